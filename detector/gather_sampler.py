"""The crop as a gather: a bin is a weighted sum of pixels, and ``embedding_bag`` sums rows of a table by weight.

With its channels innermost (channels_last) a map is a table of one row a pixel. The weights of bilinear sampling
and of averaging over a bin are products of a weight for the pixel's row and one for its column, so that all the
geometry stays in small tensors without channels, and no sample is ever written to memory. The gradient to the map
is a gather as well: the pixel's row is a weighted sum of the bins that read it, found by sorting. Neither adds to
a place in memory from two threads, so that values and gradients are the same to the last bit from run to run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.grid_sampler import crop_by_grid
from detector.sampling import Samples

# The most pixels that one call of embedding_bag reads. On a CPU a chunk's bins should stay in the cache until they
# are written to their place; on a GPU a call costs more than that.
MAX_PIXELS_READ_CPU = 2**17
MAX_PIXELS_READ_GPU = 2**26


@torch.compiler.disable
def crop_by_gather(maps: Sequence[Tensor], samples: Sequence[Samples]) -> Tensor:
    """What :func:`~detector.grid_sampler.crop_by_grid` returns for the same arguments, laid out in channels_last.

    Maps that are not in channels_last are copied. Second derivatives are taken through ``crop_by_grid``.
    """
    positions = [axis for group in samples for axis in (group.y, group.x)]
    return _Gather.apply(list(samples), len(maps), *maps, *positions)


class _Gather(torch.autograd.Function):
    """Inputs: the groups of samples, the number of maps, the maps, and y and x of each group."""

    @staticmethod
    def forward(samples: list[Samples], maps: int, *tensors: Tensor) -> Tensor:
        tables, parts = _tables(tensors[:maps], _with_positions(samples, tensors[maps:]))
        rois = sum(len(group.image) for group in samples)
        bins, channels = (samples[0].y.shape[1], samples[0].x.shape[1]), tables[0].shape[1]
        crops = tables[0].new_empty(rois, *bins, channels)
        for part in parts:
            for chunk in part.chunks():
                pixels, weights = chunk.pixels(), chunk.weights()
                sums = F.embedding_bag(pixels, tables[chunk.table], mode="sum", per_sample_weights=weights)
                sums = sums.view(-1, *bins, channels)
                if len(sums) == rois:  # all of them; they are in their order
                    crops = sums
                else:
                    crops.index_copy_(0, chunk.rois, sums)
        return crops.permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.samples, ctx.maps = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        samples, maps, tensors = ctx.samples, ctx.maps, ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: this gradient is to be differentiated

            def crop(*tensors: Tensor) -> Tensor:
                return crop_by_grid(tensors[:maps], _with_positions(samples, tensors[maps:]))

            return None, None, *torch.func.vjp(crop, *tensors)[1](grad)

        tables, parts = _tables(tensors[:maps], _with_positions(samples, tensors[maps:]))
        grad = grad.permute(0, 2, 3, 1).contiguous()  # [K, bins, bins, C]
        map_grads: list[Tensor | None] = [None] * maps
        position_grads: list[Tensor | None] = [None] * (2 * len(samples))
        if any(ctx.needs_input_grad[2 : 2 + maps]):
            map_grads = list(_map_gradients(tensors[:maps], tables, parts, grad))
        if any(ctx.needs_input_grad[2 + maps :]):
            position_grads = list(_position_gradients(samples, tables, parts, grad))
        return None, None, *map_grads, *position_grads


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

    def select(self, of: slice) -> "_Taps":
        return _Taps(self.index[of], self.weight[of], self.slot[of], self.slope[of])

    def pull_back(self, grad: Tensor) -> Tensor:
        """From the gradient at the weights, [M, bins, T], to that at the positions, [M, bins, n]."""
        return (grad.gather(2, self.slot + 1) - grad.gather(2, self.slot)) * self.slope


def _taps(position: Tensor, size: Tensor, sample_weight: Tensor | float, dtype: torch.dtype) -> _Taps:
    """Taps of samples at normalised positions [M, bins, n] on maps of a size [M]."""
    size = size[:, None, None]
    if isinstance(sample_weight, Tensor):
        sample_weight = sample_weight[:, None, None]
    on_map = position.abs() <= 1
    pixel = ((position + 1) * size - 1) / 2
    low = torch.minimum(pixel.floor(), size - 2).clamp(min=0)
    # Samples that count as zero read a pixel that the bin, or at least the RoI, reads anyhow: what lies outside
    # every box may be NaN.
    first = torch.where(on_map, low, torch.inf).amin(2, keepdim=True)  # [M, bins, 1]
    first = torch.where(first.isinf(), first.amin(1, keepdim=True), first)
    first = torch.where(first.isinf(), 0, first)
    low = torch.where(on_map, low, first)

    slot = (low - first).long()
    taps = 2 * low.shape[2]
    # One tap a pixel, if that makes them fewer. On a GPU nobody looks.
    if low.is_cpu and low.shape[2] > 1 and low.numel() and (run := int(slot.max()) + 2) < taps:
        last = torch.minimum(first + slot.amax(2, keepdim=True) + 1, size - 1)
        index = torch.minimum(first + torch.arange(run, dtype=first.dtype, device=first.device), last)
        taps = run
    else:
        index = torch.stack([low, torch.minimum(low + 1, size - 1)], dim=3).flatten(2)
        slot = torch.arange(0, taps, 2, device=slot.device).expand(slot.shape)
    sample_weight = on_map.to(position.dtype) * sample_weight
    fraction = (pixel - low) * sample_weight
    weight = position.new_zeros(*index.shape)
    weight = weight.scatter_add_(2, slot, sample_weight - fraction).scatter_add_(2, slot + 1, fraction)
    return _Taps(index, weight.to(dtype), slot, (sample_weight * size / 2).to(dtype))


@dataclass(frozen=True)
class _Part:
    """RoIs that read one table: their taps, and where they come from and go to."""

    table: int
    group: int
    of_group: Tensor  # [M], which RoIs of the group
    rois: Tensor  # [M], which RoIs of the call
    origin: Tensor  # [M], the table's row of the first pixel of the RoI's map and image
    width: Tensor  # [M], rows of the table from a row of the map to the next
    y: _Taps
    x: _Taps

    @property
    def bins(self) -> tuple[int, int]:
        return self.y.index.shape[1], self.x.index.shape[1]

    def chunks(self) -> Iterator["_Part"]:
        rois, bins_y, taps_y = self.y.index.shape
        pixels = bins_y * taps_y * self.x.index[0].numel() if rois else 1
        most = MAX_PIXELS_READ_CPU if self.rois.is_cpu else MAX_PIXELS_READ_GPU
        step = max(most // pixels, 1)
        for start in range(0, rois, step):
            of = slice(start, start + step)
            yield replace(
                self,
                of_group=self.of_group[of],
                rois=self.rois[of],
                origin=self.origin[of],
                width=self.width[of],
                y=self.y.select(of),
                x=self.x.select(of),
            )

    def pixels(self) -> Tensor:
        """The rows of the table that each bin reads, [M * bins * bins, T * T]."""
        dtype = self.origin.dtype
        rows = self.origin[:, None, None] + self.y.index.to(dtype) * self.width[:, None, None]
        return (rows[:, :, None, :, None] + self.x.index.to(dtype)[:, None, :, None, :]).flatten(3).flatten(0, 2)

    def weights(self) -> Tensor:
        """Their weights, [M * bins * bins, T * T]."""
        return (self.y.weight[:, :, None, :, None] * self.x.weight[:, None, :, None, :]).flatten(3).flatten(0, 2)


def _tables(maps: Sequence[Tensor], samples: list[Samples]) -> tuple[list[Tensor], list[_Part]]:
    """The tables [pixels, C] and who reads them.

    On a CPU there is one for each map, which is the map itself if it is in channels_last: no copy. To know who
    reads which the values of the levels must be read, which on a GPU would wait for it: there all maps are copied
    into one table, at a speed that makes it the smaller evil.
    """
    tables = [source.permute(0, 2, 3, 1).reshape(-1, source.shape[1]) for source in maps]
    if tables[0].is_cpu:
        origins = [0] * len(maps)
    else:
        ends = [0]
        for table in tables:
            ends.append(ends[-1] + len(table))
        origins, tables = ends[:-1], [torch.cat(tables)]
    # Half the memory where it does: there are hundreds of pixels an RoI.
    dtype = torch.int32 if max(len(table) for table in tables) < 2**31 else torch.int64
    parts = []
    for number, group in enumerate(samples):
        everyone = torch.arange(len(group.image), device=group.image.device)
        for table in range(len(tables)):
            chosen = everyone
            if len(tables) > 1:  # those on no level have no weight, but they have a place
                chosen = torch.where(group.level.clamp(min=0) == table)[0]
                if not len(chosen):
                    continue
            members = group if chosen is everyone else group.select(chosen)
            weight = (members.level >= 0).to(members.y.dtype) * members.weight
            height, width = members.height.to(dtype), members.width.to(dtype)
            origin = members.image.to(dtype) * height * width
            for level, start in enumerate(origins):
                if start:
                    origin = torch.where(members.level == level, origin + start, origin)
            parts.append(
                _Part(
                    table,
                    number,
                    chosen,
                    chosen if group.rois is None else group.rois[chosen],
                    origin,
                    width,
                    _taps(members.y, members.height, weight, maps[0].dtype),
                    _taps(members.x, members.width, 1.0, maps[0].dtype),
                )
            )
    return tables, parts


def _map_gradients(maps: Sequence[Tensor], tables: list[Tensor], parts: list[_Part], grad: Tensor) -> Iterator[Tensor]:
    """The gradient at each map, in channels_last, from that at the crops [K, bins, bins, C]."""
    grad_table = grad.flatten(0, 2)  # a row a bin
    bins = grad.shape[1] * grad.shape[2]
    table_grads = []
    for number, table in enumerate(tables):
        readers = [part for part in parts if part.table == number and len(part.rois)]
        if not readers or not len(grad_table):
            table_grads.append(torch.zeros_like(table))
            continue
        pixels = torch.cat([part.pixels().flatten() for part in readers])
        weights = torch.cat([part.weights().flatten() for part in readers])
        bags = torch.cat([_bags(part, bins).flatten() for part in readers])
        # A bag for each pixel: the bins that read it. A stable sort, so that they are summed in one order always.
        pixels, order = pixels.sort(stable=True)
        starts = torch.searchsorted(pixels, torch.arange(len(table), dtype=pixels.dtype, device=pixels.device))
        table_grads.append(
            F.embedding_bag(
                bags[order], grad_table, starts.to(bags.dtype), mode="sum", per_sample_weights=weights[order]
            )
        )
    if len(table_grads) < len(maps):
        table_grads = list(table_grads[0].split([source[:, 0].numel() for source in maps]))
    for source, table_grad in zip(maps, table_grads):
        images, channels, height, width = source.shape
        yield table_grad.view(images, height, width, channels).permute(0, 3, 1, 2)


def _bags(part: _Part, bins: int) -> Tensor:
    """Which of the call's bins reads each of :meth:`_Part.pixels`, of the same shape."""
    bag = part.rois[:, None] * bins + torch.arange(bins, device=part.rois.device)
    taps = part.y.index.shape[2] * part.x.index.shape[2]
    return bag.to(part.origin.dtype).flatten()[:, None].expand(-1, taps)


