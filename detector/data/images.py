"""Image files as RGB tensors, whatever their mode, checked before anything is computed from them."""

import contextlib
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms import v2

from detector.errors import DataError, ImageError, SizeError

# What a file may be, whatever it is called. Pillow knows more, and runs Ghostscript on a file that says it is an EPS.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
Orientation = Literal["upright", "stored"]
UPRIGHT = {  # what turns the stored pixels upright, by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STORED = UPRIGHT | {6: UPRIGHT[8], 8: UPRIGHT[6]}  # and what turns it back
# Remarks on an image that may be labelled upright or as stored, and on one that is not taken as the setting says.
DOUBTFUL = "the annotated size fits the image upright and as stored, and its EXIF orientation is"
TOLD = "the annotated size fits the image in one way only, against the setting, and its EXIF orientation is"
TOO_LARGE = (
    "a small file may say that, and fill the memory; one that is meant is let through by --max_pixels of "
    "tools/predict.py, max_pixels of detect, and takes about 40 bytes of memory a pixel"
)
_opening = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # or it writes on stderr what is wrong with a file


def read_image(
    path: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    orientation: Orientation = "upright",
    max_pixels: int | None = None,
    remarks: list[str] | None = None,
) -> Tensor:
    """Read an image as RGB, whatever its mode: grey, palette, 16 bits, floats, or with an alpha channel (dropped).

    Integers of more than 8 bits and floats are scaled as :func:`as_rgb` says. Of several frames or pages the first is
    taken.

    A photograph may carry an EXIF orientation, by which viewers and most label tools turn it upright. It is turned
    upright here as well, unless the annotation's size fits the pixels as they are stored alone.

    Args:
        path: one of :data:`FORMATS`, so far as this Pillow reads them.
        width: the annotation's width, in pixels, if there is one.
        height: the annotation's height.
        orientation: "upright": turn the image upright by its EXIF orientation; "stored": do not. Where the annotation's
            size fits only one of the two, that one is taken.
        max_pixels: the most that it may have; ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``.
        remarks: gets a phrase for each thing that a user may want to know: that the values were scaled, that there
            are more frames, that the annotated size fits both orientations (:data:`DOUBTFUL`), or only the other one
            (:data:`TOLD`).

    Returns:
        [3, H, W], uint8.

    Raises:
        DataError: the file is missing, broken or cut off, has more pixels than may be, values that are no colours, or
            another size than the annotation says.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    most = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a folder; a pipe, of which nothing would ever come
            raise ImageError(f"{path}: cannot be read as an image: it is no regular file")
        with without_pillows_warnings(), _open(path, formats, max_pixels) as image:
            if most is not None and image.size[0] * image.size[1] > most:  # Pillow only warns, up to twice as many
                raise ImageError(
                    f"{path}: the image has {image.size[0]}x{image.size[1]} pixels, more than the {most:,} that are "
                    f"read: {TOO_LARGE}"
                )
            deep = image.mode[0] not in "IF" and ";16" in str(getattr(image, "tile", ""))  # Pillow drops the lower 8
            size = image.size
            turned = oriented(image, None if width is None or height is None else (width, height), orientation, remarks)
            if width is not None and turned.size != (width, height):
                raise SizeError(
                    f"{path}: the image has {size[0]}x{size[1]} pixels, its annotation says "
                    f"{width}x{height} (width x height)"
                )
            pixels = v2.functional.pil_to_tensor(as_rgb(turned, remarks))
            if remarks is not None:
                if deep and 0 < int(pixels.max()) < 64:
                    remarks.append("dark colours of 16 bits, of which only the upper 8 are read; save them with 8")
                if _has_more_frames(image):
                    remarks.append("several frames or pages, of which the first was taken")
            return pixels
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {str(error).rstrip('.')}: {TOO_LARGE}") from None
    except ImageError:
        raise
    except DataError as error:
        raise ImageError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise what they like: struct.error, TypeError, SyntaxError, ...
        raise ImageError(f"{path}: cannot be read as an image (broken or cut off): {error}") from None


def _open(path: str | Path, formats: list[str], max_pixels: int | None) -> Image.Image:
    """Open an image. Pillow's limit is the whole process's: another holds only while the file's head is read."""
    if max_pixels is None:
        return Image.open(path, formats=formats)
    with _opening:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            return Image.open(path, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # a phone's photograph, with a second view or a preview behind it
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # as above: what comes behind the first frame is broken
        return False


@contextlib.contextmanager
def without_pillows_warnings() -> Iterator[None]:
    """Keep Pillow's remarks about an image (its EXIF data, its size) from the terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def oriented(
    image: Image.Image,
    size: tuple[int, int] | None = None,
    orientation: Orientation = "upright",
    remarks: list[str] | None = None,
) -> Image.Image:
    """Turn a PIL image upright, or leave it as it is stored, see :func:`read_image`."""
    is_tiff = image.format == "TIFF"  # which Pillow turns upright by itself as it loads it
    if not is_tiff:
        image.load()  # the EXIF data of a PNG may come after its pixels
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of EXIF data that are broken, decoders raise what they like
        turn = 1
    if turn not in UPRIGHT:
        return image
    image.load()
    ways = {"upright": None if is_tiff else UPRIGHT[turn], "stored": STORED[turn] if is_tiff else None}
    sizes = {way: image.size if method is None or turn < 5 else image.size[::-1] for way, method in ways.items()}
    other = "stored" if orientation == "upright" else "upright"
    told = size is not None and sizes[other] == size != sizes[orientation]
    chosen = other if told else orientation
    if remarks is not None and size is not None and (told or sizes["upright"] == sizes["stored"]):
        taken = "turned upright" if chosen == "upright" else "taken as stored"
        remarks.append(f"{TOLD if told else DOUBTFUL} {turn}: {taken}")
    method = ways[chosen]
    return image if method is None else image.transpose(method)


def as_rgb(image: Image.Image, remarks: list[str] | None = None) -> Image.Image:
    """Turn a PIL image of any mode into RGB; an alpha channel is dropped.

    Of integers of 16 or 32 bits the largest decides: they have the fewest of 8, 10, 12, 14 or 16 bits that hold it (a
    microscope's or an X-ray's 12 come in 16), of which the upper 8 are taken. Floats up to 1 are scaled to 0 to 255,
    others are taken as they are, without what follows the point. ``remarks`` gets a phrase if values were scaled.

    Raises:
        DataError: integers outside of 0 to 65535, floats outside of 0 to 255, or NaN.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise DataError(
                f"the image has integers from {low} to {high}: 0 to 65535 are read; save it with 8 or 16 bits"
            )
        bits = max(high.bit_length() + high.bit_length() % 2, 8)
        if remarks is not None and high and bits < 16:
            remarks.append(f"values of 16 bits or more that use at most {bits}, scaled by those {bits}")
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        least, largest = float(values.min()), float(values.max())
        if not (least >= 0 and largest <= 255):  # also NaN
            raise DataError(
                f"the image has floats from {least:.4g} to {largest:.4g}: 0 to 1 or 0 to 255 are read; scale them, or "
                "save it with 8 or 16 bits"
            )
        if largest <= 1:
            if remarks is not None:
                remarks.append("floats from 0 to 1, scaled to 0 to 255")
            image = Image.fromarray((values * 255).round().astype(np.uint8))
    return image.convert("RGB")
