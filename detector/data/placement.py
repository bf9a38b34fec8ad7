"""Detecting masks and keypoints outside their boxes, and the convention that their numbers seem to follow."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from detector.data.annotation_types import AnnotationType

MIN_OBJECTS = 3  # that another reading must fit
UNSCALED = 0.8, 1.25  # factors in between are no other scale
Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # of points, labelled and boxes, [L]

# Conversions of points [L, P, 2] to pixels, given their boxes [L, 2, 2] (corners) and their images' width and height
# [L, 1, 2].
READINGS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "coordinates normalised to 0..1: multiply by the image's width and height": lambda p, b, s: p * s,
    "coordinates normalised by the image's longer side: multiply by it": lambda p, b, s: p * s.max(2, keepdims=True),
    "coordinates normalised to their box: multiply by its size and add its corner": (
        lambda p, b, s: p * np.diff(b, axis=1) + b[:, :1]
    ),
    "offsets from their box's corner: add its x and y": lambda p, b, s: p + b[:, :1],
    "y before x: swap them": lambda p, b, s: p[..., ::-1],
}


@dataclass(frozen=True)
class Placement:
    """The positions of the masks or keypoints of L objects relative to their boxes."""

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
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)[rows]
    points, labelled = points[rows], labelled[rows]
    if annotation_type == "masks":
        both, areas, _ = _areas(points + np.array([[-0.5], [0.5]]), corners)  # gives points and lines an area
        misplaced = far = both < 0.1 * areas
        fit: Fit = _iou
        right, better = 0.8, 0.2
    else:
        misplaced = _share(points, labelled, corners, margin=0.25, pixels=2) < 0.5
        far = _share(points, labelled, corners, margin=1, pixels=10) < 0.5
        fit, right, better = _share, 0.9, 0.25
    now = fit(points, labelled, corners)
    some = now < 0.5  # where most objects do not fit, only these are read
    if 2 * some.sum() <= len(now):
        some[:] = True
    looks = _best_reading(points[some], labelled[some], corners[some], sizes[rows[some], None], fit, right, better)
    outside = np.zeros(len(boxes), dtype=bool)
    outside[rows[misplaced]] = True
    return Placement(outside, len(rows), looks is not None or 2 * far.sum() > len(far), looks)


def _areas(corners: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the areas of the intersection of two boxes and of both boxes, each [L], in square pixels."""
    low, high = np.maximum(corners[:, 0], boxes[:, 0]), np.minimum(corners[:, 1], boxes[:, 1])
    shapes = (high - low, corners[:, 1] - corners[:, 0], boxes[:, 1] - boxes[:, 0])
    return tuple(shape.clip(min=0).prod(axis=1) for shape in shapes)


def _iou(corners: np.ndarray, labelled: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    both, first, second = _areas(corners, boxes)
    return both / (first + second - both)


def _share(
    points: np.ndarray, labelled: np.ndarray, boxes: np.ndarray, margin: float = 0.1, pixels: float = 1
) -> np.ndarray:
    """Return the fraction of each object's labelled points in its box, [L], enlarged by a margin of its sides and
    pixels.

    It is 0 where all lie within 0..1 in a box larger than 4 pixels.
    """
    sides = np.diff(boxes, axis=1)
    around = margin * sides + pixels
    inside = ((points >= boxes[:, :1] - around) & (points <= boxes[:, 1:] + around)).all(axis=2) & labelled
    small = (((points >= 0) & (points <= 1.0001)).all(axis=2) | ~labelled).all(axis=1)
    return np.where(small & (sides[:, 0] > 4).all(axis=1), 0, inside.sum(axis=1) / labelled.sum(axis=1).clip(min=1))


def _best_reading(
    points: np.ndarray,
    labelled: np.ndarray,
    boxes: np.ndarray,
    sizes: np.ndarray,
    fit: Fit,
    right: float,
    gain: float,
) -> str | None:
    """Return the conversion whose mean fit is at least ``right`` and exceeds that of pixels by ``gain``."""
    now = fit(points, labelled, boxes).mean() if len(points) else 1
    if now > 1 - gain or len(points) < MIN_OBJECTS:
        return None
    found = {words: fit(read(points, boxes, sizes), labelled, boxes).mean() for words, read in READINGS.items()}
    scale = float(points.mean(axis=(1, 2), where=labelled[..., None]).sum() / boxes.mean(axis=(1, 2)).sum())
    if scale > 0 and not UNSCALED[0] < scale < UNSCALED[1]:
        words = f"pixels of an image {scale:.3g} times as large: divide by {scale:.3g}"
        found[words] = fit(points / scale, labelled, boxes).mean()
    looks = next(words for words, mean in found.items() if mean > max(found.values()) - 0.05)
    return looks if found[looks] >= right and found[looks] - now >= gain else None
