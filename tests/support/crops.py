"""Maps and boxes to crop, the operators under test, and the tolerances."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import pytest
import torch
from torchvision.ops import roi_align

from detector import affine_crop, exact_crop

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# N(0, 1) maps of some 10 to 100 pixels. A normalised float32 coordinate is off by up to 1e-4 pixels.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# torchvision's RoIAlign in Python, not compiled: differentiable in the boxes. It ignores the border rule.
_python_roi_align = import_module("torchvision.ops.roi_align")._roi_align.__wrapped__


def python_roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned):
    return _python_roi_align(input, rois, spatial_scale, *output_size, sampling_ratio, aligned)


@dataclass(frozen=True)
class Operator:
    """A crop with the arguments (maps, boxes, output_size, spatial_scale, aligned), and what it should equal."""

    crop: Callable
    ratio: int  # of roi_align; the exact crop is its limit
    error: float = 0  # of that roi_align, in [0, 1) maps
    sampler: str = ""

    def __call__(self, maps, boxes, output_size=(2, 3), spatial_scale=1.0, aligned=False):
        return self.crop(maps, boxes, output_size, spatial_scale, aligned=aligned)

    def reference(self, maps, boxes, output_size=(2, 3), spatial_scale=1.0, aligned=False):
        return roi_align(maps, boxes, output_size, spatial_scale, self.ratio, aligned)


# The Triton kernels run where there is a GPU or Triton's interpreter; see test_triton.
HAS_TRITON = INTERPRETED or torch.cuda.is_available()
SAMPLERS = ("grid_sample", "gather", "triton") if HAS_TRITON else ("grid_sample", "gather")
both_samplers = pytest.mark.parametrize("sampler", SAMPLERS)
OPERATORS = {
    f"{sampler}{ratio}": Operator(partial(affine_crop, sampling_ratio=ratio, sampler=sampler), ratio, sampler=sampler)
    for sampler in SAMPLERS
    for ratio in (-1, 2)
}
OPERATORS["exact"] = Operator(partial(exact_crop, sampler="gather"), 100, 0.02)
if HAS_TRITON:
    OPERATORS["triton exact"] = Operator(partial(exact_crop, sampler="triton"), 100, 0.02, "triton")


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
    """Boxes [K, 4] with the index of their image in front, [K, 5]."""
    return torch.cat([torch.tensor(index, dtype=boxes.dtype, device=boxes.device)[:, None], boxes], 1)


def slopes(crop, boxes, upstream, step=1e-6):
    """Gradient at boxes [K, 4] by central differences of a crop whose result k depends on box k alone."""
    sides = []
    for side in range(4):
        moved = torch.zeros(4, dtype=boxes.dtype, device=boxes.device)
        moved[side] = step
        sides.append(((crop(boxes + moved) - crop(boxes - moved)) * upstream).sum((1, 2, 3)) / (2 * step))
    return torch.stack(sides, 1)
