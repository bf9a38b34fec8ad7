"""Pictures of what a detector sees: boxes with names, masks, skeletons, and sheets of pictures side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import v2

from detector.data.keypoints import KeypointLayout
from detector.data.part_drawing import Mask, contrast, draw_keypoints, draw_mask
from detector.text import short

# Okabe and Ito's colours, which colour-blind readers can tell apart; one a class, in turn.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
LEGIBLE_SIDE = 440  # pixels; a picture whose longer side is smaller is enlarged, so that captions fit beside boxes
FONT_SIZE = 12
GAP = 8  # pixels between the pictures of a sheet
DASH = 9  # pixels

Stroke = Literal["thin", "thick", "dashed", "dotted"]


@dataclass(frozen=True)
class Box:
    """A box to be drawn, and what is known of the object in it.

    Args:
        corners: x1, y1, x2, y2, in pixels of the picture.
        caption: on a plate above it.
        color: of frame and plate.
        stroke: "thick" has black edges, and is seen on any ground; "dashed" is as thick, in turns with black; "dotted"
            is fine, in turns with black, and has no caption.
        mask: of the image, in any size: it is stretched over the picture.
        points: x, y, in pixels of the picture, and visibility of each keypoint.
    """

    corners: tuple[float, float, float, float]
    caption: str
    color: str
    stroke: Stroke = "thin"
    mask: Mask | None = None
    points: Sequence[Sequence[float]] | None = None


def draw(
    image: Tensor,
    target: Mapping[str, Any],
    names: Sequence[str],
    *,
    min_score: float = 0.5,
    layout: KeypointLayout | None = None,
) -> Image.Image:
    """Draw boxes with class names, and scores, masks and keypoints if there are any.

    Args:
        image: [3, H, W], float in 0..1 or uint8.
        target: ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels, ``labels`` [L] from 1 on, and perhaps ``scores`` [L],
            ``masks`` [L, H, W] uint8 or ``segmentations``, a list of L RLE (both of the image, in any size), and
            ``keypoints`` [L, K, 3]: x, y in pixels, and visibility, 0 for points that are not there.
        names: the class names, that of label 1 first.
        min_score: detections below it are left out.
        layout: of the keypoints; without it there are no lines between them.

    Returns:
        The picture, enlarged if it is small.
    """
    picture = v2.functional.to_pil_image(v2.functional.to_dtype(image.cpu(), torch.uint8, scale=True))
    factor = max(round(LEGIBLE_SIDE / max(picture.size)), 1)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)
    nothing = [None] * len(target["labels"])
    scores = target["scores"].tolist() if "scores" in target else nothing
    masks = target.get("segmentations", target.get("masks", nothing))
    points = target["keypoints"].tolist() if "keypoints" in target else nothing
    boxes = []
    for corners, label, score, mask, of_object in zip(
        target["boxes"].tolist(), target["labels"].tolist(), scores, masks, points, strict=True
    ):
        if score is not None and score < min_score:
            continue
        x1, y1, x2, y2 = (coordinate * factor for coordinate in corners)
        name = short(names[label - 1], 40)
        caption = name if score is None else f"{name} {score:.2f}"
        enlarged = of_object and [(x * factor, y * factor, visible) for x, y, visible in of_object]
        boxes.append(Box((x1, y1, x2, y2), caption, class_color(label), mask=mask, points=enlarged))
    draw_boxes(picture, boxes, layout=layout)
    return picture


def class_color(label: int) -> str:
    """Return the colour of a class, by its label, from 1 on."""
    return COLORS[(label - 1) % len(COLORS)]


def draw_boxes(
    picture: Image.Image,
    boxes: Iterable[Box],
    *,
    font_size: int = FONT_SIZE,
    layout: KeypointLayout | None = None,
) -> None:
    """Draw boxes with captions on an RGB picture, in place; the last ones lie on top, masks and skeletons beneath.

    torchvision's ``draw_bounding_boxes`` writes in a size of choice only with the file of a font, writes into the box,
    over the object, and beyond the picture's edge, and draws neither edges around a frame nor dashes.
    """
    boxes = list(boxes)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box.corners for box in boxes)]
    for _, box in sorted(zip(areas, boxes), key=lambda one: -one[0]):  # a large mask would hide the small ones
        if box.mask is not None:
            draw_mask(picture, box.mask, box.color)
    for box in boxes:
        if box.points is not None:
            draw_keypoints(picture, box.points, layout, box.color)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(font_size)
    for box in boxes:
        x1, y1, x2, y2 = box.corners
        x2, y2 = max(x1, x2), max(y1, y2)
        if box.stroke == "thin":
            pen.rectangle((x1, y1, x2, y2), outline=box.color, width=2)
        elif box.stroke == "dotted":
            pen.rectangle((x1, y1, x2, y2), outline="black", width=2)
            _dashes(pen, (x1, y1, x2, y2), box.color, length=DASH // 2, width=2)
            continue
        else:
            pen.rectangle((x1 - 3, y1 - 3, x2 + 3, y2 + 3), outline="black", width=6)
            if box.stroke == "thick":
                pen.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=box.color, width=4)
            else:
                _dashes(pen, (x1 - 2, y1 - 2, x2 + 2, y2 + 2), box.color, length=DASH, width=4)
        # Above the box, where it hides none of the object; inside at the upper edge of the picture.
        frame = 0 if box.stroke == "thin" else 3  # of it that lies outside
        lower = y1 - frame if y1 - frame >= font_size + 3 else y1 + frame + font_size + 3
        left = max(min(x1 + 2, picture.width - pen.textlength(box.caption, font) - 2), 2)
        plate = pen.textbbox((left, lower), box.caption, font, anchor="lb")
        pen.rectangle((plate[0] - 2, plate[1] - 1, plate[2] + 2, plate[3] + 1), fill=box.color)
        pen.text((plate[0], plate[3]), box.caption, contrast(box.color), font, anchor="lb")


def _dashes(
    pen: ImageDraw.ImageDraw, frame: tuple[float, float, float, float], color: str, *, length: int, width: int
) -> None:
    """Draw pieces of a frame, in pixels."""
    x1, y1, x2, y2 = (round(side) for side in frame)
    for x in range(x1, x2, 2 * length):
        for y in (y1, y2 - width + 1):
            pen.rectangle((x, y, min(x + length - 1, x2), y + width - 1), fill=color)
    for y in range(y1, y2, 2 * length):
        for x in (x1, x2 - width + 1):
            pen.rectangle((x, y, x + width - 1, min(y + length - 1, y2)), fill=color)


def sheet(rows: Sequence[Sequence[Image.Image]], headings: Sequence[str] = ()) -> Image.Image:
    """Put pictures of any sizes on one white sheet, row by row, with a heading over each column."""
    columns = [max(picture.width for picture in column) for column in zip(*rows)]
    heights = [max(picture.height for picture in row) for row in rows]
    top = GAP + (FONT_SIZE + GAP if headings else 0)
    canvas = Image.new("RGB", (sum(columns) + GAP * (len(columns) + 1), top + sum(heights) + GAP * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    lefts = [GAP + sum(columns[:i]) + GAP * i for i in range(len(columns))]
    for left, heading in zip(lefts, headings):
        pen.text((left, GAP - 2), heading, "black", ImageFont.load_default(FONT_SIZE + 2))
    for row, height in zip(rows, heights):
        for left, picture in zip(lefts, row):
            canvas.paste(picture, (left, top))
        top += height + GAP
    return canvas
