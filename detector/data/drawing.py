"""Pictures with boxes, captions, masks and skeletons that stay visible on any background.

torchvision's drawing functions have no contrasting edges, no dashes and no mask contours, and write captions into the
box.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torchvision.transforms import v2

from detector.data.keypoints import KeypointLayout
from detector.data.masks import decode_masks
from detector.text import short

# Okabe and Ito's colours, which colour-blind readers can distinguish. Classes use them in turn.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
LIGHT = ("#F0E442", "#E69F00", "#56B4E9", "#FFE600", "#FFFFFF")  # black contrasts with them
LEFT, RIGHT, MIDDLE = "#56B4E9", "#E69F00", "#FFFFFF"  # of keypoints
LEGIBLE_SIDE = 440  # pixels; smaller pictures are enlarged, so that captions fit
FONT_SIZE = 12
GAP = 8  # pixels between the pictures of a sheet
MASK_OPACITY = 0.45
WHOLE = 2**20  # pixels, longer than any side
# Margin, width and dash of each stroke, in pixels.
FRAMES = {"thin": (0, 2, WHOLE), "dotted": (0, 2, 4), "thick": (2, 4, WHOLE), "dashed": (2, 4, 9)}
CONTOUR = 2  # pixels

Stroke = Literal["thin", "thick", "dashed", "dotted"]
Mask = Tensor | Mapping[str, Any]  # [H, W], above 0 on the object; or an RLE


@dataclass(frozen=True)
class Box:
    """A box to draw. Coordinates are pixels of the picture.

    Args:
        corners: x1, y1, x2, y2.
        caption: text on a plate above the box.
        color: colour of the frame and the plate.
        stroke: "thick" has black edges; "dashed" alternates with black; "dotted" is thin, alternates with black, and
            has no caption.
        mask: mask of the object in any size, stretched over the picture.
        points: x, y and visibility of each keypoint.
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
    max_side: int | None = None,
    caption: str = "",
) -> Image.Image:
    """Draw an image with boxes and class names, and with scores, masks and keypoints if there are any.

    Args:
        image: [3, H, W], float in 0..1 or uint8.
        target: ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels, ``labels`` [L] from 1 on; optionally ``scores`` [L],
            ``masks`` [L, H, W] uint8 or ``segmentations``, a list of L RLE (both stretched over the image), and
            ``keypoints`` [L, K, 3]: x, y in pixels, and visibility, 0 for missing points.
        names: class names, starting with that of label 1.
        min_score: minimum score of the drawn detections.
        layout: the keypoints; without it no lines join them.
        max_side: maximum length of the picture's longer side in pixels.
        caption: text in the lower left corner.

    Returns:
        The picture, enlarged if it is small.
    """
    picture = v2.functional.to_pil_image(v2.functional.to_dtype(image.cpu(), torch.uint8, scale=True))
    factor: float = max(round(LEGIBLE_SIDE / max(picture.size)), 1)
    if max_side is not None:
        factor = min(factor, max_side / max(picture.size))
    width, height = (max(round(side * factor), 1) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    missing = [None] * len(target["labels"])
    scores = target["scores"].tolist() if "scores" in target else missing
    keypoints = target["keypoints"].tolist() if "keypoints" in target else missing
    columns = [target["boxes"].tolist(), target["labels"].tolist(), scores, keypoints]
    boxes = []
    for corners, label, score, points, mask in zip(
        *columns, target.get("segmentations", target.get("masks", missing)), strict=True
    ):
        if score is None or score >= min_score:
            x1, y1, x2, y2 = (coordinate * factor for coordinate in corners)
            text = short(names[label - 1], 40) + ("" if score is None else f" {score:.2f}")
            scaled = points and [(x * factor, y * factor, visible) for x, y, visible in points]
            boxes.append(Box((x1, y1, x2, y2), text, class_color(label), mask=mask, points=scaled))
    draw_boxes(picture, boxes, layout=layout)
    if caption:
        pen, place = ImageDraw.Draw(picture), (4, picture.height - 4)
        pen.rectangle(pen.textbbox(place, caption, anchor="lb"), fill="white")
        pen.text(place, caption, "black", anchor="lb")
    return picture


def class_color(label: int) -> str:
    """Return the colour of a class by its label, from 1 on."""
    return COLORS[(label - 1) % len(COLORS)]


def draw_boxes(
    picture: Image.Image,
    boxes: Iterable[Box],
    *,
    font_size: int = FONT_SIZE,
    layout: KeypointLayout | None = None,
) -> None:
    """Draw boxes on an RGB picture, in place: masks lowest, then skeletons, then boxes, the last ones on top."""
    boxes = list(boxes)
    # Large masks first, because they would hide small ones.
    for box in sorted(boxes, key=lambda box: (box.corners[0] - box.corners[2]) * (box.corners[3] - box.corners[1])):
        if box.mask is not None:
            draw_mask(picture, box.mask, box.color)
    for box in boxes:
        if box.points is not None:
            draw_keypoints(picture, box.points, layout, box.color)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(font_size)
    for box in boxes:
        outside = _draw_frame(pen, box)
        if box.stroke == "dotted":
            continue
        # Above the box, or inside it at the upper edge of the picture.
        x1, y1, *_ = box.corners
        lower = y1 - outside if y1 - outside >= font_size + 3 else y1 + outside + font_size + 3
        left = max(min(x1 + 2, picture.width - pen.textlength(box.caption, font) - 2), 2)
        plate = pen.textbbox((left, lower), box.caption, font, anchor="lb")
        pen.rectangle((plate[0] - 2, plate[1] - 1, plate[2] + 2, plate[3] + 1), fill=box.color)
        pen.text((plate[0], plate[3]), box.caption, _contrast(box.color), font, anchor="lb")


def _draw_frame(pen: ImageDraw.ImageDraw, box: Box) -> int:
    """Draw the frame, and return by how many pixels it reaches outside the box."""
    outside, width, dash = FRAMES[box.stroke]
    x1, y1 = (round(side) - outside for side in box.corners[:2])
    x2, y2 = (max(round(side) + outside, start) for side, start in zip(box.corners[2:], (x1, y1)))
    edge = outside // 2
    if box.stroke != "thin":
        pen.rectangle((x1 - edge, y1 - edge, x2 + edge, y2 + edge), outline="black", width=width + 2 * edge)
    for x in range(x1, x2 + 1, 2 * dash):
        for y in (y1, y2 - width + 1):
            pen.rectangle((x, y, min(x + dash - 1, x2), y + width - 1), fill=box.color)
    for y in range(y1, y2 + 1, 2 * dash):
        for x in (x1, x2 - width + 1):
            pen.rectangle((x, y, x + width - 1, min(y + dash - 1, y2)), fill=box.color)
    return outside + edge


def _contrast(color: str) -> str:
    return "black" if color in LIGHT else "white"


def draw_mask(picture: Image.Image, mask: Mask, color: str) -> None:
    """Tint the object of a mask, stretched over an RGB picture, in place; its contour has the colour and a halo."""
    pixels = mask.cpu() if isinstance(mask, Tensor) else decode_masks([mask], *mask["size"])[0]
    shape = Image.fromarray((pixels.numpy() > 0).astype(np.uint8) * 255)
    shape = shape.resize(picture.size, Image.Resampling.BILINEAR).point([0] * 128 + [255] * 128)
    box = shape.getbbox()
    if box is None:
        return
    margin = CONTOUR + 1
    left, top = max(box[0] - margin, 0), max(box[1] - margin, 0)
    shape = shape.crop((left, top, min(box[2] + margin, picture.width), min(box[3] + margin, picture.height)))
    # The filters replicate the border, so an object has no contour along the picture's edge.
    contour = ImageChops.subtract(shape, shape.filter(ImageFilter.MinFilter(2 * CONTOUR + 1)))
    halo = ImageChops.subtract(shape.filter(ImageFilter.MaxFilter(3)), shape)
    picture.paste(color, (left, top), shape.point([0] * 128 + [round(255 * MASK_OPACITY)] * 128))
    picture.paste(color, (left, top), contour)
    picture.paste(_contrast(color), (left, top), halo)


def draw_keypoints(
    picture: Image.Image, points: Iterable[Sequence[float]], layout: KeypointLayout | None, color: str
) -> None:
    """Draw keypoints (x, y, visibility) and their skeleton on an RGB picture, in place.

    Points of visibility 0 and points outside the picture are left out, and so are their lines. Colours distinguish left
    from right if the names do. Lines are drawn only if ``layout`` has the same number of keypoints.
    """
    width, height = picture.size
    places = [(x, y) if seen > 0 and 0 <= x <= width and 0 <= y <= height else None for x, y, seen in points]
    if not any(places):
        return
    extent = np.ptp([place for place in places if place is not None], axis=0).max()
    size = round(min(max(extent / 40, 1), 4))  # small dots on a small object
    colors = [color] * len(places)
    skeleton: Iterable[tuple[int, int]] = ()
    if layout is not None and len(layout) == len(places):
        skeleton = layout.skeleton
        mirrored, names = layout.mirrored(), [name.lower() for name in layout.names]
        if mirrored != list(range(len(places))):  # "left" comes before "right" in the alphabet, and "l" before "r"
            sides = (MIDDLE if j == i else LEFT if names[i] < names[j] else RIGHT for i, j in enumerate(mirrored))
            colors = list(sides)
    pen = ImageDraw.Draw(picture)
    for ink, thickness in ((_contrast(color), size + 2), (color, size)):
        for start, end in skeleton:
            if (one := places[start]) is not None and (other := places[end]) is not None:
                pen.line((*one, *other), ink, thickness)
    for place, fill in zip(places, colors, strict=True):
        if place is not None:
            pen.circle(place, size + 1, fill, _contrast(fill))


def sheet(rows: Sequence[Sequence[Image.Image]], headings: Sequence[str] = ()) -> Image.Image:
    """Arrange pictures of any sizes on a white sheet, with a heading over each column."""
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
