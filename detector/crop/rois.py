"""Checks of maps and boxes, and the place of every RoI on its map. Shared by all crops."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from detector.crop.geometry import geometry_dtype
from detector.crop.positions import Axis, is_vmapped, makes_graph, roi_axes


@dataclass(frozen=True)
class RoIs:
    """K RoIs of one call, on maps of one or several sizes."""

    y: Axis
    x: Axis
    level: Tensor  # [K] int64, which map the RoI is cropped from; -1: none
    image: Tensor  # [K] int64, index in the batch
    counts: list[int] | None  # RoIs per image, if known without reading values; the RoIs are then in image order
    valid: Tensor | None  # [K]; None: all are, as values were checked
    vmapped: bool  # torch.vmap runs over the boxes

    def finish(self, crops: Tensor, dtype: torch.dtype) -> Tensor:
        """Set the crops [K, C, bins, bins] of invalid RoIs to NaN and convert to ``dtype``."""
        if self.valid is not None:
            crops = torch.where(self.valid[:, None, None, None], crops, torch.nan)
        return crops.to(dtype)


def place_rois(
    maps: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    level_of: Callable[[Tensor], Tensor] | None,
    bins: tuple[int, int],
    spatial_scales: Sequence[float],
    aligned: bool,
) -> RoIs:
    """Check the arguments of a crop and place its RoIs on the maps.

    Args:
        maps: one [N, C, H, W] per level, all with the same N and C.
        boxes: see :func:`~detector.affine_crop`.
        level_of: maps corners [K, 4] to level indices [K], int64; -1: no level. ``None``: a single map.
        bins: height and width of the crop.
        spatial_scales: map pixels per image pixel, one per level.
        aligned: see :func:`~detector.affine_crop`.

    Raises:
        TypeError, ValueError: see :func:`~detector.affine_crop`.
    """
    for source, spatial_scale in zip(maps, spatial_scales):
        _check_map(source, spatial_scale)
        if source.shape[:2] != maps[0].shape[:2] or source.device != maps[0].device:
            given = [(list(m.shape), str(m.device)) for m in maps]
            raise ValueError(f"maps must have the same N and C and be on one device, got {given}")
    index, corners, counts = _split_boxes(maps[0], boxes)
    images = maps[0].shape[0]
    known = (index >= 0) & (index < images)  # false for NaN
    if index.is_floating_point():
        known = known & (index == index.floor())
    vmapped = is_vmapped(corners)
    # On a GPU a check would synchronise. Values do not exist while a graph is made.
    checked = corners.device.type == "cpu" and not makes_graph() and not vmapped
    if checked:
        _check_values(index, known, corners, images)
    image = torch.where(known, index, 0).long()
    level = torch.zeros_like(image) if level_of is None else level_of(corners.detach())
    corners = corners.to(geometry_dtype(*maps, corners))
    sizes = [(source.shape[2], source.shape[3]) for source in maps]
    y, x, finite = roi_axes(corners, level, sizes, bins, spatial_scales, aligned)
    if checked and not finite.all():
        row = int((~finite).nonzero()[0])
        scale = spatial_scales[max(int(level[row]), 0)]
        raise ValueError(f"boxes must be finite in map pixels, got {corners[row].tolist()} at spatial_scale {scale}")
    return RoIs(y, x, level, image, counts, None if checked else known & finite, vmapped)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return one or two integers (Python's or numpy's) as a pair, each at least 1."""
    try:
        first, second = (operator.index(n) for n in (value if isinstance(value, Sequence) else (value, value)))
    except (TypeError, ValueError):  # not integers, or not two
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}") from None
    if min(first, second) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return first, second


def _split_boxes(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int] | None]:
    """Check the boxes; return image indices [K], corners [K, 4], and the RoIs per image if known."""
    images = input.shape[0]
    counts = None
    if isinstance(boxes, Tensor):
        _check_boxes("boxes", boxes, input, 5, "[K, 5] (image index, x1, y1, x2, y2)")
        index, corners = boxes[:, 0].detach(), boxes[:, 1:]
        if images == 1:
            counts = [boxes.shape[0]]
    elif isinstance(boxes, Sequence) and not isinstance(boxes, str):
        for i, image_boxes in enumerate(boxes):
            _check_boxes(f"boxes[{i}]", image_boxes, input, 4, "[L, 4] (x1, y1, x2, y2)")
        if len(boxes) > images:
            raise ValueError(f"boxes has {len(boxes)} images, but input has a batch of {images}")
        # len() would be baked into a traced graph.
        counts = [image_boxes.shape[0] for image_boxes in boxes] + [0] * (images - len(boxes))
        corners = torch.cat(list(boxes)) if boxes else input.new_zeros(0, 4, dtype=geometry_dtype(input))
        # int64, because bfloat16 boxes count exactly to 256 only.
        of_image = [torch.full_like(image_boxes[:, 0], i, dtype=torch.int64) for i, image_boxes in enumerate(boxes)]
        index = torch.cat(of_image or [corners.new_zeros(0, dtype=torch.int64)])
    else:
        raise TypeError(f"boxes must be a [K, 5] tensor or a sequence of [L, 4] tensors, got {type(boxes).__name__}")
    return index, corners, counts


def _check_map(input: Tensor, spatial_scale: float) -> None:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        kind = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"input must be a floating point tensor, got {kind}")
    if input.dim() != 4:
        raise ValueError(f"input must have shape [N, C, H, W], got {list(input.shape)}")
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"input must be at least one pixel high and wide, got shape {list(input.shape)}")
    if not 0 < spatial_scale < inf:
        raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}")


def _check_boxes(name: str, boxes: Tensor, input: Tensor, columns: int, shape: str) -> None:
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        kind = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(f"{name} must have shape {shape}, got {list(boxes.shape)}")
    if boxes.device != input.device:
        raise TypeError(f"{name} and input must be on one device, got {boxes.device} and {input.device}")


def _check_values(index: Tensor, known: Tensor, corners: Tensor, images: int) -> None:
    if not known.all():
        row = int((~known).nonzero()[0])
        raise ValueError(f"boxes[{row}] has image index {index[row].item()}, but input has a batch of {images}")
    finite = torch.isfinite(corners).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"boxes must be finite, got {corners[row].tolist()} (RoI {row})")
