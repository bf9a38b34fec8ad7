"""The mean of the bilinear surface over each bin, in closed form (Precise RoI Pooling; see :func:`.prroi_pool2d`).

It is a sum over pixels. The weight of a pixel is the integral of its hat function over the bin, divided by the bin's
length; a hat rises from 0 to 1 within a pixel and falls to 0 within the next, beyond the border of the map as well.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import cbrt

import torch
from torch import Tensor

from detector.crop.arguments import Names, check_values
from detector.crop.gather_sampler import Taps, crop_by_gather
from detector.crop.geometry import geometry_dtype
from detector.crop.rois import Samples, group_by_size

NAMES = Names("features", "rois")
PRECISE = -1  # in place of a sampling ratio
# Pixels; smaller bins are widened to this around their middle. A gradient divides by the length of a bin, and this
# balances its rounding error with the error of the wider bin.
MIN_BIN = {dtype: cbrt(torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)}


def place_bins(
    source: Tensor, index: Tensor, corners: Tensor, bins: Sequence[int], spatial_scale: float
) -> tuple[Samples, Tensor | None]:
    """Return the edges of bins in map pixels, as :class:`.Samples`, and the valid RoIs of :func:`.check_values`."""
    corners = corners.to(geometry_dtype(source, corners))
    scales = torch.full_like(corners[:, 0], spatial_scale)
    edges = corners * scales[:, None]
    finite = torch.isfinite(torch.cat([edges, edges[:, 2:] - edges[:, :2]], 1).detach()).all(dim=1)
    image, valid = check_values(source, index, corners, finite, scales, NAMES)
    x1, y1, x2, y2 = torch.where(finite[:, None], edges, 0).unbind(1)
    y, x = _bin_edges(y1, y2, bins[0]), _bin_edges(x1, x2, bins[1])
    height, width = (torch.full_like(x1, size) for size in source.shape[2:])
    return Samples(None, torch.zeros_like(image), image, y, x, height, width, 1), valid


def pool_by_gather(source: Tensor, samples: Samples) -> Tensor:
    """Return the means over bins, [K, C, bins, bins], from the pixels that each bin overlaps. Reads values."""
    groups = [samples]
    if not samples.y.is_meta and samples.y.numel():
        axes = (samples.y, samples.height), (samples.x, samples.width)
        runs = [_run(*axis).diff(dim=0)[0].amax(1) + 1 for axis in axes]
        groups = [replace(samples.select(rois), rois=rois) for rois, _ in group_by_size(torch.stack(runs, 1))]
    return crop_by_gather([source], groups, _taps, pool_by_products)


def pool_by_products(maps: Sequence[Tensor], groups: Sequence[Samples]) -> Tensor:
    """Return the means over bins as rows x map x columns, by matrix products that support all derivatives.

    Every RoI is multiplied by every pixel of the batch.
    """
    (source,) = maps
    images, channels, height, width = source.shape
    table = source.permute(0, 2, 3, 1).reshape(images * height, width * channels)
    crops = []
    for group in groups:
        rois, bins_y = group.y.shape[:2]
        rows, columns = (
            _weights(edges, torch.arange(pixels, dtype=edges.dtype, device=edges.device)).to(source.dtype)
            for edges, pixels in ((group.y, height), (group.x, width))
        )
        own = group.image[:, None] == torch.arange(images, device=group.image.device)
        rows = (rows[:, :, None] * own[:, None, :, None].to(rows.dtype)).reshape(rois * bins_y, images * height)
        device = source.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            part = (rows @ table).reshape(rois, bins_y, width, channels)
            crops.append((columns[:, None] @ part).permute(0, 3, 1, 2))  # from [M, bins y, bins x, C]
    rois_of = [group.rois for group in groups if group.rois is not None]
    return torch.cat(crops)[torch.cat(rois_of).argsort()] if rois_of else crops[0].contiguous()


def _bin_edges(start: Tensor, end: Tensor, bins: int) -> Tensor:
    """Return the start and end of each bin, [K, bins, 2]. They are equal for an empty or inverted side."""
    extent = (end - start)[:, None]
    middle = (torch.arange(bins, dtype=start.dtype, device=start.device) + 0.5) / bins
    middle = start[:, None] + middle * extent
    half = torch.where(extent > 0, (extent / bins).clamp(min=MIN_BIN[start.dtype]), 0) / 2
    return torch.stack([middle - half, middle + half], dim=2)


def _run(edges: Tensor, size: Tensor) -> Tensor:
    """Return the first and the last pixel that each bin reads, [2, M, bins]."""
    start, end = edges.detach().unbind(2)
    return torch.minimum(torch.stack([start.floor(), end.ceil()]).clamp(min=0), size[:, None] - 1)


def _taps(edges: Tensor, size: Tensor) -> Taps:
    """Return the run of pixels that each bin overlaps."""
    first, last = _run(edges, size)[..., None]
    longest = 2 if edges.is_meta or not edges.numel() else int((last - first).max()) + 1
    numbers = first + torch.arange(longest, dtype=edges.dtype, device=edges.device)
    return Taps(torch.minimum(numbers, last), _weights(edges, numbers).masked_fill(numbers > last, 0))


def _weights(edges: Tensor, numbers: Tensor) -> Tensor:
    """Return the weights of pixels ``numbers``, [n] or [M, bins, n], in the means over bins."""
    start, end = edges.split(1, dim=2)
    length = end - start
    return (_integral(end - numbers) - _integral(start - numbers)) / torch.where(length > 0, length, 1)


def _integral(to: Tensor) -> Tensor:
    """Integrate a hat around 0 from -1 to a position."""
    # The derivative at the three kinks is that to the right. torch.clamp would mix both sides.
    at = torch.where(to < -1, -1, torch.where(to < 1, to, 1))
    return torch.where(at < 0, (1 + at) ** 2 / 2, 1 - (1 - at) ** 2 / 2)
