"""Reading, checking and measuring the segmentations of COCO's files."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from math import inf, nan
from operator import mul
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
    """Return the type of polygons of at least 3 points, with coordinates from ``low`` to ``high``."""
    coordinate = Annotated[float, msgspec.Meta(ge=low, le=high)]
    polygon = Annotated[list[coordinate], msgspec.Meta(min_length=6)]
    return Annotated[list[polygon], msgspec.Meta(min_length=1)]


_decode_any = msgspec.json.Decoder(_polygons(-1e9, 1e9) | _Rle).decode


@cache
def _decoder_near(side: int) -> Callable[[bytes | msgspec.Raw], list[list[float]]]:
    """Return a decoder of polygons near any image whose shorter side is ``side``."""
    decoder: msgspec.json.Decoder[list[list[float]]] = msgspec.json.Decoder(_polygons(-side, 2 * side))
    return decoder.decode


def read_segmentation(segmentation: bytes | msgspec.Raw, width: int, height: int) -> tuple[Any, str | None]:
    """Read the JSON of a segmentation in an image of that size.

    pycocotools checks nothing: it writes beyond the mask if an RLE is too long, and treats four numbers as a box. The
    usual case is a single decoder call, because COCO has 860,000 polygons.

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


def spans_a_pixel(segmentation: Any, left: float, top: float, right: float, bottom: float) -> bool:
    """Return whether three points of a polygon lie within limits, and span a triangle of at least a pixel."""
    if not isinstance(segmentation, list):
        return False
    polygon = segmentation[0]
    third = len(polygon) // 6 * 2
    (a, b), (c, d), (e, f) = polygon[:2], polygon[third : third + 2], polygon[2 * third : 2 * third + 2]
    inside = left <= a <= right and left <= c <= right and left <= e <= right
    inside = inside and top <= b <= bottom and top <= d <= bottom and top <= f <= bottom
    return inside and abs((c - a) * (f - b) - (e - a) * (d - b)) >= 2


def measure_mask(segmentation: Any, width: int, height: int) -> tuple[float, ...]:
    """Measure a mask of :func:`read_segmentation`.

    Returns:
        The box around the points of polygons or the pixels of an RLE, x1, y1, x2, y2 in pixels, and the area in pixels.
        The box is NaN for ``None`` and an RLE without a pixel, the area for ``None``. The area is exact for RLE and for
        polygons that are small or leave their image; elsewhere overlaps count twice.
    """
    if segmentation is None:
        return (nan,) * 5
    if isinstance(segmentation, dict):
        rle = as_rle(segmentation, height, width)
        x, y, w, h = mask_box(rle)
        return (x, y, x + w, y + h, mask_area(rle)) if w else (nan, nan, nan, nan, 0)
    left, top, right, lower, area = inf, inf, -inf, -inf, 0.0
    for polygon in segmentation:
        xs, ys = polygon[::2], polygon[1::2]
        area += abs(sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))) / 2
        left, top, right, lower = min(left, min(xs)), min(top, min(ys)), max(right, max(xs)), max(lower, max(ys))
    if area < 10 or left < 0 or top < 0 or right > width or lower > height:  # a line has no pixel
        area = mask_area(as_rle(segmentation, height, width))
    return left, top, right, lower, area
