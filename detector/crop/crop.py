"""The affine crop: RoIAlign's call and values, with gradients to the boxes."""

import warnings
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Literal

import torch
import torch.fx
from torch import Tensor, nn

from detector.crop.arguments import check_choice, finish, pair, split_rois
from detector.crop.gather_sampler import crop_by_gather
from detector.crop.geometry import geometry_dtype
from detector.crop.grid_sampler import crop_by_grid
from detector.crop.rois import Geometry, place_rois, place_samples
from detector.crop.transforms import is_vmapped, is_wrapped, makes_standard_graph
from detector.crop.triton_sampler import box_gradient_by_triton, crop_by_triton, why_not

Sampler = Literal["auto", "grid_sample", "gather", "triton"]
AUTO_TAKES_TRITON = False  # on a GPU; not before `pytest -m gpu`, tools/benchmark.py and a training have run on one
MIN_CHANNELS_TO_GATHER = 32  # with fewer, grid_sample is faster: finding a table row takes longer than reading it


@torch.fx.wrap  # a leaf in torch.fx traces, like roi_align
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
    """Crop boxes out of feature maps or images, with gradients to the maps and the boxes.

    Boxes are (x1, y1, x2, y2) in image pixels, x to the right and y down. With ``aligned=True`` pixel ``i`` covers
    ``[i, i + 1]`` and has its centre at ``i + 0.5``. Samples more than a pixel outside the map count as 0, others are
    clamped to the centres of the edge pixels. Arguments, defaults and values are those of
    ``torchvision.ops.roi_align`` (He et al., "Mask R-CNN", 2017, section 3), which gives boxes no gradient.

    Args:
        input: [N, C, H, W], any floating dtype.
        boxes: one [L, 4] tensor per image, or one [K, 5] tensor whose first column is the image's index. The sequence
            avoids a synchronisation on a GPU. Coordinates are used in float32 or float64.
        output_size: height and width of the crop in bins, or one number for both.
        spatial_scale: pixels of ``input`` per image pixel.
        sampling_ratio: samples per bin and axis. 0 or less: ``ceil(box size / output_size)``, which cannot be traced or
            vmapped over boxes. Except with ``"triton"``, it synchronises on a GPU and does not compile into one graph.
        aligned: shift samples by half a pixel, to pixel centres. torchvision's detectors use ``False``, which also
            widens boxes to at least one map pixel.
        sampler: how maps are read; values and gradients agree to rounding. ``"grid_sample"`` can be compiled and
            exported; its CUDA backward is not deterministic. ``"gather"`` is deterministic, copies maps that are not
            channels_last, and runs outside compiled graphs. ``"triton"`` is one kernel for the values and one for all
            gradients, on a GPU with Triton: it never synchronises, stays in compiled graphs, and adds up the gradient
            of maps in no fixed order. Where it cannot run, in deterministic mode and under ``torch.func``, it is
            ``"auto"``. ``"auto"`` selects the gather from 32 channels on, unless a CPU would copy more than two pixels
            per sample. It takes ``grid_sample`` when compiled, and the gather in deterministic mode on a GPU.

    Returns:
        [K, C, output height, output width] in the dtype of ``input``. RoIs with a bad image index or a non-finite
        coordinate are NaN where a check would synchronise or is impossible: on a GPU, in graphs, vmapped over boxes.
        Second derivatives and ``torch.func``'s reverse mode work; forward mode does not, as in ``grid_sample``.

    Raises:
        TypeError: ``input`` or ``boxes`` has the wrong type, dtype or device.
        ValueError: a shape or value is invalid, or adaptive counts are traced or vmapped over boxes.

    Example:
        >>> boxes = torch.tensor([[20.5, 30.5, 180.0, 150.0]], requires_grad=True)
        >>> crop = affine_crop(torch.rand(1, 3, 240, 320), [boxes], 7, sampling_ratio=2, aligned=True)
        >>> crop.square().sum().backward()
        >>> crop.shape, boxes.grad.shape
        (torch.Size([1, 3, 7, 7]), torch.Size([1, 4]))
    """
    geometry = Geometry(pair("output_size", output_size), [spatial_scale], sampling_ratio, aligned)
    return crop_levels([input], boxes, geometry, sampler)


