"""The affine crop: ``roi_align``'s call and values, with gradients to the boxes as well."""

import operator
from collections.abc import Callable, Sequence
from math import inf, prod
from typing import Literal, get_args

import torch
import torch.fx
from torch import Tensor, nn

from detector.crop.exact import crop_by_matrices, exact_samples
from detector.crop.gather_sampler import crop_by_gather
from detector.crop.geometry import geometry_dtype
from detector.crop.grid_sampler import crop_by_grid
from detector.crop.positions import adaptive_samples, fixed_samples, is_vmapped, makes_graph, roi_axes

Sampler = Literal["auto", "grid_sample", "gather"]
Sampling = Literal["points", "exact"]
# Below, grid_sample is faster: a row of the gather's table costs more to find than to read.
FEWEST_CHANNELS_TO_GATHER = 32


@torch.fx.wrap  # a leaf of a symbolic trace, as roi_align is
def affine_crop(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    sampler: Sampler = "auto",
    sampling: Sampling = "points",
) -> Tensor:
    """Crop boxes out of feature maps or images, differentiably in the maps and in the boxes.

    The call, the defaults and the values of ``torchvision.ops.roi_align``; that operator gives boxes no gradient.
    Each box becomes an affine matrix theta (:func:`~detector.boxes_to_theta`), theta an affine grid, the map is
    read there by bilinear interpolation, and the mean over the samples of a bin is the output.

    Args:
        input: [N, C, H, W], float64, float32, bfloat16 or float16, contiguous or channels_last.
        boxes: (x1, y1, x2, y2) in pixels of the image. Either a sequence with one [L, 4] tensor per image of the
            batch, or one [K, 5] tensor whose first column is the image's index. Coordinates are used in float32 or
            better. For ``grid_sample`` the sequence is the better form under ``torch.compile`` and ``torch.vmap``
            (where the tensor form samples every RoI in each image) and on a GPU (where the tensor's indices must be
            read back, once).
        output_size: height and width of the crop in bins, or one number for both.
        spatial_scale: pixels of ``input`` per pixel in which ``boxes`` are given.
        sampling_ratio: samples per bin and axis; 0 or less takes ``ceil(box size / output_size)`` of them, each
            RoI its own. Adaptive counts depend on values: no ``torch.compile(fullgraph=True)``, and a
            synchronisation on a GPU.
        aligned: shift the samples by half a pixel, so that pixel ``i`` covers ``[i, i + 1]``. ``False`` is what
            torchvision's detectors are trained with; it also makes boxes at least one map pixel wide and high.
        sampler: how the map is read; values and gradients are the same to rounding.

            * ``"grid_sample"`` samples, then averages. With ``sampling_ratio > 0`` it can be compiled and exported.
              Its backward on CUDA is not deterministic, and refused under ``use_deterministic_algorithms``.
            * ``"gather"`` sums each bin's pixels by weight in one step, and writes no samples. On a CPU, with maps
              in channels_last, it takes a small part of the time of ``grid_sample`` and of ``roi_align``
              (``tools/benchmark.py``); other maps are copied into that layout first, in the forward and once more in
              the backward, and on CUDA all maps are if there are several levels. First derivatives are the same to
              the last bit from run to run; the mode ``use_deterministic_algorithms``, which fills new memory, makes
              it 6 to 15 % slower on a CPU with its backward, and up to 31 % without. ``torch.compile`` runs it as it
              is, outside of the graph. Second derivatives, ``torch.func`` and ``torch.vmap`` go through
              ``grid_sample``; batched gradients (``is_grads_batched``) fail.
            * ``"auto"`` takes what was measured fastest on a CPU: ``"gather"``, but ``"grid_sample"`` for maps of
              fewer than 32 channels, of which a gather reads too little at a time, and where maps would have to be
              copied that have more than two pixels for each sample. On CUDA neither was measured; there it goes by
              the channels alone, and under ``use_deterministic_algorithms`` it is ``"gather"``, which over several
              levels does not synchronise either. Under ``torch.compile`` and for export it is ``"grid_sample"``.

        sampling: ``"points"``: a bin is the mean of its samples. ``"exact"``: the mean of the bilinear surface over the
            bin, in closed form (Jiang et al. 2018; see ``detector.crop.exact``), to which the mean of samples tends as
            they become more; ``sampling_ratio`` is not used. Its box gradient has no kinks at pixel centres. It reads
            all pixels of a bin: large RoIs take longer. It is for eager mode alone, and not for ``torch.vmap`` over
            boxes; ``"grid_sample"`` stands for a product of matrices, which is slow.

    Returns:
        [K, C, output height, output width] in ``input``'s dtype, the RoIs in the order in which they came.

    Raises:
        TypeError: ``input`` or ``boxes`` are of the wrong type, not floating point, or on different devices.
        ValueError: a shape does not fit, a size is below 1, ``spatial_scale`` is not positive, ``sampler`` is none
            of the three, or a crop of ``sampling_ratio <= 0`` is traced, or vmapped over boxes; in eager mode on a CPU
            also an image index that is not one, and a coordinate that is NaN or infinite. Where a look at the values
            would cost a synchronisation (on a GPU, under ``torch.compile``) or cannot be had (under ``torch.vmap`` over
            boxes) such an RoI comes back as NaN.

    Inverted and empty boxes give what ``roi_align`` gives. Second derivatives work, and the reverse mode of
    ``torch.func`` (``grad``, ``vjp``, ``jacrev``; the Hessian is ``jacrev`` of ``jacrev``). PyTorch's ``grid_sample``
    has no forward mode, and so neither sampler has: of ``jvp`` and ``hessian``, those of ``torch.autograd.functional``
    work and those of ``torch.func`` do not. ``torch.vmap`` goes over maps, and with ``sampling_ratio > 0`` over boxes
    as well: ``vmap(grad(f))`` is one gradient for each. (It fails over a ``jacrev`` of another derivative, as over that
    of PyTorch's ``grid_sample``.) ``torch.jit.trace`` takes ``sampling_ratio > 0`` alone.

    Example:
        >>> image = torch.rand(1, 3, 240, 320)
        >>> boxes = torch.tensor([[20.5, 30.5, 180.0, 150.0]], requires_grad=True)
        >>> crop = affine_crop(image, [boxes], 7, sampling_ratio=2, aligned=True)
        >>> crop.shape
        torch.Size([1, 3, 7, 7])
        >>> crop.square().sum().backward()
        >>> boxes.grad.shape
        torch.Size([1, 4])
    """
    return crop_levels([input], boxes, None, output_size, [spatial_scale], sampling_ratio, aligned, sampler, sampling)


