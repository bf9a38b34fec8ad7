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
    :func:`~detector.data.images.read_image` says.

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
        pixels = _array_pixels(image)
    elif isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise DataError(f"an image tensor must be [3, H, W] or [1, H, W], got {_shape(image)}")
        _refuse_dtype("tensor", image.dtype, image.dtype == torch.uint8 or image.is_floating_point())
        pixels = image.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels
    else:
        raise DataError(f"an image must be a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    if pixels.numel() == 0:
        raise DataError(f"an image must have pixels, got {pixels.shape[2]} x {pixels.shape[1]}")
    if pixels.is_floating_point():
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= 0 and high <= 1):  # also NaN
            raise DataError(f"a float image must lie in 0..1 (RGB, not normalised), got {low:.4g} to {high:.4g}")
        pixels = (pixels * 255).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).contiguous()


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


def _array_pixels(image: np.ndarray) -> Tensor:
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise DataError(f"an image array must be [H, W, 3], [H, W, 4] or [H, W], got {_shape(image)}")
    _refuse_dtype("array", image.dtype, image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating))
    # Copied: the array may be read-only, or of a byte order or precision that torch lacks.
    pixels = torch.from_numpy(np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32))
    return pixels[None] if image.ndim == 2 else pixels.permute(2, 0, 1)[:3]


def _refuse_dtype(kind: str, dtype: np.dtype | torch.dtype, fits: bool) -> None:
    if not fits:
        raise DataError(f"an image {kind} must be uint8, or float in 0..1, got {dtype}")


def _shape(images: np.ndarray | Tensor) -> str:
    return f"{list(images.shape)}" + ("; pass the images of a batch as list(batch)" if images.ndim == 4 else "")
