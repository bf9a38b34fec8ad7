"""Whether the masks and the keypoints of objects lie in their boxes, and what their numbers look like if not."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from detector.data.annotation_types import AnnotationType

MIN_OBJECTS = 3  # that another reading must fit
UNSCALED = 0.8, 1.25  # factors in between are no other scale

# How points [L, P, 2] may be meant, given their boxes (x1, y1, x2, y2) and the width and height of their images.
READINGS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "coordinates normalised to 0..1: multiply by the image's width and height": lambda p, b, sizes: p * sizes[:, None],
    "coordinates normalised by the image's longer side: multiply by it": lambda p, b, sizes: (
        p * sizes.max(axis=1)[:, None, None]
    ),
    "coordinates normalised to their box: multiply by its size and add its corner": lambda p, b, sizes: (
        p * (b[:, 2:] - b[:, :2])[:, None] + b[:, None, :2]
    ),
    "offsets from their box's corner: add its x and y": lambda p, b, sizes: p + b[:, None, :2],
    "y before x: swap them": lambda p, b, sizes: p[..., ::-1],
}


@dataclass(frozen=True)
class Placement:
    """Where the masks, or keypoints, of L objects lie."""

    outside: np.ndarray  # [L] bool, whether they lie outside their box
    compared: int  # number of objects with a box and labelled points
    wrong: bool  # whether most objects' numbers are wrong: far outside, or right in another reading
    looks: str | None  # what the numbers look like, and what to do; None if no reading fits


def placement_of(
    annotation_type: AnnotationType, points: np.ndarray, labelled: np.ndarray, boxes: np.ndarray, sizes: np.ndarray
) -> Placement:
    """Compare the masks, or keypoints, of L objects with their boxes.

    A mask is outside if less than a tenth of the box around it lies inside, an object's keypoints if less than half of
    them lie in or near its box.

    Args:
        annotation_type: which of them.
        points: [L, P, 2], x and y in pixels; for masks the upper left and the lower right corner around each.
        labelled: [L, P] bool, the points that count.
        boxes: [L, 4], x, y, width and height in pixels.
        sizes: [L, 2], width and height of the images.
    """
    rows = np.flatnonzero(labelled.any(axis=1) & (boxes[:, 2:] > 0).all(axis=1))
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])[rows]
    points, labelled, sizes = points[rows], labelled[rows], sizes[rows]
    if annotation_type == "masks":
        wrong, looks = _best_reading(points, labelled, corners, sizes, fit=_iou, right=0.8, better=0.2)
        both, areas, _ = _areas(points + np.array([[-0.5], [0.5]]), corners)  # gives points and lines an area
        misplaced = far = both < 0.1 * areas
    else:
        wrong, looks = _best_reading(points, labelled, corners, sizes, fit=_share, right=0.9, better=0.25)
        misplaced = _share(points, labelled, corners, margin=0.25, pixels=2) < 0.5
        far = _share(points, labelled, corners, margin=1, pixels=10) < 0.5
    outside = np.zeros(len(boxes), dtype=bool)
    outside[rows[misplaced]] = True
    return Placement(outside, len(rows), wrong or 2 * far.sum() > len(far), looks)


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
