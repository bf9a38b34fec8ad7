"""A tracker's step: boxes move uphill on the IoU that a network predicts from two frames.

    python .github/assets/tracker_step.py

The network is that of ATOM in small (Danelljan et al., "ATOM: Accurate Tracking by Overlap Maximization", CVPR 2019,
section 3.1). The reference branch pools the first frame at the object's box into a vector of one factor per channel.
The test branch pools the second frame, times these factors, at candidate boxes, and predicts their IoU. Training is by
the squared error on jittered boxes. A step moves a box by the gradient of its predicted IoU, in units of its sides.

The backbone has ImageNet weights and does not change. The sequences are made: one of scikit-learn's digits moves,
turns, grows and stretches over blotches, among other digits that do so too. No test sequence has a digit of training.

In pytracking one import changes, that of ltr/models/bbreg/atom_iou_net.py, from
``from ltr.external.PreciseRoIPooling.pytorch.prroi_pool import PrRoIPool2D`` to ``from detector import PrRoIPool2D``.
"""

import time
import timeit
from statistics import fmean, median

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.ops import roi_align

from detector import PrRoIPool2D
from detector.models.timm_pyramid import packaged_weights
from detector.refinement.boxes import move, paired_iou

BACKBONE = "tf_efficientnet_lite0"
SIDE, HEIGHT, OTHERS = 128, (36, 60), 3  # pixels of a frame, and of a digit; other digits in a frame
TRAIN_DIGITS, TRAIN, TEST = 1400, 3000, 300  # source digits, the rest is for tests; sequences
SEEDS, STEPS, BATCH, RATE = (0, 1, 2), 600, 16, 1e-3
MAPS, STRIDE, CHANNELS, BOXES = 64, 8, 128, 16  # of the backbone; of the test branch; per object
JITTER = 0.25  # maximum standard deviation of a box's offsets, in units of its sides
ASCENT_STEPS, STEP_LENGTH, LONGEST = 10, 0.03, 0.05  # the length is a factor of the gradient, in units of the sides
Data = tuple[Tensor, Tensor]  # the backbone's maps [N, 2, MAPS, H, W] of two frames, and the object's boxes [N, 2, 4]


def draw(digit: np.ndarray, height: float, aspect: float, angle: float) -> Image.Image:
    """The tight mask of a digit [8, 8], 0 to 16."""
    ink = Image.fromarray(np.pad(digit * (255 / 16), 1).astype(np.uint8)).resize((80, 80), Image.Resampling.BICUBIC)
    strokes = (np.asarray(ink.rotate(angle, Image.Resampling.BICUBIC), dtype=int) - 70).clip(0, 127) * 2  # crisp edges
    rows, columns = np.nonzero(strokes > 127)
    tight = strokes[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    width = round(height * aspect * tight.shape[1] / tight.shape[0])
    return Image.fromarray(tight.astype(np.uint8)).resize((max(width, 6), round(height)), Image.Resampling.BILINEAR)


def sequence(digits: np.ndarray, rng: Generator) -> tuple[np.ndarray, list[list[int]]]:
    """Two frames [2, SIDE, SIDE, 3] and the box of the object in each. The object is drawn last."""
    blotches = Image.fromarray(rng.integers(70, 186, (14, 14, 3), dtype=np.uint8))
    canvas = blotches.resize((SIDE + 32, SIDE + 32), Image.Resampling.BICUBIC)
    frames = [canvas.crop((x, y, x + SIDE, y + SIDE)) for x, y in rng.integers(0, 32, (2, 2)).tolist()]
    for digit in digits[rng.choice(len(digits), OTHERS + 1, replace=False)]:
        color = tuple((rng.integers(0, 2, 3) * 190 + rng.integers(0, 66, 3)).tolist())  # each channel dark or bright
        height, aspect, angle = rng.uniform(*HEIGHT), np.exp(rng.uniform(-0.3, 0.3)), rng.uniform(-15, 15)
        place, boxes = rng.uniform(0, 1, 2), []
        for frame in frames:
            grown, stretched = height * np.exp(rng.uniform(-0.15, 0.15)), aspect * np.exp(rng.uniform(-0.1, 0.1))
            mask = draw(digit, grown, stretched, angle + rng.uniform(-8, 8))
            room = np.array([SIDE - mask.width, SIDE - mask.height])
            x, y = (room * (place + rng.uniform(-0.2, 0.2, 2)).clip(0, 1)).astype(int).tolist()
            frame.paste(color, (x, y), mask)
            boxes.append([x, y, x + mask.width, y + mask.height])
    return np.stack([np.asarray(frame) for frame in frames]), boxes


@torch.no_grad()
def sequences(digits: np.ndarray, count: int, rng: Generator) -> Data:
    backbone = timm.create_model(BACKBONE, features_only=True, out_indices=(1, 2)).eval()
    backbone.load_state_dict(packaged_weights(BACKBONE), strict=False)
    backbone.to(memory_format=torch.channels_last)
    drawn = [sequence(digits, rng) for _ in range(count)]
    frames = torch.from_numpy(np.concatenate([frames for frames, _ in drawn])).permute(0, 3, 1, 2)
    maps = []
    for part in frames.split(50):
        low, high = backbone(part / 128 - 1)
        maps.append(torch.cat([F.avg_pool2d(low, 2), high], dim=1))
    return torch.cat(maps).unflatten(0, (-1, 2)), torch.tensor([boxes for _, boxes in drawn], dtype=torch.float32)


def rois_of(boxes: Tensor, images: int) -> Tensor:
    """Boxes [K, 4], the same number for each of the images, as [K, 5] with the image's index first."""
    index = torch.arange(len(boxes)) // (len(boxes) // images)
    return torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)