def _position_gradients(samples: list[Samples], tables: list[Tensor], parts: list[_Part], grad: Tensor) -> list[Tensor]:
    """The gradients at y and x of each group, from that at the crops [K, bins, bins, C]."""
    grads = [torch.zeros_like(axis) for group in samples for axis in (group.y, group.x)]
    for part in parts:
        for chunk in part.chunks():
            with torch.enable_grad():
                weights = chunk.weights().requires_grad_()
                sums = F.embedding_bag(chunk.pixels(), tables[chunk.table], mode="sum", per_sample_weights=weights)
            (weight_grad,) = torch.autograd.grad(sums, weights, grad[chunk.rois].flatten(0, 2))
            y, x = chunk.y, chunk.x
            shape = (len(chunk.rois), *chunk.bins, y.index.shape[2], x.index.shape[2])
            weight_grad = weight_grad.view(shape)  # [M, y bins, x bins, y taps, x taps]
            # Products and sums, not einsum: a matrix product may be in TF32.
            y_grad = (weight_grad * x.weight[:, None, :, None, :]).sum((2, 4))
            x_grad = (weight_grad * y.weight[:, :, None, :, None]).sum((1, 3))
            for axis, taps, axis_grad in ((0, y, y_grad), (1, x, x_grad)):
                target = grads[2 * chunk.group + axis]
                target.index_copy_(0, chunk.of_group, taps.pull_back(axis_grad).to(target.dtype))
    return grads


def _with_positions(samples: list[Samples], positions: Sequence[Tensor]) -> list[Samples]:
    return [replace(group, y=y, x=x) for group, y, x in zip(samples, positions[::2], positions[1::2])]
