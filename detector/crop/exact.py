"""The exact crop: each bin is the mean of the bilinear surface over the bin, in closed form.

This is Precise RoI Pooling (Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection", 2018,
equations 4 to 6) with RoIAlign's border rules. A pixel's weight is the integral of its hat function divided by the
bin's length.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detector.crop.gather_sampler import Taps, crop_by_gather
from detector.crop.geometry import geometry_dtype
from detector.crop.rois import Axis, RoIs, Samples, group_by_size, is_vmapped

EXACT = -1  # in place of a sampling ratio
MIN_BIN = 0.01  # pixels; smaller bins (empty sides, with aligned=True) are widened to this around their middle


def crop_exactly(source: Tensor, rois: RoIs) -> Tensor:
    """Crop a map by a gather, or by matrices if it is vmapped. Returns [K, C, bins, bins]."""
    bins = exact_bins(rois)
    if is_vmapped(source):
        return crop_by_matrices([source.to(geometry_dtype(source))], bins)
    return crop_by_gather([source], bins, exact_taps, crop_by_matrices)


def exact_bins(rois: RoIs) -> list[Samples]:
    """Return the bins' edges, [M, bins, 2], in place of sample positions, grouped by the pixels that a bin reads."""
    y, x = rois.y, rois.x
    whole = Samples(None, rois.level, rois.image, _edges(y), _edges(x), y.size, x.size, 1)
    if whole.y.is_meta or not whole.y.numel():
        return [whole]
    runs = [_first_and_run(edges, size)[1].amax(1) for edges, size in ((whole.y, y.size), (whole.x, x.size))]
    return [replace(whole.select(group), rois=group) for group, _ in group_by_size(torch.stack(runs, 1))]


def _edges(axis: Axis) -> Tensor:
    """Return the start and end of each bin, [K, bins, 2], in pixels; 0 is the centre of the first pixel."""
    unit = torch.arange(axis.bins + 1, dtype=axis.start.dtype, device=axis.start.device) * (2 / axis.bins) - 1
    edges = ((axis.scale[:, None] * unit + axis.shift[:, None] + 1) * axis.size[:, None] - 1) / 2
    start, end = edges[:, :-1], edges[:, 1:]
    middle, half = (start + end) / 2, (end - start) / 2
    least = torch.full_like(half, MIN_BIN / 2)
    half = torch.where(half.abs() < least, least.copysign(half.detach()), half)
    return torch.stack([middle - half, middle + half], dim=2)


def _first_and_run(edges: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first pixel that each bin reads and the number of pixels, both [K, bins]."""
    on_map = torch.minimum(edges.detach().clamp(min=0), (size - 1)[:, None, None])
    first, last = on_map.amin(2).floor(), on_map.amax(2).ceil()
    return first, last - first + 1


def exact_taps(edges: Tensor, size: Tensor) -> Taps:
    """Return the run of pixels that each bin overlaps."""
    first, run = _first_and_run(edges, size)
    longest = 2 if edges.is_meta or not edges.numel() else int(run.max())
    numbers = first[..., None] + torch.arange(longest, dtype=edges.dtype, device=edges.device)
    last = (size - 1)[:, None, None]
    return Taps(torch.minimum(numbers, last), _weights(edges, size, numbers).masked_fill(numbers > last, 0))


def _weights(edges: Tensor, size: Tensor, numbers: Tensor) -> Tensor:
    """Return the weights of pixels, [n] or [M, bins, n], in the means over bins. Differentiable in the edges."""
    last = (size - 1)[:, None, None]
    start, end = edges.split(1, dim=2)
    return (_integral(end, numbers, last) - _integral(start, numbers, last)) / (end - start)


def _integral(to: Tensor, number: Tensor, last: Tensor) -> Tensor:
    """Integrate a pixel's hat from -1 to a position. Outside the map an edge pixel's hat is 1 for one pixel, then 0."""
    before = torch.where(number == 0, _clamp(to, -1, 0) + 1 / 2, 0)  # minus the half of the hat outside the map
    after = torch.where(number == last, _clamp(to, last, last + 1) - last, 0)
    at = _clamp(_clamp(to, 0, last) - number, -1, 1)
    return before + torch.where(at < 0, (1 + at) ** 2 / 2, 1 - (1 - at) ** 2 / 2) + after


def _clamp(at: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    # Both ends use the slope to the right. On a tie torch.clamp would add both slopes, torch.minimum average them.
    return torch.where(at < low, low, torch.where(at < high, at, high))


def crop_by_matrices(maps: Sequence[Tensor], samples: Sequence[Samples]) -> Tensor:
    """Compute the exact crop as rows x map x columns, with operations that support all derivatives."""
    (source,) = maps
    crops, order = [], []
    for group in samples:
        rows, columns = (
            _weights(edges, size, torch.arange(pixels, dtype=edges.dtype, device=edges.device))
            for edges, size, pixels in zip((group.y, group.x), (group.height, group.width), source.shape[2:])
        )
        own = torch.nn.functional.one_hot(group.image, source.shape[0]).to(rows.dtype)
        rows = rows[:, :, None] * own[:, None, :, None]  # [M, bins, N, H]
        crops.append(torch.einsum("kynh,nchw,kxw->kcyx", *(t.to(source.dtype) for t in (rows, source, columns))))
        order.append(torch.arange(len(own), device=own.device) if group.rois is None else group.rois)
    return torch.cat(crops)[torch.cat(order).argsort()]
