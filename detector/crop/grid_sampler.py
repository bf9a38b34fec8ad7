"""The crop by ``grid_sample``: every operation can be differentiated twice, vmapped and exported."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detector.crop.rois import OUTSIDE, Samples
from detector.crop.transforms import is_vmapped, makes_graph

MAX_SAMPLED_ELEMENTS = 2**26  # per call of grid_sample (float32: 256 MiB); larger crops are computed in chunks


def crop_by_grid(maps: Sequence[Tensor], samples: Sequence[Samples], counts: list[int] | None = None) -> Tensor:
    """Sample maps, float32 or float64, and average over bins, [K, C, bins, bins]; ``counts``: see :class:`.RoIs`."""
    crops = [_crop_group(maps, group, counts) for group in samples]
    rois = [group.rois for group in samples if group.rois is not None]
    return torch.cat(crops)[torch.cat(rois).argsort()] if rois else crops[0]


def _crop_group(maps: Sequence[Tensor], group: Samples, counts: list[int] | None) -> Tensor:
    if torch.jit.is_tracing():
        crops = _average_selected(maps, group)
    elif (makes_graph() or group.y.is_meta or is_vmapped(group.y)) and (counts is None or len(maps) > 1):
        of_levels = [_average_masked(source, group, level) for level, source in enumerate(maps)]
        crops = torch.stack(of_levels).sum(dim=0)
    elif len(maps) == 1:
        crops = _average(maps[0], group, counts)
    else:
        rois = [torch.where(group.level == level)[0] for level in range(len(maps))]
        crops = torch.cat([_average(source, group.select(r), None) for source, r in zip(maps, rois)])
        # Some RoIs may be on no level.
        crops = crops.new_zeros(len(group.level), *crops.shape[1:]).index_copy(0, torch.cat(rois), crops)
    return crops / group.count.to(crops.dtype)[:, None, None, None] if isinstance(group.count, Tensor) else crops


def _average_selected(maps: Sequence[Tensor], group: Samples) -> Tensor:
    """Sample each level and image at its own RoIs, which are found in the traced graph. [M, C, bins, bins]"""
    rois, crops = [], []
    for level, source in enumerate(maps):
        for i, image in enumerate(source.split(1)):
            own = torch.where((group.level == level) & (group.image == i))[0]
            part = group.select(own)
            rois.append(own)
            crops.append(_average_batched(image, part.y[None], part.x[None], group.divisor)[0])
    found = torch.cat(crops)
    return found.new_zeros(group.level.shape[0], *found.shape[1:]).index_copy(0, torch.cat(rois), found)


def _average_masked(source: Tensor, group: Samples, level: int) -> Tensor:
    """Sample each image at all RoIs; those of another image or level read nothing and add zero. [M, C, bins, bins]"""
    images = torch.arange(source.shape[0], device=source.device)[:, None]
    own = (group.image == images) & (group.level == level)  # [N, M]
    own = own.reshape(*own.shape, *[1] * (group.x.dim() - 1))
    x = torch.where(own, group.x, OUTSIDE)
    return _average_batched(source, group.y.expand(len(source), *group.y.shape), x, group.divisor).sum(dim=0)


def _average(source: Tensor, group: Samples, counts: list[int] | None) -> Tensor:
    """Sample one map at its RoIs. [M, C, bins, bins]; means if all RoIs have one count, otherwise sums."""
    images, rois = source.shape[0], group.image.shape[0]
    if images == 1 or (not makes_graph() and rois == 0):
        return _average_batched(source[:1], group.y[None][:images], group.x[None][:images], group.divisor).flatten(0, 1)
    order = None
    if counts is None:
        counts = group.image.bincount(minlength=images).tolist()
        if (group.image.diff() < 0).any():
            order = group.image.argsort(stable=True)
            group = replace(group, y=group.y[order], x=group.x[order])
    y, x = group.y.split(counts), group.x.split(counts)
    # One call for all images, padded to one length, as grid_sample uses one CPU thread per image. One by one where
    # padding would cost more than it saves, or has no batching rule.
    if makes_graph() or images * max(counts) > 2 * rois or is_vmapped(group.y):
        of_images = [
            _average_batched(source[i : i + 1], y_image[None], x_image[None], group.divisor)[0]
            for i, (y_image, x_image) in enumerate(zip(y, x))
        ]
    else:
        padded_y, padded_x = (pad_sequence(list(p), batch_first=True, padding_value=OUTSIDE) for p in (y, x))
        batched = _average_batched(source, padded_y, padded_x, group.divisor)
        of_images = [batched[i, :count] for i, count in enumerate(counts)]
    crops = torch.cat(of_images)
    return crops if order is None else crops[order.argsort()]


def _average_batched(source: Tensor, y: Tensor, x: Tensor, divisor: int) -> Tensor:
    """Sample each image at the positions of :class:`.Samples`, y and x [N, M, ...]. [N, M, C, bins, bins], sums."""
    images, rois = y.shape[:2]
    if y.dim() == 4:
        y, x = y[..., None, None], x[:, :, None, None]
    # Constants in ONNX too: onnxruntime cannot infer a computed size where there are no RoIs.
    bins_y, rows, bins_x, columns = (int(n) for n in (*y.shape[2:4], *x.shape[4:]))
    channels = source.shape[1]
    if channels == 0:  # which grid_sample refuses; adding sums of the inputs to no element keeps the graph
        return source.new_zeros(images, rois, 0, bins_y, bins_x) + (source.sum() + y.sum() + x.sum())
    if not makes_graph():
        row = images * channels * bins_y * bins_x * columns  # elements for one row of samples in each bin
        fit = max(MAX_SAMPLED_ELEMENTS // max(row * rows, 1), 1)
        if rois > fit:
            chunks = zip(y.split(fit, dim=1), x.split(fit, dim=1))
            return torch.cat([_average_batched(source, *chunk, divisor) for chunk in chunks], dim=1)
        # A huge RoI is sliced along its rows of samples, so that even one RoI stays within the limit.
        fit = max(MAX_SAMPLED_ELEMENTS // max(row * rois, 1), 1)
        if rows > fit:
            x = x.expand(-1, -1, -1, rows, -1, -1)
            slices = zip(y.split(fit, dim=3), x.split(fit, dim=3))
            return torch.stack([_average_batched(source, *part, divisor) for part in slices]).sum(dim=0)
    # The grids of an image's RoIs are stacked along the height of one grid, because each further grid would copy the
    # map.
    shape = (images, rois, bins_y, rows, bins_x, columns)
    grid = torch.stack([x.to(source.dtype).expand(shape), y.to(source.dtype).expand(shape)], dim=-1)
    grid = grid.reshape(images, rois * bins_y * rows, bins_x * columns, 2)
    sampled = F.grid_sample(
        source, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )  # [N, C, M * bins * rows, bins * columns]
    if makes_graph():  # pooling rejects empty tensors, also in onnxruntime, and emptiness is unknown here
        windows = sampled.reshape(images, channels, rois, bins_y, rows, bins_x, columns)
        return (windows.sum(dim=(4, 6)) / divisor).transpose(1, 2)
    if rois and images and rows * columns > 1:  # pooling rejects empty tensors
        sampled = _WindowMean.apply(sampled, (rows, columns), divisor)
    return sampled.reshape(images, channels, rois, bins_y, bins_x).transpose(1, 2)


class _WindowMean(torch.autograd.Function):
    """avg_pool2d that does not keep its input, the largest tensor here, for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(sampled: Tensor, window: tuple[int, int], divisor: int) -> Tensor:
        return F.avg_pool2d(sampled, window, divisor_override=divisor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, int], int], output: Tensor) -> None:
        _, ctx.window, ctx.divisor = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.window
        spread = (grad / ctx.divisor)[..., None, :, None].expand(*grad.shape[:-1], rows, grad.shape[-1], columns)
        return spread.reshape(*grad.shape[:-2], grad.shape[-2] * rows, grad.shape[-1] * columns), None, None
