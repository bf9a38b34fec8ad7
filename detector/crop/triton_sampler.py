"""The crop as an operator of ``torch.library`` that launches one Triton kernel, and one more for all gradients."""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from detector.crop.arguments import finish
from detector.crop.geometry import geometry_dtype
from detector.crop.grid_sampler import crop_by_grid
from detector.crop.precise import PRECISE, place_bins, pool_by_products
from detector.crop.rois import Geometry, place_rois, place_samples

BINS_PER_PROGRAM = 64
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # fused products would move samples across the border
CHANNELS_PER_PROGRAM = {"crop": 32, "maps": 16, "boxes": 16, "both": 16}  # a gradient keeps four sums


class Flat(NamedTuple):
    """The values of :meth:`.Geometry.flat`, in types that ``torch.library`` accepts."""

    areas: Sequence[float] | None  # least area of a box on each level but the first, in image pixels; None: one level
    bins: Sequence[int]
    scales: Sequence[float]  # map pixels per image pixel, of each level
    ratio: int  # samples per bin and axis; 0: adaptive counts; PRECISE: no samples, see detector.crop.precise
    aligned: bool


@torch.library.custom_op("detector::affine_crop", mutates_args=())
def crop_by_triton(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    areas: Sequence[float] | None,
    bins: Sequence[int],
    scales: Sequence[float],
    ratio: int,
    aligned: bool,
) -> Tensor:
    """Crop boxes [K, 4], in image pixels, out of the images [K] of maps [N, C, H, W]. See :class:`Flat`.

    Returns:
        [K, C, bins, bins] in the dtype of the first map. RoIs on no level are zero. RoIs with a bad image index or a
        non-finite coordinate are NaN.
    """
    crops = _empty_crops(maps, boxes, image, areas, bins)
    _launch("crop", maps, boxes, image, Flat(areas, bins, scales, ratio, aligned), crops)
    return crops


def box_gradient_by_triton(
    maps: Sequence[Tensor], boxes: Tensor, image: Tensor, *geometry: Any, upstream: Tensor
) -> Tensor:
    """Return the gradient at boxes [K, 4], given that at their crops. The crops are not computed for it."""
    with torch.no_grad():
        _, parts = _gradients(upstream, maps, boxes, image, *geometry, "boxes")
        return _of_boxes(parts, boxes)


@cache
def why_not(device: torch.device) -> str | None:
    """Return why the kernel does not run on a device, or ``None``. A small crop is tried once, and compiled for it."""
    try:
        from detector.crop.triton_kernels import INTERPRETED
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device.type != "cuda" and not INTERPRETED:
        return f"Triton needs a GPU, and the tensors are on {device}"
    try:
        with _disable_current_modes():  # a mode with tensors that have no values would fail, and be remembered
            source, box = torch.zeros(1, 1, 2, 2, device=device), torch.zeros(1, 4, device=device)
            geometry = Flat(None, [1, 1], [1.0], 1, True)
            for task in ("crop", "both"):
                _launch(
                    task, [source], box, box[:, 0], geometry, source[..., :1, :1].clone(), source.clone(), box[None]
                )
    except torch.OutOfMemoryError:  # which may pass
        raise
    except Exception as error:  # no C compiler, a folder that cannot be written, an old driver, ...
        message = f"{error}".strip().partition("\n")[0]
        return f"Triton failed with {type(error).__name__}: {message}"
    return None


@crop_by_triton.register_fake
def _empty_crops(maps: Sequence[Tensor], boxes: Tensor, image: Tensor, areas: Any, bins: Any, *_: Any) -> Tensor:
    return maps[0].new_empty(boxes.shape[0], maps[0].shape[1], *bins)


