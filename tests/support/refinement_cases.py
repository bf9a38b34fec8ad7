"""A refinement on maps and boxes of its own: smooth, in float64, no sample on a kink of bilinear interpolation."""

import torch
from support.refined_models import refined
from support.tiny_models import CHANNELS, SIZE, tiny_rcnn

SHAPES = [(SIZE, SIZE), (SIZE - 8, SIZE)]


def maps(images=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(images, CHANNELS, SIZE // stride, SIZE // stride, dtype=dtype, generator=generator)
        for name, stride in (("0", 4), ("1", 8), ("2", 16))
    }


class RefinementCase:
    """Maps of two images, boxes near to the truth, and a refinement of random weights."""

    def __init__(self, dtype=torch.float64, **settings):
        self.refinement = refined(tiny_rcnn().to(dtype), **settings).roi_heads.refinement
        self.features = maps(dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        # Far enough from the border that no look is clipped there, which is a kink as well.
        objects = [
            [[18.3, 20.1, 47.2, 45.4], [33.2, 14.7, 47.9, 31.6], [7.2, 9.1, 48.7, 43.4]],
            [[15.1, 16.2, 46.3, 43.7]],
        ]
        self.boxes, self.truth = [], []
        for sides, copies in zip(objects, (2, 3)):
            true = torch.tensor(sides, dtype=dtype).repeat(copies, 1)
            side = (true[:, 2:] - true[:, :2]).repeat(1, 2)
            self.boxes.append(true + side * 0.06 * torch.randn(true.shape, dtype=dtype, generator=generator))
            self.truth.append(true)
