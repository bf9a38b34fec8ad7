"""Images of any kind as tensors, and batches of one size of them."""

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
BATCH_PIXELS = 2**25  # of a batch of more than one image: 400 MB as floats
T = TypeVar("T")


def image_tensor(image: ImageLike, *, orientation: Orientation = "upright", max_pixels: int | None = None) -> Tensor:
    """An image of any kind as a tensor.

    Args:
        image: a path; a PIL image of any mode; an array [H, W, 3], [H, W, 4] (alpha is dropped), [H, W, 1] or
            [H, W]; or a tensor [3, H, W] or [1, H, W]. Arrays and tensors are uint8, or float in 0..1; RGB. Images at
            paths and PIL images of 16 bits or floats are scaled as :func:`~detector.data.images.read_image` says.
        orientation: "upright": images at paths and PIL images are turned upright by their EXIF orientation, as a viewer
            does; "stored": they are not.
        max_pixels: the most that the image at a path may have; ``None``: Pillow's ``Image.MAX_IMAGE_PIXELS``.

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
        except (OSError, SyntaxError, ValueError) as error:  # it was opened, and is read only now
            raise DataError(f"the PIL image cannot be read (broken or cut off): {error}") from None
    elif isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise DataError(f"an image array must be [H, W, 3], [H, W, 4] or [H, W], got {_shape(image)}")
        if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
            raise DataError(f"an image array must be uint8, or float in 0..1, got {image.dtype}")
        # A copy: the array may be read-only, and of a byte order or a width that torch lacks.
        channels_last = torch.from_numpy(np.array(image, np.uint8 if image.dtype == np.uint8 else np.float32))
        pixels = channels_last[None] if image.ndim == 2 else channels_last.permute(2, 0, 1)[:3]
    elif isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise DataError(f"an image tensor must be [3, H, W] or [1, H, W], got {_shape(image)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise DataError(f"an image tensor must be uint8, or float in 0..1, got {image.dtype}")
        pixels = image.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels
    else:
        raise DataError(f"an image must be a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    if pixels.numel() == 0:
        raise DataError(f"an image must have pixels, got {pixels.shape[2]} x {pixels.shape[1]} of them")
    if pixels.is_floating_point():
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= 0 and high <= 1):  # also NaN
            raise DataError(f"a float image must lie in 0..1 (RGB, not normalised), got {low:.4g} to {high:.4g}")
        pixels = (pixels * 255).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).contiguous()


def batches_of_one_size(
    items: Iterable[T], pixels_of: Callable[[T], Tensor], most: int, most_pixels: int = BATCH_PIXELS
) -> Iterator[list[T]]:
    """Neighbours whose images have one size together, in order, at most so many, and pixels, at a time."""
    batch: list[T] = []
    for item in items:
        pixels = pixels_of(item)
        if batch and (
            len(batch) == most
            or pixels_of(batch[0]).shape != pixels.shape
            or (len(batch) + 1) * pixels[0].numel() > most_pixels
        ):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _shape(images: np.ndarray | Tensor) -> str:
    return f"{list(images.shape)}" + ("; give the images of a batch as list(batch)" if images.ndim == 4 else "")
