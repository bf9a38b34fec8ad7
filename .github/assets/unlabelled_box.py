"""A box without a label: a classifier's loss moves the box that it reads onto the digit.

    python .github/assets/unlabelled_box.py unlabelled_box.png

A scene has a digit of scikit-learn's among fragments of others, as in the cluttered digits of Spatial Transformer
Networks (Jaderberg et al., 2015). A network predicts a box, affine_crop crops it, and a classifier reads the crop. The
digit's class is the only label, so the box learns from the gradient through the crop alone. The control is the same
training with the boxes detached. No digit or fragment of the test scenes comes from a digit of the training scenes.
"""

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import Tensor, nn

from detector import affine_crop
from detector.refinement.boxes import paired_iou

SIDE, DIGIT, FRAGMENT, FRAGMENTS = 64, (18, 30), 9, 6  # pixels of a scene, a digit's longer side, and a fragment
TRAIN_DIGITS, TRAIN, TEST = 1400, 8000, 1000  # source digits, the rest is for tests; scenes
FIRST_BOX, BOX, CROP = 44.0, 34.0, 24  # pixels of a box's side at the start of training and after half, and of a crop's
JITTER = 3.0  # standard deviation in pixels of a shift of boxes in training: it pays to have the digit in the middle
SHARPNESS = 4.0  # factor of the map before its softmax: without it, nothing moves for hundreds of steps
SEEDS, BATCH, RATE = (3, 4, 5), 64, 1e-3
SHOWN = (0, 200, 400, 800, 1600, 2400)  # steps of the picture; the last one ends the training
SCENES, SCALE, GAP, HEAD = 4, 2, 8, 24  # of the picture: number; enlargement; pixels
BEFORE, BETWEEN, AFTER, TRUTH = "#D55E00", "#E69F00", "#009E73", "#56B4E9"
Data = tuple[Tensor, Tensor, Tensor]  # scenes [N, 1, SIDE, SIDE], boxes of the digits [N, 4], classes [N]


def draw(digit: np.ndarray, rng: Generator) -> np.ndarray:
    """Enlarge the ink of a digit [8, 8], 0 to 16, to a random size. Values are 0 to 1."""
    rows, columns = np.nonzero(digit > 4)
    ink = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float32) / 16
    factor = rng.integers(*DIGIT, endpoint=True) / max(ink.shape)
    size = (round(factor * ink.shape[1]), round(factor * ink.shape[0]))
    return np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)


def paste(scene: np.ndarray, ink: np.ndarray, rng: Generator) -> list[int]:
    """Draw ink anywhere in a scene. Returns its box."""
    (height, width), (y, x) = ink.shape, rng.integers(SIDE - np.array(ink.shape), endpoint=True).tolist()
    part = scene[y : y + height, x : x + width]
    np.maximum(part, ink, out=part)
    return [x, y, x + width, y + height]


def scenes(digits: np.ndarray, classes: np.ndarray, count: int, rng: Generator) -> Data:
    images, boxes = np.zeros((count, SIDE, SIDE), np.float32), []
    chosen = rng.integers(len(digits), size=(count, 1 + FRAGMENTS))
    for image, (pick, *others) in zip(images, chosen):
        for other in others:
            ink = draw(digits[other], rng)
            y, x = (rng.integers(max(length - FRAGMENT, 0), endpoint=True) for length in ink.shape)
            paste(image, ink[y : y + FRAGMENT, x : x + FRAGMENT], rng)
        boxes.append(paste(image, draw(digits[pick], rng), rng))
    return torch.from_numpy(images)[:, None], torch.tensor(boxes).float(), torch.from_numpy(classes[chosen[:, 0]])


class Reader(nn.Module):
    """Finds a box and reads it."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU()]
        last = nn.Conv2d(32, 1, 5, 1, 2)
        for parameter in last.parameters():  # boxes start in the middle; from elsewhere some run into a corner
            nn.init.zeros_(parameter)
        self.find = nn.Sequential(*first, last)
        layers = [nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        self.read = nn.Sequential(*layers, nn.Linear(64 * (CROP // 4) ** 2, 10))

    def boxes(self, images: Tensor, side: float = BOX) -> Tensor:
        """Square boxes [N, 4] around the mean position under a softmax over the map of the convolutions."""
        weights = (SHARPNESS * self.find(images)[:, 0]).flatten(1).softmax(1).unflatten(1, (SIDE // 4, SIDE // 4))
        position = 4.0 * torch.arange(SIDE // 4) + 2
        center = torch.stack([weights.sum(1) @ position, weights.sum(2) @ position], dim=1)
        return torch.cat([center - side / 2, center + side / 2], dim=1)

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        """The logits [N, 10] of the classes at one box per image."""
        return self.read(affine_crop(images, list(boxes.split(1)), CROP, sampling_ratio=1, aligned=True))


@torch.no_grad()
def evaluate(reader: Reader, data: Data) -> list[float]:
    """The mean error of the box's centre in pixels, and the shares of digits inside the box and of right classes."""
    images, truth, classes = data
    boxes = reader.boxes(images)
    error = (boxes - truth).unflatten(1, (2, 2)).mean(1).norm(dim=1)
    inside = ((boxes - truth) * torch.tensor([1, 1, -1, -1]) <= 0).all(1)
    right = reader(images, boxes).argmax(1) == classes
    return [values.float().mean().item() for values in (error, inside, right)]


