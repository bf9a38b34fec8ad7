"""Maps and boxes to crop."""

import pytest
import torch

both_samplers = pytest.mark.parametrize("sampler", ["grid_sample", "gather"])


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
