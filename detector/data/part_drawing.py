"""Masks and skeletons, drawn on pictures so that they are seen on any ground."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from detector.data.keypoints import KeypointLayout
from detector.data.masks import decode_masks

LIGHT = ("#F0E442", "#E69F00", "#56B4E9", "#FFE600", "#FFFFFF")  # with black beside them; white beside all others
FILL = 0.45  # of a mask's colour over the object
LINE = 2  # pixels of a mask's contour
LEFT, RIGHT, MIDDLE = "#56B4E9", "#E69F00", "#FFFFFF"  # of keypoints; told apart by colour-blind readers, too

Mask = Tensor | Mapping[str, Any]  # [H, W], above 0 on the object; or an RLE
Points = Iterable[Sequence[float]]  # x, y and visibility of each


def contrast(color: str) -> str:
    """Return what is written on a colour, or drawn beside it: black or white."""
    return "black" if color in LIGHT else "white"


def draw_mask(picture: Image.Image, mask: Mask, color: str) -> None:
    """Lay a colour over an object of an RGB picture, in place, with a contour in that colour and its contrast.

    torchvision's ``draw_segmentation_masks`` draws no contour, copies the picture, and needs masks of its size.

    Args:
        picture: the image, in any size.
        mask: of the image; it is stretched over the picture.
        color: "#RRGGBB".
    """
    pixels = mask.cpu() if isinstance(mask, Tensor) else decode_masks([mask], *mask["size"])[0]
    is_object = pixels.numpy() > 0
    rows, columns = (np.flatnonzero(is_object.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return
    left, right, x1, x2 = _span(columns, is_object.shape[1], picture.width)
    top, bottom, y1, y2 = _span(rows, is_object.shape[0], picture.height)
    # What is needed of the mask: a pixel more, which the resampling looks at.
    x, y = max(math.floor(x1) - 1, 0), max(math.floor(y1) - 1, 0)
    cut = Image.fromarray(is_object[y : math.ceil(y2) + 1, x : math.ceil(x2) + 1].astype(np.uint8) * 255)
    shape = cut.resize((right - left, bottom - top), Image.Resampling.BILINEAR, (x1 - x, y1 - y, x2 - x, y2 - y))
    shape = shape.point([0] * 128 + [255] * 128)
    # The filters go on beyond the picture's edge as it ends there: an object that it cuts has no contour along it.
    line = ImageChops.subtract(shape, shape.filter(ImageFilter.MinFilter(2 * LINE + 1)))
    halo = ImageChops.subtract(shape.filter(ImageFilter.MaxFilter(3)), shape)
    picture.paste(color, (left, top), shape.point([0] * 128 + [round(255 * FILL)] * 128))
    picture.paste(color, (left, top), line)
    picture.paste(contrast(color), (left, top), halo)


def _span(places: np.ndarray, length: int, size: int) -> tuple[int, int, float, float]:
    """Where an object lies along a side of the picture, with space for its contour, and what that is of its mask.

    Args:
        places: of the mask's pixels with the object, in order.
        length, size: of that side of the mask, and of the picture.
    """
    scale, margin = size / length, LINE + 1
    start = max(math.floor(places[0] * scale) - margin, 0)
    end = min(math.ceil((places[-1] + 1) * scale) + margin, size)
    return start, end, start / scale, end / scale


def draw_keypoints(picture: Image.Image, points: Points, layout: KeypointLayout | None, color: str) -> None:
    """Draw the keypoints of an object, and the lines of its skeleton, on an RGB picture, in place.

    Dots tell left from right where the names do, lines have the object's colour. Points of visibility 0 and points
    outside the picture are left out, with their lines. torchvision's ``draw_keypoints`` draws no edges, which a busy
    ground needs, and one colour a call.

    Args:
        picture: the image, in any size.
        points: in pixels of the picture.
        layout: of that many points; without, or with another number, there are dots alone.
        color: "#RRGGBB".
    """
    places = [
        (x, y) if visible > 0 and 0 <= x <= picture.width and 0 <= y <= picture.height else None
        for x, y, visible in points
    ]
    seen = [place for place in places if place is not None]
    if not seen:
        return
    xs, ys = zip(*seen)
    extent = max(max(xs) - min(xs), max(ys) - min(ys))
    size = round(min(max(extent / 40, 1), 4))  # a small object is not hidden by its dots
    known = layout if layout is not None and len(layout) == len(places) else None
    lines = [(places[a], places[b]) for a, b in (known.skeleton if known is not None else ())]
    joined = [(*start, *end) for start, end in lines if start is not None and end is not None]
    pen = ImageDraw.Draw(picture)
    for ink, width in ((contrast(color), size + 2), (color, size)):
        for line in joined:
            pen.line(line, ink, width)
    for place, fill in zip(places, _dots(known, color, len(places)), strict=True):
        if place is not None:
            pen.circle(place, size + 1, fill, contrast(fill))


def _dots(layout: KeypointLayout | None, color: str, count: int) -> list[str]:
    """The colour of each keypoint."""
    other = list(range(count)) if layout is None else layout.mirrored()
    if layout is None or other == list(range(count)):
        return [color] * count
    names = [name.lower() for name in layout.names]
    # Where two names that are each other's mirror image begin to differ, one has an l and the other an r.
    return [MIDDLE if other[i] == i else LEFT if names[i] < names[other[i]] else RIGHT for i in range(count)]
