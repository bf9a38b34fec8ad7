"""RoIs: checks, their place on the maps, and sample positions, one axis at a time.

The rules are those of ``torchvision.ops.roi_align`` (He et al., "Mask R-CNN", 2017, section 3, and the C++ kernel):

* a bin is cut into equal parts, with one sample in the middle of each;
* a sample more than one pixel outside the map (position < -1 or > size) counts as zero;
* any other sample is clamped to [0, size - 1], the centres of the first and last pixel.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Self

import torch
from torch import Tensor
from torchvision.ops.boxes import box_area
from torchvision.ops.poolers import LevelMapper

from detector.crop.geometry import boxes_in_frame, boxes_to_theta, check_floating, geometry_dtype

# Normalised position of samples that count as zero, more than a pixel outside any map: grid_sample then reads nothing.
OUTSIDE = 3.0


class Rows:
    """Base of frozen dataclasses whose tensors have one row per RoI."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""
        rows = {name: value for name, value in vars(self).items() if isinstance(value, (Tensor, Rows))}
        mapped = {name: function(row) if isinstance(row, Tensor) else row.map(function) for name, row in rows.items()}
        return replace(self, **mapped)  # type: ignore[type-var]

    def select(self, rois: slice | Tensor) -> Self:
        return self.map(lambda rows: rows[rois])


@dataclass(frozen=True)
class Axis(Rows):
    """One axis (x or y) of K RoIs. Start and extent decide what is outside the map; scale and shift place samples."""

    start: Tensor  # [K], map pixels, without gradient, rounded as in roi_align
    extent: Tensor  # [K], map pixels, without gradient, rounded as in roi_align
    scale: Tensor  # [K], theta's entry for this axis
    shift: Tensor  # [K], theta's translation
    size: Tensor  # [K], pixels of the RoI's map, in the dtype of the others
    bins: int

    def adaptive_counts(self) -> Tensor:
        """Return the samples per bin at ``sampling_ratio <= 0``, [K]: ceil(extent / bins), 0 for an empty side."""
        return (self.extent / self.bins).ceil().clamp(min=0)

    def windows(self) -> tuple[Tensor, Tensor]:
        """Return each bin's first sample that may be on the map, [K, bins], and their maximum, [K]; int64."""
        # Limits the cost of huge RoIs, with two samples of slack.
        extent, size, counts = (values.double()[:, None] for values in (self.extent, self.size, self.adaptive_counts()))
        bin_size = extent / self.bins
        bin_start = self.start.double()[:, None] + torch.arange(self.bins, device=extent.device) * bin_size
        step = bin_size / counts.clamp(min=1)  # [K, 1], pixels between samples
        zero = torch.zeros_like(counts)
        first = (((-1 - bin_start) / step - 0.5).floor() - 2).nan_to_num().clamp(zero, counts)
        last = (((size - bin_start) / step - 0.5).ceil() + 3).nan_to_num().clamp(zero, counts)
        return first.long(), (last - first).amax(dim=1).long()

    def positions(self, index: Tensor, counts: Tensor | int) -> Tensor:
        """Return normalised positions [K, bins, n] of the samples at ``index``; OUTSIDE if they count as 0."""
        dtype = self.start.dtype
        bins = torch.arange(self.bins, dtype=dtype, device=self.start.device)[:, None]  # [bins, 1]
        limit = counts[:, None, None] if isinstance(counts, Tensor) else counts
        count = limit.clamp(min=1) if isinstance(limit, Tensor) else limit
        size = self.size[:, None, None]
        middle = index.to(dtype) + 0.5
        bin_size = (self.extent / self.bins)[:, None, None]
        # In roi_align's order of operations: samples of integer boxes lie exactly on the border.
        pixel = self.start[:, None, None] + bins * bin_size + middle * bin_size / count  # [K, bins, n]
        on_map = (pixel >= -1) & (pixel <= size) & (index < limit)

        unit = (bins + middle / count) * (2 / self.bins) - 1  # the sample in the crop frame, -1..1
        # A row of affine_grid written out: autocast would run its matrix product in bfloat16.
        position = self.scale[:, None, None] * unit + self.shift[:, None, None]
        # The centre of the edge pixel minus a rounding error. On or beyond the centre, zero padding would give the
        # slope from the pixel down to 0 where the surface is flat.
        edge = (1 - 1 / size) * (1 - 4 * torch.finfo(dtype).eps)
        position = torch.where(position.abs() < edge, position, position.detach().clamp(-edge, edge))
        return torch.where(on_map, position, OUTSIDE)


