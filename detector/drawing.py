"""Pictures of what a detector sees: boxes with names, and sheets that put pictures side by side."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import v2

from detector.names import short

# Okabe and Ito's colours, which colour-blind readers can tell apart; one a class, in turn.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
LEGIBLE_SIDE = 440  # pixels; a picture whose longer side is smaller is enlarged, so that captions fit beside boxes
FONT_SIZE = 12
GAP = 8  # pixels between the pictures of a sheet


def draw(image: Tensor, target: dict[str, Tensor], names: Sequence[str], *, min_score: float = 0.5) -> Image.Image:
    """Draw boxes with class names, and scores if there are any.

    Args:
        image: [3, H, W], float in 0..1 or uint8.
        target: ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels, ``labels`` [L] from 1 on, and perhaps ``scores`` [L].
        names: the class names, that of label 1 first.
        min_score: detections below it are left out.

    Returns:
        The picture, enlarged if it is small.
    """
    picture = v2.functional.to_pil_image(v2.functional.to_dtype(image.cpu(), torch.uint8, scale=True))
    factor = max(round(LEGIBLE_SIDE / max(picture.size)), 1)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT_SIZE)
    scores = target["scores"].tolist() if "scores" in target else [None] * len(target["labels"])
    for box, label, score in zip(target["boxes"].tolist(), target["labels"].tolist(), scores):
        if score is not None and score < min_score:
            continue
        x1, y1, x2, y2 = (coordinate * factor for coordinate in box)
        color = COLORS[(label - 1) % len(COLORS)]
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=2)
        name = short(names[label - 1], 40)
        caption = name if score is None else f"{name} {score:.2f}"
        # Above the box, where it hides none of the object; inside at the upper edge of the picture.
        lower = y1 if y1 >= FONT_SIZE + 3 else y1 + FONT_SIZE + 3
        left = max(min(x1 + 2, picture.width - pen.textlength(caption, font) - 2), 2)
        plate = pen.textbbox((left, lower), caption, font, anchor="lb")
        pen.rectangle((plate[0] - 2, plate[1] - 1, plate[2] + 2, plate[3] + 1), fill=color)
        pen.text(
            (plate[0], plate[3]),
            caption,
            "black" if color in ("#F0E442", "#E69F00", "#56B4E9") else "white",
            font,
            anchor="lb",
        )
    return picture


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
