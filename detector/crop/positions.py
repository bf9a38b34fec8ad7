"""Where RoIAlign looks: the sample positions of a set of RoIs, one axis at a time.

RoIAlign's samples form a product of two axes, so each axis is worked out alone, on [K, bins, samples]
values, and no tensor here has a channel dimension. The rules are those of ``torchvision.ops.roi_align``
(He et al., "Mask R-CNN", 2017, section 3, and the C++ kernel for the borders):

* bin ``p`` of an RoI of extent ``e`` is cut into ``count`` parts, one sample in the middle of each;
* a sample more than one pixel outside the map (position < -1 or > size) counts as zero;
* any other sample is moved onto the map: to [0, size - 1], the centres of the first and last pixel.

Both samplers (:mod:`detector.crop.grid_sampler`, :mod:`detector.crop.gather_sampler`) read the maps at these positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detector.crop.geometry import boxes_in_frame, boxes_to_theta

# Samples that count as zero go here: a normalised coordinate whose neighbours all lie outside any map,
# so that grid_sample's zero padding gives exactly 0, no gradient, and reads nothing.
OUTSIDE = 3.0


def makes_graph() -> bool:
    """Whether the code runs to be compiled or traced: neither values nor the number of RoIs may decide anything."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # which the export to ONNX does


