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
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        unfinished = Path(temporary) / root.name
        (unfinished / "annotations").mkdir(parents=True)
        for (split, images), pool in zip(splits.items(), pools):
            (unfinished / split).mkdir()
            shapes, classes = digits.images[pool], digits.target[pool]
            content = _write_split(unfinished / split, images, shapes, classes, rng, count, height)
            (unfinished / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        unfinished.rename(root)


def _write_split(
    folder: Path, number: int, digits: np.ndarray, classes: np.ndarray, rng: Generator, count: Range, height: Range
) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, number + 1):
        size = SIZES[rng.integers(len(SIZES))]
        canvas = _background(*size, rng)
        boxes: list[Corners] = []
        strokes: list[np.ndarray] = []  # masks of the canvas's size
        for _ in range(0 if rng.random() < 0.05 else rng.integers(*count, endpoint=True)):
            pick = rng.integers(len(digits))
            shape = _distort(digits[pick], rng, height)
            box = _paste(canvas, shape, boxes, rng)
            if box is None:
                continue
            boxes.append(box)
            x1, y1, x2, y2 = box
            stroke = np.zeros((size[1], size[0]), dtype=bool)
            stroke[y1:y2, x1:x2] = shape > INK
            for below in strokes:
                below &= ~stroke
            strokes.append(stroke)
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(classes[pick]) + 1}
            annotations.append(ids | {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0})
        masks = encode_masks(torch.from_numpy(np.array(strokes))) if strokes else []
        for annotation, mask in zip(annotations[len(annotations) - len(masks) :], masks, strict=True):
            annotation |= {"segmentation": mask, "area": int(mask_area(mask))}
        name = f"{image_id:05}.png"
        canvas.save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
    info = {"description": "scikit-learn's handwritten digits on cluttered canvases"}
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    return {"info": info, "categories": categories, "images": images, "annotations": annotations}


def _background(width: int, height: int, rng: Generator) -> Image.Image:
    """Paint blotches and scribbles."""
    blotches = Image.fromarray(rng.integers(60, 196, (4, 5, 3), dtype=np.uint8))
    canvas = blotches.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 9)):
        corner = rng.uniform((-20, -20), (width, height))
        points = np.cumsum(np.vstack([corner, rng.normal(0, 14, (rng.integers(1, 4), 2))]), axis=0)
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
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
    """Paint a digit where its box covers little of the others, and return the box, or ``None`` without space."""
    height, width = mask.shape
    if width >= canvas.width or height >= canvas.height:
        return None
    for _ in range(20):
        x, y = int(rng.integers(canvas.width - width)), int(rng.integers(canvas.height - height))
        if all(_overlap((x, y, x + width, y + height), other) <= 0.25 for other in boxes):
            break
    else:
        return None
    ground = np.asarray(canvas)[y : y + height, x : x + width].mean(axis=(0, 1))
    color = rng.integers(0, 256, 3)
    while np.abs(color - ground).max() < 90:  # too little contrast
        color = rng.integers(0, 256, 3)
    ink = Image.new("RGB", (width, height), tuple(int(value) for value in color))
    canvas.paste(ink, (x, y), Image.fromarray(mask))
    return x, y, x + width, y + height


def _overlap(a: Corners, b: Corners) -> float:
    """Return the overlap of two boxes as a share of the smaller one."""
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return overlap / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
