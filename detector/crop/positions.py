"""Sample positions of RoIAlign, one axis at a time.

The samples of an RoI form a product of two axes. Each axis is computed on [K, bins, samples] values, without channels.
The rules are those of ``torchvision.ops.roi_align`` (He et al., "Mask R-CNN", 2017, section 3, and its C++ kernel for
the borders):

* a bin is cut into equal parts, with one sample in the middle of each;
* a sample more than one pixel outside the map (position < -1 or > size) counts as zero;
* any other sample is clamped to [0, size - 1], the centres of the first and last pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detector.crop.geometry import boxes_in_frame, boxes_to_theta

# Normalised position of samples that count as zero. It lies more than a pixel outside any map, so that grid_sample's
# zero padding gives exactly 0, without a gradient, and reads nothing.
OUTSIDE = 3.0


def makes_graph() -> bool:
    """Return whether a graph is being compiled or traced (for ONNX too), so that values must not be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_vmapped(tensor: Tensor) -> bool:
    """Return whether ``torch.vmap`` runs over a tensor, so that its values must not be read.

    Under ``torch.func.grad``, or a vmap over other tensors, its values can be read.
    """
    if torch.compiler.is_compiling():
        return False
    # PyTorch has no public function for this; torch.cond and tensor printing use these.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)  # a wrapper of grad, perhaps around one of vmap
    return False


