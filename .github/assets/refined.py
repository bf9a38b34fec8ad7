"""Draw the README's picture: boxes moved by refinement iterations, and by gradient ascent.

    python .github/assets/refined.py runs/quickstart data/digits refined.png

The objects are the first of the val split, image by image, that the detector found with an IoU of 0.6 to 0.8.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms import v2

from detector.data.dataset import CocoDetection
from detector.pretrained import load_detector
from detector.rcnn.forward import detect_boxes, propose
from detector.refinement.inference import refine_detections

OBJECTS, SIDE, GAP, HEAD = 5, 190, 12, 24  # pictures in a row; pixels
BEFORE, BETWEEN, AFTER = "#D55E00", "#E69F00", "#009E73"
ROWS = (("refinement iterations", "iterations", (0, 1, 2)), ("gradient ascent, 8 steps", "ascent_steps", range(9)))

detector = load_detector(sys.argv[1]).eval()
model: Any = detector.model
refinement: Any = detector.refinement
folder = Path(sys.argv[2])
data = CocoDetection(folder / "val", folder / "annotations" / "instances_val.json")
plain = replace(refinement.config, iterations=0, ascent_steps=0, iou_power=0.0)


@torch.no_grad()
def paths(image: Tensor) -> tuple[list[Tensor], Tensor]:
    """For each row boxes [steps, L, 4] in pixels of the image, and the scores [L]."""
    proposed = propose(model, [image])
    sizes = proposed.image_sizes
    found = detect_boxes(model.roi_heads, proposed.features, proposed.boxes, sizes)
    factor = image.shape[-1] / sizes[0][1]
    rows = []
    for _, setting, counts in ROWS:
        boxes = []
        for count in counts:
            refinement.config = replace(plain, **{setting: count})
            (moved,), _, _ = refine_detections(refinement, proposed.features, found, sizes)
            boxes.append(moved * factor)
        rows.append(torch.stack(boxes))
    return rows, found[1][0]


def panel(image: Tensor, boxes: Tensor, truth: Tensor, view: tuple[int, ...]) -> Image.Image:
    """A part of an image, enlarged, with the boxes [steps, 4] on their way, and an arrow from each corner."""
    scale = SIDE / (view[2] - view[0])
    picture = v2.functional.to_pil_image(image).crop(view)
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    origin = torch.tensor([view[0], view[1]] * 2)
    placed = ((boxes - origin) * scale).tolist()
    for box in placed[1:-1]:
        pen.rectangle(box, outline=BETWEEN, width=1)
    pen.rectangle(placed[0], outline=BEFORE, width=2)
    pen.rectangle(placed[-1], outline=AFTER, width=3)
    for x, y in ((0, 1), (2, 1), (0, 3), (2, 3)):
        arrow(pen, [(box[x], box[y]) for box in placed])
    iou = box_iou(boxes, truth[None])[:, 0].tolist()
    pen.rectangle((0, SIDE - 20, SIDE, SIDE), fill="white")
    pen.text((4, SIDE - 2), f"IoU {iou[0]:.2f} to {iou[-1]:.2f}", "black", ImageFont.load_default(14), anchor="lb")
    return picture


def arrow(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]]) -> None:
    """A line through points, with a head at the end if it is long enough for one."""
    pen.line(points, fill="#0072B2", width=2)
    tip = torch.tensor(points[-1])
    way = tip - torch.tensor(points[0])
    if way.norm() > 9:
        way = 7 * way / way.norm()
        side = torch.stack([-way[1], way[0]]) / 2
        pen.polygon([tuple(point.tolist()) for point in (tip, tip - way + side, tip - way - side)], fill="#0072B2")


def chosen(index: int) -> list[list[Image.Image]]:
    """The pictures of an image's objects."""
    image, target = data[index]
    rows, scores = paths(image)
    iou = box_iou(target["boxes"], rows[0][0][scores >= 0.5])
    found = []
    for truth, best in zip(target["boxes"], iou):
        if not len(best) or not 0.6 <= best.max() <= 0.8:
            continue
        shown = [row[:, best.argmax()] for row in rows]
        side = 1.5 * float((truth[2:] - truth[:2]).max())
        left, upper = ((truth[:2] + truth[2:] - side) / 2).round().tolist()
        view = (int(left), int(upper), int(left) + round(side), int(upper) + round(side))
        found.append([panel(image, boxes, truth, view) for boxes in shown])
    return found


columns: list[list[Image.Image]] = []
for index in range(len(data)):
    columns += chosen(index)
    if len(columns) >= OBJECTS:
        break
canvas = Image.new("RGB", (OBJECTS * (SIDE + GAP) + GAP, len(ROWS) * (SIDE + HEAD + GAP) + HEAD), "white")
pen = ImageDraw.Draw(canvas)
font = ImageFont.load_default(15)
for number, (title, _, _) in enumerate(ROWS):
    top = number * (SIDE + HEAD + GAP)
    pen.text((GAP, top + HEAD - 3), title, "black", font, anchor="lb")
    for column, pictures in enumerate(columns[:OBJECTS]):
        canvas.paste(pictures[number], (GAP + column * (SIDE + GAP), top + HEAD))
left = GAP
for color, text in ((BEFORE, "the detector's box"), (BETWEEN, "on the way"), (AFTER, "refined")):
    pen.rectangle((left, canvas.height - 19, left + 22, canvas.height - 7), outline=color, width=3)
    pen.text((left + 28, canvas.height - 4), text, "black", font, anchor="lb")
    left += 60 + int(pen.textlength(text, font))
canvas.save(sys.argv[3])
