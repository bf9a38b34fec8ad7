"""The images of each batch, as functions of the seed and the epoch only.

Neither the number of ranks that share a batch nor an interruption changes them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from detector.seeds import seed_of

Item = tuple[int, int]  # (epoch, index)


@dataclass(eq=False)
class TrainingBatches(Sampler[list[Item]]):
    """Shuffled batches of images that are all wide or all tall, to reduce padding.

    Images that do not fill a batch of their shape form one mixed batch. The remainder that fills no batch at all is
    left out; it differs between epochs.

    Args:
        wide: whether each image is at least as wide as tall. If all values are equal, images are not grouped.
        batch_size: number of images in a batch of one rank.
        seed: seed of the order, 0 or more.
        ranks: number of processes that share the batches.
        rank: index of this process.
        epoch: first epoch.
        start: number of batches of the first epoch to skip.
    """

    wide: Sequence[bool]
    batch_size: int
    seed: int = 0
    ranks: int = 1
    rank: int = 0
    epoch: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        self._first_epoch = self.epoch

    @property
    def sampler(self) -> "TrainingBatches":
        """Return itself, because Lightning calls ``set_epoch`` on a batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(len(self.wide) // (self.batch_size * self.ranks), 1)

    def __iter__(self) -> Iterator[list[Item]]:
        start = self.start if self.epoch == self._first_epoch else 0
        for indices in self.batches(self.epoch)[start:]:
            yield [(self.epoch, index) for index in indices]

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the image indices of this rank's batches."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        size = self.batch_size * self.ranks
        order = torch.randperm(len(self.wide), generator=generator)
        order = order[: max(len(order) // size * size, min(size, len(order)))]
        wide = torch.tensor(self.wide, dtype=torch.bool)[order]
        groups = [order[wide], order[~wide]]
        mixed = torch.cat([group[len(group) // size * size :] for group in groups])  # none, or one batch
        batches = [batch for group in groups for batch in group.split(size) if len(batch) == size]
        batches += [mixed] if len(mixed) else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        own = [batches[number].tolist()[self.rank * self.batch_size :][: self.batch_size] for number in shuffled]
        # If the only batch is too small for all ranks, the last ranks repeat its first images.
        return [batch or batches[0].tolist()[: self.batch_size] for batch in own]


def scoring_batches(images: int, batch_size: int, *, ranks: int = 1, rank: int = 0) -> list[list[int]]:
    """Return batches of all images, in order. Ranks share them in turn, so their number does not change any batch."""
    return [list(range(i, min(i + batch_size, images))) for i in range(0, images, batch_size)][rank::ranks]
