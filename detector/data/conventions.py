"""Detecting results whose boxes are not COCO's x, y, width and height in pixels of the image."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchvision.ops import box_iou

from detector.data.annotations import Annotations

MOST_IMAGES = 1000  # whose results are compared with the ground truth: a second's work
FEWEST = 5  # results that are compared
MEET, BETTER = 0.6, 0.3  # the share of the best results that must meet an object, and by how much it must be higher
# Fitting a scale improves poor boxes, too, so it needs more evidence: results, images with results, and a larger gain.
FEWEST_TO_SCALE, FEWEST_IMAGES, BETTER_BY_SCALE = 10, 3, 0.6

# How four numbers [L, 4] may be meant: as (x1, y1, x2, y2).
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x, y, width and height": lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]),
    "corners (x1, y1, x2, y2)": lambda b: b,
    "centres (cx, cy, width, height)": lambda b: np.hstack([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2]),
    "corners with y before x (y1, x1, y2, x2)": lambda b: b[:, [1, 0, 3, 2]],
}
# In images that were resized to N pixels: what of the image's width and height, [L, 2], was made N. Only of the last
# one the two numbers may differ.
STRETCHED = "of images resized to {0:,.0f} x {1:,.0f} pixels"
RESIZED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "of images {0:.3g} times as large": np.ones_like,
    "of images resized to a longer side of {0:,.0f} pixels": lambda sizes: sizes.max(1, keepdims=True).repeat(2, 1),
    "of images resized to a shorter side of {0:,.0f} pixels": lambda sizes: sizes.min(1, keepdims=True).repeat(2, 1),
    STRETCHED: lambda sizes: sizes,
}


def boxes_look_like(boxes: np.ndarray, scores: np.ndarray, image_ids: np.ndarray, truth: Annotations) -> str | None:
    """Say if the boxes of results meet the objects of their images only when they are read in another way.

    Of each image the results with the best scores are looked at, as many as it has objects.

    Args:
        boxes: [L, 4], the four numbers of each result.
        scores: [L].
        image_ids: [L].
        truth: the annotations of the images.

    Returns:
        What they look like, and how many meet an object so, and as they are; ``None`` if they are as they should be, or
        if nothing fits.
    """
    best, objects = _best_of_images(scores, image_ids, truth)
    rows = np.concatenate(best) if best else np.empty(0, int)
    if len(rows) < FEWEST:
        return None
    of_image = np.repeat(np.arange(len(best)), [len(of) for of in best])
    sizes = truth.sizes[truth.find(image_ids[rows])].astype(float)
    read_as = {form: read(boxes[rows]) for form, read in FORMS.items()}
    as_they_are = _met(next(iter(read_as.values())), of_image, objects)
    if as_they_are > (1 - BETTER) * len(rows):  # as of any right file: nothing can be so much better
        return None
    counts: dict[str, int] = {}
    for form, corners in read_as.items():
        counts[form] = _met(corners, of_image, objects)
        counts[f"{form}, normalised (0..1)"] = _met(corners * np.tile(sizes, 2), of_image, objects)
    for form, corners in read_as.items() if len(rows) >= FEWEST_TO_SCALE and len(best) >= FEWEST_IMAGES else ():
        for resized, sides_of in RESIZED.items():
            pixels = _pixels(corners, of_image, objects, sides_of(sizes))
            if pixels is None or (resized != STRETCHED and abs(pixels[0] - pixels[1]) > 0.05 * pixels[0]):
                continue
            met = _met(corners * np.tile(sides_of(sizes) / pixels, 2), of_image, objects)
            if met - as_they_are >= BETTER_BY_SCALE * len(rows):
                counts[f"{form}, {resized.format(*pixels)}"] = met
    looks = max(counts, key=lambda what: counts[what])  # of equals the first
    if counts[looks] < MEET * len(rows) or counts[looks] - as_they_are < BETTER * len(rows):
        return None
    begin = f"{looks}: {counts[looks]:,} of the {len(rows):,} best-scored boxes overlap an object when read so"
    return f"{begin}, {as_they_are:,} as they are"


def _best_of_images(
    scores: np.ndarray, image_ids: np.ndarray, truth: Annotations
) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """The best results of each image that has some, and objects, and these as (x1, y1, x2, y2)."""
    order = np.lexsort((-scores, image_ids))
    ids, starts = np.unique(image_ids[order], return_index=True)
    corners = FORMS["x, y, width and height"](truth.boxes)
    best: list[np.ndarray] = []
    objects: list[torch.Tensor] = []
    for index, rows in zip(truth.find(ids).tolist(), np.split(order, starts[1:])):
        here = corners[truth.of(index)][~truth.crowds[truth.of(index)]]
        if len(here):
            best.append(rows[: len(here)])
            objects.append(torch.from_numpy(here))
        if len(best) == MOST_IMAGES:
            break
    return best, objects


def _met(corners: np.ndarray, of_image: np.ndarray, objects: Sequence[torch.Tensor]) -> int:
    """How many boxes overlap an object of their image by half."""
    own = torch.from_numpy(corners).split(np.bincount(of_image).tolist())
    return sum(int((box_iou(boxes, there).amax(dim=1) >= 0.5).sum()) for boxes, there in zip(own, objects, strict=True))


def _pixels(
    corners: np.ndarray, of_image: np.ndarray, objects: Sequence[torch.Tensor], sides: np.ndarray
) -> np.ndarray | None:
    """To how many pixels, [2], sides were resized, if the boxes' furthest corners are those of the objects."""
    starts = np.searchsorted(of_image, np.arange(len(objects)))
    furthest = np.maximum.reduceat(corners[:, 2:], starts)
    there = np.stack([boxes[:, 2:].amax(dim=0).numpy() for boxes in objects])
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = np.median(furthest / there * sides[starts], axis=0)
    return pixels if (np.isfinite(pixels) & (pixels > 0)).all() else None
