"""The affine crop: ``roi_align``'s call and values, with gradients to the boxes as well."""

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detector.geometry import boxes_to_theta, geometry_dtype, normalize_boxes
from detector.sampling import OUTSIDE, Axis

# The most elements that one call of grid_sample may return (float32: 256 MiB). More are taken in chunks.
MAX_SAMPLED_ELEMENTS = 2**26


def affine_crop(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Crop boxes out of feature maps or images, differentiably in the maps and in the boxes.

    The call, the defaults and the values of ``torchvision.ops.roi_align``; that operator gives boxes no gradient.
    Each box becomes an affine matrix theta (:func:`~detector.boxes_to_theta`), theta an affine grid, and
    ``grid_sample`` reads the map there; the mean over the samples of a bin is the output.

    Args:
        input: [N, C, H, W], float64, float32, bfloat16 or float16, contiguous or channels_last.
        boxes: (x1, y1, x2, y2) in pixels of the image. Either a sequence with one [L, 4] tensor per image of the
            batch, or one [K, 5] tensor whose first column is the image's index. Coordinates are used in float32 or
            better. The sequence is the faster form on a GPU (the tensor's indices must be read back, once) and
            under ``torch.compile`` (where the tensor form samples every RoI in each image).
        output_size: height and width of the crop in bins, or one number for both.
        spatial_scale: pixels of ``input`` per pixel in which ``boxes`` are given.
        sampling_ratio: samples per bin and axis; 0 or less takes ``ceil(box size / output_size)`` of them, each
            RoI its own. Adaptive counts depend on values: no ``torch.compile(fullgraph=True)``, and a
            synchronisation on a GPU.
        aligned: shift the samples by half a pixel, so that pixel ``i`` covers ``[i, i + 1]``. ``False`` is what
            torchvision's detectors are trained with; it also makes boxes at least one map pixel wide and high.

    Returns:
        [K, C, output height, output width] in ``input``'s dtype, the RoIs in the order in which they came.

    Raises:
        TypeError: ``input`` or ``boxes`` are of the wrong type, not floating point, or on different devices.
        ValueError: a shape does not fit, a size is below 1, ``spatial_scale`` is not positive; in eager mode on a
            CPU also an image index that is not one, and a coordinate that is NaN or infinite. Where a look at the
            values would cost a synchronisation (on a GPU, under ``torch.compile``) such an RoI comes back as NaN.

    Inverted and empty boxes give what ``roi_align`` gives. Second derivatives work.
    """
    bins = _pair("output_size", output_size)
    _check_input(input, spatial_scale)
    index, corners, counts = _split_boxes(input, boxes)
    known = (index >= 0) & (index < input.shape[0]) & (index == index.floor())  # false for NaN
    look = _may_look(corners)
    if look:
        _check_values(index, known, corners, input.shape[0])
    index = torch.where(known, index, 0).long()
    order = None
    if counts is None and not torch.compiler.is_compiling():
        order = index.argsort(stable=True)
        index, known, corners = index[order], known[order], corners[order]
        counts = _rois_per_image(index, input.shape[0])

    y, x, finite = _axes(corners.to(geometry_dtype(input, corners)), input, bins, spatial_scale, aligned)
    if look and not finite.all():
        box = corners[~finite][0].tolist()
        raise ValueError(f"boxes must be finite in map pixels, got {box} at spatial_scale {spatial_scale}")

    source = input.to(torch.promote_types(input.dtype, torch.float32))
    if sampling_ratio > 0:
        samples = torch.arange(sampling_ratio, device=input.device)
        sums = _sum_bins(
            source, y.positions(samples, sampling_ratio), x.positions(samples, sampling_ratio), index, counts, bins
        )
        crops = sums / sampling_ratio**2
    else:
        crops = _adaptive(source, y, x, index, bins)

    if not look:
        crops = torch.where((known & finite)[:, None, None, None], crops, torch.nan)
    if order is not None:
        crops = crops[order.argsort()]
    return crops.to(input.dtype)


class AffineCrop(nn.Module):
    """:func:`affine_crop` as a module, as ``torchvision.ops.RoIAlign`` is of ``roi_align``."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = _pair("output_size", output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return affine_crop(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


def _axes(
    corners: Tensor, input: Tensor, bins: tuple[int, int], spatial_scale: float, aligned: bool
) -> tuple[Axis, Axis, Tensor]:
    """The y and x axes of RoIs with corners [K, 4] in image pixels, and which RoIs are finite, [K]."""
    size = (input.shape[-2], input.shape[-1])
    pixels = corners.detach() * spatial_scale - (0.5 if aligned else 0.0)
    start, end = pixels.split(2, dim=1)
    extent = end - start
    if not aligned:
        extent = extent.clamp(min=1)
        corners = torch.cat([corners[:, :2], torch.maximum(corners[:, 2:], corners[:, :2] + 1 / spatial_scale)], 1)
    finite = torch.isfinite(torch.cat([pixels, extent], dim=1)).all(dim=1)
    theta = boxes_to_theta(normalize_boxes(corners, size, spatial_scale, aligned))
    finite = finite & torch.isfinite(theta.detach()).flatten(1).all(dim=1)
    # Nothing may be computed from a non-finite number: NaN times zero is NaN, in the gradients too.
    theta = torch.where(finite[:, None, None], theta, 0.0)
    start, extent = torch.where(finite[:, None], start, 0.0), torch.where(finite[:, None], extent, 1.0)
    y = Axis(start[:, 1], extent[:, 1], theta[:, 1, 1], theta[:, 1, 2], size[0], bins[0])
    x = Axis(start[:, 0], extent[:, 0], theta[:, 0, 0], theta[:, 0, 2], size[1], bins[1])
    return y, x, finite


def _adaptive(input: Tensor, y: Axis, x: Axis, index: Tensor, bins: tuple[int, int]) -> Tensor:
    """Bin means at ``sampling_ratio <= 0``: RoIs with like numbers of samples are taken together."""
    y_counts, x_counts = y.adaptive_counts(), x.adaptive_counts()
    (y_first, y_number), (x_first, x_number) = y.windows(y_counts), x.windows(x_counts)
    number = torch.stack([y_number, x_number], dim=1)
    # Rounded up to powers of two there are few groups; samples beyond a RoI's own number count as zero.
    number = (2.0 ** number.clamp(min=1).log2().ceil()).long()
    groups, group_of = number.unique(dim=0, return_inverse=True)
    pieces, order = [], []
    for group, (rows, columns) in enumerate(groups.tolist()):
        rois = torch.where(group_of == group)[0]
        images = index[rois]
        counts = _rois_per_image(images, input.shape[0])
        x_samples = x_first[rois][..., None] + torch.arange(columns, device=input.device)
        x_positions = x.select(rois).positions(x_samples, x_counts[rois])
        # A huge RoI is taken in slices of its rows of samples, so that even one RoI stays within the limit.
        row_elements = input.shape[0] * input.shape[1] * prod(bins) * columns
        slice_rows = max(MAX_SAMPLED_ELEMENTS // max(row_elements, 1), 1)
        total = input.new_zeros(())
        for rows_of_slice in torch.arange(rows, device=input.device).split(slice_rows):
            y_samples = y_first[rois][..., None] + rows_of_slice
            y_positions = y.select(rois).positions(y_samples, y_counts[rois])
            total = total + _sum_bins(input, y_positions, x_positions, images, counts, bins)
        pieces.append(total)
        order.append(rois)
    if not pieces:  # no RoIs: grid_sample takes the empty grid, and the result stays in the graph
        nothing = y.positions(index, 1), x.positions(index, 1)
        return _sum_bins(input, *nothing, index, [0] * input.shape[0], bins)
    divisor = (y_counts * x_counts).clamp(min=1).to(input.dtype)
    return torch.cat(pieces)[torch.cat(order).argsort()] / divisor[:, None, None, None]


def _sum_bins(
    input: Tensor, y: Tensor, x: Tensor, index: Tensor, counts: list[int] | None, bins: tuple[int, int]
) -> Tensor:
    """Sample the maps where ``y`` [K, rows] and ``x`` [K, columns] (normalised) cross; sum over each bin.

    ``counts`` are the numbers of RoIs of each image, the RoIs sorted by image; ``None`` if not known (under
    compile). Returns [K, C, *bins].

    A map is never copied per RoI: the grids of an image's RoIs are stacked along the height of one grid. Images
    go through one call on the batch axis, their grids padded to the same length: on a CPU grid_sample runs one
    thread per image.
    """
    y, x = y.to(input.dtype), x.to(input.dtype)
    images, rois = input.shape[0], y.shape[0]
    if images == 1 or rois == 0:
        return _sum_bins_batched(input[:1], y[None, :][:images], x[None, :][:images], bins).flatten(0, 1)
    if counts is None:
        # Each image is sampled for all RoIs; one that is not the image's own reads nothing and adds zero.
        own = index == torch.arange(images, device=index.device)[:, None]  # [N, K]
        x = torch.where(own[..., None], x, OUTSIDE)
        return _sum_bins_batched(input, y.expand(images, *y.shape), x, bins).sum(dim=0)
    longest = max(counts)
    if images * longest > 2 * rois:  # padding would cost more than it saves
        by_image = [
            _sum_bins_batched(input[i : i + 1], y_image[None], x_image[None], bins)[0]
            for i, (y_image, x_image) in enumerate(zip(y.split(counts), x.split(counts)))
            if len(y_image)
        ]
        return torch.cat(by_image)
    y, x = (pad_sequence(list(p.split(counts)), batch_first=True, padding_value=OUTSIDE) for p in (y, x))
    crops = _sum_bins_batched(input, y, x, bins)
    return torch.cat([crops[i, :count] for i, count in enumerate(counts)])


def _sum_bins_batched(input: Tensor, y: Tensor, x: Tensor, bins: tuple[int, int]) -> Tensor:
    """:func:`_sum_bins` for M RoIs in each image: ``y`` [N, M, rows], ``x`` [N, M, columns] to [N, M, C, *bins]."""
    images, rois, rows = y.shape
    columns = x.shape[2]
    channels = input.shape[1]
    if not torch.compiler.is_compiling():
        fit = max(MAX_SAMPLED_ELEMENTS // max(images * channels * rows * columns, 1), 1)
        if rois > fit:
            chunks = zip(y.split(fit, dim=1), x.split(fit, dim=1))
            return torch.cat([_sum_bins_batched(input, *chunk, bins) for chunk in chunks], dim=1)
    if channels == 0:  # grid_sample takes no such map
        return input.new_zeros(images, rois, 0, *bins)
    shape = (images, rois, rows, columns)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[..., None].expand(shape)], dim=-1)
    sampled = F.grid_sample(
        input, grid.view(images, rois * rows, columns, 2), mode="bilinear", padding_mode="zeros", align_corners=False
    )  # [N, C, M * rows, columns]
    window = (rows // bins[0], columns // bins[1])
    if rois and images and prod(window) > 1:  # pooling takes no empty tensor
        sampled = _WindowSum.apply(sampled, window)
    return sampled.reshape(images, channels, rois, *bins).transpose(1, 2)


class _WindowSum(torch.autograd.Function):
    """Sum over windows side by side: avg_pool2d (the fastest way found), but without keeping its input.

    avg_pool2d saves the samples, the largest tensor here, for a backward that needs only their shape.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(sampled: Tensor, window: tuple[int, int]) -> Tensor:
        return F.avg_pool2d(sampled, window, divisor_override=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, int]], output: Tensor) -> None:
        ctx.window = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, columns = ctx.window
        spread = grad[..., None, :, None].expand(*grad.shape[:-1], rows, grad.shape[-1], columns)
        return spread.reshape(*grad.shape[:-2], grad.shape[-2] * rows, grad.shape[-1] * columns), None


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


def _rois_per_image(index: Tensor, images: int) -> list[int]:
    return index.bincount(minlength=images).tolist()


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
