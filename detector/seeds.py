"""Random numbers that depend only on their purpose, so that resumed runs and runs on several devices repeat them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Mix integers, such as a run's seed, an epoch and an image id, into a seed of 64 bits."""
    # numpy would take (7,) for (7, 0), as it concatenates the 32-bit words of the numbers.
    words = [len(numbers), *(word for number in numbers for word in (number % 2**32, number % 2**64 >> 32))]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's random numbers on the CPU and on ``device`` in the block, and restore the state afterwards."""
    device = torch.device(device)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        torch.manual_seed(seed)
        yield
