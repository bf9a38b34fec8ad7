"""RoIAlign of rotated boxes, by the name and arguments of detectron2 and mmcv. Nothing is compiled."""

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn

from detector.crop.arguments import Names, check_values, finish, pair, split_rois
from detector.crop.geometry import RADIANS, boxes_in_frame, boxes_to_theta, geometry_dtype
from detector.crop.grid_sampler import crop_by_grid
from detector.crop.rois import Axis, RoIs, Turn, place_samples
from detector.crop.transforms import is_vmapped

NAMES = Names("input", "rois", ("centre x", "centre y", "width", "height", "angle"))


@torch.fx.wrap  # a leaf in torch.fx traces, like roi_align
def roi_align_rotated(
    input: Tensor,
    rois: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
    clockwise: bool = False,
) -> Tensor:
    """Crop rotated boxes out of feature maps, with gradients to the maps and to all five numbers of a box.

    A box is (centre x, centre y, width, height, angle), in image pixels and **degrees**, x to the right and y down. It
    turns around its centre, counter-clockwise as seen for positive angles. Pixel ``i`` covers ``[i, i + 1]`` and has
    its centre at ``i + 0.5``. Samples more than a pixel outside the map count as 0, others are clamped to the centres
    of the edge pixels. Values are those of detectron2's ``ROIAlignRotated``, at angle 0 ``affine_crop(aligned=True)``,
    and of mmcv with its angles in radians converted: ``torch.cat([rois[:, :5], rois[:, 5:].rad2deg()], 1)``.
    torchvision's ``CXCYWHR`` boxes are the same. theta is that of :func:`~detector.boxes_to_theta`. Second derivatives
    work; on a GPU the backward is not deterministic.

    Args:
        input: [N, C, H, W], any floating dtype.
        rois: [K, 6], the image's index and the box; or one [L, 5] tensor per image, which avoids a synchronisation on a
            GPU. Used in float32 or float64.
        output_size: height and width of the crop in bins, or one number for both.
        spatial_scale: pixels of ``input`` per image pixel.
        sampling_ratio: samples per bin and axis. 0 or less: ``ceil(side / bins)`` of each box, so that an empty box is
            0; this synchronises on a GPU, and cannot be traced, compiled into one graph or vmapped over boxes.
        aligned: ``False`` samples half a map pixel further and widens sides to at least one map pixel, as in mmcv.
        clockwise: positive angles turn clockwise as seen.

    Returns:
        [K, C, output height, output width] in the dtype of ``input``. RoIs with a bad image index, a negative side or a
        non-finite number are NaN where a check would synchronise or is impossible: on a GPU, in graphs, vmapped.

    Raises:
        TypeError: ``input`` or ``rois`` has the wrong type, dtype or device.
        ValueError: a shape or value is invalid, a side is negative, or adaptive counts are traced or vmapped.

    Example:
        >>> rois = torch.tensor([[0, 100.0, 90.0, 120.0, 40.0, 30.0]], requires_grad=True)
        >>> crops = roi_align_rotated(torch.rand(1, 3, 240, 320), rois, (7, 14), 1.0, 2)
        >>> crops.square().sum().backward()
        >>> crops.shape, rois.grad.shape
        (torch.Size([1, 3, 7, 14]), torch.Size([1, 6]))
    """
    bins = pair("output_size", output_size)
    index, boxes, counts = split_rois([input], rois, [spatial_scale], NAMES)
    boxes = boxes.to(geometry_dtype(input, boxes))
    scales = torch.full_like(boxes[:, 0], spatial_scale)
    finite = torch.isfinite(boxes.detach() * scales[:, None]).all(dim=1)
    image, valid = check_values(input, index, boxes, finite, scales, NAMES)
    upright = (boxes.detach()[:, 2:4] >= 0).all(dim=1)
    if valid is None and not upright.all():
        row = int((~upright).nonzero()[0])
        raise ValueError(f"rois[{row}] must have a width and a height of at least 0, got {boxes[row].tolist()}")
    valid = None if valid is None else valid & upright
    boxes = torch.where((finite & upright)[:, None], boxes, 0)
    y, x, turn = _place(boxes, (input.shape[2], input.shape[3]), bins, spatial_scale, aligned, clockwise)
    placed = RoIs(y, x, torch.zeros_like(image), image, counts, valid, is_vmapped(boxes), turn)
    samples = place_samples(placed, sampling_ratio)
    crops = crop_by_grid([input.to(geometry_dtype(input))], samples, counts if sampling_ratio > 0 else None)
    return finish(crops, valid, input.dtype)


class RoIAlignRotated(nn.Module):
    """Crop rotated boxes: :func:`roi_align_rotated` as a module.

    Example:
        >>> align = RoIAlignRotated((7, 14), spatial_scale=1 / 4, sampling_ratio=2)
        >>> align(torch.rand(1, 8, 60, 80), torch.tensor([[0, 100.0, 90.0, 120.0, 40.0, 30.0]])).shape
        torch.Size([1, 8, 7, 14])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        aligned: bool = True,
        clockwise: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = pair("output_size", output_size)
        self.spatial_scale, self.sampling_ratio = spatial_scale, sampling_ratio
        self.aligned, self.clockwise = aligned, clockwise

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        geometry = (self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, self.clockwise)
        return roi_align_rotated(input, rois, *geometry)

    def extra_repr(self) -> str:
        names = ("output_size", "spatial_scale", "sampling_ratio", "aligned", "clockwise")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _place(
    boxes: Tensor, size: tuple[int, int], bins: tuple[int, int], scale: float, aligned: bool, clockwise: bool
) -> tuple[Axis, Axis, Turn]:
    """Place boxes [K, 5] of image pixels on a map of a size (height, width)."""
    centre, sides, angle = boxes.split((2, 2, 1), dim=1)
    angle = -angle if clockwise else angle
    least = 0.0 if aligned else 1.0  # map pixels
    theta = boxes_to_theta(
        boxes_in_frame(torch.cat([centre, sides.clamp(min=least / scale), angle], 1), *size, scale, aligned), size
    )
    x, y = (centre.detach() * scale - (0.5 if aligned else 0.0)).unbind(1)
    width, height = (sides.detach() * scale).clamp(min=least).unbind(1)
    map_height, map_width = (torch.full_like(x, pixels) for pixels in size)
    reach = (torch.maximum(x + 1, map_width - x) ** 2 + torch.maximum(y + 1, map_height - y) ** 2).sqrt()
    turn = Turn(theta[:, 1, 0], theta[:, 0, 1], y, x, angle.detach()[:, 0] * RADIANS, reach)
    y_axis = Axis(-height / 2, height, theta[:, 1, 1], theta[:, 1, 2], map_height, bins[0])
    x_axis = Axis(-width / 2, width, theta[:, 0, 0], theta[:, 0, 2], map_width, bins[1])
    return y_axis, x_axis, turn