@dataclass(frozen=True)
class Levels:
    """The levels of a pyramid (Lin et al., "Feature Pyramid Networks", 2017, equation 1). They carry no gradient."""

    first: Any  # the logarithm of the stride of the first level; a tensor while ONNX is traced
    last: Any
    canonical_scale: int  # box size, in image pixels, of canonical_level
    canonical_level: int

    def __call__(self, corners: Tensor) -> Tensor:
        """Return each RoI's level: -1 for a negative area, as in torchvision, and 0 for boxes that are not finite."""
        corners = corners.to(geometry_dtype(corners))
        mapper = LevelMapper(self.first, self.last, self.canonical_scale, self.canonical_level)
        level = torch.where(box_area(corners) < 0, -1, mapper([corners.nan_to_num()]))
        return torch.where(torch.isfinite(corners).all(dim=1), level, 0)

    def least_areas(self) -> list[float]:
        """Return the least area, in image pixels, of boxes on each level but the first. Infinite: there is none."""
        exponents = [level - self.canonical_level - 1e-6 for level in range(self.first + 1, self.last + 1)]
        return [(self.canonical_scale * 2.0**e) ** 2 for e in exponents] or [inf]  # 1e-6 is LevelMapper's eps


@dataclass(frozen=True)
class RoIs(Rows):
    """The K RoIs of one call, on maps of one or several sizes."""

    y: Axis
    x: Axis
    level: Tensor  # [K] int64, index of the RoI's map; -1: none
    image: Tensor  # [K] int64, index in the batch
    counts: list[int] | None  # RoIs per image, if known without reading values; the RoIs are then in image order
    valid: Tensor | None  # [K]; None: all are, as values were checked
    vmapped: bool  # torch.vmap runs over the boxes

    def finish(self, crops: Tensor, dtype: torch.dtype) -> Tensor:
        """Set the crops [K, C, bins, bins] of invalid RoIs to NaN and convert to ``dtype``."""
        if self.valid is not None:
            crops = torch.where(self.valid[:, None, None, None], crops, torch.nan)
        return crops.to(dtype)


@dataclass(frozen=True)
class Samples(Rows):
    """Sample positions of M of the K RoIs of a call, all with the same number of samples."""

    rois: Tensor | None  # [M] int64, which RoIs these are; None: all, in order
    level: Tensor  # [M] int64, index of the RoI's map; -1: none
    image: Tensor  # [M] int64, index in the batch
    y: Tensor  # [M, bins, n], normalised positions of the rows of samples, differentiable
    x: Tensor  # [M, bins, n], and of the columns
    height: Tensor  # [M], pixels of the RoI's map
    width: Tensor  # [M]
    count: Tensor | int  # samples per bin, on the map or not, at least 1; [M] or one for all

    @property
    def divisor(self) -> int:
        return 1 if isinstance(self.count, Tensor) else self.count


def fixed_samples(rois: RoIs, sampling_ratio: int) -> Samples:
    """Place ``sampling_ratio`` samples per bin and axis for every RoI."""
    index = torch.arange(sampling_ratio, device=rois.level.device)
    y, x = (axis.positions(index, sampling_ratio) for axis in (rois.y, rois.x))
    return Samples(None, rois.level, rois.image, y, x, rois.y.size, rois.x.size, sampling_ratio**2)