def is_vmapped(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` goes over a tensor: it then stands for many, and its values may decide nothing.

    The tensor is asked, not whether a transform runs: under ``torch.func.grad``, or a vmap over other things, its
    values can be looked at. Under ``torch.compile``, where nothing looks at any value, it is false.
    """
    if torch.compiler.is_compiling():
        return False
    # PyTorch has no public function for this; torch.cond and the printing of tensors use these.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)  # by grad, with perhaps a vmap around it
    return False


@dataclass(frozen=True)
class Axis:
    """One axis (x or y) of K RoIs.

    ``start`` and ``extent`` [K] are in map pixels, computed in roi_align's order of operations and without
    gradient: they decide on which side of the border a sample lies, which must be decided exactly as
    roi_align does. ``scale`` and ``shift`` [K] are theta's entries for this axis (normalised); they say
    where the sample is, and carry the gradient.
    """

    start: Tensor
    extent: Tensor
    scale: Tensor
    shift: Tensor
    size: Tensor  # of each RoI's map, in pixels, [K], in the dtype of the others
    bins: int  # of the output

    def select(self, index: Tensor) -> "Axis":
        start, extent, scale, shift, size = (
            values[index] for values in (self.start, self.extent, self.scale, self.shift, self.size)
        )
        return Axis(start, extent, scale, shift, size, self.bins)

    def adaptive_counts(self) -> Tensor:
        """Samples per bin at ``sampling_ratio <= 0``: ceil(extent / bins), none for an empty side. [K]"""
        return (self.extent / self.bins).ceil().clamp(min=0)

    def windows(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of each bin that can lie on the map, so that a huge RoI costs no more than the map.

        Args:
            counts: [K], samples per bin.

        Returns:
            The index of the first such sample of each bin, [K, bins], and the number of them in the fullest
            bin of each RoI, [K], both int64. Two samples of slack on each side: what is really on the map is
            decided by :meth:`positions`.
        """
        extent, size, counts = (values.double()[:, None] for values in (self.extent, self.size, counts))
        bin_size = extent / self.bins
        bin_start = self.start.double()[:, None] + torch.arange(self.bins, device=extent.device) * bin_size
        step = bin_size / counts.clamp(min=1)  # [K, 1], pixels from sample to sample
        first = ((-1 - bin_start) / step - 0.5).floor() - 2
        last = ((size - bin_start) / step - 0.5).ceil() + 3
        zero = torch.zeros_like(counts)
        first = first.nan_to_num().clamp(zero, counts)
        last = last.nan_to_num().clamp(zero, counts)
        return first.long(), (last - first).amax(dim=1).long()

    def positions(self, index: Tensor, counts: Tensor | int) -> Tensor:
        """Normalised positions of samples, :data:`OUTSIDE` for those that count as zero. Differentiable.

        Args:
            index: which samples of each bin, [n] or [K, bins, n].
            counts: samples per bin, a number or [K]. An ``index`` beyond it counts as zero.

        Returns:
            [K, bins, n]
        """
        dtype = self.start.dtype
        bins = torch.arange(self.bins, dtype=dtype, device=self.start.device)[:, None]  # [bins, 1]
        limit = counts[:, None, None] if isinstance(counts, Tensor) else counts
        count = limit.clamp(min=1) if isinstance(limit, Tensor) else limit
        size = self.size[:, None, None]
        middle = index.to(dtype) + 0.5
        bin_size = (self.extent / self.bins)[:, None, None]
        # In roi_align's order of operations: on an integer box a sample lies exactly on the border.
        pixel = self.start[:, None, None] + bins * bin_size + middle * bin_size / count  # [K, bins, n]
        on_map = (pixel >= -1) & (pixel <= size) & (index < limit)

        unit = (bins + middle / count) * (2 / self.bins) - 1  # the sample in the crop frame, -1..1
        # One row of affine_grid, written out: as a matrix product autocast would make it bfloat16.
        position = self.scale[:, None, None] * unit + self.shift[:, None, None]
        # The centre of the edge pixel, less a rounding error: on the centre itself, or beyond it by rounding,
        # zero padding would give the slope from the pixel down to 0 for a gradient, where it is flat.
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
    """The y and x axes of RoIs on maps of several sizes, by way of theta.

    Args:
        corners: [K, 4], (x1, y1, x2, y2) in pixels of the image, float32 or float64.
        level: [K], int64, which of the maps each is in; -1: none.
        sizes: (height, width) of each map.
        bins: height and width of the crop.
        spatial_scales: of each map.
        aligned: as in :func:`~detector.affine_crop`.

    Returns:
        The axes, and which RoIs are finite in map pixels, [K]; those that are not have been put at 0.
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
    # Nothing may be computed from a non-finite number: NaN times zero is NaN, in the gradients too.
    theta = torch.where(finite[:, None, None], theta, 0.0)
    start, extent = torch.where(finite[:, None], start, 0.0), torch.where(finite[:, None], extent, 1.0)
    y = Axis(start[:, 1], extent[:, 1], theta[:, 1, 1], theta[:, 1, 2], height, bins[0])
    x = Axis(start[:, 0], extent[:, 0], theta[:, 0, 0], theta[:, 0, 2], width, bins[1])
    return y, x, finite


def _of_level(level: Tensor, values: Sequence[float], like: Tensor) -> Tensor:
    """The value of each RoI's level, [K]. From numbers, without a copy to a GPU, which would wait for it."""
    chosen = like.new_full(level.shape, values[0])
    for number, value in enumerate(values[1:], 1):
        chosen = torch.where(level == number, value, chosen)
    return chosen


@dataclass(frozen=True)
class Samples:
    """Where M of the K RoIs of a call are sampled, with like numbers of samples, and how many make a bin."""

    rois: Tensor | None  # [M], which RoIs these are, int64; None: all of them, in their order
    level: Tensor  # [M], which of the call's maps each is in, int64; -1: in none
    image: Tensor  # [M], which image of the batch, int64
    y: Tensor  # [M, bins, n], normalised positions of the rows of samples, with gradient
    x: Tensor  # [M, bins, n], and of the columns
    height: Tensor  # [M], of each RoI's map, in pixels
    width: Tensor  # [M]
    count: Tensor | int  # samples in a bin, on the map or not, [M] or one for all; at least 1
    # Of the exact crop, where y and x are the edges of bins, [M, bins, 2]: the most rows and columns that a bin reads.
    taps: tuple[int, int] | None = None

    def select(self, index: Tensor) -> "Samples":
        """Some of these RoIs, ``index`` [m] int64."""
        return Samples(
            index if self.rois is None else self.rois[index],
            self.level[index],
            self.image[index],
            self.y[index],
            self.x[index],
            self.height[index],
            self.width[index],
            self.count[index] if isinstance(self.count, Tensor) else self.count,
            self.taps,
        )


def fixed_samples(y: Axis, x: Axis, level: Tensor, image: Tensor, sampling_ratio: int) -> Samples:
    """``sampling_ratio`` samples per bin and axis, for every RoI."""
    index = torch.arange(sampling_ratio, device=level.device)
    return Samples(
        None,
        level,
        image,
        y.positions(index, sampling_ratio),
        x.positions(index, sampling_ratio),
        y.size,
        x.size,
        sampling_ratio**2,
    )


def adaptive_samples(y: Axis, x: Axis, level: Tensor, image: Tensor) -> list[Samples]:
    """A number of samples that goes with the RoI's size; RoIs with like numbers are taken together.

    Reads values, and so synchronises on a GPU. On the meta device, which has none, only shapes come out.
    """
    if level.is_meta:
        return [fixed_samples(y, x, level, image, 1)]
    y_counts, x_counts = y.adaptive_counts(), x.adaptive_counts()
    (y_first, y_number), (x_first, x_number) = y.windows(y_counts), x.windows(x_counts)
    count = (y_counts * x_counts).clamp(min=1)
    number = torch.stack([y_number, x_number], dim=1)
    # Rounded up to powers of two there are few groups; samples beyond a RoI's own number count as zero.
    number = (2.0 ** number.clamp(min=1).log2().ceil()).long()
    groups, group_of = number.unique(dim=0, return_inverse=True)
    samples = []
    for group, (rows, columns) in enumerate(groups.tolist()):
        rois = torch.where(group_of == group)[0]
        y_index = y_first[rois][..., None] + torch.arange(rows, device=rois.device)
        x_index = x_first[rois][..., None] + torch.arange(columns, device=rois.device)
        y_positions = y.select(rois).positions(y_index, y_counts[rois])
        x_positions = x.select(rois).positions(x_index, x_counts[rois])
        samples.append(
            Samples(rois, level[rois], image[rois], y_positions, x_positions, y.size[rois], x.size[rois], count[rois])
        )
    return samples or [fixed_samples(y, x, level, image, 1)]  # no RoIs: an empty result that stays in the graph
