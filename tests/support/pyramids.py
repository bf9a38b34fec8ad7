"""Feature pyramids and boxes that belong to their levels."""

import torch

STRIDES = {"0": 4, "1": 8, "2": 16, "3": 32}
# With the default canonical scale every box of a small test image would map to the finest level.
SMALL = {"canonical_scale": 56, "canonical_level": 4}


def pyramid(images, size, channels=2, dtype=torch.float64, strides=STRIDES):
    """Maps of a batch that is padded to a multiple of 32, as GeneralizedRCNNTransform does."""
    generator = torch.Generator().manual_seed(sum(size))
    height, width = (-(-side // 32) * 32 for side in size)
    return {
        name: torch.randn(images, channels, height // stride, width // stride, dtype=dtype, generator=generator)
        for name, stride in strides.items()
    }


def boxes_of_side(sides, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor(sides, dtype=torch.float64)
    corners = torch.rand(len(sides), 2, generator=generator, dtype=torch.float64) * 60 - 10
    extents = sides[:, None] * (0.8 + 0.4 * torch.rand(len(sides), 2, generator=generator, dtype=torch.float64))
    return torch.cat([corners, corners + extents], 1).to(dtype)


# Two boxes for each of the four levels, which with SMALL are parted at 28, 56 and 112 pixels.
LEVEL_SIDES = [18, 40, 80, 170, 22, 38, 84, 300]
