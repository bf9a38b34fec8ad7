"""Maps and boxes to crop, the operators under test, a reference for each, and the tolerances."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torchvision.ops import roi_align

from detector import affine_crop, prroi_pool2d, roi_align_rotated

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# N(0, 1) maps of some 10 to 100 pixels. A normalised float32 coordinate is off by up to 1e-4 pixels.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# torchvision's RoIAlign in Python, not compiled: differentiable in the boxes. It ignores the border rule.
_python_roi_align = import_module("torchvision.ops.roi_align")._roi_align.__wrapped__


def python_roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned):
    return _python_roi_align(input, rois, spatial_scale, *output_size, sampling_ratio, aligned)


# --- References ------------------------------------------------------------------------------------------------------


def rows_of(boxes):
    """Boxes as one tensor with the image's index in front."""
    if isinstance(boxes, torch.Tensor):
        return boxes
    return torch.cat([with_index([i] * len(of_image), of_image) for i, of_image in enumerate(boxes)])


def hat_means(start, end, bins, size):
    """The mean of each pixel's hat over each bin, [K, bins, size], in float64; 0 for empty and inverted sides.

    Bins are cut at the centres of pixels, and a pixel beyond the border. In between a hat is straight, and its value in
    the middle is its mean.
    """
    start, end = start.detach().double()[:, None], end.detach().double()[:, None]
    pixels = torch.arange(-1.0, size + 1, dtype=torch.float64, device=start.device)
    edges = start + (end - start) * torch.arange(bins + 1, device=start.device) / bins
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    cuts = torch.cat([low, torch.minimum(torch.maximum(pixels, low), high), high], 2)
    middle = (cuts[..., 1:] + cuts[..., :-1]) / 2
    hats = (1 - (middle[..., None] - pixels[1:-1]).abs()).clamp(min=0)
    return torch.where(high > low, (cuts.diff(dim=2)[..., None] * hats).sum(2) / (high - low), 0)


def precise_reference(maps, rois, output_size, spatial_scale=1.0):
    """PrRoIPool by the pieces of :func:`hat_means`; differentiable in the maps only."""
    rois = rows_of(rois)
    height, width = sides_of(output_size)
    x1, y1, x2, y2 = (rois[:, 1:].detach().double() * spatial_scale).unbind(1)
    y, x = hat_means(y1, y2, height, maps.shape[2]), hat_means(x1, x2, width, maps.shape[3])
    return torch.einsum("kyh,kchw,kxw->kcyx", y.to(maps), maps[rois[:, 0].long()], x.to(maps))


def rotated_reference(maps, rois, output_size, spatial_scale=1.0, ratio=0, aligned=True, clockwise=False):
    """detectron2's RoIAlignRotated sample by sample; differentiable in the maps only."""
    bins, size = sides_of(output_size), maps.shape[2:]
    crops = [maps.new_zeros(0, maps.shape[1], *bins)]
    for index, *box in rows_of(rois).detach().unbind(0):
        x_centre, y_centre = (centre * spatial_scale - (0.5 if aligned else 0) for centre in box[:2])
        sides = [side * spatial_scale for side in box[3:1:-1]]  # height and width
        if not aligned:
            sides = [side.clamp(min=1) for side in sides]
        counts = [ratio if ratio > 0 else int(torch.ceil(side / n)) for side, n in zip(sides, bins)]
        offsets = []
        for side, n, count in zip(sides, bins, counts):
            of_bins, step = torch.arange(n).to(side)[:, None], side / n
            offsets.append(-side / 2 + of_bins * step + (torch.arange(count).to(side) + 0.5) * step / max(count, 1))
        yy, xx = offsets[0][:, :, None, None], offsets[1]
        angle = torch.deg2rad(-box[4] if clockwise else box[4])
        y = yy * angle.cos() - xx * angle.sin() + y_centre
        x = yy * angle.sin() + xx * angle.cos() + x_centre
        counted = (y >= -1) & (y <= size[0]) & (x >= -1) & (x <= size[1])
        samples = 0
        (y0, y1, of_y), (x0, x1, of_x) = (neighbours(at, pixels) for at, pixels in zip((y, x), size))
        for row, y_weight in ((y0, 1 - of_y), (y1, of_y)):
            for column, x_weight in ((x0, 1 - of_x), (x1, of_x)):
                samples = samples + (y_weight * x_weight * counted).to(maps) * maps[int(index)][:, row, column]
        crops.append(samples.sum((2, 4))[None] / max(counts[0] * counts[1], 1))
    return torch.cat(crops)


def neighbours(at, size):
    """Both pixels beside places clamped to the centres of the edge pixels, and the weight of the second."""
    at = at.clamp(0, size - 1)
    low = at.floor()
    return low.long(), (low + 1).clamp(max=size - 1).long(), at - low


def sides_of(output_size):
    return (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)


# --- Operators -------------------------------------------------------------------------------------------------------

ANGLE = 33.0  # degrees; the rotated crop's samples then lie on no kink


def turned(corners):
    """Boxes (..., x1, y1, x2, y2), perhaps with an index, as (..., x, y, width, height, angle)."""
    index, (x1, y1, x2, y2) = corners[:, :-4], corners[:, -4:].unbind(1)
    rotated = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, torch.full_like(x1, ANGLE)], 1)
    return torch.cat([index, rotated], 1)


