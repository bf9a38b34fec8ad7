"""The affine crop: ``roi_align``'s call and values, with gradients to the boxes as well."""

from collections.abc import Callable, Sequence
from math import inf, prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from detector.gather_sampler import crop_by_gather
from detector.geometry import boxes_in_frame, boxes_to_theta, geometry_dtype
from detector.grid_sampler import crop_by_grid
from detector.sampling import Axis, adaptive_samples, fixed_samples

Sampler = Literal["auto", "grid_sample", "gather"]
# Below, a row of the gather's table costs more to find than to read.
FEWEST_CHANNELS_TO_GATHER = 32


def affine_crop(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    sampler: Sampler = "auto",
) -> Tensor:
    """Crop boxes out of feature maps or images, differentiably in the maps and in the boxes.

    The call, the defaults and the values of ``torchvision.ops.roi_align``; that operator gives boxes no gradient.
    Each box becomes an affine matrix theta (:func:`~detector.boxes_to_theta`), theta an affine grid, the map is
    read there by bilinear interpolation, and the mean over the samples of a bin is the output.

    Args:
        input: [N, C, H, W], float64, float32, bfloat16 or float16, contiguous or channels_last.
        boxes: (x1, y1, x2, y2) in pixels of the image. Either a sequence with one [L, 4] tensor per image of the
            batch, or one [K, 5] tensor whose first column is the image's index. Coordinates are used in float32 or
            better. The sequence is the better form under ``torch.compile`` (where the tensor form samples every RoI
            in each image) and for ``grid_sample`` on a GPU (where the tensor's indices must be read back, once).
        output_size: height and width of the crop in bins, or one number for both.
        spatial_scale: pixels of ``input`` per pixel in which ``boxes`` are given.
        sampling_ratio: samples per bin and axis; 0 or less takes ``ceil(box size / output_size)`` of them, each
            RoI its own. Adaptive counts depend on values: no ``torch.compile(fullgraph=True)``, and a
            synchronisation on a GPU.
        aligned: shift the samples by half a pixel, so that pixel ``i`` covers ``[i, i + 1]``. ``False`` is what
            torchvision's detectors are trained with; it also makes boxes at least one map pixel wide and high.
        sampler: how the map is read; values and gradients are the same to rounding.

            * ``"grid_sample"`` samples, then averages. All of it can be compiled and exported. Its backward on CUDA
              is not deterministic, and refused under ``torch.use_deterministic_algorithms(True)``.
            * ``"gather"`` sums each bin's pixels by weight in one step, and writes no samples. On a CPU, with maps
              in channels_last, it takes a small part of the time of ``grid_sample`` and of ``roi_align``
              (``tools/benchmark.py``); other maps are copied into that layout first. Its gradients are the same to
              the last bit from run to run, and no slower under ``use_deterministic_algorithms``. ``torch.compile``
              runs it as it is, outside of the graph; second derivatives and ``vmap`` go through ``grid_sample``. It
              has no batched gradients (``is_grads_batched``).
            * ``"auto"`` takes ``"grid_sample"`` under ``torch.compile`` and for export; for maps of fewer than 32
              channels, of which a gather reads too little at a time; and on a CPU where maps would have to be
              copied that have more than two pixels for each sample. Else it takes ``"gather"``. On CUDA neither was
              measured: there it goes by the channels as well, for ``"gather"`` is deterministic and, over several
              levels, does not synchronise; under ``use_deterministic_algorithms`` it is always that.

    Returns:
        [K, C, output height, output width] in ``input``'s dtype, the RoIs in the order in which they came.

    Raises:
        TypeError: ``input`` or ``boxes`` are of the wrong type, not floating point, or on different devices.
        ValueError: a shape does not fit, a size is below 1, ``spatial_scale`` is not positive, ``sampler`` is none
            of the three; in eager mode on a CPU also an image index that is not one, and a coordinate that is NaN or
            infinite. Where a look at the values would cost a synchronisation (on a GPU, under ``torch.compile``)
            such an RoI comes back as NaN.

    Inverted and empty boxes give what ``roi_align`` gives. Second derivatives work.
    """
    return crop_levels([input], boxes, None, output_size, [spatial_scale], sampling_ratio, aligned, sampler)


def crop_levels(
    maps: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    level_of: Callable[[Tensor], Tensor] | None,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    sampler: Sampler,
) -> Tensor:
    """:func:`affine_crop` of RoIs that are in maps of several sizes.

    Args:
        maps: one [N, C, H, W] for each level, N and C of all alike.
        boxes: as in :func:`affine_crop`.
        level_of: the number of the map for RoIs with corners [K, 4], as int64 [K]; -1 is none, and gives zeros.
            Not needed for a single map.
        spatial_scales: one for each level.

    Returns:
        [K, C, output height, output width] in the first map's dtype.
    """
    bins = _pair("output_size", output_size)
    check_sampler(sampler)
    for source, spatial_scale in zip(maps, spatial_scales):
        _check_input(source, spatial_scale)
    index, corners, counts = _split_boxes(maps[0], boxes)
    images = maps[0].shape[0]
    known = (index >= 0) & (index < images) & (index == index.floor())  # false for NaN
    look = _may_look(corners)
    if look:
        _check_values(index, known, corners, images)
    image = torch.where(known, index, 0).long()
    level = torch.zeros_like(image) if level_of is None else level_of(corners.detach())
    dtype = geometry_dtype(*maps)
    y, x, finite = _axes(corners.to(geometry_dtype(*maps, corners)), level, maps, bins, spatial_scales, aligned)
    if look and not finite.all():
        row = int((~finite).nonzero()[0])
        scale = spatial_scales[max(int(level[row]), 0)]
        raise ValueError(f"boxes must be finite in map pixels, got {corners[row].tolist()} at spatial_scale {scale}")

    if sampling_ratio > 0:
        samples = [fixed_samples(y, x, level, image, sampling_ratio)]
    else:
        samples, counts = adaptive_samples(y, x, level, image), None
    sources = [source.to(dtype) for source in maps]
    if sampler == "auto":
        sampler = _measured_fastest(maps, len(corners) * prod(bins) * max(sampling_ratio, 1) ** 2)
    crops = crop_by_gather(sources, samples) if sampler == "gather" else crop_by_grid(sources, samples, counts)
    if not look:
        crops = torch.where((known & finite)[:, None, None, None], crops, torch.nan)
    return crops.to(maps[0].dtype)