@dataclass(frozen=True)
class Axis:
    """One axis (x or y) of K RoIs.

    ``start`` and ``extent`` decide whether a sample is outside the map. They are computed in roi_align's order of
    operations, so that the decision is the same on exact ties. ``scale`` and ``shift`` are theta's entries; they give
    the sample's position and carry the gradient.
    """

    start: Tensor  # [K], map pixels, without gradient
    extent: Tensor  # [K], map pixels, without gradient
    scale: Tensor  # [K], normalised
    shift: Tensor  # [K], normalised
    size: Tensor  # [K], pixels of the RoI's map, in the dtype of the others
    bins: int

    def select(self, index: Tensor) -> "Axis":
        start, extent, scale, shift = (v[index] for v in (self.start, self.extent, self.scale, self.shift))
        return Axis(start, extent, scale, shift, self.size[index], self.bins)

    def adaptive_counts(self) -> Tensor:
        """Return the samples per bin at ``sampling_ratio <= 0``, [K]: ceil(extent / bins), 0 for an empty side."""
        return (self.extent / self.bins).ceil().clamp(min=0)

    def windows(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples of each bin that can lie on the map, so that a huge RoI costs no more than the map.

        Args:
            counts: [K], samples per bin.

        Returns:
            The first such sample of each bin, [K, bins], and the largest number of them in a bin, [K]; both int64.
            There are two samples of slack on each side; :meth:`positions` decides exactly.
        """
        extent, size, counts = (values.double()[:, None] for values in (self.extent, self.size, counts))
        bin_size = extent / self.bins
        bin_start = self.start.double()[:, None] + torch.arange(self.bins, device=extent.device) * bin_size
        step = bin_size / counts.clamp(min=1)  # [K, 1], pixels between samples
        first = ((-1 - bin_start) / step - 0.5).floor() - 2
        last = ((size - bin_start) / step - 0.5).ceil() + 3
        zero = torch.zeros_like(counts)
        first = first.nan_to_num().clamp(zero, counts)
        last = last.nan_to_num().clamp(zero, counts)
        return first.long(), (last - first).amax(dim=1).long()

    def positions(self, index: Tensor, counts: Tensor | int) -> Tensor:
        """Return normalised sample positions [K, bins, n], :data:`OUTSIDE` for those that count as zero.

        Args:
            index: sample numbers in each bin, [n] or [K, bins, n]. Numbers from ``counts`` on count as zero.
            counts: samples per bin, a number or [K].
        """
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
        # The centre of the edge pixel less a rounding error. On or beyond the centre, zero padding would give the
        # slope from the pixel down to 0 where the surface is flat.
        edge = (1 - 1 / size) * (1 - 4 * torch.finfo(dtype).eps)
        position = torch.where(position.abs() < edge, position, position.detach().clamp(-edge, edge))
        return torch.where(on_map, position, OUTSIDE)


def roi_axes(
    corners: Tensor,
    level: Tensor,
    sizes: Sequence[tuple[int, int]],
    bins: tuple[int, int],
    spatial_scales: Sequence[float],
    aligned: bool,
) -> tuple[Axis, Axis, Tensor]:
    """Return the y and x axes of RoIs, and which RoIs are finite in map pixels, [K].

    RoIs that are not finite are replaced by RoIs at 0.

    Args:
        corners: [K, 4], (x1, y1, x2, y2) in image pixels, float32 or float64.
        level: [K], int64, index of the RoI's map; -1: none.
        sizes: (height, width) of each map.
        bins: height and width of the crop.
        spatial_scales: map pixels per image pixel, one per map.
        aligned: see :func:`~detector.affine_crop`.
    """
    height = _of_level(level, [size[0] for size in sizes], corners)
    width = _of_level(level, [size[1] for size in sizes], corners)
    scale = _of_level(level, spatial_scales, corners)
    pixels = corners.detach() * scale[:, None] - (0.5 if aligned else 0.0)
    start, end = pixels.split(2, dim=1)
    extent = end - start
    if not aligned:
        extent = extent.clamp(min=1)
        corners = torch.cat([corners[:, :2], torch.maximum(corners[:, 2:], corners[:, :2] + 1 / scale[:, None])], 1)
    finite = torch.isfinite(torch.cat([pixels, extent], dim=1)).all(dim=1)
    theta = boxes_to_theta(boxes_in_frame(corners, height, width, scale, aligned))
    finite = finite & torch.isfinite(theta.detach()).flatten(1).all(dim=1)
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


@dataclass(frozen=True)
class Samples:
    """Sample positions of M of the K RoIs of a call, all with the same number of samples."""

    rois: Tensor | None  # [M] int64, which RoIs these are; None: all, in order
    level: Tensor  # [M] int64, index of the RoI's map; -1: none
    image: Tensor  # [M] int64, index in the batch
    y: Tensor  # [M, bins, n], normalised positions of the rows of samples, differentiable
    x: Tensor  # [M, bins, n], and of the columns
    height: Tensor  # [M], pixels of the RoI's map
    width: Tensor  # [M]
    count: Tensor | int  # samples per bin, on the map or not, at least 1; [M] or one for all

    def select(self, index: Tensor) -> "Samples":
        """Return some of these RoIs, given their places [m] in this group."""
        rois = index if self.rois is None else self.rois[index]
        count = self.count[index] if isinstance(self.count, Tensor) else self.count
        level, image, y, x = self.level[index], self.image[index], self.y[index], self.x[index]
        return Samples(rois, level, image, y, x, self.height[index], self.width[index], count)


def fixed_samples(y: Axis, x: Axis, level: Tensor, image: Tensor, sampling_ratio: int) -> Samples:
    """Place ``sampling_ratio`` samples per bin and axis for every RoI."""
    index = torch.arange(sampling_ratio, device=level.device)
    rows, columns = (axis.positions(index, sampling_ratio) for axis in (y, x))
    return Samples(None, level, image, rows, columns, y.size, x.size, sampling_ratio**2)


def adaptive_samples(y: Axis, x: Axis, level: Tensor, image: Tensor) -> list[Samples]:
    """Place a number of samples that depends on the RoI's size, in groups of RoIs with similar numbers.

    Synchronises on a GPU. On the meta device only shapes are right.
    """
    if level.is_meta:
        return [fixed_samples(y, x, level, image, 1)]
    y_counts, x_counts = y.adaptive_counts(), x.adaptive_counts()
    (y_first, y_number), (x_first, x_number) = y.windows(y_counts), x.windows(x_counts)
    count = (y_counts * x_counts).clamp(min=1)
    samples = []
    for rois, (rows, columns) in group_by_size(torch.stack([y_number, x_number], dim=1)):
        y_index = y_first[rois][..., None] + torch.arange(rows, device=rois.device)
        x_index = x_first[rois][..., None] + torch.arange(columns, device=rois.device)
        y_positions = y.select(rois).positions(y_index, y_counts[rois])
        x_positions = x.select(rois).positions(x_index, x_counts[rois])
        samples.append(
            Samples(rois, level[rois], image[rois], y_positions, x_positions, y.size[rois], x.size[rois], count[rois])
        )
    return samples or [fixed_samples(y, x, level, image, 1)]  # no RoIs: an empty result that stays in the graph


def group_by_size(sizes: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Group RoIs by their numbers of rows and columns, [K, 2], rounded up to powers of two to keep the groups few."""
    sizes = (2.0 ** sizes.clamp(min=1).log2().ceil()).long()
    groups, group_of = sizes.unique(dim=0, return_inverse=True)
    return [(torch.where(group_of == number)[0], group) for number, group in enumerate(groups.tolist())]
