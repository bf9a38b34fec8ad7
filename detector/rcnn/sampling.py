"""Sampling of anchors and RoIs in training with a seed per image."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.seeds import seed_of, seeded


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or RoIs with one seed per image of the next batch in :attr:`seeds`."""

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
    """Seed the sampling of anchors and RoIs of an R-CNN's next batch, one seed per image, in place.

    ``None`` returns to torchvision's sampling from the global random state.
    """
    for number, part in enumerate((model.rpn, model.roi_heads)):
        if not isinstance(part.fg_bg_sampler, SeededSampler):
            stock = part.fg_bg_sampler
            part.fg_bg_sampler = SeededSampler(stock.batch_size_per_image, stock.positive_fraction)
        part.fg_bg_sampler.seeds = None if seeds is None else [seed_of(seed, number) for seed in seeds]
