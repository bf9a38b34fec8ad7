"""A synthetic data set: scikit-learn's handwritten digits on cluttered canvases."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from detector.data.masks import encode_masks, mask_area
from detector.errors import DataError

SPLITS = {"train": 400, "val": 80}
SIZES = ((240, 192), (192, 240), (224, 208))  # width, height of the canvases, in pixels
INK = 127  # value of 255 above which a pixel belongs to the stroke
SOURCE_SCALE = 8  # enlargement of the 8x8 digits, which keeps distorted strokes smooth
Corners = tuple[int, int, int, int]  # x1, y1, x2, y2
Range = tuple[int, int]


def write_digits(
    root: str | Path,
    *,
    seed: int = 0,
    splits: dict[str, int] = SPLITS,
    count: Range = (1, 8),
    height: Range = (20, 96),
) -> None:
    """Write a data set in COCO's layout: ``annotations/instances_SPLIT.json`` and the folder ``SPLIT`` of PNGs.

    Digits are distorted, coloured and partly overlapping. No digit is in two splits, and one image in twenty has none.
    Masks cover the visible strokes. The seed determines every byte. The folder appears only when it is complete.

    Args:
        root: the folder to create.
        seed: random seed.
        splits: number of images of each split.
        count: minimum and maximum number of digits in an image. Those without space are left out.
        height: minimum and maximum height of a digit in pixels.

    Raises:
        DataError: scikit-learn is missing, or ``root`` exists.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError('the digits need scikit-learn: pip install "affine-crop-rcnn[quickstart]"') from None
    root = Path(root)
    if root.exists():
        raise DataError(f"{root} exists; delete it to write the digits again")
    digits = load_digits()
    rng = np.random.default_rng(seed)
    shares = np.array(list(splits.values())) / sum(splits.values())
    cuts = (np.cumsum(shares)[:-1] * len(digits.images)).astype(int)
    pools = np.split(rng.permutation(len(digits.images)), cuts)
    info = {"description": "scikit-learn's handwritten digits on cluttered canvases"}
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        unfinished = Path(temporary) / root.name
        (unfinished / "annotations").mkdir(parents=True)
        for (split, number), pool in zip(splits.items(), pools):
            (unfinished / split).mkdir()
            images: list[Any] = []
            annotations: list[Any] = []
            for image_id in range(1, number + 1):
                canvas, objects = _draw_canvas(digits.images[pool], rng, count, height)
                name = f"{image_id:05}.png"
                canvas.save(unfinished / split / name)
                images.append({"id": image_id, "file_name": name, "width": canvas.width, "height": canvas.height})
                for pick, (x1, y1, x2, y2), stroke in objects:
                    ids = {"image_id": image_id, "category_id": int(digits.target[pool[pick]]) + 1}
                    box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
                    (mask,) = encode_masks(torch.from_numpy(stroke)[None])
                    shape = {"segmentation": mask, "area": int(mask_area(mask))}
                    annotations.append({"id": len(annotations) + 1, **ids, **box, **shape})
            content = {"info": info, "categories": categories, "images": images, "annotations": annotations}
            (unfinished / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        unfinished.rename(root)


def _draw_canvas(
    digits: np.ndarray, rng: Generator, count: Range, height: Range
) -> tuple[Image.Image, list[tuple[int, Corners, np.ndarray]]]:
    """Draw an image. Also returns the index of each digit, its box, and the mask of its visible strokes, [H, W]."""
    canvas = _background(*SIZES[rng.integers(len(SIZES))], rng)
    objects: list[tuple[int, Corners, np.ndarray]] = []
    for _ in range(0 if rng.random() < 0.05 else rng.integers(*count, endpoint=True)):
        pick = int(rng.integers(len(digits)))
        shape = _distort(digits[pick], rng, height)
        box = _paste(canvas, shape, [other for _, other, _ in objects], rng)
        if box is not None:
            stroke = np.zeros(canvas.size[::-1], dtype=bool)
            stroke[box[1] : box[3], box[0] : box[2]] = shape > INK
            for *_, below in objects:
                below &= ~stroke
            objects.append((pick, box, stroke))
    return canvas, objects


def _background(width: int, height: int, rng: Generator) -> Image.Image:
    """Paint blotches and scribbles."""
    blotches = Image.fromarray(rng.integers(60, 196, (4, 5, 3), dtype=np.uint8))
    canvas = blotches.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 9)):
        corner = rng.uniform((-20, -20), (width, height))
        points = np.cumsum(np.vstack([corner, rng.normal(0, 14, (rng.integers(1, 4), 2))]), axis=0)
        color = tuple(rng.integers(0, 256, 3).tolist())
        draw.line([tuple(point) for point in points.tolist()], fill=color, width=int(rng.integers(1, 6)), joint="curve")
    canvas = canvas.filter(ImageFilter.GaussianBlur(0.7))
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))


def _distort(digit: np.ndarray, rng: Generator, heights: Range) -> np.ndarray:
    """Turn a digit [8, 8], 0 to 16, into a tight mask, 0 to 255, of random size, slant and aspect ratio."""
    ink = Image.fromarray(np.pad(digit * (255 / 16), 1).astype(np.uint8))
    ink = ink.resize((10 * SOURCE_SCALE, 10 * SOURCE_SCALE), Image.Resampling.BICUBIC)
    ink = ink.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    strokes = np.clip((np.asarray(ink, dtype=float) - 70) * 2.2, 0, 255).astype(np.uint8)  # crisp edges
    rows, columns = np.nonzero(strokes > INK)
    tight = strokes[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height = np.exp(rng.uniform(*np.log(heights)))
    width = height * tight.shape[1] / tight.shape[0] * np.exp(rng.uniform(-0.35, 0.35))
    size = (max(round(width), 5), max(round(height), 5))
    return np.asarray(Image.fromarray(tight).resize(size, Image.Resampling.BILINEAR))


def _paste(canvas: Image.Image, mask: np.ndarray, boxes: list[Corners], rng: Generator) -> Corners | None:
    """Paste a digit where its box covers little of the others, and return the box, or ``None`` without space."""
    height, width = mask.shape
    if width >= canvas.width or height >= canvas.height:
        return None
    for _ in range(20):
        x, y = int(rng.integers(canvas.width - width)), int(rng.integers(canvas.height - height))
        box = (x, y, x + width, y + height)
        if all(_overlap(box, other) <= 0.25 for other in boxes):
            break
    else:
        return None
    ground = np.asarray(canvas)[y : y + height, x : x + width].mean(axis=(0, 1))
    color = rng.integers(0, 256, 3)
    while np.abs(color - ground).max() < 90:  # too little contrast
        color = rng.integers(0, 256, 3)
    canvas.paste(tuple(color.tolist()), box, Image.fromarray(mask))
    return box


def _overlap(a: Corners, b: Corners) -> float:
    """Return the overlap of two boxes as a share of the smaller one."""
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return overlap / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
