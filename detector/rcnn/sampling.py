"""Drawing the anchors and RoIs of a training step, image by image, from seeds of their own."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.seeds import seed_of, seeded


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or RoIs, drawing for each image from a seed of its own.

    :attr:`seeds` holds those of the next batch, one an image; without them it draws as torchvision does.
    """

    seeds: Sequence[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.seeds is None:
            return super().__call__(matched_idxs)
        positives, negatives = [], []
        for seed, matched in zip(self.seeds, matched_idxs, strict=True):
            with seeded(seed, matched.device):
                positive, negative = super().__call__([matched])
            positives += positive
            negatives += negative
        return positives, negatives


def seed_sampling(model: GeneralizedRCNN, seeds: Sequence[int] | None) -> None:
    """Make an R-CNN draw the anchors and RoIs of its next batch from these seeds, one an image; in place.

    Args:
        model: a torchvision R-CNN, stock or swapped.
        seeds: one an image; ``None``: torchvision's own draws again.
    """
    for number, part in enumerate((model.rpn, model.roi_heads)):
        sampler = part.fg_bg_sampler
        if not isinstance(sampler, SeededSampler):
            sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
            part.fg_bg_sampler = sampler
        sampler.seeds = None if seeds is None else [seed_of(seed, number) for seed in seeds]
