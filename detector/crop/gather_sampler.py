"""The crop as a gather: a bin is a weighted sum of pixels, and ``embedding_bag`` sums rows of a table by weight.

With its channels innermost (channels_last) a map is a table of one row a pixel. The weights of bilinear sampling
and of averaging over a bin are products of a weight for the pixel's row and one for its column, so that all the
geometry stays in small tensors without channels, and no sample is ever written to memory. The gradient to the map
is a gather as well: the pixel's row is a weighted sum of the bins that read it, found by sorting. Neither adds to
a place in memory from two threads, so that values and gradients are the same to the last bit from run to run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.crop.exact import crop_by_matrices, hat_weights
from detector.crop.geometry import geometry_dtype
from detector.crop.grid_sampler import crop_by_grid
from detector.crop.positions import Samples

# The most pixels that one call of embedding_bag reads (one RoI may be more). On a CPU a chunk's bins should stay in the
# cache until they are written to their place; on a GPU a call costs more than that.
MAX_PIXELS_READ_CPU = 2**17
MAX_PIXELS_READ_GPU = 2**26
# The most that are sorted at once for the maps' gradient, at some 30 bytes each.
MAX_PIXELS_SORTED = 2**25


@torch.compiler.disable
def crop_by_gather(maps: Sequence[Tensor], samples: Sequence[Samples]) -> Tensor:
    """What :func:`~detector.crop.grid_sampler.crop_by_grid` returns for the same arguments; maps of any floating dtype.

    The sums are in float32, or float64 where a map is. Maps in another layout than channels_last are copied, one at a
    time, and again in the backward rather than kept; on a GPU maps of several levels are, together. Second
    derivatives and all derivatives of ``torch.func`` are taken through ``crop_by_grid``. Vmapped tensors must not come
    here: the caller takes ``crop_by_grid`` for them.
    """
    if not maps[0].shape[1]:  # embedding_bag takes no such table
        return crop_by_grid([source.to(geometry_dtype(*maps)) for source in maps], samples)
    positions = [axis for group in samples for axis in (group.y, group.x)]
    detached = _with_positions(samples, [axis.detach() for axis in positions])
    return _Gather.apply(detached, len(maps), *maps, *positions)


class _Gather(torch.autograd.Function):
    """Inputs: the groups of samples, the number of maps, the maps, and y and x of each group."""

    @staticmethod
    def forward(samples: list[Samples], maps: int, *tensors: Tensor) -> Tensor:
        rois = sum(len(group.image) for group in samples)
        tables = _tables(tensors[:maps], samples)
        # Contiguous, as roi_align's: a head may call view.
        shape = (rois, tensors[0].shape[1], samples[0].y.shape[1], samples[0].x.shape[1])
        all_read = sum(len(part.rois) for table in tables for part in table.readers) == rois
        crops = tensors[0].new_empty(shape, dtype=tables[0].dtype)
        if not all_read:
            crops.zero_()
        for table in tables:
            rows = table.rows(tensors)
            for chunk in table.chunks():
                sums = F.embedding_bag(chunk.pixels(), rows, mode="sum", per_sample_weights=chunk.weights())
                sums = sums.view(-1, *shape[2:], shape[1]).permute(0, 3, 1, 2)
                crops.index_copy_(0, chunk.rois, sums)
        return crops

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.samples, ctx.maps = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        samples, maps, tensors = ctx.samples, ctx.maps, ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: this gradient is to be differentiated
            return None, None, *torch.func.vjp(partial(_by_grid, samples, maps), *tensors)[1](grad)

        grad = grad.permute(0, 2, 3, 1)  # [K, bins, bins, C]
        map_grads: list[Tensor | None] = [None] * maps
        position_grads = [torch.zeros_like(position) for position in tensors[maps:]]
        boxes_need_it = any(ctx.needs_input_grad[2 + maps :])
        for table in _tables(tensors[:maps], samples):
            if boxes_need_it:
                _add_position_gradients(position_grads, table, table.rows(tensors), grad)
            if any(ctx.needs_input_grad[2 + number] for number in table.maps):
                sizes = [tensors[number][:, 0].numel() for number in table.maps]
                rows = _rows_gradient(table, grad, sum(sizes))
                for number, map_rows in zip(table.maps, rows.split(sizes)):
                    map_grads[number] = _as_map(map_rows, tensors[number])
        return None, None, *map_grads, *(position_grads if boxes_need_it else [None] * len(position_grads))

    @staticmethod
    def vmap(*args: Any) -> tuple[Tensor, int]:
        """Never called: PyTorch only wants it to exist where a vmap goes over other tensors."""
        raise NotImplementedError


def _by_grid(samples: list[Samples], maps: int, *tensors: Tensor) -> Tensor:
    """:class:`_Gather` by the other sampler, of whose operations all have derivatives and batching rules."""
    dtype = geometry_dtype(*tensors[:maps])
    crop = crop_by_grid if samples[0].taps is None else crop_by_matrices
    return crop([m.to(dtype) for m in tensors[:maps]], _with_positions(samples, tensors[maps:]))


@dataclass(frozen=True)
class _Taps:
    """The pixels along one axis that a bin reads, and their weights.

    A sample reads two neighbours. Samples that lie closer than a pixel share theirs, and then a bin's taps are the
    run of pixels from its first to its last one; else they are the two of each sample.
    """

    index: Tensor  # [M, bins, T], the pixel
    weight: Tensor  # [M, bins, T]
    slot: Tensor  # [M, bins, n], the tap that is the first neighbour of each sample; the second is the next one
    slope: Tensor  # [M, bins, n], what the second neighbour's weight grows by for a step of the normalised position

    def select(self, of: slice | Tensor) -> "_Taps":
        return type(self)(self.index[of], self.weight[of], self.slot[of], self.slope[of])

    def pull_back(self, grad: Tensor) -> Tensor:
        """From the gradient at the weights, [M, bins, T], to that at the positions, [M, bins, n]."""
        return (grad.gather(2, self.slot + 1) - grad.gather(2, self.slot)) * self.slope


class _ExactTaps(_Taps):
    """The run of pixels that a bin overlaps; ``slope`` is [M, bins, T, 2], for a step of each edge; no ``slot``."""

    def pull_back(self, grad: Tensor) -> Tensor:
        """From the gradient at the weights, [M, bins, T], to that at the edges, [M, bins, 2]."""
        return (grad[..., None] * self.slope).sum(2)


def _exact_taps(edges: Tensor, size: Tensor, dtype: torch.dtype, most: int, weight: Tensor | None = None) -> _ExactTaps:
    """Taps of bins with edges [M, bins, 2] on maps of a size [M]; each bin weighs 1 or [M]."""
    index, weights, slopes = hat_weights(edges, size, most)
    if weight is not None:
        weights, slopes = weights * weight[:, None, None], slopes * weight[:, None, None, None]
    return _ExactTaps(index, weights.to(dtype), index, slopes.to(dtype))


def _taps(position: Tensor, size: Tensor, dtype: torch.dtype, weight: Tensor | None = None) -> _Taps:
    """Taps of samples at normalised positions [M, bins, n] on maps of a size [M]; each sample weighs 1 or [M]."""
    size = size[:, None, None]
    on_map = position.abs() <= 1
    pixel = ((position + 1) * size - 1) / 2
    low = torch.minimum(pixel.floor(), size - 2).clamp(min=0)
    # Samples that count as zero read a pixel that the bin, or at least the RoI, reads anyhow: what lies outside
    # every box may be NaN. Of an RoI that has no other samples it is the first one, as in roi_align.
    first = torch.where(on_map, low, torch.inf).amin(2, keepdim=True)  # [M, bins, 1]
    first = torch.where(first.isinf(), first.amin(1, keepdim=True), first)
    first = torch.where(first.isinf(), 0, first)
    low = torch.where(on_map, low, first)

    sample_weight = on_map.to(position.dtype)
    if weight is not None:
        sample_weight = sample_weight * weight[:, None, None]
    second = (pixel - low) * sample_weight
    slot = (low - first).long()
    taps = 2 * low.shape[2]
    # One tap a pixel, if that makes them fewer. On a GPU nobody looks.
    if low.is_cpu and low.shape[2] > 1 and low.numel() and (run := int(slot.max()) + 2) < taps:
        last = torch.minimum(first + slot.amax(2, keepdim=True) + 1, size - 1)
        index = torch.minimum(first + torch.arange(run, dtype=first.dtype, device=first.device), last)
        weights = position.new_zeros(index.shape)
        weights.scatter_add_(2, slot, sample_weight - second).scatter_add_(2, slot + 1, second)
    else:
        index = torch.stack([low, torch.minimum(low + 1, size - 1)], dim=3).flatten(2)
        slot = torch.arange(0, taps, 2, device=slot.device).expand(slot.shape)
        weights = torch.stack([sample_weight - second, second], dim=3).flatten(2)
    return _Taps(index, weights.to(dtype), slot, (sample_weight * size / 2).to(dtype))


@dataclass(frozen=True)
class _Part:
    """RoIs of one group that read one table."""

    group: int
    of_group: Tensor  # [M], which RoIs of the group
    rois: Tensor  # [M], which RoIs of the call
    y: _Taps  # whose pixel is the table's row of the first pixel of that row of the map
    x: _Taps

    @property
    def taps(self) -> int:
        """Pixels that a bin reads."""
        return self.y.index.shape[2] * self.x.index.shape[2]

    @property
    def size(self) -> int:
        """Pixels that all bins read."""
        return len(self.rois) * self.y.index.shape[1] * self.x.index.shape[1] * self.taps

    def select(self, of: slice | Tensor) -> "_Part":
        return _Part(self.group, self.of_group[of], self.rois[of], self.y.select(of), self.x.select(of))

    def chunks(self, most: int | None = None) -> Iterator["_Part"]:
        """These RoIs in parts that read ``most`` pixels, by default as many as one call should."""
        if most is None:
            most = MAX_PIXELS_READ_CPU if self.rois.is_cpu else MAX_PIXELS_READ_GPU
        rois = len(self.rois)
        step = max(most * rois // max(self.size, 1), 1)
        return (self.select(slice(start, start + step)) for start in range(0, rois, step))

    def pixels(self) -> Tensor:
        """The rows of the table that each bin reads, [M * bins * bins, T * T]."""
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
        """[pixels, C]. A map in channels_last and the dtype is its own table, without a copy."""
        # Contiguous, or of a single image in NCHW it would be a view whose rows are not, which are slow to read.
        rows = [maps[n].permute(0, 2, 3, 1).contiguous().to(self.dtype).flatten(0, 2) for n in self.maps]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def chunks(self) -> Iterator[_Part]:
        return (chunk for part in self.readers for chunk in part.chunks())


def _tables(maps: Sequence[Tensor], samples: list[Samples]) -> list[_Table]:
    """One table for each map on a CPU. To know who reads which, the levels must be looked at.

    On a GPU a look would wait for it: there all maps are copied into one table, at a speed that makes it the
    smaller evil.
    """
    working = geometry_dtype(*maps)
    ends = list(accumulate(source[:, 0].numel() for source in maps))
    dtype = torch.int32 if ends[-1] < 2**31 else torch.int64  # half the memory: an RoI reads hundreds of pixels
    starts = [0] * len(maps) if maps[0].is_cpu else [0, *ends[:-1]]
    parts = []
    for number, group in enumerate(samples):
        width = group.width.to(dtype)
        origin = group.image.to(dtype) * group.height.to(dtype) * width
        for level, start in enumerate(starts):
            if start:
                origin = torch.where(group.level == level, origin + start, origin)
        # RoIs on no level have no weight. (On a GPU they do read.)
        weight = (group.level >= 0).to(group.y.dtype) / group.count
        if group.taps is None:
            y, x = _taps(group.y, group.height, working, weight), _taps(group.x, group.width, working)
        else:
            rows, columns = group.taps
            y = _exact_taps(group.y, group.height, working, rows, weight)
            x = _exact_taps(group.x, group.width, working, columns)
        first = origin[:, None, None] + y.index.to(dtype) * width[:, None, None]
        y, x = replace(y, index=first), replace(x, index=x.index.to(dtype))
        everyone = torch.arange(len(origin), device=origin.device)
        parts.append(_Part(number, everyone, everyone if group.rois is None else group.rois, y, x))
    if not maps[0].is_cpu or len(maps) == 1:
        return [_Table(range(len(maps)), working, parts)]
    tables = []
    for number in range(len(maps)):
        readers = [part.select(torch.where(group.level == number)[0]) for part, group in zip(parts, samples)]
        tables.append(_Table([number], working, readers))
    return tables


def _rows_gradient(table: _Table, grad: Tensor, size: int) -> Tensor:
    """The gradient at a table's rows, [size, C], from that at the crops, [K, bins, bins, C]."""
    # What is sorted together: RoIs whose bins take no more memory than the table, or than the sort may.
    batches: list[list[_Part]] = []
    for part in table.readers:
        most = min(MAX_PIXELS_SORTED, size * part.taps)
        for chunk in part.chunks(most):
            if batches and sum(part.size for part in batches[-1]) + chunk.size <= most:
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
        # A bag for each pixel: the bins that read it. A stable sort, so that they are summed in one order always.
        pixels, order = torch.cat([pixels.flatten() for pixels in read]).sort(stable=True)
        bins, weights = bins[order], weights[order]
        pixel = torch.arange(size, dtype=dtype, device=device)
        starts = torch.searchsorted(pixels, pixel, out_int32=dtype == torch.int32)
        of_batch = F.embedding_bag(bins, of_bins, starts, mode="sum", per_sample_weights=weights)
        rows = of_batch if rows is None else rows.add_(of_batch)
    return grad.new_zeros(size, grad.shape[3]) if rows is None else rows


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [pixels, C] as a map of the shape, the dtype and the layout of another."""
    source = rows.to(like.dtype).view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return source.contiguous() if like.is_contiguous() else source


def _add_position_gradients(position_grads: list[Tensor], table: _Table, rows: Tensor, grad: Tensor) -> None:
    """Put the gradients at the readers' y and x into those of their groups, from that at the crops."""
    for chunk in table.chunks():
        y, x = chunk.y, chunk.x
        of_crops = grad.index_select(0, chunk.rois)  # [M, bins, bins, C]
        with torch.enable_grad():
            weights = chunk.weights().requires_grad_()
            sums = F.embedding_bag(chunk.pixels(), rows, mode="sum", per_sample_weights=weights)
        (of_weights,) = torch.autograd.grad(sums, weights, of_crops.flatten(0, 2))
        of_weights = of_weights.view(*of_crops.shape[:3], y.index.shape[2], x.index.shape[2])
        # Products and sums, not einsum: a matrix product may be in TF32.
        of_y = y.pull_back((of_weights * x.weight[:, None, :, None, :]).sum((2, 4)))
        of_x = x.pull_back((of_weights * y.weight[:, :, None, :, None]).sum((1, 3)))
        for target, of_chunk in zip(position_grads[2 * chunk.group :], (of_y, of_x)):
            target.index_copy_(0, chunk.of_group, of_chunk.to(target.dtype))


def _with_positions(samples: Sequence[Samples], positions: Sequence[Tensor]) -> list[Samples]:
    return [replace(group, y=y, x=x) for group, y, x in zip(samples, positions[::2], positions[1::2])]
