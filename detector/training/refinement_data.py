"""The images that a refinement learns from."""

import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from detector.data.batches import Item, TrainingBatches
from detector.data.checks import no_box
from detector.data.dataset import CocoDetection
from detector.errors import DataError
from detector.training.data import CocoDataModule
from detector.training.failures import REFINE


class RefinementData(CocoDataModule):
    """The images of a train split that have boxes, in batches of as many epochs as it takes.

    To Lightning it is one epoch: a data set of five images would else write a checkpoint every other step. Images keep
    their size; the detector resizes them as it does in testing.

    Args:
        steps: of the whole training.
        epochs: as many as give so many passes over the images, in place of ``steps``.
        flip: every second image is flipped.
        train_split, options: see :class:`CocoDataModule`.
    """

    advice = REFINE

    def __init__(
        self,
        *,
        train_split: str = "train2017",
        steps: int = 600,
        epochs: int | None = None,
        flip: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            train_split=train_split,
            val_split=train_split,
            augmentation=None if flip else [],
            min_size=None,
            **options,
        )
        self.steps, self.epochs = steps, epochs

    def setup(self, stage: str | None = None) -> None:
        if stage != "fit":
            return
        self.train_set = self.split(self.train_split, train=True)
        self._open_images()
        for note in self.notes:
            rank_zero_info(note)
        train_set = self.train_set
        ids = [i for i, count in zip(train_set.image_ids, train_set.counts().tolist(), strict=True) if count]
        if not ids:
            raise DataError(no_box(self.folder.annotation_file(self.train_split)).message)
        train_set.keep(ids)
        rank_zero_info(f"{self.train_split}: {len(train_set):,} images with boxes to learn from")

    def _used(self) -> list[tuple[str, CocoDetection]]:
        return [(self.train_split, self.train_set)]

    def _training_batches(self) -> TrainingBatches:
        return RepeatedBatches(count=None if self.epochs else self.steps, epochs=self.epochs or 1, **self._order())


class RepeatedBatches(TrainingBatches):
    """The batches of several epochs, one after the other, as those of one.

    Args:
        count: how many; ``None``: those of ``epochs`` whole ones.
        epochs: see there.
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
