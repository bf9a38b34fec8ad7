"""Boxes, the normalised frame and the affine matrix theta.

The normalised frame is that of ``grid_sample`` with ``align_corners=False``, from -1 to 1 between a map's outer edges.
"""

from math import pi
from typing import Any

import torch
from torch import Tensor

RADIANS = pi / 180  # of a degree; ONNX has no deg2rad


def geometry_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor has it, otherwise float32: in half precision coordinates would be off by pixels."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def normalize_boxes(boxes: Tensor, size: tuple[int, int], spatial_scale: float = 1.0, aligned: bool = True) -> Tensor:
    """Convert boxes from image pixels to the normalised frame of a map. Differentiable.

    Args:
        boxes: [..., 4], (x1, y1, x2, y2) in image pixels; inverted boxes stay inverted. Or rotated boxes [..., 5],
            (centre x, centre y, width, height, angle); the angle, in degrees, does not change.
        size: (height, width) of the map that will be sampled: an image, or a feature map.
        spatial_scale: map pixels per image pixel, 1/16 for a feature map of stride 16.
        aligned: ``True``: pixel ``i`` of the image covers ``[i, i + 1]``. ``False``: as in
            ``torchvision.ops.roi_align(aligned=False)``, half a map pixel further right and down.

    Returns:
        The shape of ``boxes``, normalised; float64 if ``boxes`` is, otherwise float32.

    Raises:
        TypeError, ValueError: ``boxes`` has another shape or is not floating point, or a size or the scale is not
            positive.

    Example:
        >>> normalize_boxes(torch.tensor([0.0, 0.0, 320.0, 120.0]), (240, 320))  # the upper half of an image
        tensor([-1., -1.,  1.,  0.])
    """
    _check_frame(boxes, size, spatial_scale)
    return boxes_in_frame(boxes.to(geometry_dtype(boxes)), size[0], size[1], spatial_scale, aligned)


def denormalize_boxes(boxes: Tensor, size: tuple[int, int], spatial_scale: float = 1.0, aligned: bool = True) -> Tensor:
    """Convert boxes from the normalised frame to image pixels: the inverse of :func:`normalize_boxes`.

    Arguments are those of :func:`normalize_boxes`, but ``boxes`` is normalised.

    Example:
        >>> denormalize_boxes(torch.tensor([-1.0, -1.0, 1.0, 0.0]), (240, 320)).round()
        tensor([  0.,   0., 320., 120.])
    """
    _check_frame(boxes, size, spatial_scale)
    lines = _lines(boxes.shape[-1], size[0], size[1], spatial_scale, aligned)
    columns = boxes.to(geometry_dtype(boxes)).unbind(-1)
    return torch.stack([(column - shift) / factor for column, (factor, shift) in zip(columns, lines)], dim=-1)


def boxes_in_frame(
    boxes: Tensor, height: int | Tensor, width: int | Tensor, spatial_scale: float | Tensor, aligned: bool
) -> Tensor:
    """:func:`normalize_boxes` without checks. Sizes and scale are numbers, or tensors [K] that differ by RoI."""
    lines = _lines(boxes.shape[-1], height, width, spatial_scale, aligned)
    return torch.stack([column * factor + shift for column, (factor, shift) in zip(boxes.unbind(-1), lines)], dim=-1)


def _lines(columns: int, height: Any, width: Any, spatial_scale: Any, aligned: bool) -> list[tuple[Any, Any]]:
    """Return the factor and shift from pixels to the normalised frame of each column of a box."""
    # Numbers stay numbers: copying them to a GPU would synchronise.
    places = [(2 * spatial_scale / pixels, (0.0 if aligned else 1.0) / pixels - 1) for pixels in (width, height)]
    if columns == 4:
        return places * 2
    return [*places, *((factor, 0.0) for factor, _ in places), (1.0, 0.0)]


def boxes_to_theta(boxes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Convert normalised boxes to the affine matrices that crop them. Differentiable.

    theta maps the unit crop frame onto the box (Jaderberg et al., "Spatial Transformer Networks", 2015, equation 1).
    For (x1, y1, x2, y2) it is [[(x2 - x1) / 2, 0, (x2 + x1) / 2], [0, (y2 - y1) / 2, (y2 + y1) / 2]], which maps
    (-1, -1) to (x1, y1) and (1, 1) to (x2, y2). A rotated box also fills the entries off the diagonal.

    Args:
        boxes: [K, 4], (x1, y1, x2, y2) in the normalised frame; or rotated boxes [K, 5], see :func:`normalize_boxes`.
            Positive angles, in degrees, turn a box counter-clockwise as seen.
        size: (height, width) of the map. Rotated boxes need it, as the frame of a map that is not square is stretched.

    Returns:
        [K, 2, 3] for ``affine_grid(theta, size, align_corners=False)``; float64 if ``boxes`` is, otherwise float32.

    Raises:
        TypeError, ValueError: ``boxes`` is not [K, 4], or [K, 5] with a size, and floating point.

    Example:
        >>> boxes_to_theta(torch.tensor([[-1.0, -1.0, 1.0, 0.0]]))
        tensor([[[ 1.0000,  0.0000,  0.0000],
                 [ 0.0000,  0.5000, -0.5000]]])
    """
    check_floating("boxes", boxes)
    if boxes.dim() != 2 or boxes.shape[1] != (4 if size is None else 5):
        raise ValueError(f"boxes must be [K, 4], or rotated [K, 5] with size; got {list(boxes.shape)} and {size=}")
    columns = boxes.to(geometry_dtype(boxes)).unbind(1)
    zero = torch.zeros_like(columns[0])
    if size is None:
        x1, y1, x2, y2 = columns
        theta = [(x2 - x1) / 2, zero, (x2 + x1) / 2, zero, (y2 - y1) / 2, (y2 + y1) / 2]
    else:
        x, y, width, height, angle = columns
        cos, sin, aspect = (angle * RADIANS).cos(), (angle * RADIANS).sin(), size[1] / size[0]
        theta = [width / 2 * cos, height / 2 * sin / aspect, x, -width / 2 * sin * aspect, height / 2 * cos, y]
    return torch.stack(theta, dim=1).view(-1, 2, 3)


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")


def _check_frame(boxes: Tensor, size: tuple[int, int], spatial_scale: float) -> None:
    check_floating("boxes", boxes)
    if boxes.dim() < 1 or boxes.shape[-1] not in (4, 5):
        raise ValueError(f"boxes must have shape [..., 4] (x1, y1, x2, y2) or [..., 5], got {list(boxes.shape)}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width), both at least 1, got {tuple(size)}")
    if not spatial_scale > 0:
        raise ValueError(f"spatial_scale must be positive, got {spatial_scale}")