class IoUNet(nn.Module):
    """Predicts the IoU of boxes in the second frame with the object of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.reference_pool = PrRoIPool2D(3, 3, 1 / STRIDE)
        self.test_pool = PrRoIPool2D(5, 5, 1 / STRIDE)
        self.norm = nn.BatchNorm2d(MAPS)
        self.factors = nn.Sequential(nn.Flatten(), nn.Linear(9 * MAPS, CHANNELS))
        self.test = nn.Sequential(nn.Conv2d(MAPS, CHANNELS, 3, 1, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(25 * CHANNELS, 256), nn.ReLU(), nn.Linear(256, 1))

    def modulate(self, first: Tensor, boxes: Tensor, second: Tensor) -> Tensor:
        """The maps of second frames [N, CHANNELS, H, W] times the factors of first frames at boxes [N, 4]."""
        factors = 1 + self.factors(self.reference_pool(self.norm(first), rois_of(boxes, len(boxes))))
        return self.test(self.norm(second)) * factors[..., None, None]

    def forward(self, maps: Tensor, boxes: Tensor) -> Tensor:
        """The predicted IoU [K] of boxes [K, 4], the same number for each map."""
        return self.head(self.test_pool(maps, rois_of(boxes, len(maps)))).squeeze(1)


def jittered(boxes: Tensor, count: int = BOXES) -> tuple[Tensor, Tensor]:
    """Candidates [K, 4], ``count`` for each box, each with its own standard deviation, and their IoU [K] with it."""
    copies = boxes.repeat_interleave(count, dim=0)
    candidates = move(copies, torch.randn_like(copies) * torch.rand(len(copies), 1) * JITTER)
    return candidates, paired_iou(candidates, copies)


def train(data: Data) -> IoUNet:
    net = IoUNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for _ in range(STEPS):
        picked = torch.randint(TRAIN, (BATCH,))
        (first, second), (boxes, truth) = (part[picked].unbind(1) for part in data)
        candidates, iou = jittered(truth)
        loss = F.mse_loss(net(net.modulate(first, boxes, second), candidates), iou)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def step_uphill(net: IoUNet, maps: Tensor, boxes: Tensor) -> Tensor:
    """Move boxes [K, 4] by one step of gradient ascent on their predicted IoU."""
    offsets = torch.zeros_like(boxes, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(maps, move(boxes, offsets)).sum(), offsets)
    return move(boxes, (STEP_LENGTH * gradient).clamp(-LONGEST, LONGEST))


def evaluate(net: IoUNet, data: Data) -> dict[str, tuple[float, float]]:
    """The mean IoU of jittered boxes and the share that improved: as they are, and after ascent."""
    (first, second), (boxes, truth) = (part.unbind(1) for part in data)
    start, before = jittered(truth, 10)
    found = {"no ascent": (before.mean().item(), 0.0)}
    for name, other in (("ascent, reference of another sequence", 1), ("ascent", 0)):
        maps, moved = net.modulate(first.roll(other, 0), boxes.roll(other, 0), second), start
        for _ in range(ASCENT_STEPS):
            moved = step_uphill(net, maps, moved)
        after = paired_iou(moved, truth.repeat_interleave(10, dim=0))
        found[name] = (after.mean().item(), (after > before).float().mean().item())
    return found


def step_time(net: IoUNet, data: Data) -> float:
    """The median time in ms of a step of ten boxes in one frame. roi_align gives them no gradient."""
    (first, second), (boxes, truth) = (part[:1].unbind(1) for part in data)
    maps, candidates = net.modulate(first, boxes, second), jittered(truth, 10)[0]
    rois = rois_of(candidates, 1).requires_grad_()
    assert torch.autograd.grad(roi_align(maps, rois, 5, 1 / STRIDE).sum(), rois, allow_unused=True) == (None,)
    return 1000 * median(timeit.repeat(lambda: step_uphill(net, maps, candidates), number=1, repeat=200))


def main() -> None:
    digits, rng = load_digits().images, np.random.default_rng(0)
    digits = digits[rng.permutation(len(digits))]
    start = time.perf_counter()
    data, test = sequences(digits[:TRAIN_DIGITS], TRAIN, rng), sequences(digits[TRAIN_DIGITS:], TEST, rng)
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        net = train(data)
        found.append(evaluate(net, test))
    print("| boxes | " + " | ".join(f"IoU, seed {seed}" for seed in SEEDS) + " | mean | boxes improved |")
    print("|---|" + "---|" * (len(SEEDS) + 2))
    for name in found[0]:
        ious, shares = zip(*(one[name] for one in found))
        print(f"| {name} | {' | '.join(f'{iou:.3f}' for iou in ious)} | {fmean(ious):.3f} | {fmean(shares):.2f} |")
    print(f"\nOne step of 10 boxes, {CHANNELS} channels: {step_time(net, test):.1f} ms, median of 200.")
    print(f"All took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
