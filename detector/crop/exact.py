"""The exact crop: each bin is the mean of the bilinear surface over the bin, in closed form.

This is Precise RoI Pooling (Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection", 2018,
equations 4 to 6) with RoIAlign's border rules. The surface is separable, and so is its mean. Along an axis a pixel's
weight is the integral of its hat function over the bin, divided by the bin's length. That integral is continuously
differentiable across pixel centres, where the gradient of sampled bins has kinks.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detector.crop.gather_sampler import Taps, crop_by_gather
from detector.crop.geometry import geometry_dtype
from detector.crop.positions import Axis, Samples, group_by_size, is_vmapped, makes_graph
from detector.crop.rois import RoIs, pair, place_rois

# Pixels. A smaller bin (an empty side, with aligned=True) is widened to this around its middle: up to rounding its mean
# and gradient stay those of the point.
MIN_BIN = 0.01


def exact_crop(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    aligned: bool = False,
) -> Tensor:
    """Crop boxes out of maps; each bin is the mean of the bilinear surface over the bin.

    Boxes are (x1, y1, x2, y2) in image pixels, as in :func:`~detector.affine_crop`, which converges to this function as
    its ``sampling_ratio`` grows. The box gradient is continuous. All pixels of a bin are read, so large boxes take
    longer.

    Args:
        input: [N, C, H, W], any floating dtype.
        boxes: one [L, 4] tensor per image, or one [K, 5] tensor whose first column is the image's index.
        output_size: height and width of the crop in bins, or one number for both.
        spatial_scale: pixels of ``input`` per image pixel.
        aligned: see :func:`~detector.affine_crop`.

    Returns:
        [K, C, output height, output width] in the dtype of ``input``. On a GPU, where it synchronises, RoIs with a bad
        image index or a non-finite coordinate are NaN.

    Raises:
        TypeError: see :func:`~detector.affine_crop`.
        ValueError: see :func:`~detector.affine_crop`; or the call is compiled, traced, or vmapped over boxes.

    Second derivatives and vmap over maps multiply each RoI with its whole map, which is slow.

    Example:
        >>> boxes = torch.tensor([[20.0, 30.0, 180.0, 150.0]], requires_grad=True)
        >>> exact_crop(torch.rand(1, 3, 240, 320), [boxes], 7, aligned=True).shape
        torch.Size([1, 3, 7, 7])
    """
    if makes_graph():
        raise ValueError("exact_crop cannot be compiled or traced; use affine_crop with a sampling_ratio above 0")
    rois = place_rois([input], boxes, None, pair("output_size", output_size), [spatial_scale], aligned)
    if rois.vmapped:
        raise ValueError(
            "exact_crop cannot be vmapped over boxes: the pixels it reads depend on the box; use affine_crop with a "
            "sampling_ratio above 0, or crop all boxes in one call"
        )
    bins = _bins(rois)
    if is_vmapped(input):
        crops = _crop_by_matrices([input.to(geometry_dtype(input))], bins)
    else:
        crops = crop_by_gather([input], bins, _exact_taps, _crop_by_matrices)
    return rois.finish(crops, input.dtype)


def _bins(rois: RoIs) -> list[Samples]:
    """Return the bins' edges, [M, bins, 2], in place of sample positions, grouped by the pixels that a bin reads."""
    y, x = rois.y, rois.x
    whole = Samples(None, rois.level, rois.image, _edges(y), _edges(x), y.size, x.size, 1)
    if whole.y.is_meta or not whole.y.numel():
        return [whole]
    runs = [_first_and_run(edges, size)[1].amax(1) for edges, size in ((whole.y, y.size), (whole.x, x.size))]
    return [replace(whole.select(group), rois=group) for group, _ in group_by_size(torch.stack(runs, 1))]


def _edges(axis: Axis) -> Tensor:
    """Return the normalised start and end of each bin, [K, bins, 2]."""
    unit = torch.arange(axis.bins + 1, dtype=axis.start.dtype, device=axis.start.device) * (2 / axis.bins) - 1
    edges = axis.scale[:, None] * unit + axis.shift[:, None]
    start, end = edges[:, :-1], edges[:, 1:]
    middle, half = (start + end) / 2, (end - start) / 2
    least = (MIN_BIN / axis.size)[:, None]  # half a bin, in a frame of width 2
    half = torch.where(half.abs() < least, least.copysign(half.detach()), half)
    return torch.stack([middle - half, middle + half], dim=2)


def _pixels(edges: Tensor, size: Tensor) -> Tensor:
    """Convert normalised edges to pixels, with the centre of the first pixel at 0."""
    return ((edges + 1) * size[:, None, None] - 1) / 2


def _first_and_run(edges: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first pixel that each bin reads and the number of pixels, both [K, bins]."""
    on_map = torch.minimum(_pixels(edges.detach(), size).clamp(min=0), (size - 1)[:, None, None])
    first, last = on_map.amin(2).floor(), on_map.amax(2).ceil()
    return first, last - first + 1


def _exact_taps(edges: Tensor, size: Tensor) -> Taps:
    """Return the run of pixels that each bin overlaps."""
    first, run = _first_and_run(edges, size)
    longest = 2 if edges.is_meta or not edges.numel() else int(run.max())
    numbers = first[..., None] + torch.arange(longest, dtype=edges.dtype, device=edges.device)
    last = (size - 1)[:, None, None]
    return Taps(torch.minimum(numbers, last), _weights(edges, size, numbers).masked_fill(numbers > last, 0))


def _weights(edges: Tensor, size: Tensor, numbers: Tensor) -> Tensor:
    """Return each pixel's weight in the mean over a bin, differentiable in the edges.

    Args:
        edges: [M, bins, 2], normalised.
        size: [M], pixels of the map.
        numbers: the pixels, [n] or [M, bins, n].
    """
    last = (size - 1)[:, None, None]
    start, end = _pixels(edges, size).split(1, dim=2)
    return (_integral(end, numbers, last) - _integral(start, numbers, last)) / (end - start)


def _integral(to: Tensor, number: Tensor, last: Tensor) -> Tensor:
    """Integrate a pixel's weight in the bilinear surface from -1 to a position.

    The weight is a hat. The first and last pixel's continue for one pixel beyond the border, and then are zero.
    """
    before = torch.where(number == 0, _clamp(to, -1, 0) + 1, 0)
    after = torch.where(number == last, _clamp(to, last, last + 1) - last, 0)
    return before + _hat_integral(_clamp(to, 0, last) - number) - _hat_integral(-number) + after


def _hat_integral(to: Tensor) -> Tensor:
    """Integrate ``max(1 - |t|, 0)`` from -1 to a position."""
    to = _clamp(to, -1, 1)
    return torch.where(to < 0, (1 + to) ** 2 / 2, 1 - (1 - to) ** 2 / 2)


def _clamp(at: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Clamp with the slope to the right on both ends: 1 at ``low``, 0 at ``high``.

    On a tie nested torch.clamp would add both slopes, and torch.minimum would halve them.
    """
    return torch.where(at < low, low, torch.where(at < high, at, high))


def _crop_by_matrices(maps: Sequence[Tensor], samples: Sequence[Samples]) -> Tensor:
    """Compute the exact crop of one map as rows x map x columns, by operations that have all derivatives."""
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