def crop_levels(
    maps: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    level_of: Callable[[Tensor], Tensor] | None,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    sampler: Sampler,
    sampling: Sampling = "points",
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

    Raises:
        TypeError, ValueError: as :func:`affine_crop`; the maps differ in N or C, or are on several devices.
    """
    bins = pair("output_size", output_size)
    check_sampler(sampler)
    check_sampling(sampling)
    if sampling == "exact" and makes_graph():
        raise ValueError("sampling='exact' cannot be compiled or traced; take 'points' with a sampling_ratio above 0")
    if sampling_ratio <= 0 and torch.jit.is_tracing():
        raise ValueError(
            f"sampling_ratio is {sampling_ratio}: a number of samples that goes with the box cannot be traced, by "
            "torch.jit.trace or for ONNX; take one above 0, as torchvision's detectors do"
        )
    for source, spatial_scale in zip(maps, spatial_scales):
        _check_input(source, spatial_scale)
        if source.shape[:2] != maps[0].shape[:2] or source.device != maps[0].device:
            given = [(list(m.shape), str(m.device)) for m in maps]
            raise ValueError(f"maps must have the same N and C and be on one device, got {given}")
    index, corners, counts = _split_boxes(maps[0], boxes)
    vmapped = is_vmapped(corners)
    if vmapped and (sampling == "exact" or sampling_ratio <= 0):
        raise ValueError(
            f"sampling={sampling!r} with sampling_ratio={sampling_ratio} cannot be vmapped over boxes: the number of "
            "pixels read depends on the box; use sampling='points' with sampling_ratio > 0, or crop all boxes in one "
            "call"
        )
    images = maps[0].shape[0]
    known = (index >= 0) & (index < images)  # false for NaN
    if index.is_floating_point():
        known = known & (index == index.floor())
    look = not vmapped and _may_look(corners)
    if look:
        _check_values(index, known, corners, images)
    image = torch.where(known, index, 0).long()
    level = torch.zeros_like(image) if level_of is None else level_of(corners.detach())
    corners = corners.to(geometry_dtype(*maps, corners))
    sizes = [(source.shape[2], source.shape[3]) for source in maps]
    y, x, finite = roi_axes(corners, level, sizes, bins, spatial_scales, aligned)
    if look and not finite.all():
        row = int((~finite).nonzero()[0])
        scale = spatial_scales[max(int(level[row]), 0)]
        raise ValueError(f"boxes must be finite in map pixels, got {corners[row].tolist()} at spatial_scale {scale}")

    if sampling == "exact":
        samples, counts = exact_samples(y, x, level, image), None
    elif sampling_ratio > 0:
        samples = [fixed_samples(y, x, level, image, sampling_ratio)]
    else:
        samples, counts = adaptive_samples(y, x, level, image), None
    if torch.jit.is_tracing() or vmapped or any(is_vmapped(source) for source in maps):
        sampler = "grid_sample"  # which torch knows how to trace, and to vmap
    elif maps[0].is_meta:
        sampler = "gather"  # which reads no value
    elif sampler == "auto" and sampling == "exact":
        sampler = "gather"
    elif sampler == "auto":
        sampler = _measured_fastest(maps, corners.shape[0] * prod(bins) * max(sampling_ratio, 1) ** 2)
    if sampler == "gather":
        crops = crop_by_gather(maps, samples)
    elif sampling == "exact":
        crops = crop_by_matrices([source.to(geometry_dtype(*maps)) for source in maps], samples)
    else:
        crops = crop_by_grid([source.to(geometry_dtype(*maps)) for source in maps], samples, counts)
    if not look:
        crops = torch.where((known & finite)[:, None, None, None], crops, torch.nan)
    return crops.to(maps[0].dtype)


class AffineCrop(nn.Module):
    """:func:`affine_crop` as a module, as ``torchvision.ops.RoIAlign`` is of ``roi_align``.

    Example:
        >>> crop = AffineCrop((7, 14), spatial_scale=1 / 16, sampling_ratio=2, aligned=True)
        >>> crop(torch.rand(2, 8, 15, 20), [torch.rand(3, 4), torch.rand(0, 4)]).shape
        torch.Size([3, 8, 7, 14])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
        *,
        sampler: Sampler = "auto",
        sampling: Sampling = "points",
    ) -> None:
        super().__init__()
        self.output_size = pair("output_size", output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.sampler = check_sampler(sampler)
        self.sampling = check_sampling(sampling)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return affine_crop(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            sampler=self.sampler,
            sampling=self.sampling,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}{describe(self.sampler, self.sampling)}"
        )


