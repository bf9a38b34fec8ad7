"""Detecting results whose boxes are not COCO's x, y, width and height in pixels of the image."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchvision.ops import box_iou

from detector.data.annotations import Annotations

MAX_IMAGES = 1000  # images whose results are compared with the annotations, which takes a second
MIN_RESULTS = 5
# The share of the best results that must meet an object, and by how much it must be higher than as they are.
MIN_SHARE, MIN_GAIN = 0.6, 0.3
# Scaling improves poor boxes, too, so it needs more evidence.
MIN_RESULTS_TO_SCALE, MIN_IMAGES_TO_SCALE, MIN_GAIN_TO_SCALE = 10, 3, 0.6

# How four numbers [L, 4] may be meant, as (x1, y1, x2, y2).
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x, y, width and height": lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]),
    "corners (x1, y1, x2, y2)": lambda b: b,
    "centres (cx, cy, width, height)": lambda b: np.hstack([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2]),
    "corners with y before x (y1, x1, y2, x2)": lambda b: b[:, [1, 0, 3, 2]],
}
# The sides, by the images' width and height [L, 2], that were resized to a number of pixels. Only STRETCHED has two.
STRETCHED = "of images resized to {0:,.0f} x {1:,.0f} pixels"
RESIZED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "of images {0:.3g} times as large": np.ones_like,
    "of images resized to a longer side of {0:,.0f} pixels": lambda sizes: sizes.max(1, keepdims=True).repeat(2, 1),
    "of images resized to a shorter side of {0:,.0f} pixels": lambda sizes: sizes.min(1, keepdims=True).repeat(2, 1),
    STRETCHED: lambda sizes: sizes,
}


def boxes_look_like(boxes: np.ndarray, scores: np.ndarray, image_ids: np.ndarray, truth: Annotations) -> str | None:
    """Find out whether results meet the objects of their images only when their boxes are read in another way.

    Each image's best-scored results are compared, as many as it has objects. Returns what the boxes [L, 4] look like,
    with the number that meet an object; ``None`` if they are right, or if nothing fits.
    """
    best, objects = _best_of_images(scores, image_ids, truth)
    rows = np.concatenate(best) if best else np.empty(0, int)
    if len(rows) < MIN_RESULTS:
        return None
    image_of = np.repeat(np.arange(len(best)), [len(found) for found in best])
    sizes = truth.sizes[truth.find(image_ids[rows])].astype(float)
    corners_of = {form: read(boxes[rows]) for form, read in FORMS.items()}
    as_they_are = _met(next(iter(corners_of.values())), image_of, objects)
    if as_they_are > (1 - MIN_GAIN) * len(rows):  # no reading can gain enough
        return None
    counts: dict[str, int] = {}
    for form, corners in corners_of.items():
        counts[form] = _met(corners, image_of, objects)
        counts[f"{form}, normalised (0..1)"] = _met(corners * np.tile(sizes, 2), image_of, objects)
    can_scale = len(rows) >= MIN_RESULTS_TO_SCALE and len(best) >= MIN_IMAGES_TO_SCALE
    for form, corners in corners_of.items() if can_scale else ():
        for resized, sides_of in RESIZED.items():
            pixels = _pixels(corners, image_of, objects, sides_of(sizes))
            if pixels is None or (resized != STRETCHED and abs(pixels[0] - pixels[1]) > 0.05 * pixels[0]):
                continue
            met = _met(corners * np.tile(sides_of(sizes) / pixels, 2), image_of, objects)
            if met - as_they_are >= MIN_GAIN_TO_SCALE * len(rows):
                counts[f"{form}, {resized.format(*pixels)}"] = met
    looks = max(counts, key=lambda what: counts[what])  # the first of equals
    if counts[looks] < MIN_SHARE * len(rows) or counts[looks] - as_they_are < MIN_GAIN * len(rows):
        return None
    read_so = f"{counts[looks]:,} of the {len(rows):,} best-scored boxes overlap an object when read so"
    return f"{looks}: {read_so}, {as_they_are:,} as they are"


def _best_of_images(
    scores: np.ndarray, image_ids: np.ndarray, truth: Annotations
) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """The rows of each image's best results, and its objects (x1, y1, x2, y2), for images with both."""
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
        if len(best) == MAX_IMAGES:
            break
    return best, objects


def _met(corners: np.ndarray, image_of: np.ndarray, objects: Sequence[torch.Tensor]) -> int:
    """The number of boxes with an IoU of at least 0.5 with an object of their image."""
    own = torch.from_numpy(corners).split(np.bincount(image_of).tolist())
    return sum(int((box_iou(boxes, there).amax(dim=1) >= 0.5).sum()) for boxes, there in zip(own, objects, strict=True))


def _pixels(
    corners: np.ndarray, image_of: np.ndarray, objects: Sequence[torch.Tensor], sides: np.ndarray
) -> np.ndarray | None:
    """The number of pixels, [2], to which sides were resized, if the furthest corners are those of the objects."""
    starts = np.searchsorted(image_of, np.arange(len(objects)))
    furthest = np.maximum.reduceat(corners[:, 2:], starts)
    there = np.stack([boxes[:, 2:].amax(dim=0).numpy() for boxes in objects])
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = np.median(furthest / there * sides[starts], axis=0)
    return pixels if (np.isfinite(pixels) & (pixels > 0)).all() else None