def crop_levels(
    maps: Sequence[Tensor], boxes: Tensor | Sequence[Tensor], geometry: Geometry, sampler: Sampler
) -> Tensor:
    """:func:`affine_crop` from maps of several sizes; RoIs on no level are zero."""
    check_choice("sampler", sampler, Sampler)
    index, corners, counts = split_rois(maps, boxes, geometry.scales)
    if runs_triton(sampler, [*maps, corners]):
        return crop_by_triton(maps, corners, index, *geometry.flat())
    rois = place_rois(maps, index, corners, counts, geometry)
    samples = place_samples(rois, geometry.ratio)
    if torch.jit.is_tracing() or rois.vmapped or any(is_vmapped(source) for source in maps):
        sampler = "grid_sample"  # PyTorch can trace and vmap it
    elif maps[0].is_meta:
        sampler = "gather"  # it needs no values
    elif sampler in ("auto", "triton"):
        sampler = _fastest_sampler(maps, rois.image.shape[0] * prod(geometry.bins) * max(geometry.ratio, 1) ** 2)
    if sampler == "gather":
        crops = crop_by_gather(maps, samples)
    else:
        counts = rois.counts if geometry.ratio > 0 else None
        crops = crop_by_grid([source.to(geometry_dtype(*maps)) for source in maps], samples, counts)
    return finish(crops, rois.valid, maps[0].dtype)


def box_gradient(
    maps: Sequence[Tensor], boxes: Sequence[Tensor], upstream: Tensor, geometry: Geometry, sampler: Sampler
) -> list[Tensor]:
    """Return the gradient at boxes, [L, 4] per image, from that at their crops. Maps and boxes get no gradient."""
    index, corners, _ = split_rois(maps, boxes, geometry.scales)
    if runs_triton(sampler, [*maps, corners]):
        gradient = box_gradient_by_triton(maps, corners, index, *geometry.flat(), upstream=upstream)
        return list(gradient.split([len(b) for b in boxes]))
    with torch.enable_grad():
        maps, leaves = [m.detach() for m in maps], [b.detach().requires_grad_() for b in boxes]
        return list(torch.autograd.grad(crop_levels(maps, leaves, geometry, sampler), leaves, upstream))


class AffineCrop(nn.Module):
    """Crop boxes (x1, y1, x2, y2), in image pixels, out of a map: :func:`affine_crop` as a module.

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
    ) -> None:
        super().__init__()
        self.output_size = pair("output_size", output_size)
        self.spatial_scale, self.sampling_ratio, self.aligned = spatial_scale, sampling_ratio, aligned
        self.sampler = check_choice("sampler", sampler, Sampler)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        geometry = (self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)
        return affine_crop(input, rois, *geometry, sampler=self.sampler)

    def extra_repr(self) -> str:
        names = ("output_size", "spatial_scale", "sampling_ratio", "aligned", "sampler")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def runs_triton(sampler: str, tensors: Sequence[Tensor]) -> bool:
    """Return whether the Triton kernel computes a call with these maps and boxes."""
    if sampler != "triton" and not (sampler == "auto" and AUTO_TAKES_TRITON and tensors[0].is_cuda):
        return False
    if tensors[0].is_meta or makes_standard_graph() or torch.are_deterministic_algorithms_enabled():
        return False
    return not any(is_wrapped(tensor) for tensor in tensors) and _has_triton(tensors[0].device)


@torch.compiler.assume_constant_result
def _has_triton(device: torch.device) -> bool:
    reason = why_not(device)
    if reason:
        _warn_once(f"'triton' is not available, and another way is taken: {reason}")
    return not reason


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _fastest_sampler(maps: Sequence[Tensor], samples: int) -> Sampler:
    """Return the sampler that ``"auto"`` stands for. ``samples`` counts samples, or bins if adaptive."""
    if torch.compiler.is_compiling():
        return "grid_sample"
    if maps[0].is_cuda and torch.are_deterministic_algorithms_enabled():
        return "gather"
    if maps[0].shape[1] < MIN_CHANNELS_TO_GATHER:
        return "grid_sample"
    if maps[0].is_cpu:
        copied = [m for m in maps if not m.permute(0, 2, 3, 1).is_contiguous()]
        if 2 * samples < sum(m[:, 0].numel() for m in copied):
            return "grid_sample"
    return "gather"
