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
class Names:
    """What an operator calls its maps, its RoIs, and the columns of an RoI, for error messages."""

    maps: str = "input"
    rois: str = "boxes"
    columns: str = "x1, y1, x2, y2"


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

    def windows(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return each bin's first sample that may be between two places [K], [K, bins], and their maximum, [K]; int64.

        This limits the cost of huge RoIs, with two samples of slack.
        """
        given = (self.extent, self.adaptive_counts(), low, high)
        extent, counts, low, high = (values.double()[:, None] for values in given)
        bin_size = extent / self.bins
        bin_start = self.start.double()[:, None] + torch.arange(self.bins, device=extent.device) * bin_size
        step = bin_size / counts.clamp(min=1)  # [K, 1], pixels between samples
        zero = torch.zeros_like(counts)
        first = (((low - bin_start) / step - 0.5).floor() - 2).nan_to_num().clamp(zero, counts)
        last = (((high - bin_start) / step - 0.5).ceil() + 3).nan_to_num().clamp(zero, counts)
        return first.long(), (last - first).amax(dim=1).long()

    def places(self, index: Tensor, counts: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places of samples in map pixels and in the crop frame (-1..1), and if they count, [K, bins, n]."""
        dtype = self.start.dtype
        bins = torch.arange(self.bins, dtype=dtype, device=self.start.device)[:, None]  # [bins, 1]
        limit = counts[:, None, None] if isinstance(counts, Tensor) else counts
        count = limit.clamp(min=1) if isinstance(limit, Tensor) else limit
        middle = index.to(dtype) + 0.5
        bin_size = (self.extent / self.bins)[:, None, None]
        # In roi_align's order of operations: samples of integer boxes lie exactly on the border.
        pixel = self.start[:, None, None] + bins * bin_size + middle * bin_size / count
        return pixel, (bins + middle / count) * (2 / self.bins) - 1, (index < limit).expand_as(pixel)

    def positions(self, index: Tensor, counts: Tensor | int) -> Tensor:
        """Return normalised positions [K, bins, n] of the samples at ``index``; OUTSIDE if they count as 0."""
        pixel, unit, counted = self.places(index, counts)
        size = self.size[:, None, None]
        on_map = (pixel >= -1) & (pixel <= size) & counted
        # A row of affine_grid written out: autocast would run its matrix product in bfloat16.
        return on_border(self.scale[:, None, None] * unit + self.shift[:, None, None], on_map, size)


@dataclass(frozen=True)
class Turn(Rows):
    """What rotated RoIs have besides their axes, which start at the centre and lie along the unrotated sides. [K]"""

    y_skew: Tensor  # theta's entries off the diagonal
    x_skew: Tensor
    y_centre: Tensor  # map pixels, without gradient, as the angle
    x_centre: Tensor
    angle: Tensor  # radians, counter-clockwise as seen
    reach: Tensor  # map pixels from the centre to the farthest corner of what counts as the map

    def positions(
        self, y_axis: Axis, x_axis: Axis, places: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return normalised y and x of samples, [K, bins y, n y, bins x, n x], from :meth:`Axis.places` of both."""
        y, v, y_counted = (rows[..., None, None] for rows in places[0])
        x, u, x_counted = (columns[..., None, None, :, :] for columns in places[1])

        def wide(values: Tensor) -> Tensor:
            return values.reshape(-1, 1, 1, 1, 1)

        cos, sin = wide(self.angle.cos()), wide(self.angle.sin())
        height, width = wide(y_axis.size), wide(x_axis.size)
        # In detectron2's order of operations.
        y_pixel = y * cos - x * sin + wide(self.y_centre)
        x_pixel = y * sin + x * cos + wide(self.x_centre)
        on_map = (y_pixel >= -1) & (y_pixel <= height) & (x_pixel >= -1) & (x_pixel <= width) & y_counted & x_counted
        y = wide(y_axis.scale) * v + wide(self.y_skew) * u + wide(y_axis.shift)
        x = wide(x_axis.scale) * u + wide(self.x_skew) * v + wide(x_axis.shift)
        return on_border(y, on_map, height), on_border(x, on_map, width)


def on_border(position: Tensor, on_map: Tensor, size: Tensor) -> Tensor:
    """Clamp normalised positions of samples to the centres of the edge pixels; OUTSIDE if they are not on the map."""
    # The centre minus a rounding error. On or beyond the centre, zero padding would give the slope from the pixel down
    # to 0 where the surface is flat.
    edge = (1 - 1 / size) * (1 - 4 * torch.finfo(position.dtype).eps)
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
    turn: Turn | None = None  # of rotated RoIs

    def positions(self, indices: Sequence[Tensor], counts: Sequence[Tensor | int]) -> Any:
        """Return normalised y and x of the samples at two indices, as :class:`Samples` has them."""
        axes = list(zip((self.y, self.x), indices, counts))
        if self.turn is None:
            return [axis.positions(index, count) for axis, index, count in axes]
        return self.turn.positions(self.y, self.x, [axis.places(index, count) for axis, index, count in axes])

    def windows(self) -> list[tuple[Tensor, Tensor]]:
        """Return :meth:`Axis.windows` of samples that may be on the map, of both axes."""
        if self.turn is None:
            return [axis.windows(torch.full_like(axis.size, -1), axis.size) for axis in (self.y, self.x)]
        return [axis.windows(-self.turn.reach, self.turn.reach) for axis in (self.y, self.x)]


@dataclass(frozen=True)
class Samples(Rows):
    """Sample positions of M of the K RoIs of a call, all with the same number of samples."""

    rois: Tensor | None  # [M] int64, which RoIs these are; None: all, in order
    level: Tensor  # [M] int64, index of the RoI's map; -1: none
    image: Tensor  # [M] int64, index in the batch
    # Normalised, differentiable: of the rows and columns of samples, or (rotated) of each sample in both.
    y: Tensor  # [M, bins, n] or [M, bins y, n y, bins x, n x]
    x: Tensor
    height: Tensor  # [M], pixels of the RoI's map
    width: Tensor  # [M]
    count: Tensor | int  # samples per bin, on the map or not, at least 1; [M] or one for all

    @property
    def divisor(self) -> int:
        return 1 if isinstance(self.count, Tensor) else self.count


def place_samples(rois: RoIs, sampling_ratio: int) -> list[Samples]:
    """Place ``sampling_ratio`` samples per bin and axis, or, at 0 or less, as many as the RoI's size asks for.

    The latter are in groups of RoIs with similar numbers, and synchronise on a GPU.
    """
    if sampling_ratio <= 0 and (rois.vmapped or torch.jit.is_tracing()):
        raise ValueError(f"{sampling_ratio=}: a sample count per box cannot be traced or vmapped; use one above 0")
    # Without RoIs, an empty result that stays in the graph.
    if sampling_ratio > 0 or rois.level.is_meta or not rois.level.numel():
        ratio = max(sampling_ratio, 1)
        index = torch.arange(ratio, device=rois.level.device)
        y, x = rois.positions((index, index), (ratio, ratio))
        return [Samples(None, rois.level, rois.image, y, x, rois.y.size, rois.x.size, ratio**2)]
    largest = torch.stack([most for _, most in rois.windows()], dim=1)
    samples = []
    for group, shape in group_by_size(largest):
        part = rois.select(group)
        counts = [part.y.adaptive_counts(), part.x.adaptive_counts()]
        indices = [f[..., None] + torch.arange(n, device=group.device) for (f, _), n in zip(part.windows(), shape)]
        y, x = part.positions(indices, counts)
        count = counts[0].mul(counts[1]).clamp(min=1)
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
    maps: Sequence[Tensor],
    rois: Tensor | Sequence[Tensor],
    spatial_scales: Sequence[float],
    names: Names = Names(),
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
    images, name, columns = maps[0].shape[0], names.rois, names.columns.count(",") + 1
    indexed, plain = f"[K, {columns + 1}] (image index, {names.columns})", f"[L, {columns}] ({names.columns})"
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
    source: Tensor,
    index: Tensor,
    boxes: Tensor,
    finite: Tensor,
    scales: Tensor,
    names: Names = Names(),
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
    level = torch.zeros_like(index, dtype=torch.int64) if level_of is None else level_of(corners.detach())
    scales = _of_level(level, spatial_scales, corners.to(geometry_dtype(*maps, corners)))
    y, x, finite = _axes(corners.to(scales.dtype), level, scales, maps, bins, aligned)
    image, valid = check_values(maps[0], index, corners, finite, scales)
    return RoIs(y, x, level, image, counts, valid, is_vmapped(corners))


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
