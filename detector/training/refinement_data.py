"""The data of a refinement: the images of a train split that have boxes."""

import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from detector.data.batches import Item, TrainingBatches
from detector.data.checks import no_box
from detector.errors import DataError
from detector.training.data import CocoDataModule


class RefinementData(CocoDataModule):
    """The images of a train split that have boxes, in batches of several epochs.

    Lightning sees them as one epoch; with five images it would otherwise write a checkpoint every other step. Images
    keep their size, and the detector resizes them as in testing.

    Args:
        steps: number of training steps.
        epochs: number of passes over the images; replaces ``steps``.
        flip: flip every second image.
        train_split: the split to learn from.
        options: see :class:`CocoDataModule`.
    """

    def __init__(
        self,
        *,
        train_split: str = "train2017",
        steps: int = 600,
        epochs: int | None = None,
        flip: bool = True,
        **options: Any,
    ) -> None:
        augmentation: list[Any] | None = None if flip else []
        super().__init__(
            train_split=train_split, val_split=train_split, augmentation=augmentation, min_size=None, **options
        )
        self.steps, self.epochs = steps, epochs

    def setup(self, stage: str | None = None) -> None:
        train_set = self.train_set = self.split(self.train_split, train=True)
        self.notes = self._open_images([(self.train_split, train_set)])
        ids = [i for i, count in zip(train_set.image_ids, train_set.counts().tolist(), strict=True) if count]
        if not ids:
            raise DataError(no_box(self.folder.annotation_file(self.train_split)).message)
        train_set.keep(ids)
        for note in (*self.notes, f"{self.train_split}: {len(ids):,} images with boxes to learn from"):
            rank_zero_info(note)

    def _training_batches(self) -> TrainingBatches:
        return RepeatedBatches(
            count=None if self.epochs else self.steps, epochs=self.epochs or 1, **self._batch_options()
        )


class RepeatedBatches(TrainingBatches):
    """The batches of several epochs as those of one.

    Args:
        count: number of batches; ``None``: those of ``epochs`` whole epochs.
        epochs: number of epochs.
        options: see :class:`TrainingBatches`.
    """

    def __init__(self, *, count: int | None, epochs: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.count = epochs * super().__len__() if count is None else count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Item]]:
        start = self.start if self.epoch == self._first_epoch else 0
        for number in range(start, self.count):
            epoch, place = divmod(number, super().__len__())
            if place == 0 or number == start:
                batches = super().batches(epoch)
            yield [(epoch, index) for index in batches[place]]

    def batches(self, epoch: int) -> list[list[int]]:
        passes = math.ceil(self.count / super().__len__())
        return [batch for number in range(passes) for batch in super(RepeatedBatches, self).batches(number)][
            : self.count
        ]