def adaptive_samples(rois: RoIs) -> list[Samples]:
    """Place samples by the RoI's size, in groups of RoIs with similar numbers. Synchronises on a GPU."""
    if rois.level.is_meta or not rois.level.numel():  # without RoIs, an empty result that stays in the graph
        return [fixed_samples(rois, 1)]
    largest = torch.stack([axis.windows()[1] for axis in (rois.y, rois.x)], dim=1)
    samples = []
    for group, shape in group_by_size(largest):
        part = rois.select(group)
        y, x = (
            axis.positions(axis.windows()[0][..., None] + torch.arange(n, device=group.device), axis.adaptive_counts())
            for axis, n in zip((part.y, part.x), shape)
        )
        count = (part.y.adaptive_counts() * part.x.adaptive_counts()).clamp(min=1)
        samples.append(Samples(group, part.level, part.image, y, x, part.y.size, part.x.size, count))
    return samples


def group_by_size(sizes: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Group RoIs by their numbers of rows and columns, [K, 2], rounded up to powers of two to keep the groups few."""
    sizes = (2.0 ** sizes.clamp(min=1).log2().ceil()).long()
    groups, group_of = sizes.unique(dim=0, return_inverse=True)
    return [(torch.where(group_of == number)[0], group) for number, group in enumerate(groups.tolist())]


def makes_graph() -> bool:
    """Return whether a graph is being compiled or traced (for ONNX too), so that values must not be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def makes_standard_graph() -> bool:
    """Return whether a graph is traced or exported, which should have PyTorch's own operators only."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_vmapped(tensor: Tensor) -> bool:
    """Return whether ``torch.vmap`` runs over this tensor itself, so that its values must not be read."""
    if torch.compiler.is_compiling():
        return False
    # PyTorch has no public function for this; torch.cond and tensor printing use these.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)  # a wrapper of grad, perhaps around one of vmap
    return False


def is_wrapped(tensor: Any) -> bool:
    """Return whether a tensor is wrapped by ``torch.func`` or ``torch.vmap``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


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
    maps: Sequence[Tensor], boxes: Tensor | Sequence[Tensor], spatial_scales: Sequence[float]
) -> tuple[Tensor, Tensor, list[int] | None]:
    """Check the types and shapes of a crop's arguments, but no values on a device.

    Returns:
        The image indices [K], the corners [K, 4], and the number of RoIs per image if it is known.
    """
    for source, spatial_scale in zip(maps, spatial_scales):
        check_floating("input", source)
        if source.dim() != 4 or source.shape[2] < 1 or source.shape[3] < 1:
            raise ValueError(f"input must be [N, C, H, W], H and W at least 1, got {list(source.shape)}")
        if not 0 < spatial_scale < inf:
            raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}")
        if source.shape[:2] != maps[0].shape[:2] or source.device != maps[0].device:
            given = [(list(m.shape), str(m.device)) for m in maps]
            raise ValueError(f"maps must have the same N and C and be on one device, got {given}")
    return _split_boxes(maps[0], boxes)


def place_rois(
    maps: Sequence[Tensor],
    index: Tensor,
    corners: Tensor,
    counts: list[int] | None,
    level_of: Callable[[Tensor], Tensor] | None,
    bins: tuple[int, int],
    spatial_scales: Sequence[float],
    aligned: bool,
) -> RoIs:
    """Place the RoIs of :func:`split_rois`, and check their values where that costs nothing.

    ``level_of`` returns the level of corners, or -1 for none; ``None`` if there is one level.
    """
    images = maps[0].shape[0]
    known = (index >= 0) & (index < images)  # false for NaN
    if index.is_floating_point():
        known = known & (index == index.floor())
    image = torch.where(known, index, 0).long()
    level = torch.zeros_like(image) if level_of is None else level_of(corners.detach())
    scales = _of_level(level, spatial_scales, corners.to(geometry_dtype(*maps, corners)))
    y, x, finite = _axes(corners.to(scales.dtype), level, scales, maps, bins, aligned)
    vmapped = is_vmapped(corners)
    # On a GPU a check would synchronise. Values do not exist while a graph is made.
    if corners.device.type != "cpu" or makes_graph() or vmapped:
        return RoIs(y, x, level, image, counts, known & finite, vmapped)
    if not known.all():
        row = int((~known).nonzero()[0])
        raise ValueError(f"boxes[{row}] has image index {index[row].item()}, but input has a batch of {images}")
    if not finite.all():
        row = int((~finite).nonzero()[0])
        place = f"(RoI {row}, spatial_scale {spatial_scales[max(int(level[row]), 0)]})"
        raise ValueError(f"boxes must be finite in map pixels, got {corners[row].tolist()} {place}")
    return RoIs(y, x, level, image, counts, None, vmapped)


