"""Images of any kind as tensors, and batches of images of one size."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detector.data.images import Orientation, pil_to_rgb, read_image
from detector.errors import DataError

ImageLike = str | Path | Image.Image | np.ndarray | Tensor
BATCH_PIXELS = 2**25  # maximum number of pixels of a batch of several images: 400 MB as floats
T = TypeVar("T")


def image_tensor(image: ImageLike, *, orientation: Orientation = "upright", max_pixels: int | None = None) -> Tensor:
    """Convert an image of any kind to a tensor, see :meth:`~detector.pretrained.Detector.detect` for the arguments.

    Arrays may also be [H, W, 4] (alpha is dropped) or [H, W, 1]. PIL images of 16 bits or floats are scaled as
    :func:`~detector.data.images.read_image_with_remarks` says.

    Returns:
        [3, H, W], uint8.

    Raises:
        DataError: it cannot be read, or has another shape, dtype or range of values.
    """
    if isinstance(image, str | Path):
        return read_image(image, orientation=orientation, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        try:
            pixels, _ = pil_to_rgb(image, orientation=orientation)
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError) as error:  # Pillow opens lazily
            raise DataError(f"the PIL image cannot be read (broken or cut off): {error}") from None
    elif isinstance(image, np.ndarray):
        is_valid = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
        _check(image, is_valid, "[H, W, 3], [H, W, 4] or [H, W]", np.issubdtype(image.dtype, np.floating))
        # Copied: the array may be read-only, or of a byte order or precision that torch lacks.
        pixels = torch.from_numpy(np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32))
        pixels = pixels[None] if image.ndim == 2 else pixels.permute(2, 0, 1)[:3]
    elif isinstance(image, Tensor):
        is_valid = image.dim() == 3 and image.shape[0] in (1, 3)
        _check(image, is_valid, "[3, H, W] or [1, H, W]", image.is_floating_point())
        pixels = image.detach().cpu()
    else:
        raise DataError(f"an image must be a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    if pixels.numel() == 0:
        raise DataError(f"an image must have pixels, got {pixels.shape[2]} x {pixels.shape[1]}")
    if pixels.is_floating_point():
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= 0 and high <= 1):  # also NaN
            raise DataError(f"a float image must lie in 0..1 (RGB, not normalised), got {low:.4g} to {high:.4g}")
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).contiguous()


def _check(image: np.ndarray | Tensor, is_valid: bool, layout: str, is_float: bool) -> None:
    if not is_valid:
        hint = "; pass the images of a batch as list(batch)" if image.ndim == 4 else ""
        raise DataError(f"an image must be {layout}, got {list(image.shape)}{hint}")
    if not is_float and str(image.dtype).removeprefix("torch.") != "uint8":
        raise DataError(f"an image must be uint8, or float in 0..1, got {image.dtype}")


def batches_of_one_size(
    items: Iterable[T], pixels_of: Callable[[T], Tensor], max_items: int, max_pixels: int = BATCH_PIXELS
) -> Iterator[list[T]]:
    """Group neighbours whose images have the same size into batches, in order."""
    batch: list[T] = []
    for item in items:
        pixels = pixels_of(item)
        full = len(batch) == max_items or (len(batch) + 1) * pixels[0].numel() > max_pixels
        if batch and (full or pixels_of(batch[0]).shape != pixels.shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
