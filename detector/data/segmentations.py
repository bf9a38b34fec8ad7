"""Segmentations of COCO's files: read from JSON, checked, and measured."""

from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Annotated, Any

import msgspec
import numpy as np

from detector.data.masks import as_rle, mask_area, mask_box, run_lengths

# Of an image with masks, and of an object's outlines. pycocotools counts fifths of a pixel in 32 bits, writes runs of
# more than 24 bits beyond its buffer, and takes 100 bytes a pixel of an outline.
MOST_PIXELS, MOST_OUTLINE = 2**26, 2_000_000


class _Rle(msgspec.Struct):
    size: tuple[int, int]
    counts: list[Annotated[int, msgspec.Meta(ge=0)]] | str


def _polygons(least: float, most: float) -> Any:
    """The type of polygons, each of 3 points or more with coordinates from the one to the other."""
    coordinate = Annotated[float, msgspec.Meta(ge=least, le=most)]
    polygon = Annotated[list[coordinate], msgspec.Meta(min_length=6)]
    return Annotated[list[polygon], msgspec.Meta(min_length=1)]


_any = msgspec.json.Decoder(_polygons(-1e9, 1e9) | _Rle)


@cache
def _near(side: int) -> Callable[[bytes | msgspec.Raw], list[list[float]]]:
    """Decode polygons that are near any image whose shorter side is this one."""
    decoder: msgspec.json.Decoder[list[list[float]]] = msgspec.json.Decoder(_polygons(-side, 2 * side))
    return decoder.decode


def read_segmentation(segmentation: bytes | msgspec.Raw, width: int, height: int) -> tuple[Any, str | None]:
    """Read the JSON of a segmentation, which is not empty, in an image of that size.

    pycocotools reads what it is given without looking: an RLE that is too long writes beyond its mask, and four numbers
    are a box to it. COCO has 860,000 polygons, so the usual case is a single decoder call, of two microseconds.

    Returns:
        Polygons or an RLE, for :func:`as_rle`, and ``None``; or ``None`` and what is wrong.
    """
    if width * height > MOST_PIXELS:
        return None, f"in an image of {width}x{height} pixels: masks are read in images of {MOST_PIXELS:,} at most"
    side, numbers = min(width, height), 0
    try:
        polygons = _near(side)(segmentation)
        for polygon in polygons:
            numbers += len(polygon) if len(polygon) % 2 == 0 else MOST_OUTLINE
        if 1.5 * side * numbers <= MOST_OUTLINE:  # a step of an outline is at most 3 sides long
            return polygons, None
    except ValueError:
        pass
    try:
        value = _any.decode(segmentation)
    except ValueError as error:
        return None, f"neither polygons, each of 3 points or more, nor an RLE: {_what_is_wrong(segmentation, error)}"
    if isinstance(value, _Rle):
        problem = _rle_problem(value, width, height)
        return (None, problem) if problem else ({"size": list(value.size), "counts": value.counts}, None)
    problem = _polygons_problem(value, width, height)
    return (None, problem) if problem else (value, None)


def _what_is_wrong(segmentation: bytes | msgspec.Raw, error: ValueError) -> str:
    with suppress(ValueError):
        numbers = len(msgspec.json.decode(segmentation, type=list[float]))
        return f"{numbers} numbers in a flat list: write [[x, y, ...]], a list of polygons"
    return str(error)


def _polygons_problem(polygons: list[list[float]], width: int, height: int) -> str | None:
    outline = 0.0
    for number, polygon in enumerate(polygons):
        if len(polygon) % 2:
            return f"polygon {number} of {len(polygon)} numbers: x and y of each point are needed"
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        if x.min() < -width or x.max() > 2 * width or y.min() < -height or y.max() > 2 * height:
            return f"polygon {number} that reaches far outside the image of {width}x{height} pixels"
        outline += np.maximum(abs(x - np.roll(x, 1)), abs(y - np.roll(y, 1))).sum()
    if outline > MOST_OUTLINE:  # a few lines to and fro would fill the memory
        return f"polygons whose outlines are {outline:,.0f} pixels long: {MOST_OUTLINE:,} at most are read"
    return None


