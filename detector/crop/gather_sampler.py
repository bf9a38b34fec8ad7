"""The crop as a gather: a bin is a weighted sum of pixels, computed by ``embedding_bag``.

In channels_last a map is a table with one row per pixel. The weights of bilinear sampling and of averaging over a bin
are products of a weight for the pixel's row and one for its column. All geometry therefore stays in small tensors
without channels, and no sample is written to memory. The map's gradient is a gather as well: a pixel's row is a
weighted sum of the bins that read it, found by sorting. No two threads add to the same place in memory, so values and
gradients are the same to the last bit in every run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.crop.geometry import geometry_dtype
from detector.crop.grid_sampler import crop_by_grid
from detector.crop.positions import Samples

# Pixels that one call of embedding_bag reads (a single RoI may read more). On a CPU the bins of a chunk should stay in
# the cache until they are written; on a GPU a call costs more than that.
MAX_PIXELS_READ_CPU = 2**17
MAX_PIXELS_READ_GPU = 2**26
# Pixels that are sorted at once for the maps' gradient, at about 30 bytes each.
MAX_PIXELS_SORTED = 2**25


@dataclass(frozen=True)
class Taps:
    """The pixels that each bin reads along one axis, and their weights."""

    index: Tensor  # [M, bins, T], pixel numbers
    weight: Tensor  # [M, bins, T], differentiable in the positions

    def select(self, rois: slice | Tensor) -> "Taps":
        return Taps(self.index[rois], self.weight[rois])


def point_taps(position: Tensor, size: Tensor) -> Taps:
    """Return the taps of samples at normalised positions [M, bins, n] on maps of a size [M]; each sample weighs 1.

    A sample reads two neighbouring pixels. If the samples of all bins lie close together, a bin's taps are the run of
    pixels from its first to its last; otherwise they are the two of each sample.
    """
    size = size[:, None, None]
    on_map = position.abs() <= 1
    pixel = ((position + 1) * size - 1) / 2
    low = torch.minimum(pixel.detach().floor(), size - 2).clamp(min=0)
    # Samples that count as zero read a pixel that the bin, or the RoI, reads anyway: pixels outside every box may be
    # NaN. An RoI without other samples reads the first pixel, like roi_align.
    first = torch.where(on_map, low, torch.inf).amin(2, keepdim=True)  # [M, bins, 1]
    first = torch.where(first.isinf(), first.amin(1, keepdim=True), first)
    first = torch.where(first.isinf(), 0, first)
    low = torch.where(on_map, low, first)

    weight = on_map.to(position.dtype)
    second = (pixel - low) * weight
    slot = (low - first).long()
    taps = 2 * low.shape[2]
    # Shared taps, if they are fewer. Not on a GPU, where the test would synchronise.
    if low.is_cpu and low.shape[2] > 1 and low.numel() and (run := int(slot.max()) + 2) < taps:
        last = torch.minimum(first + slot.amax(2, keepdim=True) + 1, size - 1)
        index = torch.minimum(first + torch.arange(run, dtype=first.dtype, device=first.device), last)
        weights = position.new_zeros(index.shape).scatter_add(2, slot, weight - second)
        return Taps(index, weights.scatter_add(2, slot + 1, second))
    index = torch.stack([low, torch.minimum(low + 1, size - 1)], dim=3).flatten(2)
    return Taps(index, torch.stack([weight - second, second], dim=3).flatten(2))


@torch.compiler.disable
def crop_by_gather(
    maps: Sequence[Tensor],
    samples: Sequence[Samples],
    taps_of: Callable[[Tensor, Tensor], Taps] = point_taps,
    reference: Callable[[Sequence[Tensor], Sequence[Samples]], Tensor] = crop_by_grid,
) -> Tensor:
    """Compute what ``reference`` computes, as weighted sums of pixels. Tensors must not be vmapped.

    Sums are in float32, or float64 if a map is. Maps that are not channels_last are copied, one at a time, and again in
    the backward rather than kept; on a GPU all levels are copied together.

    Args:
        maps: one [N, C, H, W] per level, with the same N and C, any floating dtype.
        samples: the K RoIs, each in one of the groups.
        taps_of: returns the taps for the positions of a group, [M, bins, n], and the sizes of the maps, [M].
        reference: the same crop by differentiable operations, of float32 or float64 maps; for second derivatives.

    Returns:
        [K, C, bins, bins]
    """
    if not maps[0].shape[1]:  # embedding_bag takes no table without columns
        return reference([source.to(geometry_dtype(*maps)) for source in maps], samples)
    positions = [axis for group in samples for axis in (group.y, group.x)]
    plan = _Plan(_with_positions(samples, [axis.detach() for axis in positions]), taps_of, reference, len(maps))
    return _Gather.apply(plan, *maps, *positions)


@dataclass(frozen=True)
class _Plan:
    samples: list[Samples]  # without gradient
    taps_of: Callable[[Tensor, Tensor], Taps]
    reference: Callable[[Sequence[Tensor], Sequence[Samples]], Tensor]
    maps: int

    def crop(self, *tensors: Tensor) -> Tensor:
        """Compute :class:`_Gather` by the reference, which has second derivatives."""
        dtype = geometry_dtype(*tensors[: self.maps])
        maps = [source.to(dtype) for source in tensors[: self.maps]]
        return self.reference(maps, _with_positions(self.samples, tensors[self.maps :]))


class _Gather(torch.autograd.Function):
    """Inputs: the plan, the maps, and y and x of each group."""

    @staticmethod
    def forward(plan: _Plan, *tensors: Tensor) -> Tensor:
        maps, samples = tensors[: plan.maps], plan.samples
        rois = sum(len(group.image) for group in samples)
        tables = _tables(maps, samples, plan.taps_of)
        # Contiguous like roi_align's output: a head may call view.
        shape = (rois, maps[0].shape[1], samples[0].y.shape[1], samples[0].x.shape[1])
        crops = maps[0].new_empty(shape, dtype=tables[0].dtype)
        if sum(len(part.rois) for table in tables for part in table.readers) < rois:
            crops.zero_()
        for table in tables:
            rows = table.rows(maps)
            for chunk in (chunk for part in table.readers for chunk in part.chunks()):
                sums = F.embedding_bag(chunk.pixels(), rows, mode="sum", per_sample_weights=chunk.weights())
                sums = sums.view(-1, *shape[2:], shape[1]).permute(0, 3, 1, 2)
                crops.index_copy_(0, chunk.rois, sums)
        return crops

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, tensors = ctx.plan, ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True this gradient will be differentiated
            return None, *torch.func.vjp(plan.crop, *tensors)[1](grad)
        grad = grad.permute(0, 2, 3, 1)  # [K, bins, bins, C]
        maps = tensors[: plan.maps]
        boxes_need_it = any(ctx.needs_input_grad[1 + plan.maps :])
        positions = [position.detach().requires_grad_(boxes_need_it) for position in tensors[plan.maps :]]
        with torch.set_grad_enabled(boxes_need_it):
            tables = _tables(maps, _with_positions(plan.samples, positions), plan.taps_of)
        map_grads: list[Tensor | None] = [None] * plan.maps
        weights: list[Tensor] = []
        weight_grads: list[Tensor] = []
        for table in tables:
            if boxes_need_it:
                rows = table.rows(maps)
                for part in table.readers:
                    weights += [part.y.weight, part.x.weight]
                    weight_grads += _weight_gradients(part, rows, grad)
            if any(ctx.needs_input_grad[1 + number] for number in table.maps):
                sizes = [maps[number][:, 0].numel() for number in table.maps]
                for number, map_rows in zip(table.maps, _rows_gradient(table, grad, sum(sizes)).split(sizes)):
                    map_grads[number] = _as_map(map_rows, maps[number])
        if not boxes_need_it:
            return None, *map_grads, *([None] * len(positions))
        return None, *map_grads, *torch.autograd.grad(weights, positions, weight_grads)

    @staticmethod
    def vmap(*args: Any) -> tuple[Tensor, int]:
        """Never called; PyTorch requires it when a vmap runs over other tensors."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Part:
    """M RoIs of one group that read one table."""

    rois: Tensor  # [M], which RoIs of the call
    y: Taps  # the index is the table row of the first pixel of a map row
    x: Taps

    @property
    def taps(self) -> int:
        """Pixels that a bin reads."""
        return self.y.index.shape[2] * self.x.index.shape[2]

    @property
    def size(self) -> int:
        """Pixels that all bins read."""
        return len(self.rois) * self.y.index.shape[1] * self.x.index.shape[1] * self.taps

    def select(self, rois: slice | Tensor) -> "_Part":
        return _Part(self.rois[rois], self.y.select(rois), self.x.select(rois))

    def chunks(self, max_pixels: int | None = None) -> Iterator["_Part"]:
        """Split these RoIs so that each chunk reads at most ``max_pixels``, by default the limit of the device."""
        if max_pixels is None:
            max_pixels = MAX_PIXELS_READ_CPU if self.rois.is_cpu else MAX_PIXELS_READ_GPU
        rois = len(self.rois)
        step = max(max_pixels * rois // max(self.size, 1), 1)
        return (self.select(slice(start, start + step)) for start in range(0, rois, step))

    def pixels(self) -> Tensor:
        """The table rows that each bin reads, [M * bins * bins, T * T]."""
        return (self.y.index[:, :, None, :, None] + self.x.index[:, None, :, None, :]).flatten(3).flatten(0, 2)

    def weights(self) -> Tensor:
        """Their weights, [M * bins * bins, T * T]."""
        return (self.y.weight[:, :, None, :, None] * self.x.weight[:, None, :, None, :]).flatten(3).flatten(0, 2)


@dataclass(frozen=True)
class _Table:
    """A row for each pixel of some maps, and the RoIs that read it."""

    maps: Sequence[int]
    dtype: torch.dtype
    readers: list[_Part]

    def rows(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the table, [pixels, C]. A channels_last map in the right dtype is not copied."""
        # Contiguous, because the rows of a single NCHW image would be a view, which is slow to read.
        rows = [maps[n].permute(0, 2, 3, 1).contiguous().to(self.dtype).flatten(0, 2) for n in self.maps]
        return torch.cat(rows) if len(rows) > 1 else rows[0]


def _tables(maps: Sequence[Tensor], samples: list[Samples], taps_of: Callable[[Tensor, Tensor], Taps]) -> list[_Table]:
    """Make one table per map on a CPU, and one of all maps on a GPU, where reading the levels would synchronise."""
    working = geometry_dtype(*maps)
    ends = list(accumulate(source[:, 0].numel() for source in maps))
    dtype = torch.int32 if ends[-1] < 2**31 else torch.int64  # half the memory: an RoI reads hundreds of pixels
    starts = [0] * len(maps) if maps[0].is_cpu else [0, *ends[:-1]]
    parts = []
    for group in samples:
        width = group.width.to(dtype)
        origin = group.image.to(dtype) * group.height.to(dtype) * width
        for level, start in enumerate(starts):
            if start:
                origin = torch.where(group.level == level, origin + start, origin)
        y, x = taps_of(group.y, group.height), taps_of(group.x, group.width)
        # RoIs on no level weigh nothing. (On a GPU they do read.)
        roi_weight = ((group.level >= 0).to(group.y.dtype) / group.count)[:, None, None]
        y_rows = origin[:, None, None] + y.index.to(dtype) * width[:, None, None]
        y = Taps(y_rows, (y.weight * roi_weight).to(working))
        x = Taps(x.index.to(dtype), x.weight.to(working))
        parts.append(_Part(torch.arange(len(origin), device=origin.device) if group.rois is None else group.rois, y, x))
    if not maps[0].is_cpu or len(maps) == 1:
        return [_Table(range(len(maps)), working, parts)]
    tables = []
    for number in range(len(maps)):
        readers = [part.select(torch.where(group.level == number)[0]) for part, group in zip(parts, samples)]
        tables.append(_Table([number], working, readers))
    return tables


def _rows_gradient(table: _Table, grad: Tensor, size: int) -> Tensor:
    """Return the gradient of a table's rows, [size, C], from that of the crops, [K, bins, bins, C]."""
    # RoIs are sorted together while their bins take no more memory than the table, and no more than the limit.
    batches: list[list[_Part]] = []
    for part in table.readers:
        max_pixels = min(MAX_PIXELS_SORTED, size * part.taps)
        for chunk in part.chunks(max_pixels):
            if batches and sum(part.size for part in batches[-1]) + chunk.size <= max_pixels:
                batches[-1].append(chunk)
            else:
                batches.append([chunk])
    rows = None
    for batch in batches:
        of_bins = grad.index_select(0, torch.cat([part.rois for part in batch])).flatten(0, 2)
        read = [part.pixels() for part in batch]  # [bins, taps] each
        dtype, device = read[0].dtype, read[0].device
        numbers = torch.arange(len(of_bins), dtype=dtype, device=device).split([len(pixels) for pixels in read])
        bins = torch.cat([n[:, None].expand_as(pixels).flatten() for n, pixels in zip(numbers, read)])
        weights = torch.cat([part.weights().flatten() for part in batch])
        # A bag per pixel: the bins that read it. The sort is stable, so that they are always summed in one order.
        pixels, order = torch.cat([pixels.flatten() for pixels in read]).sort(stable=True)
        bins, weights = bins[order], weights[order]
        pixel = torch.arange(size, dtype=dtype, device=device)
        starts = torch.searchsorted(pixels, pixel, out_int32=dtype == torch.int32)
        of_batch = F.embedding_bag(bins, of_bins, starts, mode="sum", per_sample_weights=weights)
        rows = of_batch if rows is None else rows.add_(of_batch)
    return grad.new_zeros(size, grad.shape[3]) if rows is None else rows


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows [pixels, C] as a map of the shape, dtype and layout of another."""
    source = rows.to(like.dtype).view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return source.contiguous() if like.is_contiguous() else source


def _weight_gradients(part: _Part, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the y and x weights, from that of the crops, [K, bins, bins, C]."""
    of_y, of_x = [part.y.weight[:0]], [part.x.weight[:0]]
    for chunk in part.chunks():
        of_crops = grad.index_select(0, chunk.rois)  # [M, bins, bins, C]
        with torch.enable_grad():
            weights = chunk.weights().detach().requires_grad_()
            sums = F.embedding_bag(chunk.pixels(), rows, mode="sum", per_sample_weights=weights)
        (of_weights,) = torch.autograd.grad(sums, weights, of_crops.flatten(0, 2))
        of_weights = of_weights.view(*of_crops.shape[:3], chunk.y.index.shape[2], chunk.x.index.shape[2])
        # Products and sums rather than einsum, whose matrix product may be in TF32.
        of_y.append((of_weights * chunk.x.weight[:, None, :, None, :]).sum((2, 4)))
        of_x.append((of_weights * chunk.y.weight[:, :, None, :, None]).sum((1, 3)))
    return torch.cat(of_y), torch.cat(of_x)


def _with_positions(samples: Sequence[Samples], positions: Sequence[Tensor]) -> list[Samples]:
    return [replace(group, y=y, x=x) for group, y, x in zip(samples, positions[::2], positions[1::2])]