def _split_boxes(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int] | None]:
    images = input.shape[0]
    if isinstance(boxes, Tensor):
        _check_boxes("boxes", boxes, input, 5, "[K, 5] (image index, x1, y1, x2, y2)")
        return boxes[:, 0].detach(), boxes[:, 1:], [boxes.shape[0]] if images == 1 else None
    if not isinstance(boxes, Sequence) or isinstance(boxes, str):
        raise TypeError(f"boxes must be a [K, 5] tensor or a sequence of [L, 4] tensors, got {type(boxes).__name__}")
    for i, image_boxes in enumerate(boxes):
        _check_boxes(f"boxes[{i}]", image_boxes, input, 4, "[L, 4] (x1, y1, x2, y2)")
    if len(boxes) > images:
        raise ValueError(f"boxes has {len(boxes)} images, but input has a batch of {images}")
    # len() would be baked into a traced graph.
    counts = [image_boxes.shape[0] for image_boxes in boxes] + [0] * (images - len(boxes))
    corners = list(boxes) or [input.new_zeros(0, 4, dtype=geometry_dtype(input))]
    # int64, because bfloat16 boxes count exactly to 256 only.
    index = [torch.full_like(image_boxes[:, 0], i, dtype=torch.int64) for i, image_boxes in enumerate(corners)]
    if len(corners) == 1:  # joining would copy
        return index[0], corners[0], counts
    return torch.cat(index), torch.cat(corners), counts


def _check_boxes(name: str, boxes: Tensor, input: Tensor, columns: int, shape: str) -> None:
    check_floating(name, boxes)
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(f"{name} must have shape {shape}, got {list(boxes.shape)}")
    if boxes.device != input.device:
        raise TypeError(f"{name} and input must be on one device, got {boxes.device} and {input.device}")


def _axes(
    corners: Tensor, level: Tensor, scale: Tensor, maps: Sequence[Tensor], bins: tuple[int, int], aligned: bool
) -> tuple[Axis, Axis, Tensor]:
    """Return the y and x axes of RoIs, and which RoIs are finite in map pixels, [K]; the others are placed at 0."""
    height, width = (_of_level(level, [source.shape[axis] for source in maps], corners) for axis in (2, 3))
    pixels = corners.detach() * scale[:, None] - (0.5 if aligned else 0.0)
    start, end = pixels.split(2, dim=1)
    extent = end - start
    if not aligned:
        extent = extent.clamp(min=1)
        corners = torch.cat([corners[:, :2], torch.maximum(corners[:, 2:], corners[:, :2] + 1 / scale[:, None])], 1)
    theta = boxes_to_theta(boxes_in_frame(corners, height, width, scale, aligned))
    finite = torch.isfinite(torch.cat([pixels, extent, theta.detach().flatten(1)], dim=1)).all(dim=1)
    # Nothing may be computed from NaN: NaN times zero is NaN, in gradients too.
    theta = torch.where(finite[:, None, None], theta, 0.0)
    start, extent = torch.where(finite[:, None], start, 0.0), torch.where(finite[:, None], extent, 1.0)
    y = Axis(start[:, 1], extent[:, 1], theta[:, 1, 1], theta[:, 1, 2], height, bins[0])
    x = Axis(start[:, 0], extent[:, 0], theta[:, 0, 0], theta[:, 0, 2], width, bins[1])
    return y, x, finite


def _of_level(level: Tensor, values: Sequence[float], like: Tensor) -> Tensor:
    """Return the value of each RoI's level, [K], without copying a tensor to a GPU, which would synchronise."""
    chosen = like.new_full(level.shape, values[0])
    for number, value in enumerate(values[1:], 1):
        chosen = torch.where(level == number, value, chosen)
    return chosen