def _rle_problem(rle: _Rle, width: int, height: int) -> str | None:
    if rle.size != (height, width):
        return f"an RLE of size {list(rle.size)}, [height, width], in an image of {width}x{height} pixels"
    runs = run_lengths(rle.counts) if isinstance(rle.counts, str) else rle.counts
    if runs is None:
        return "an RLE whose counts are broken"
    if sum(runs) != width * height:
        return f"an RLE whose counts add up to {sum(runs)} pixels, not to the {width * height} of the image"
    return None


def measure_masks(segmentations: Sequence[Any], sizes: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Where masks are, and how large.

    Args:
        segmentations: as :func:`read_segmentation` gives them; ``None`` for those that are not measured.
        sizes: width and height of the image of each.

    Returns:
        Boxes, [L, 4] float64 (x1, y1, x2, y2) in pixels, around the points of polygons or the pixels of an RLE; NaN for
        an RLE without a pixel. And areas, [L] float64, in pixels: exact for RLE, for polygons of under 10 pixels, and
        for those that leave their image; else the area that they enclose, overlaps counted twice. NaN where ``None``
        was given.
    """
    boxes, areas = np.full((len(segmentations), 4), np.nan), np.full(len(segmentations), np.nan)
    numbers, owners, lengths = array("d"), [], []
    for row, (value, (width, height)) in enumerate(zip(segmentations, sizes, strict=True)):
        if value is None:
            continue
        if isinstance(value, dict):
            rle = as_rle(value, height, width)
            areas[row] = mask_area(rle)
            x, y, w, h = mask_box(rle)
            boxes[row] = (x, y, x + w, y + h) if areas[row] else np.nan
            continue
        for polygon in value:
            numbers.extend(polygon)
            owners.append(row)
            lengths.append(len(polygon) // 2)
    if owners:
        rows = np.unique(owners)
        boxes[rows], areas[rows] = _measure_polygons(
            np.frombuffer(numbers).reshape(-1, 2), np.array(lengths), np.array(owners)
        )
        sides = np.array(sizes)[rows]
        exactly = (areas[rows] < 10) | (boxes[rows, :2] < 0).any(axis=1) | (boxes[rows, 2:] > sides).any(axis=1)
        for row in rows[exactly].tolist():  # a line or a point has no pixel, nor has what lies outside the image
            width, height = sizes[row]
            areas[row] = mask_area(as_rle(segmentations[row], height, width))
    return boxes, areas


def spans_a_pixel(segmentation: Any, left: float, top: float, right: float, bottom: float) -> bool:
    """Whether three points of a polygon are within limits, and are the corners of a triangle of a pixel or more.

    That takes a microsecond, and measuring it ten.
    """
    if not isinstance(segmentation, list):
        return False
    polygon = segmentation[0]
    third = len(polygon) // 6 * 2
    a, b, c, d = polygon[0], polygon[1], polygon[third], polygon[third + 1]
    e, f = polygon[2 * third], polygon[2 * third + 1]
    inside = left <= a <= right and left <= c <= right and left <= e <= right
    inside = inside and top <= b <= bottom and top <= d <= bottom and top <= f <= bottom
    return inside and abs((c - a) * (f - b) - (e - a) * (d - b)) >= 2


def _measure_polygons(points: np.ndarray, lengths: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box around the polygons of each owner, and the sum of their areas, by the points of all, [P, 2]."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = starts
    x, y = points.T
    areas = abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
    first = np.flatnonzero(np.diff(owners, prepend=-1))  # polygon of each owner
    low = np.minimum.reduceat(np.minimum.reduceat(points, starts), first)
    high = np.maximum.reduceat(np.maximum.reduceat(points, starts), first)
    return np.hstack([low, high]), np.add.reduceat(areas, first)