@dataclass(frozen=True)
class Operator:
    """A crop, and an independent reference, with the arguments (maps, boxes, output_size, spatial_scale, aligned).

    Calls take boxes (x1, y1, x2, y2); ``crop`` takes the operator's own boxes.
    """

    rule: str  # "affine", "precise" or "rotated"
    crop: Callable
    own_reference: Callable
    ratio: int | None = None  # samples per bin and axis; -1: adaptive counts; None: means over bins
    sampler: str = ""  # or method
    names: tuple[str, str] = ("input", "boxes")  # of the maps and the boxes

    def __call__(self, maps, boxes, output_size=(2, 3), spatial_scale=1.0, aligned=False):
        return self.crop(maps, self.own(boxes), output_size, spatial_scale, aligned)

    def reference(self, maps, boxes, output_size=(2, 3), spatial_scale=1.0, aligned=False):
        return self.own_reference(maps, self.own(boxes), output_size, spatial_scale, aligned)

    def own(self, boxes):
        """Corner boxes in either form as the operator's own."""
        if self.rule != "rotated":
            return boxes
        return turned(boxes) if isinstance(boxes, torch.Tensor) else [turned(of_image) for of_image in boxes]

    @property
    def alignments(self):
        return (False,) if self.rule == "precise" else (False, True)  # PrRoIPool has one rule


def affine(ratio, sampler):
    def crop(maps, boxes, output_size, scale, aligned):
        return affine_crop(maps, boxes, output_size, scale, ratio, aligned, sampler=sampler)

    def reference(maps, boxes, output_size, scale, aligned):
        return roi_align(maps, boxes, output_size, scale, ratio, aligned)

    return Operator("affine", crop, reference, ratio, sampler)


def precise(method):
    def crop(maps, rois, output_size, scale, aligned):
        return prroi_pool2d(maps, rois, *sides_of(output_size), scale, method=method)

    def reference(maps, rois, output_size, scale, aligned):
        return precise_reference(maps, rois, output_size, scale)

    return Operator("precise", crop, reference, None, method, ("features", "rois"))


def rotated(ratio):
    def crop(maps, rois, output_size, scale, aligned):
        return roi_align_rotated(maps, rois, output_size, scale, ratio, aligned)

    def reference(maps, rois, output_size, scale, aligned):
        return rotated_reference(maps, rois, output_size, scale, ratio, aligned)

    return Operator("rotated", crop, reference, ratio, "grid_sample", ("input", "rois"))


# The Triton kernels run where there is a GPU or Triton's interpreter; see test_triton.
HAS_TRITON = INTERPRETED or torch.cuda.is_available()
SAMPLERS = ("grid_sample", "gather", "triton") if HAS_TRITON else ("grid_sample", "gather")
METHODS = ("products", *SAMPLERS[1:])  # of prroi_pool2d
both_samplers = pytest.mark.parametrize("sampler", SAMPLERS)
OPERATORS = {
    **{f"{sampler}{ratio}": affine(ratio, sampler) for sampler in SAMPLERS for ratio in (-1, 2)},
    **{f"precise {method}": precise(method) for method in METHODS},
    **{f"rotated{ratio}": rotated(ratio) for ratio in (-1, 2)},
}


def operators(where=lambda operator: True):
    """Parametrize ``operator`` with those for which a condition holds."""
    chosen = {name: operator for name, operator in OPERATORS.items() if where(operator)}
    return pytest.mark.parametrize("operator", chosen.values(), ids=list(chosen))


def aligned_operators(where=lambda operator: True):
    """Parametrize ``operator`` and ``aligned``."""
    chosen = [(name, o, aligned) for name, o in OPERATORS.items() if where(o) for aligned in o.alignments]
    ids = [f"{name}-{aligned}" for name, _, aligned in chosen]
    return pytest.mark.parametrize(("operator", "aligned"), [one[1:] for one in chosen], ids=ids)


def for_sampler(sampler, boxes, every):
    """All boxes, or one of ``every`` for Triton's interpreter, which takes some 20 ms a box."""
    return boxes[::every] if sampler == "triton" and INTERPRETED else boxes


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def general_boxes(count, size, seed=0, dtype=torch.float64):
    """Boxes inside and across the edges of a map of a size, at coordinates where no sample sits on a kink."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    frame = torch.tensor([width, height], dtype=torch.float64)
    corner = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.3) * frame
    extent = (0.15 + 0.7 * torch.rand(count, 2, generator=generator, dtype=torch.float64)) * frame
    return torch.cat([corner, corner + extent], 1).to(dtype)


def with_index(index, boxes):
    """Boxes [K, ...] with the index of their image in front."""
    return torch.cat([torch.tensor(index, dtype=boxes.dtype, device=boxes.device)[:, None], boxes], 1)


def slopes(crop, boxes, upstream, step=1e-6):
    """Gradient at boxes [K, 4 or 5] by central differences of a crop whose result k depends on box k alone."""
    sides = []
    for side in range(boxes.shape[1]):
        moved = torch.zeros_like(boxes[0])
        moved[side] = step
        sides.append(((crop(boxes + moved) - crop(boxes - moved)) * upstream).sum((1, 2, 3)) / (2 * step))
    return torch.stack(sides, 1)
