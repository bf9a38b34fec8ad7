"""Checks of an operator's arguments, which name the argument that is wrong."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, get_args

import torch
from torch import Tensor

from detector.crop.geometry import check_floating, geometry_dtype
from detector.crop.transforms import is_vmapped, makes_graph


@dataclass(frozen=True)
class Names:
    """The names of an operator's maps, RoIs and RoI columns in error messages."""

    maps: str = "input"
    rois: str = "boxes"
    columns: tuple[str, ...] = ("x1", "y1", "x2", "y2")


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """Return a value that is one of a ``Literal``'s."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
    return value


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return one or two integers (Python's or numpy's) as a pair, each at least 1."""
    try:
        first, second = (operator.index(n) for n in (value if isinstance(value, Sequence) else (value, value)))
    except (TypeError, ValueError):  # not integers, or not two
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}") from None
    if min(first, second) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return first, second


def split_rois(
    maps: Sequence[Tensor], rois: Tensor | Sequence[Tensor], spatial_scales: Sequence[float], names: Names = Names()
) -> tuple[Tensor, Tensor, list[int] | None]:
    """Check the types and shapes of an operator's arguments, but no values on a device.

    Returns:
        The image indices [K], the boxes [K, columns], and the number of RoIs per image if it is known.
    """
    for source, spatial_scale in zip(maps, spatial_scales):
        check_floating(names.maps, source)
        if source.dim() != 4 or source.shape[2] < 1 or source.shape[3] < 1:
            raise ValueError(f"{names.maps} must be [N, C, H, W], H and W at least 1, got {list(source.shape)}")
        if not 0 < spatial_scale < inf:
            raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}")
        if source.shape[:2] != maps[0].shape[:2] or source.device != maps[0].device:
            given = [(list(m.shape), str(m.device)) for m in maps]
            raise ValueError(f"maps must have the same N and C and be on one device, got {given}")
    images, name, columns, text = maps[0].shape[0], names.rois, len(names.columns), ", ".join(names.columns)
    indexed, plain = f"[K, {columns + 1}] (image index, {text})", f"[L, {columns}] ({text})"
    if isinstance(rois, Tensor):
        _check_shape(name, rois, maps[0], columns + 1, indexed)
        return rois[:, 0].detach(), rois[:, 1:], [rois.shape[0]] if images == 1 else None
    if not isinstance(rois, Sequence) or isinstance(rois, str):
        raise TypeError(f"{name} must be a {indexed} tensor or a sequence of {plain}, got {type(rois).__name__}")
    for i, image_boxes in enumerate(rois):
        _check_shape(f"{name}[{i}]", image_boxes, maps[0], columns, plain)
    if len(rois) > images:
        raise ValueError(f"{name} has {len(rois)} images, but {names.maps} has a batch of {images}")
    # len() would be baked into a traced graph.
    counts = [image_boxes.shape[0] for image_boxes in rois] + [0] * (images - len(rois))
    boxes = list(rois) or [maps[0].new_zeros(0, columns, dtype=geometry_dtype(maps[0]))]
    # int64, because bfloat16 boxes count exactly to 256 only.
    index = [torch.full_like(image_boxes[:, 0], i, dtype=torch.int64) for i, image_boxes in enumerate(boxes)]
    if len(boxes) == 1:  # joining would copy
        return index[0], boxes[0], counts
    return torch.cat(index), torch.cat(boxes), counts


def _check_shape(name: str, boxes: Tensor, input: Tensor, columns: int, shape: str) -> None:
    check_floating(name, boxes)
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(f"{name} must have shape {shape}, got {list(boxes.shape)}")
    if boxes.device != input.device:
        raise TypeError(f"{name} and the maps must be on one device, got {boxes.device} and {input.device}")


def check_values(
    source: Tensor, index: Tensor, boxes: Tensor, finite: Tensor, scales: Tensor, names: Names = Names()
) -> tuple[Tensor, Tensor | None]:
    """Check the values of RoIs where that costs nothing.

    Returns:
        Each RoI's image, [K] int64, and which RoIs are valid, [K]. ``None``: all are, as values were checked.
    """
    images = source.shape[0]
    known = (index >= 0) & (index < images)  # false for NaN
    if index.is_floating_point():
        known = known & (index == index.floor())
    image = torch.where(known, index, 0).long()
    # On a GPU a check would synchronise. Values do not exist while a graph is made.
    if boxes.device.type != "cpu" or makes_graph() or is_vmapped(boxes):
        return image, known & finite
    if not known.all():
        row = int((~known).nonzero()[0])
        raise ValueError(f"{names.rois}[{row}] has image index {index[row].item()}, but the batch has {images} images")
    if not finite.all():
        row = int((~finite).nonzero()[0])
        place = f"(RoI {row}, spatial_scale {scales[row].item():.6g})"
        raise ValueError(f"{names.rois} must be finite in map pixels, got {boxes[row].tolist()} {place}")
    return image, None


def finish(crops: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Set the crops [K, C, bins, bins] of invalid RoIs to NaN and convert to ``dtype``."""
    if valid is not None:
        crops = torch.where(valid[:, None, None, None], crops, torch.nan)
    return crops.to(dtype)
