"""Detecting results whose boxes are not COCO's x, y, width and height in pixels of the image."""

from collections.abc import Callable

import numpy as np
import torch
from torchvision.ops import box_iou

from detector.data.annotations import Annotations

MAX_IMAGES = 1000  # maximum number of images whose results are compared
MIN_RESULTS = 5
# Minimum fraction of results that overlap an object, and its minimum gain over COCO's convention.
MIN_SHARE, MIN_GAIN = 0.6, 0.3
# Scaling improves poor boxes, too, so it needs more evidence.
MIN_RESULTS_TO_SCALE, MIN_IMAGES_TO_SCALE, MIN_GAIN_TO_SCALE = 10, 3, 0.6

# Conversions of four numbers [L, 4] to (x1, y1, x2, y2), by convention.
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x, y, width and height": lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]),
    "corners (x1, y1, x2, y2)": lambda b: b,
    "centres (cx, cy, width, height)": lambda b: np.hstack([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2]),
    "corners with y before x (y1, x1, y2, x2)": lambda b: b[:, [1, 0, 3, 2]],
}
# The sides, by the images' width and height [L, 2], that were resized to a number of pixels. Only STRETCHED has two.
PIXELS, NORMALISED, STRETCHED = "", ", normalised (0..1)", ", of images resized to {0:,.0f} x {1:,.0f} pixels"
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    PIXELS: np.ones_like,
    NORMALISED: lambda sizes: sizes,
    ", of images {0:.3g} times as large": np.ones_like,
    ", of images resized to a longer side of {0:,.0f} pixels": lambda sizes: sizes.max(1, keepdims=True).repeat(2, 1),
    ", of images resized to a shorter side of {0:,.0f} pixels": lambda sizes: sizes.min(1, keepdims=True).repeat(2, 1),
    STRETCHED: lambda sizes: sizes,
}


def boxes_look_like(boxes: np.ndarray, scores: np.ndarray, image_ids: np.ndarray, truth: Annotations) -> str | None:
    """Return which convention the boxes of results seem to follow, if it is not COCO's.

    For each image with n objects, the n results with the highest scores are compared with the objects. The message
    gives the number of boxes that overlap an object. It is ``None`` if the boxes follow COCO's convention, or no known
    convention.
    """
    order = np.lexsort((-scores, image_ids))
    ids, starts = np.unique(image_ids[order], return_index=True)
    best: list[np.ndarray] = []  # rows of results of each image with objects
    objects: list[torch.Tensor] = []  # their corners
    for index, rows in zip(truth.find(ids).tolist(), np.split(order, starts[1:])):
        here = truth.boxes[truth.of(index)][~truth.crowds[truth.of(index)]]
        if len(here) and len(best) < MAX_IMAGES:
            best.append(rows[: len(here)])
            objects.append(torch.from_numpy(FORMS["x, y, width and height"](here)))
    count = sum(map(len, best))
    if count < MIN_RESULTS:
        return None
    rows, first = np.concatenate(best), np.cumsum([0, *map(len, best[:-1])])
    sizes = truth.sizes[truth.find(image_ids[rows])].astype(float)
    furthest = np.stack([corners[:, 2:].amax(0).numpy() for corners in objects])
    counts: dict[str, int] = {}
    for form, read in FORMS.items():
        corners = read(boxes[rows])
        for scale, sides_of in SCALES.items():
            sides, pixels = sides_of(sizes), np.ones(2)
            if is_resized := scale not in (PIXELS, NORMALISED):
                if count < MIN_RESULTS_TO_SCALE or len(best) < MIN_IMAGES_TO_SCALE:
                    continue
                # The furthest corners of results may be those of objects.
                with np.errstate(divide="ignore", invalid="ignore"):
                    pixels = np.median(np.maximum.reduceat(corners[:, 2:], first) / furthest * sides[first], axis=0)
                if not (np.isfinite(pixels) & (pixels > 0)).all():
                    continue
                if scale != STRETCHED and abs(pixels[0] - pixels[1]) > 0.05 * pixels[0]:
                    continue
            scaled = torch.from_numpy(corners * np.tile(sides / pixels, 2)).split([len(one) for one in best])
            met = sum(int((box_iou(*pair).amax(dim=1) >= 0.5).sum()) for pair in zip(scaled, objects, strict=True))
            now = next(iter(counts.values()), met)
            if now > (1 - MIN_GAIN) * count:  # no reading can gain enough
                return None
            if not is_resized or met - now >= MIN_GAIN_TO_SCALE * count:
                counts[form + scale.format(*pixels)] = met
    # On a tie, conventions without a resized image come first.
    looks = max(counts, key=lambda what: (counts[what], "of images" not in what))
    if counts[looks] < MIN_SHARE * count or counts[looks] - now < MIN_GAIN * count:
        return None
    met = counts[looks]
    return f"{looks}: {met:,} of the {count:,} best-scored boxes overlap an object when read so, {now:,} as they are"
