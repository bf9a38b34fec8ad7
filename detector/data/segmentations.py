"""Reading, checking and measuring the segmentations of COCO's files."""

from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Annotated, Any

import msgspec
import numpy as np

from detector.data.masks import as_rle, mask_area, mask_box, run_lengths

# pycocotools counts fifths of a pixel in 32 bits, writes runs of more than 24 bits beyond its buffer, and takes 100
# bytes for each pixel of an outline.
MAX_PIXELS, MAX_OUTLINE = 2**26, 2_000_000


class _Rle(msgspec.Struct):
    size: tuple[int, int]
    counts: list[Annotated[int, msgspec.Meta(ge=0)]] | str


def _polygons(low: float, high: float) -> Any:
    """The type of polygons of at least 3 points, with coordinates from ``low`` to ``high``."""
    coordinate = Annotated[float, msgspec.Meta(ge=low, le=high)]
    polygon = Annotated[list[coordinate], msgspec.Meta(min_length=6)]
    return Annotated[list[polygon], msgspec.Meta(min_length=1)]


_decode_any = msgspec.json.Decoder(_polygons(-1e9, 1e9) | _Rle).decode


@cache
def _decoder_near(side: int) -> Callable[[bytes | msgspec.Raw], list[list[float]]]:
    """A decoder of polygons near any image whose shorter side is ``side``."""
    decoder: msgspec.json.Decoder[list[list[float]]] = msgspec.json.Decoder(_polygons(-side, 2 * side))
    return decoder.decode


def read_segmentation(segmentation: bytes | msgspec.Raw, width: int, height: int) -> tuple[Any, str | None]:
    """Read the JSON of a segmentation in an image of that size.

    pycocotools checks nothing: it writes beyond the mask if an RLE is too long, and takes four numbers for a box. The
    usual case is a single decoder call, for COCO has 860,000 polygons.

    Returns:
        Polygons or an RLE, for :func:`~detector.data.masks.as_rle`, and ``None``; or ``None`` and what is wrong.
    """
    if width * height > MAX_PIXELS:
        return None, f"in an image of {width}x{height} pixels: masks are read in images of {MAX_PIXELS:,} at most"
    side, numbers = min(width, height), 0
    try:
        polygons = _decoder_near(side)(segmentation)
        for polygon in polygons:
            numbers += len(polygon) if len(polygon) % 2 == 0 else MAX_OUTLINE
        if 1.5 * side * numbers <= MAX_OUTLINE:  # a step of an outline is at most 3 sides long
            return polygons, None
    except ValueError:
        pass
    try:
        value = _decode_any(segmentation)
    except ValueError as error:
        what = str(error)
        with suppress(ValueError):
            numbers = len(msgspec.json.decode(segmentation, type=list[float]))
            what = f"{numbers} numbers in a flat list: write [[x, y, ...]], a list of polygons"
        return None, f"neither polygons, each of 3 points or more, nor an RLE: {what}"
    if isinstance(value, _Rle):
        reason = _rle_error(value, width, height)
        value = {"size": list(value.size), "counts": value.counts}
    else:
        reason = _polygons_error(value, width, height)
    return (None, reason) if reason else (value, None)


def _polygons_error(polygons: list[list[float]], width: int, height: int) -> str | None:
    outline = 0.0
    for number, polygon in enumerate(polygons):
        if len(polygon) % 2:
            return f"polygon {number} of {len(polygon)} numbers: x and y of each point are needed"
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        if x.min() < -width or x.max() > 2 * width or y.min() < -height or y.max() > 2 * height:
            return f"polygon {number} that reaches far outside the image of {width}x{height} pixels"
        outline += np.maximum(abs(x - np.roll(x, 1)), abs(y - np.roll(y, 1))).sum()
    if outline > MAX_OUTLINE:  # few points with long outlines would fill the memory
        return f"polygons whose outlines are {outline:,.0f} pixels long: {MAX_OUTLINE:,} at most are read"
    return None


def _rle_error(rle: _Rle, width: int, height: int) -> str | None:
    if rle.size != (height, width):
        return f"an RLE of size {list(rle.size)}, [height, width], in an image of {width}x{height} pixels"
    runs = run_lengths(rle.counts) if isinstance(rle.counts, str) else rle.counts
    if runs is None:
        return "an RLE whose counts are broken"
    if sum(runs) != width * height:
        return f"an RLE whose counts add up to {sum(runs)} pixels, not to the {width * height} of the image"
    return None


def measure_masks(segmentations: Sequence[Any], sizes: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Measure the masks of :func:`read_segmentation` in images of ``sizes`` (width, height).

    Returns:
        Boxes, [L, 4] float64 (x1, y1, x2, y2) in pixels, around the points of polygons or the pixels of an RLE; NaN for
        ``None`` and an RLE without a pixel. Areas, [L] float64, in pixels; NaN for ``None``. They are exact for RLE and
        for polygons that are small or leave their image; elsewhere overlaps count twice.
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
    """Whether three points of a polygon lie within limits, and span a triangle of at least a pixel."""
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
    """The box around each owner's polygons, and the sum of their areas, from the points of all, [P, 2]."""
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