@torch.library.custom_op("detector::affine_crop_backward", mutates_args=())
def _gradients(
    upstream: Tensor,
    maps: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    areas: Sequence[float] | None,
    bins: Sequence[int],
    scales: Sequence[float],
    ratio: int,
    aligned: bool,
    task: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of all maps in one flat tensor (empty if task is "boxes"), and those of boxes by program."""
    geometry = Flat(areas, bins, scales, ratio, aligned)
    of_maps, of_boxes = _empty_gradients(upstream, maps, boxes, image, *geometry, task)
    _launch(task, maps, boxes, image, geometry, upstream.contiguous(), of_maps.zero_(), of_boxes)
    return of_maps, of_boxes


@_gradients.register_fake
def _empty_gradients(
    upstream: Tensor, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, areas: Any, bins: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype, task = geometry_dtype(*maps), options[-1]
    programs = prod(_blocks(task, maps[0].shape[1], bins)[2:])
    of_maps = maps[0].new_empty(sum(m.numel() for m in maps) if task != "boxes" else 0, dtype=dtype)
    return of_maps, maps[0].new_empty(programs if task != "maps" else 0, boxes.shape[0], 4, dtype=dtype)


def _blocks(task: str, channels: int, bins: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the bins and channels of a program, powers of two, and how many blocks of each there are."""
    of_bins = min(BINS_PER_PROGRAM, 1 << (prod(bins) - 1).bit_length())
    of_channels = min(CHANNELS_PER_PROGRAM[task], 1 << max(channels - 1, 0).bit_length())
    return of_bins, of_channels, -(-prod(bins) // of_bins), -(-channels // of_channels)


def _is_channels_last(maps: Sequence[Tensor]) -> bool:
    return all(source.is_contiguous(memory_format=torch.channels_last) for source in maps)


def _launch(
    task: str, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, geometry: Flat, crops: Tensor, *gradients: Tensor
) -> None:
    """Run the kernel, which writes the crops, or the gradients of maps and boxes given those of the crops."""
    from detector.crop import triton_kernels as kernels

    if not crops.numel():
        return
    rois, images, channels = boxes.shape[0], maps[0].shape[0], maps[0].shape[1]
    channels_last = _is_channels_last(maps)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dtype = maps[0].dtype if len({m.dtype for m in maps}) == 1 else geometry_dtype(*maps)
    maps = [source.to(dtype).contiguous(memory_format=layout) for source in maps]
    boxes = boxes if boxes.stride(1) == 1 else boxes.contiguous()
    block_bins, block_channels, *blocks = _blocks(task, channels, geometry.bins)
    heights, widths = (tuple(float(source.shape[axis]) for source in maps) for axis in (2, 3))
    with torch.cuda.device_of(crops):
        kernels.crop_kernel[(rois * prod(blocks),)](
            tuple(maps), heights, widths, boxes, image, crops, *(gradients or (crops, crops)),
            rois, images, boxes.stride(0), image.stride(0),
            TASK=task, C=channels, BINS_Y=geometry.bins[0], BINS_X=geometry.bins[1], SCALES=tuple(geometry.scales),
            AREAS=tuple(geometry.areas or ()), RATIO=geometry.ratio, ALIGNED=geometry.aligned,
            CHANNELS_LAST=channels_last,
            GEOMETRY=kernels.DTYPES[geometry_dtype(*maps, boxes)], SUM=kernels.DTYPES[geometry_dtype(*maps)],
            OFFSET=kernels.DTYPES[torch.int32 if max(m[:1].numel() for m in maps) < 2**31 else torch.int64],
            BLOCK_BINS=block_bins, BLOCK_C=block_channels, **LAUNCH_OPTIONS,
        )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, boxes, image, *ctx.geometry = inputs
    ctx.save_for_backward(*maps, boxes, image)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *maps, boxes, image = ctx.saved_tensors
    needs_maps, needs_boxes = any(tree_leaves(ctx.needs_input_grad[0])), ctx.needs_input_grad[1]
    if torch.is_grad_enabled():  # with create_graph=True this gradient will be differentiated

        def reference(*tensors: Tensor) -> Tensor:
            return _differentiable(tensors[:-1], tensors[-1], image, *ctx.geometry)

        *of_maps, of_boxes = torch.func.vjp(reference, *maps, boxes)[1](grad)
        return of_maps, of_boxes, None, *[None] * len(ctx.geometry)
    task = "both" if needs_maps and needs_boxes else "maps" if needs_maps else "boxes"
    flat, parts = _gradients(grad, maps, boxes, image, *ctx.geometry, task)
    of_boxes = _of_boxes(parts, boxes) if needs_boxes else None
    return _of_maps(flat, maps) if needs_maps else [None] * len(maps), of_boxes, None, *[None] * len(ctx.geometry)


crop_by_triton.register_autograd(_backward, setup_context=_setup_context)


def _of_boxes(parts: Tensor, boxes: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(boxes.dtype)


def _of_maps(flat: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Split the flat gradient into the maps' shapes, dtypes and layouts."""
    if all(source.dtype == maps[0].dtype for source in maps):
        flat = flat.to(maps[0].dtype)  # one conversion for all
    channels_last = _is_channels_last(maps)
    gradients = []
    for part, source in zip(flat.split([source.numel() for source in maps]), maps):
        if channels_last:
            part = part.view(source.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        gradients.append(part.view(source.shape).to(source.dtype))
    return gradients


def _differentiable(
    maps: Sequence[Tensor], boxes: Tensor, image: Tensor, areas: Any, bins: Any, scales: Any, ratio: int, aligned: bool
) -> Tensor:
    """The same crop by operations that can be differentiated again."""
    working = [source.to(geometry_dtype(*maps)) for source in maps]
    if ratio == PRECISE:
        samples, valid = place_bins(working[0], image, boxes, bins, scales[0])
        return finish(pool_by_products(working, [samples]), valid, maps[0].dtype)

    def level_of(corners: Tensor) -> Tensor:
        sides = corners[:, 2:] - corners[:, :2]
        area = sides[:, 0] * sides[:, 1]
        return torch.where(area < 0, -1, torch.bucketize(area, area.new_tensor(areas), right=True))

    geometry = Geometry((bins[0], bins[1]), scales, ratio, aligned, level_of if areas else None)
    rois = place_rois(maps, image, boxes, None, geometry)
    return finish(crop_by_grid(working, place_samples(rois, ratio)), rois.valid, maps[0].dtype)
