"""Whether the masks and the keypoints of objects lie in their boxes, and what their numbers look like if not."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MIN_OBJECTS = 3  # that another reading must fit
UNSCALED = 0.8, 1.25  # factors in between are no other scale

# How points [L, P, 2] may be meant, given their boxes (x1, y1, x2, y2) and the width and height of their images.
READINGS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "coordinates normalised to 0..1: multiply x by the image's width and y by its height": lambda p, boxes, sizes: (
        p * sizes[:, None]
    ),
    "coordinates normalised by the image's longer side: multiply both by it": lambda p, boxes, sizes: (
        p * sizes.max(axis=1)[:, None, None]
    ),
    "coordinates normalised to their box: multiply by its size and add its corner": lambda p, boxes, sizes: (
        p * (boxes[:, 2:] - boxes[:, :2])[:, None] + boxes[:, None, :2]
    ),
    "offsets from their box's corner: add its x and y": lambda p, boxes, sizes: p + boxes[:, None, :2],
    "y before x: swap them": lambda p, boxes, sizes: p[..., ::-1],
}


@dataclass(frozen=True)
class Placement:
    """Where the masks, or keypoints, of L objects lie."""

    outside: np.ndarray  # [L] bool, whether they lie outside their box
    wrong: bool  # whether most objects' numbers are wrong: far outside, or right in another reading
    looks: str | None = None  # what the numbers look like, and what to do; None if no reading fits


def mask_placement(corners: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> Placement:
    """Compare the corners (x1, y1), (x2, y2) around masks, [L, 2, 2], with the objects' boxes.

    ``boxes`` [L, 4] (x1, y1, x2, y2) have a positive size; ``sizes`` [L, 2] are width and height of their images. All
    are in pixels. A mask is outside if less than a tenth of the box around it lies inside.
    """
    labelled = np.ones(corners.shape[:2], dtype=bool)
    wrong, looks = _best_reading(corners, labelled, boxes, sizes, fit=_iou, right=0.8, better=0.2)
    both, areas, _ = _areas(corners + np.array([[-0.5], [0.5]]), boxes)  # gives points and lines an area
    outside = both < 0.1 * areas
    return Placement(outside, wrong or 2 * outside.sum() > len(outside), looks)


def keypoint_placement(points: np.ndarray, labelled: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> Placement:
    """Compare keypoints (x, y), [L, P, 2], with the objects' boxes, as :func:`mask_placement` does.

    ``labelled`` [L, P] are the points that count, at least one of each object. An object is outside if less than half
    of them lie in or near its box.
    """
    outside = _share(points, labelled, boxes, margin=0.25, pixels=2) < 0.5
    far = _share(points, labelled, boxes, margin=1, pixels=10) < 0.5
    wrong, looks = _best_reading(points, labelled, boxes, sizes, fit=_share, right=0.9, better=0.25)
    return Placement(outside, wrong or 2 * far.sum() > len(far), looks)


def _areas(corners: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The areas of the intersection of two boxes, and of each, [L] all, in square pixels."""
    low, high = np.maximum(corners[:, 0], boxes[:, :2]), np.minimum(corners[:, 1], boxes[:, 2:])
    shapes = (high - low, corners[:, 1] - corners[:, 0], boxes[:, 2:] - boxes[:, :2])
    both, first, second = (shape.clip(min=0).prod(axis=1) for shape in shapes)
    return both, first, second


def _iou(corners: np.ndarray, labelled: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    both, first, second = _areas(corners, boxes)
    return both / (first + second - both)


def _share(
    points: np.ndarray, labelled: np.ndarray, boxes: np.ndarray, *, margin: float = 0.1, pixels: float = 1
) -> np.ndarray:
    """The share of each object's labelled points, [L], in its box grown by a margin of its sides and by pixels.

    It is 0 where all lie within 0..1 in a box larger than 4 pixels.
    """
    around = margin * (boxes[:, 2:] - boxes[:, :2]) + pixels
    low, high = (boxes[:, :2] - around)[:, None], (boxes[:, 2:] + around)[:, None]
    inside = ((points >= low) & (points <= high)).all(axis=2) & labelled
    small = (((points >= 0) & (points <= 1.0001)).all(axis=2) | ~labelled).all(axis=1)
    normalised = small & ((boxes[:, 2:] - boxes[:, :2]) > 4).all(axis=1)
    return np.where(normalised, 0, inside.sum(axis=1) / labelled.sum(axis=1).clip(min=1))


def _best_reading(
    points: np.ndarray,
    labelled: np.ndarray,
    boxes: np.ndarray,
    sizes: np.ndarray,
    *,
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    right: float,
    better: float,
) -> tuple[bool, str | None]:
    """Whether a reading fits by ``right`` on average, and by ``better`` more than pixels do; and which.

    Where most objects do not fit, only these are read.
    """
    now = fit(points, labelled, boxes)
    misfits = now < 0.5
    if 2 * misfits.sum() > len(now):
        points, labelled, boxes, sizes, now = (one[misfits] for one in (points, labelled, boxes, sizes, now))
    if not len(now) or now.mean() > 1 - better:
        return False, None
    found = {words: fit(read(points, boxes, sizes), labelled, boxes).mean() for words, read in READINGS.items()}
    middles = points.mean(axis=(1, 2), where=labelled[..., None])
    scale = float(middles.sum() / boxes.mean(axis=1).sum())
    if scale > 0 and not UNSCALED[0] < scale < UNSCALED[1]:
        words = f"pixels of an image {scale:.3g} times as large: divide by {scale:.3g}"
        found[words] = fit(points / scale, labelled, boxes).mean()
    looks = next(words for words, mean in found.items() if mean > max(found.values()) - 0.05)
    fits = found[looks] >= right and found[looks] - now.mean() >= better and len(points) >= MIN_OBJECTS
    return bool(fits), looks if fits else None
