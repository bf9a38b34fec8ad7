"""Random draws that are functions of what they are for, not of what was drawn before.

A run that stops and goes on, and one that is spread over several devices, then draw the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """A seed that mixes 64-bit integers, such as a run's seed, an epoch and an image's id; others give another seed."""
    # numpy would take (7,) for (7, 0): it strings the numbers' 32-bit words together.
    words = [len(numbers), *(word for number in numbers for word in (number % 2**32, number % 2**64 >> 32))]
    (seed,) = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return int(seed)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draws within, on the CPU and on ``device``, start from ``seed``; those after it are as if there had been none."""
    device = torch.device(device)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        torch.manual_seed(seed)
        yield
