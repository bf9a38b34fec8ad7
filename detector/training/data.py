"""A COCO-format data set for Lightning: loaders whose order and augmentation are functions of (seed, epoch, index)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import v2

from detector.coco import CocoDetection, DataError, Target

Batch = tuple[list[Tensor], list[Target]]
ROOT_VARIABLE = "DETECTOR_DATA"


class CocoDataModule(lightning.LightningDataModule):
    """Train and val splits of a data set in COCO's layout.

    Args:
        root: the data set's folder. Default: the folder DATASET in the folder that the environment variable
            DETECTOR_DATA names.
        dataset: the data set's name, a folder of DETECTOR_DATA; used where root is not given.
        train_split: the split to train on.
        val_split: the split to score on.
        annotations: annotation file of a split, relative to root; {split} stands for the split.
        images: image folder of a split, relative to root.
        min_size: training images are resized so that their shorter side has this many pixels,
        max_size: but the longer side no more than this. Keep both equal to the detector's.
        flip: probability of a horizontal flip.
        batch_size: images per step and device.
        workers: processes that read images.
        seed: of order and augmentation, 0 or more. Default: that of seed_everything.
        generate: "digits": write the synthetic set of configs/quickstart.yaml to root first, if it is not there.
    """

    def __init__(
        self,
        root: str | None = None,
        dataset: str | None = None,
        train_split: str = "train2017",
        val_split: str = "val2017",
        annotations: str = "annotations/instances_{split}.json",
        images: str = "{split}",
        min_size: int = 800,
        max_size: int = 1333,
        flip: float = 0.5,
        batch_size: int = 2,
        workers: int = 2,
        seed: int | None = None,
        generate: Literal["digits"] | None = None,
    ) -> None:
        super().__init__()
        self.root = find_root(root, dataset)
        self.train_split, self.val_split = train_split, val_split
        self.annotations, self.images = annotations, images
        self.batch_size, self.workers = batch_size, workers
        # Where Lightning puts the seed for all ranks; they must agree, or they would draw the same images.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.generate = generate
        # The detector resizes test images by itself, without antialiasing; training images must look the same.
        self.train_transform = v2.Compose(
            [
                # Where the longer side always decides, Resize wants to hear of no other.
                v2.Resize(min_size if min_size < max_size else None, max_size=max_size, antialias=False),
                v2.RandomHorizontalFlip(flip),
            ]
        )

    def prepare_data(self) -> None:
        if self.generate == "digits" and not self.root.exists():
            from detector.digits import write_digits

            write_digits(self.root)

    def setup(self, stage: str | None = None) -> None:
        self.val_set = self.split(self.val_split)
        if stage != "fit":
            return
        self.train_set = self.split(self.train_split, train=True)
        for name in ("category_ids", "category_names"):
            train, val = getattr(self.train_set, name), getattr(self.val_set, name)
            if train != val:
                raise DataError(f"{self.root}: {name} of {self.train_split} are {train}, of {self.val_split} {val}")
        if not any(len(labels) for _, labels in self.train_set.targets):
            raise DataError(f"{self.root}: no box in {self.train_split} to train on")

    def split(self, name: str, *, train: bool = False) -> CocoDetection:
        """One split as a data set."""
        data = CocoDetection(
            self.root / self.images.format(split=name),
            self.root / self.annotations.format(split=name),
            transform=self.train_transform if train else None,
            seed=self.seed,
        )
        if train and data.dropped_boxes:
            rank_zero_info(f"{name}: {data.dropped_boxes} boxes of zero size are left out")
        return data

    def train_dataloader(self) -> DataLoader[Batch]:
        world, rank = self._ranks()
        sampler = EpochSampler(self.train_set, num_replicas=world, rank=rank, shuffle=True, seed=self.seed)
        return self._loader(self.train_set, sampler, drop_last=len(self.train_set) >= self.batch_size * world)

    def val_dataloader(self) -> DataLoader[Batch]:
        world, rank = self._ranks()
        return self._loader(self.val_set, range(rank, len(self.val_set), world))

    def _loader(self, dataset: CocoDetection, sampler: Any, *, drop_last: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)


class EpochSampler(DistributedSampler):
    """torch's sampler, shuffled by (seed, epoch), that tells the data set the epoch: it draws (epoch, index).

    The data set lives in worker processes, which a call of ``set_epoch`` on it would not reach.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


def collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    """Images of different sizes stay a list; the detector pads them to one batch."""
    images, targets = zip(*samples)
    return list(images), list(targets)


def find_root(root: str | None, dataset: str | None) -> Path:
    """The folder of a data set, see :class:`CocoDataModule`. Raises :class:`DataError` if it is not told."""
    if root is not None:
        return Path(root)
    if dataset is None:
        raise DataError("where is the data? Give its folder with --data.root FOLDER")
    if ROOT_VARIABLE not in os.environ:
        raise DataError(
            f"where is the data? Give its folder with --data.root FOLDER, or set {ROOT_VARIABLE} to the folder "
            f"that {dataset!r} lies in"
        )
    return Path(os.environ[ROOT_VARIABLE]) / dataset