class AffineCrop(nn.Module):
    """:func:`affine_crop` as a module, as ``torchvision.ops.RoIAlign`` is of ``roi_align``."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
        *,
        sampler: Sampler = "auto",
    ) -> None:
        super().__init__()
        self.output_size = _pair("output_size", output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.sampler = check_sampler(sampler)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return affine_crop(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            sampler=self.sampler,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}{describe_sampler(self.sampler)}"
        )


def check_sampler(sampler: Sampler) -> Sampler:
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {sampler!r}")
    return sampler


def describe_sampler(sampler: Sampler) -> str:
    """For a module's repr, which is torchvision's where the choice is ours."""
    return "" if sampler == "auto" else f", sampler={sampler}"


def _measured_fastest(maps: Sequence[Tensor], samples: int) -> Sampler:
    """What "auto" stands for, as :func:`affine_crop` says, for a number of samples (at least; adaptive: bins)."""
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return "grid_sample"
    if maps[0].is_cuda and torch.are_deterministic_algorithms_enabled():
        return "gather"
    if maps[0].shape[1] < FEWEST_CHANNELS_TO_GATHER:
        return "grid_sample"
    if maps[0].is_cpu:
        copied = [m for m in maps if not m.is_contiguous(memory_format=torch.channels_last)]
        if 2 * samples < sum(m[:, 0].numel() for m in copied):
            return "grid_sample"
    return "gather"


def _axes(
    corners: Tensor,
    level: Tensor,
    maps: Sequence[Tensor],
    bins: tuple[int, int],
    spatial_scales: Sequence[float],
    aligned: bool,
) -> tuple[Axis, Axis, Tensor]:
    """The y and x axes of RoIs with corners [K, 4] in image pixels, and which RoIs are finite, [K]."""
    height = _of_level(level, [source.shape[2] for source in maps], corners)
    width = _of_level(level, [source.shape[3] for source in maps], corners)
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


def _split_boxes(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int] | None]:
    """Check ``boxes`` and take them apart: image indices [K], corners [K, 4], and RoIs per image if known."""
    images = input.shape[0]
    counts = None
    if isinstance(boxes, Tensor):
        _check_boxes("boxes", boxes, input, 5, "[K, 5] (image index, x1, y1, x2, y2)")
        index, corners = boxes[:, 0].detach(), boxes[:, 1:]
        if images == 1:
            counts = [boxes.shape[0]]
    elif isinstance(boxes, Sequence) and not isinstance(boxes, str):
        for i, image_boxes in enumerate(boxes):
            _check_boxes(f"boxes[{i}]", image_boxes, input, 4, "[L, 4] (x1, y1, x2, y2)")
        if len(boxes) > images:
            raise ValueError(f"boxes has {len(boxes)} images, but input has a batch of {images}")
        counts = [len(image_boxes) for image_boxes in boxes] + [0] * (images - len(boxes))
        corners = torch.cat(list(boxes)) if boxes else input.new_zeros(0, 4, dtype=geometry_dtype(input))
        # Not in the boxes' dtype: bfloat16 counts to 256.
        of_image = [corners.new_full((count,), i, dtype=torch.int64) for i, count in enumerate(counts)]
        index = torch.cat(of_image or [corners.new_zeros(0, dtype=torch.int64)])
    else:
        raise TypeError(f"boxes must be a [K, 5] tensor or a sequence of [L, 4] tensors, got {type(boxes).__name__}")
    return index, corners, counts


def _may_look(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: not under compile or on a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) for n in pair):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return pair


def _check_input(input: Tensor, spatial_scale: float) -> None:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        kind = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"input must be a floating point tensor, got {kind}")
    if input.dim() != 4:
        raise ValueError(f"input must have shape [N, C, H, W], got {list(input.shape)}")
    if input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"input must be at least one pixel high and wide, got shape {list(input.shape)}")
    if not 0 < spatial_scale < inf:
        raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}")


def _check_boxes(name: str, boxes: Tensor, input: Tensor, columns: int, shape: str) -> None:
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        kind = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise ValueError(f"{name} must have shape {shape}, got {list(boxes.shape)}")
    if boxes.device != input.device:
        raise TypeError(f"{name} and input must be on one device, got {boxes.device} and {input.device}")


def _check_values(index: Tensor, known: Tensor, corners: Tensor, images: int) -> None:
    if not known.all():
        row = int((~known).nonzero()[0])
        raise ValueError(f"boxes[{row}] has image index {index[row].item()}, but input has a batch of {images}")
    finite = torch.isfinite(corners).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"boxes must be finite, got {corners[row].tolist()} (RoI {row})")