def train(data: Data, test: Data, seed: int, box_gradient: bool) -> tuple[list[list[float]], list[Tensor]]:
    """Train a reader. Returns its scores on test scenes before and after, and its boxes there at the steps shown."""
    torch.manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=RATE)
    scores, shown = [], []
    for step in range(SHOWN[-1] + 1):
        side = FIRST_BOX + (BOX - FIRST_BOX) * min(2 * step / SHOWN[-1], 1)
        if step in SHOWN:
            shown.append(reader.boxes(test[0], side).detach())
        if step in (0, SHOWN[-1]):
            scores.append(evaluate(reader, test))
        picked = torch.randint(TRAIN, (BATCH,))
        boxes = reader.boxes(data[0][picked], side) + JITTER * torch.randn(BATCH, 2).repeat(1, 2)
        logits = reader(data[0][picked], boxes if box_gradient else boxes.detach())
        optimizer.zero_grad()
        F.cross_entropy(logits, data[2][picked]).backward()
        optimizer.step()
    return scores, shown


def panel(image: Tensor, box: Tensor, truth: Tensor, color: str) -> Image.Image:
    """A scene, enlarged, with the predicted box and, thin, the digit's."""
    picture = Image.fromarray((255 * image[0]).byte().numpy()).convert("RGB")
    picture = picture.resize((SCALE * SIDE, SCALE * SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((SCALE * truth).tolist(), outline=TRUTH, width=1)
    pen.rectangle((SCALE * box).tolist(), outline=color, width=3)
    return picture


def draw_picture(test: Data, learned: list[Tensor], control: list[Tensor]) -> Image.Image:
    """A row for each of the first scenes whose digit is not in the box, one for the control; a column for each step."""
    chosen = (paired_iou(learned[0], test[1]) < 0.1).nonzero()[:SCENES, 0].tolist()
    cell, font = SCALE * SIDE + GAP, ImageFont.load_default(15)
    canvas = Image.new("RGB", (GAP + len(SHOWN) * cell, (SCENES + 1) * cell + 3 * HEAD), "white")
    pen = ImageDraw.Draw(canvas)
    colors = [BEFORE] + [BETWEEN] * (len(SHOWN) - 2) + [AFTER]
    for row, number in enumerate((*chosen, chosen[0])):
        last = row == SCENES
        for column, boxes in enumerate(control if last else learned):
            picture = panel(test[0][number], boxes[number], test[1][number], colors[column])
            canvas.paste(picture, (GAP + column * cell, (1 + last) * HEAD + row * cell))
    for column, step in enumerate(SHOWN):
        pen.text((GAP + (column + 0.5) * cell - GAP / 2, HEAD - 4), f"step {step}", "black", font, anchor="mb")
    lower = HEAD + SCENES * cell
    pen.text((GAP, lower + HEAD - 6), "control: no gradient to the box", "black", font, anchor="lb")
    x = GAP
    for color, text in ((TRUTH, "the digit"), (BEFORE, "before"), (BETWEEN, "on the way"), (AFTER, "after training")):
        pen.rectangle((x, canvas.height - 19, x + 22, canvas.height - 7), outline=color, width=1 + 2 * (color != TRUTH))
        pen.text((x + 28, canvas.height - 8), text, "black", font, anchor="ls")
        x += 60 + int(pen.textlength(text, font))
    return canvas


def main() -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    parts = [(digits.images[part], digits.target[part]) for part in np.split(order, [TRAIN_DIGITS])]
    print("| box | seed | error of the centre | digits inside | right classes |\n|---|---|---|---|---|")
    for seed in SEEDS:
        start = time.perf_counter()
        rng = np.random.default_rng(seed)
        data, test = scenes(*parts[0], TRAIN, rng), scenes(*parts[1], TEST, rng)
        learned, control = train(data, test, seed, True), train(data, test, seed, False)
        rows = zip(("before training", "gradient of the crop", "control: no gradient"), (*learned[0], control[0][1]))
        for name, (error, inside, right) in rows:
            print(f"| {name} | {seed} | {error:.2f} pixels | {inside:.3f} | {right:.3f} |", flush=True)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if seed == SEEDS[0]:
            draw_picture(test, learned[1], control[1]).quantize(128).save(sys.argv[1], optimize=True)


if __name__ == "__main__":
    main()
