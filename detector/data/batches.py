"""Which images make up which batch: a function of the seed, the epoch and the number of images a step.

It does not depend on the number of ranks that share a batch, nor on where a run stopped and went on.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from detector.seeds import seed_of

Item = tuple[int, int]  # (epoch, index): what a data set needs to draw the augmentation


class TrainingBatches(Sampler[list[Item]]):
    """Yields shuffled batches, each of images that are all wide or all tall, so that little is padded.

    Images that fill no batch of their shape come together in a mixed one. As many as would fill no batch at all are
    left out, others in each epoch, unless they are all there is.

    Args:
        wide: of each image whether it is at least as wide as tall; all the same: no grouping.
        batch_size: images of a batch, for one rank.
        seed: 0 or more.
        ranks: how many processes share the batches.
        rank: this one's number.
        epoch: the epoch to begin in.
        start: the batches of that epoch that are left out, having been used before.
    """

    def __init__(
        self,
        wide: Sequence[bool],
        batch_size: int,
        *,
        seed: int = 0,
        ranks: int = 1,
        rank: int = 0,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        self.wide = torch.tensor(wide, dtype=torch.bool)
        self.batch_size, self.seed, self.ranks, self.rank = batch_size, seed, ranks, rank
        self.epoch = self._first_epoch = epoch
        self.start = start

    @property
    def sampler(self) -> "TrainingBatches":
        """Return itself: Lightning looks for ``set_epoch`` in a batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the batches of a whole epoch."""
        return max(len(self.wide) // (self.batch_size * self.ranks), 1)

    def __iter__(self) -> Iterator[list[Item]]:
        start = self.start if self.epoch == self._first_epoch else 0
        for indices in self.batches(self.epoch)[start:]:
            yield [(self.epoch, index) for index in indices]

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the indices of this rank's batches of an epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        size = self.batch_size * self.ranks
        order = torch.randperm(len(self.wide), generator=generator)
        order = order[: max(len(order) // size * size, min(size, len(order)))]  # others are left out in each epoch
        groups = [order[self.wide[order]], order[~self.wide[order]]]
        mixed = torch.cat([group[len(group) // size * size :] for group in groups])  # none, or one batch
        batches = [batch for group in groups for batch in group.split(size) if len(batch) == size]
        batches += [mixed] if len(mixed) else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        mine = [batches[number].tolist()[self.rank * self.batch_size :][: self.batch_size] for number in shuffled]
        # Ranks beyond the last image of the only, incomplete batch train on its first ones again.
        return [batch or batches[0].tolist()[: self.batch_size] for batch in mine]


class ScoringBatches(Sampler[list[int]]):
    """Yields all images once, in order; ranks take whole batches in turn, so that batches are those of one rank."""

    def __init__(self, images: int, batch_size: int, *, ranks: int = 1, rank: int = 0) -> None:
        batches = [list(range(i, min(i + batch_size, images))) for i in range(0, images, batch_size)]
        self._batches = batches[rank::ranks]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
