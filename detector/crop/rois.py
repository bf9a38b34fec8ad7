"""RoIs: their place on the maps, and sample positions, one axis at a time.

A bin is cut into equal parts, with one sample in the middle of each. The border rules are those of the C++ kernel of
``torchvision.ops.roi_align``; see :func:`.affine_crop`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from detector.crop.arguments import check_values
from detector.crop.geometry import boxes_in_frame, boxes_to_theta, geometry_dtype
from detector.crop.transforms import is_vmapped

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

    def windows(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bins' first samples that may lie between two places, [K, bins], and their largest number, [K]."""
        # Limits the cost of huge RoIs, with two samples of slack.
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
    """The rotation of K RoIs, each field [K]. Their axes run along the unrotated sides, with 0 at the centre."""

    y_skew: Tensor  # theta's entries off the diagonal
    x_skew: Tensor
    y_centre: Tensor  # map pixels, without gradient, as the angle
    x_centre: Tensor
    angle: Tensor  # radians, counter-clockwise as seen
    reach: Tensor  # map pixels, at least from the centre to the farthest corner of what counts as the map

    def positions(
        self, y_axis: Axis, x_axis: Axis, places: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return normalised y and x of samples, [K, bins y, n y, bins x, n x], from :meth:`Axis.places` of both."""
        y, v, y_counted = (values[..., None, None] for values in places[0])
        x, u, x_counted = (values[..., None, None, :, :] for values in places[1])
        turn, rows, columns = self.map(_wide), y_axis.map(_wide), x_axis.map(_wide)
        cos, sin, height, width = turn.angle.cos(), turn.angle.sin(), rows.size, columns.size
        # In detectron2's order of operations.
        y_pixel, x_pixel = y * cos - x * sin + turn.y_centre, y * sin + x * cos + turn.x_centre
        on_map = (y_pixel >= -1) & (y_pixel <= height) & (x_pixel >= -1) & (x_pixel <= width) & (y_counted & x_counted)
        y = (rows.scale * v + rows.shift) + turn.y_skew * u
        x = (columns.scale * u + columns.shift) + turn.x_skew * v
        return on_border(y, on_map, height), on_border(x, on_map, width)


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


def on_border(position: Tensor, on_map: Tensor, size: Tensor) -> Tensor:
    """Clamp normalised positions of samples to the centres of the edge pixels; OUTSIDE if they are not on the map."""
    # The centre minus a rounding error. On or beyond the centre, zero padding would give the slope from the pixel down
    # to 0 where the surface is flat.
    edge = (1 - 1 / size) * (1 - 4 * torch.finfo(position.dtype).eps)
    return torch.where(on_map, position.clamp(-edge, edge), OUTSIDE)


@dataclass(frozen=True)
class Geometry:
    """The settings that place boxes on maps and sample them."""

    bins: tuple[int, int]
    scales: Sequence[Any]  # map pixels per image pixel, of each level
    ratio: int  # samples per bin and axis; 0 or less: by the size of the box
    aligned: bool
    levels: Any = None  # a function from corners [K, 4] to levels [K], -1 for none; None: there is one level

    def flat(self) -> tuple[Sequence[float] | None, Sequence[int], Sequence[float], int, bool]:
        """Return the arguments of :func:`.crop_by_triton` after the boxes."""
        areas = self.levels.least_areas() if self.levels else None
        return areas, self.bins, self.scales, max(self.ratio, 0), self.aligned


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
    # Differentiable. Normalised, of the rows and columns of samples, or (rotated) of each sample; or edges of bins.
    y: Tensor  # [M, bins, n] or [M, bins y, n y, bins x, n x]
    x: Tensor
    height: Tensor  # [M], pixels of the RoI's map
    width: Tensor  # [M]
    count: Tensor | int  # samples per bin, on the map or not, at least 1; [M] or one for all

    @property
    def divisor(self) -> int:
        return 1 if isinstance(self.count, Tensor) else self.count


def place_samples(rois: RoIs, sampling_ratio: int) -> list[Samples]:
    """Place samples, at 0 or less as many as the RoI's size asks for, in groups of RoIs with similar numbers."""
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


def place_rois(
    maps: Sequence[Tensor], index: Tensor, corners: Tensor, counts: list[int] | None, geometry: Geometry
) -> RoIs:
    """Place the RoIs of :func:`.split_rois`, and check their values where that costs nothing."""
    levels, aligned = geometry.levels, geometry.aligned
    level = levels(corners.detach()) if levels else torch.zeros_like(index, dtype=torch.int64)
    given, corners = corners, corners.to(geometry_dtype(*maps, corners))
    scale, height, width = (
        _of_level(level, values, corners)
        for values in (geometry.scales, [m.shape[2] for m in maps], [m.shape[3] for m in maps])
    )
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
    y = Axis(start[:, 1], extent[:, 1], theta[:, 1, 1], theta[:, 1, 2], height, geometry.bins[0])
    x = Axis(start[:, 0], extent[:, 0], theta[:, 0, 0], theta[:, 0, 2], width, geometry.bins[1])
    image, valid = check_values(maps[0], index, given, finite, scale)
    return RoIs(y, x, level, image, counts, valid, is_vmapped(given))


def _of_level(level: Tensor, values: Sequence[float], like: Tensor) -> Tensor:
    """Return the value of each RoI's level, [K]. Copying the values to a GPU would synchronise."""
    chosen = like.new_full(level.shape, values[0])
    for number, value in enumerate(values[1:], 1):
        chosen = torch.where(level == number, value, chosen)
    return chosen
