"""Random draws that are functions of what they are for, not of what was drawn before.

A run that stops and goes on, and one that is spread over several devices, then draw the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN


def seed_of(*numbers: int) -> int:
    """A seed that mixes 64-bit integers, such as a run's seed, an epoch and an image's id; others give another seed."""
    # numpy would take (7,) for (7, 0): it strings the numbers' 32-bit words together.
    words = [len(numbers), *(word for number in numbers for word in (number % 2**32, number % 2**64 >> 32))]
    (seed,) = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return int(seed)


@contextmanager
def drawn_from(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draws within, on the CPU and on ``device``, start from ``seed``; those after it are as if there had been none."""
    device = torch.device(device)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        torch.manual_seed(seed)
        yield


class SamplerByImage(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or RoIs, drawing for each image from a seed of its own.

    :attr:`seeds` holds those of the next batch, one an image; without them it draws as torchvision does.
    """

    seeds: Sequence[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.seeds is None:
            return super().__call__(matched_idxs)
        positives, negatives = [], []
        for seed, matched in zip(self.seeds, matched_idxs, strict=True):
            with drawn_from(seed, matched.device):
                positive, negative = super().__call__([matched])
            positives += positive
            negatives += negative
        return positives, negatives


def sample_by_image(model: GeneralizedRCNN, seeds: Sequence[int] | None) -> None:
    """Make an R-CNN draw the anchors and RoIs of its next batch from these seeds, one an image; in place.

    Args:
        model: a torchvision R-CNN, stock or swapped.
        seeds: one an image; ``None``: torchvision's own draws again.
    """
    for number, part in enumerate((model.rpn, model.roi_heads)):
        sampler = part.fg_bg_sampler
        if not isinstance(sampler, SamplerByImage):
            sampler = SamplerByImage(sampler.batch_size_per_image, sampler.positive_fraction)
            part.fg_bg_sampler = sampler
        sampler.seeds = None if seeds is None else [seed_of(seed, number) for seed in seeds]