def check_sampler(sampler: Sampler) -> Sampler:
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {sampler!r}")
    return sampler


def check_sampling(sampling: Sampling) -> Sampling:
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling must be one of {', '.join(get_args(Sampling))}, got {sampling!r}")
    return sampling


def describe(sampler: Sampler, sampling: Sampling) -> str:
    """For a module's repr, which is torchvision's where the choice is ours."""
    parts = {"sampler": (sampler, "auto"), "sampling": (sampling, "points")}
    return "".join(f", {name}={value}" for name, (value, usual) in parts.items() if value != usual)


def _measured_fastest(maps: Sequence[Tensor], samples: int) -> Sampler:
    """What "auto" stands for, as :func:`affine_crop` says, for a number of samples (at least; adaptive: bins)."""
    if torch.compiler.is_compiling():
        return "grid_sample"
    if maps[0].is_cuda and torch.are_deterministic_algorithms_enabled():
        return "gather"
    if maps[0].shape[1] < FEWEST_CHANNELS_TO_GATHER:
        return "grid_sample"
    if maps[0].is_cpu:
        copied = [m for m in maps if not m.permute(0, 2, 3, 1).is_contiguous()]
        if 2 * samples < sum(m[:, 0].numel() for m in copied):
            return "grid_sample"
    return "gather"


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
        # Not len, which would be a constant in an exported graph.
        counts = [image_boxes.shape[0] for image_boxes in boxes] + [0] * (images - len(boxes))
        corners = torch.cat(list(boxes)) if boxes else input.new_zeros(0, 4, dtype=geometry_dtype(input))
        # Not in the boxes' dtype: bfloat16 counts to 256.
        of_image = [torch.full_like(image_boxes[:, 0], i, dtype=torch.int64) for i, image_boxes in enumerate(boxes)]
        index = torch.cat(of_image or [corners.new_zeros(0, dtype=torch.int64)])
    else:
        raise TypeError(f"boxes must be a [K, 5] tensor or a sequence of [L, 4] tensors, got {type(boxes).__name__}")
    return index, corners, counts


def _may_look(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: not on a GPU, nor while a graph is made that others go through."""
    return tensor.device.type == "cpu" and not makes_graph()


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An integer or two, of Python or of numpy, as two of Python's, at least 1. ``name`` is the argument's."""
    try:
        first, second = (operator.index(n) for n in (value if isinstance(value, Sequence) else (value, value)))
    except (TypeError, ValueError):  # not integers, not two
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}") from None
    if min(first, second) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return first, second


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
