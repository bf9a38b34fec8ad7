"""The crop as a gather: a bin is a weighted sum of pixels, computed by ``embedding_bag``.

In channels_last a map is a table with one row per pixel. No sample is written to memory. The map's gradient is a gather
as well: a weighted sum of the bins that read a pixel, found by sorting. No two threads add to the same place in memory,
so values and gradients are the same to the last bit in every run.
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
from detector.crop.rois import Rows, Samples

# Pixels per call of embedding_bag. On a CPU the bins should stay in the cache; on a GPU few calls matter more.
MAX_PIXELS_READ_CPU = 2**17
MAX_PIXELS_READ_GPU = 2**26
MAX_PIXELS_SORTED = 2**25  # at once for the maps' gradient, at about 30 bytes each


@dataclass(frozen=True)
class Taps(Rows):
    """The pixels that each bin reads along one axis, and their weights."""

    index: Tensor  # [M, bins, T], pixel numbers
    weight: Tensor  # [M, bins, T], differentiable in the positions


def point_taps(position: Tensor, size: Tensor) -> Taps:
    """Return the taps of samples at normalised positions [M, bins, n] on maps of a size [M]; each sample has weight 1.

    They are the two neighbours of each sample or, if that is fewer, the run of pixels from a bin's first to its last.
    """
    size = size[:, None, None]
    on_map = position.abs() <= 1
    pixel = ((position + 1) * size - 1) / 2
    low = torch.minimum(pixel.detach().floor(), size - 2).clamp(min=0)
    # Samples that count as zero read a pixel that their bin or RoI reads anyway, or else the first: others may be NaN.
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
    """Crop maps [N, C, H, W] of any floating dtype, not vmapped. Returns [K, C, bins, bins].

    ``taps_of`` returns the taps at positions [M, bins, n] on maps of a size [M]. ``reference`` computes the same by
    differentiable operations, for second derivatives. Maps that are not channels_last are copied, in the backward too.
    """
    if not maps[0].shape[1]:  # embedding_bag takes no table without columns
        return reference([source.to(geometry_dtype(*maps)) for source in maps], samples)
    positions = [axis for group in samples for axis in (group.y, group.x)]
    constants = [group.map(_unwrapped) for group in samples]
    return _Gather.apply(len(maps), constants, taps_of, reference, *maps, *positions)


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return a constant without the wrappers of ``torch.func``, which no longer exist in a backward."""
    tensor = tensor.detach()
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class _Gather(torch.autograd.Function):
    """Inputs: the number of maps, the samples and functions, the maps, and y and x of each group of samples."""

    generate_vmap_rule = True  # which PyTorch asks for when a vmap runs over other tensors

    @staticmethod
    def forward(count: int, samples: list[Samples], taps_of: Any, reference: Any, *tensors: Tensor) -> Tensor:
        maps = tensors[:count]
        rois = sum(len(group.image) for group in samples)
        tables = _tables(maps, samples, taps_of)
        # Contiguous like roi_align's output: a head may call view.
        shape = (rois, maps[0].shape[1], samples[0].y.shape[1], samples[0].x.shape[1])
        crops = maps[0].new_empty(shape, dtype=geometry_dtype(*maps))
        if sum(len(part.rois) for _, readers in tables for part in readers) < rois:
            crops.zero_()
        for numbers, readers in tables:
            rows = _rows(maps, numbers)
            for chunk in (chunk for part in readers for chunk in part.chunks()):
                sums = F.embedding_bag(chunk.pixels(), rows, mode="sum", per_sample_weights=chunk.weights())
                sums = sums.view(-1, *shape[2:], shape[1]).permute(0, 3, 1, 2)
                crops.index_copy_(0, chunk.rois, sums)
        return crops

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings = inputs[:4]
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, samples, taps_of, reference = ctx.settings
        saved = ctx.saved_tensors  # once, as activation checkpointing asks

        def crop(*tensors: Tensor) -> Tensor:
            dtype = geometry_dtype(*tensors[:count])
            return reference([m.to(dtype) for m in tensors[:count]], _with_positions(samples, tensors[count:]))

        if torch.is_grad_enabled():  # with create_graph=True this gradient will be differentiated
            return None, None, None, None, *torch.func.vjp(crop, *saved)[1](grad)
        grad = grad.permute(0, 2, 3, 1)  # [K, bins, bins, C]
        maps, need_grad = saved[:count], ctx.needs_input_grad[4:]
        boxes_need_it = any(need_grad[count:])
        positions = [position.detach().requires_grad_(boxes_need_it) for position in saved[count:]]
        with torch.set_grad_enabled(boxes_need_it):
            tables = _tables(maps, _with_positions(samples, positions), taps_of)
        gradients: list[Tensor | None] = [None] * len(need_grad)
        weights: list[Tensor] = []
        weight_grads: list[Tensor] = []
        for numbers, readers in tables:
            if boxes_need_it:
                rows = _rows(maps, numbers)
                for part in readers:
                    weights += [part.y.weight, part.x.weight]
                    weight_grads += _weight_gradients(part, rows, grad)
            if any(need_grad[number] for number in numbers):
                sizes = [maps[number][:, 0].numel() for number in numbers]
                for number, map_rows in zip(numbers, _rows_gradient(readers, grad, sum(sizes)).split(sizes)):
                    like = maps[number]
                    source = map_rows.to(like.dtype).view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
                    gradients[number] = source.contiguous() if like.is_contiguous() else source
        if boxes_need_it:
            gradients[count:] = torch.autograd.grad(weights, positions, weight_grads)
        return None, None, None, None, *gradients


@dataclass(frozen=True)
class _Part(Rows):
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

    def chunks(self, max_pixels: int | None = None) -> Iterator["_Part"]:
        """Split these RoIs into chunks that read at most ``max_pixels``, by default the device's limit."""
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


def _rows(maps: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """Return the table of some of the maps, [pixels, C]. A channels_last map in the right dtype is not copied."""
    # Contiguous, because the rows of a single NCHW image would be a view, which is slow to read.
    channels_last = [maps[n].permute(0, 2, 3, 1).contiguous() for n in numbers]
    rows = [source.to(geometry_dtype(*maps)).flatten(0, 2) for source in channels_last]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _tables(
    maps: Sequence[Tensor], samples: list[Samples], taps_of: Callable[[Tensor, Tensor], Taps]
) -> list[tuple[Sequence[int], list[_Part]]]:
    """Return the maps and readers of each table: one per map, or one in all on a GPU."""
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
        # RoIs on no level have weight 0. (On a GPU they still read.)
        roi_weight = ((group.level >= 0).to(group.y.dtype) / group.count)[:, None, None]
        y_rows = origin[:, None, None] + y.index.to(dtype) * width[:, None, None]
        y = Taps(y_rows, (y.weight * roi_weight).to(working))
        x = Taps(x.index.to(dtype), x.weight.to(working))
        parts.append(_Part(torch.arange(len(origin), device=origin.device) if group.rois is None else group.rois, y, x))
    if not maps[0].is_cpu or len(maps) == 1:
        return [(range(len(maps)), parts)]
    on_level = [[torch.where(group.level == number)[0] for group in samples] for number in range(len(maps))]
    return [([n], [part.select(rois) for part, rois in zip(parts, on_level[n])]) for n in range(len(maps))]


def _rows_gradient(readers: list[_Part], grad: Tensor, size: int) -> Tensor:
    """Return the gradient of a table's rows, [size, C], from that of the crops, [K, bins, bins, C]."""
    # RoIs are sorted together while their bins take no more memory than the table, and no more than the limit.
    batches: list[list[_Part]] = []
    for part in readers:
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
