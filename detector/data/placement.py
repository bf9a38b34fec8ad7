"""Whether the masks and the key points of objects lie in their boxes, and what their numbers look like if not."""

from collections.abc import Callable

import numpy as np

MARGIN, PIXELS = 0.25, 2.0  # by which a point may lie outside its box: a share of the box's sides, and so many pixels
ENOUGH = 0.9  # of what is misplaced must fit another reading

# How points [L, P, 2] may be meant, by their boxes (x1, y1, x2, y2) and by the width and height of their images.
POINTS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "normalised (0..1): multiply x by the image's width and y by its height": lambda p, boxes, sizes: (
        p * sizes[:, None]
    ),
    "counted from the corner of their box: add its x and y": lambda p, boxes, sizes: p + boxes[:, None, :2],
    "y before x: exchange them": lambda p, boxes, sizes: p[..., ::-1],
}


def misplaced(
    points: np.ndarray, labelled: np.ndarray, boxes: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, str | None]:
    """Find objects whose points have nothing to do with their boxes.

    Args:
        points: [L, P, 2], x and y in pixels.
        labelled: [L, P], bool: the points that count.
        boxes: [L, 4] (x1, y1, x2, y2) in pixels.
        sizes: [L, 2], width and height of the images.

    Returns:
        Which objects have less than half of their points in their box, [L], bool; and, where these are more than half
        of those with points, what most of them look like, if it can be told.
    """
    off = ~_near(points, labelled, boxes)
    if not off.sum() * 2 > labelled.any(axis=1).sum():
        return off, None
    points, labelled, boxes, sizes = points[off], labelled[off], boxes[off], sizes[off]
    fits = (what for what, read in POINTS.items() if _near(read(points, boxes, sizes), labelled, boxes).mean() > ENOUGH)
    return off, next(fits, None)


def _near(points: np.ndarray, labelled: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether at least half of an object's labelled points lie in its box, or not far outside; true without any."""
    margin = MARGIN * (boxes[:, 2:] - boxes[:, :2]) + PIXELS
    low, high = (boxes[:, :2] - margin)[:, None], (boxes[:, 2:] + margin)[:, None]
    inside = ((points >= low) & (points <= high)).all(axis=2) & labelled
    return 2 * inside.sum(axis=1) >= labelled.sum(axis=1)
