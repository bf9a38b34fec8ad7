"""Random numbers that depend only on their purpose, so that resumed and multi-device runs reproduce them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Mix integers, such as a run's seed, an epoch and an image id, into a 64-bit seed."""
    # numpy treats (7,) and (7, 0) alike, because it concatenates the numbers' 32-bit words.
    words = [len(numbers), *(word for number in numbers for word in (number % 2**32, number % 2**64 >> 32))]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's generators of the CPU and of ``device`` for a block, and restore their state afterwards."""
    device = torch.device(device)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        torch.manual_seed(seed)
        yield
