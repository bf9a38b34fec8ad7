"""Image files of any mode as RGB tensors."""

import contextlib
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.Image import Transpose
from torch import Tensor
from torchvision.transforms import v2

from detector.choices import Orientation
from detector.errors import DataError, ImageError, SizeError

# Pillow knows more formats, and runs Ghostscript on a file whose content is EPS.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
FLIPS = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE)
TURN_UPRIGHT = dict(enumerate((*FLIPS, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90), start=2))
TURN_BACK = TURN_UPRIGHT | {6: Transpose.ROTATE_90, 8: Transpose.ROTATE_270}  # both by EXIF orientation
# Prefixes of the remarks on the orientation.
AMBIGUOUS_ORIENTATION = "the annotated size fits the image upright and as stored, and its EXIF orientation is"
OVERRULED_ORIENTATION = (
    "the annotated size fits the image in one way only, against the setting, and its EXIF orientation is"
)
# A small file may claim a huge size.
TOO_LARGE = "in prediction, max_pixels allows larger images, at about 40 bytes of memory per pixel"
_pixel_limit_lock = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # otherwise it writes to stderr


def read_image(path: str | Path, **options: Any) -> Tensor:
    """Read an image as :func:`read_image_with_remarks` does, without the remarks."""
    return read_image_with_remarks(path, **options)[0]


def read_image_with_remarks(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    orientation: Orientation = "upright",
    max_pixels: int | None = None,
) -> tuple[Tensor, list[str]]:
    """Read the first frame or page of an image as RGB. An alpha channel is dropped.

    The largest value of integers with 16 or 32 bits determines the bits in use (8, 10, 12, 14 or 16), of which the
    upper 8 are kept. Floats up to 1 are scaled to 0..255; larger floats are truncated.

    Args:
        path: a file in one of :data:`FORMATS`.
        size: annotated (width, height) in pixels, which the image must have.
        orientation: "upright" applies the EXIF orientation, as viewers and most label tools do; "stored" ignores it.
            If ``size`` fits only one of the two, that one is used.
        max_pixels: maximum number of pixels. ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``.

    Returns:
        The image, [3, H, W] uint8, and remarks on scaled values, further frames and doubtful orientations.

    Raises:
        ImageError: the file is missing, broken or too large, or its values are not colours.
        SizeError: the image does not have ``size``.
    """
    Image.init()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise ImageError("cannot be read as an image: it is not a regular file")
        with without_pillow_warnings(), _open(path, max_pixels) as image:
            limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
            if limit is not None and image.width * image.height > limit:  # Pillow refuses only twice as many
                what = f"the image has {image.width}x{image.height} pixels, more than the limit of {limit:,}"
                raise Image.DecompressionBombError(what)
            return pil_to_rgb(image, size=size, orientation=orientation)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {str(error).rstrip('.')}: {TOO_LARGE}") from None
    except DataError as error:
        kind = type(error) if isinstance(error, ImageError) else ImageError
        raise kind(f"{path}: {error}") from None
    except Exception as error:  # decoders raise struct.error, TypeError, SyntaxError, ...
        raise ImageError(f"{path}: cannot be read as an image (broken or cut off): {error}") from None


def _open(path: str | Path, max_pixels: int | None) -> Image.Image:
    formats = [name for name in FORMATS if name in Image.OPEN]
    if max_pixels is None:
        return Image.open(path, formats=formats)
    with _pixel_limit_lock:  # Pillow's limit is global
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            return Image.open(path, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Hide Pillow's warnings about EXIF data and sizes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def pil_to_rgb(
    image: Image.Image, *, size: tuple[int, int] | None = None, orientation: Orientation = "upright"
) -> tuple[Tensor, list[str]]:
    """Convert a PIL image as :func:`read_image_with_remarks` does. Raises DataError or SizeError."""
    stored_size = image.size
    drops_bits = image.mode[0] not in "IF" and ";16" in str(getattr(image, "tile", ""))  # Pillow reads the upper 8
    turned, turn_remark = _orient(image, size, orientation)
    if size is not None and turned.size != size:
        says = "{}x{} pixels, its annotation says {}x{} (width x height)".format(*stored_size, *size)
        raise SizeError(f"the image has {says}")
    rgb, scale_remark = _to_rgb(turned)
    pixels = v2.functional.pil_to_tensor(rgb)
    remarks = [remark for remark in (turn_remark, scale_remark) if remark is not None]
    if drops_bits and 0 < int(pixels.max()) < 64:
        remarks.append("dark 16-bit colours, of which only the upper 8 bits are read; save them with 8 bits")
    with contextlib.suppress(Exception):  # the data after the first frame may be broken
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photograph with a preview
            remarks.append("several frames or pages, of which only the first is read")
    return pixels, remarks


def _orient(
    image: Image.Image, size: tuple[int, int] | None, orientation: Orientation
) -> tuple[Image.Image, str | None]:
    """Turn an image. Also returns a remark if the annotated size leaves the orientation open or decides it."""
    is_tiff = image.format == "TIFF"  # Pillow turns these upright when it loads them
    if not is_tiff:
        image.load()  # the EXIF data of a PNG may follow its pixels
    exif = 1
    with contextlib.suppress(Exception):  # broken EXIF data
        exif = image.getexif().get(ExifTags.Base.Orientation, 1)
    image.load()
    if exif not in TURN_UPRIGHT:
        return image, None
    turned = image.transpose((TURN_BACK if is_tiff else TURN_UPRIGHT)[exif])
    views = {"upright": image, "stored": turned} if is_tiff else {"upright": turned, "stored": image}
    other = "stored" if orientation == "upright" else "upright"
    overruled = views[other].size == size != views[orientation].size
    way = other if overruled else orientation
    if size is None or not (overruled or views["upright"].size == views["stored"].size):
        return views[way], None
    start = OVERRULED_ORIENTATION if overruled else AMBIGUOUS_ORIENTATION
    return views[way], f"{start} {exif}: {'turned upright' if way == 'upright' else 'taken as stored'}"


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Convert an image to RGB. Also returns a remark if its values were scaled."""
    remark = None
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            what = f"integers from {low} to {high}: 0 to 65535 are read"
            raise DataError(f"the image has {what}; save it with 8 or 16 bits")
        bits = max(high.bit_length() + high.bit_length() % 2, 8)
        if high and bits < 16:
            remark = f"values of 16 bits or more that use at most {bits}, scaled by those {bits}"
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        smallest, largest = float(values.min()), float(values.max())
        if not (smallest >= 0 and largest <= 255):  # also NaN
            what = f"floats from {smallest:.4g} to {largest:.4g}: 0 to 1 or 0 to 255 are read"
            raise DataError(f"the image has {what}; scale them, or save it with 8 or 16 bits")
        if largest <= 1:
            remark = "floats from 0 to 1, scaled to 0 to 255"
            image = Image.fromarray((values * 255).round().astype(np.uint8))
    return image.convert("RGB"), remark
