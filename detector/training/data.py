"""The data module: splits in COCO's layout, their checks, augmentation and loaders."""

import math
import os
from collections.abc import Collection, Sequence
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from detector.data import split_checks
from detector.data.annotation_types import AnnotationType
from detector.data.batches import TrainingBatches, scoring_batches
from detector.data.categories import label_as
from detector.data.checks import no_box
from detector.data.dataset import CocoDetection, Target, as_float
from detector.data.digits import write_digits
from detector.data.folder import DataFolder, find_root
from detector.data.images import Orientation
from detector.data.loading import make_loader
from detector.errors import DataError
from detector.models.resizing import RandomShortestSize
from detector.training.failures import refuse_changes

Batch = tuple[list[Tensor], list[Target]]
MAX_OPENED_PIXELS = 1_000_000_000  # of both splits; 5 to 10 seconds on one core


class CocoDataModule(lightning.LightningDataModule):
    """Train and val splits of a data set in COCO's layout.

    Args:
        root: the data set's folder. Default: ``dataset`` in the folder of the environment variable DETECTOR_DATA.
        dataset: the data set's name, a folder in DETECTOR_DATA. Used without root.
        train_split: the split to train on.
        val_split: the split to score on.
        annotations: annotation file of a split, relative to root; {split} stands for its name.
        images: image folder of a split, relative to root.
        orientation: "upright" applies EXIF orientations, as viewers and label tools do; "stored" ignores them. If the
            annotated size fits only one of the two, that one is used.
        augmentation: transforms of torchvision.transforms.v2 for training images and their boxes, in order, each by
            its name, or with settings as {class_path: RandomHorizontalFlip, init_args: {p: 0.25}}. Default: a
            horizontal flip of every second image. tools/browse.py shows the result.
        min_size: shorter side of resized training images in pixels, after augmentation. Of several values, a random one
            is used. Default: 800. null: images keep their size.
        max_size: maximum of the longer side of resized training images, in pixels.
        group_by_shape: put wide and tall images into separate batches, to reduce padding.
        batch_size: number of training images per step and device.
        val_batch_size: number of val images per batch. Several are padded to one size, which changes scores slightly.
        workers: number of processes that read images.
        seed: seed of the order and the augmentation, 0 or more. Default: that of seed_everything.
        skip_broken: open all images of both splits first, and leave out those that cannot be read. Otherwise a broken
            image ends the run.
        generate: "digits" first writes the synthetic data set of configs/quickstart.yaml to root, if it is missing.

    Raises:
        DataError: a value is out of range, or there is no root.
    """

    def __init__(
        self,
        root: str | None = None,
        dataset: str | None = None,
        train_split: str = "train2017",
        val_split: str = "val2017",
        annotations: str = "annotations/instances_{split}.json",
        images: str = "{split}",
        orientation: Orientation = "upright",
        augmentation: list[v2.Transform] | None = None,
        min_size: int | list[int] | None = 800,
        max_size: int = 1333,
        group_by_shape: bool = True,
        batch_size: int = 2,
        val_batch_size: int = 1,
        workers: int = 2,
        seed: int | None = None,
        skip_broken: bool = False,
        generate: Literal["digits"] | None = None,
    ) -> None:
        super().__init__()
        minimum = {"batch_size": (batch_size, 1), "val_batch_size": (val_batch_size, 1), "workers": (workers, 0)}
        for name, (value, least) in minimum.items():
            if value < least:
                raise DataError(f"must be {least} or more", setting=name, value=value)
        sizes = [] if min_size is None else [min_size] if isinstance(min_size, int) else list(min_size)
        for name, side in [*(("min_size", side) for side in sizes), ("max_size", max_size)]:
            if not 1 <= side <= 10_000:
                raise DataError("must be from 1 to 10000", setting=name, value=side)
        self.root = find_root(root, dataset)
        self.folder = DataFolder(self.root, annotations, images, orientation)
        self.train_split, self.val_split = train_split, val_split
        self.group_by_shape, self.workers = group_by_shape, workers
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        # PL_GLOBAL_SEED is the same on all ranks. With different seeds they would train on the same images.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.skip_broken, self.generate = skip_broken, generate
        transforms = [v2.RandomHorizontalFlip()] if augmentation is None else list(augmentation)
        if sizes:  # without antialiasing, as the detector resizes images in testing
            transforms.append(RandomShortestSize(sizes, max_size, antialias=False))
        self.train_transform = v2.Compose(transforms) if transforms else None
        self.notes: list[str] = []  # on the splits, for the report
        self._position = 0, 0  # of the checkpoint to resume from: epoch and batches

    def prepare_data(self) -> None:
        if self.generate == "digits" and not self.root.exists():
            write_digits(self.root)

    def setup(self, stage: str | None = None) -> None:
        train, val = self.train_split, self.val_split
        self.val_set, self.train_set = self.split(val), self.split(train, train=True)
        try:
            notes = [f"{val}: {note}" for note in label_as(self.val_set, self.train_set)]
            notes += [f"{train}: {note}" for note in split_checks.match_keypoints(self.train_set, self.val_set)]
        except DataError as error:
            raise DataError(f"{self.root}, {val}: {error}") from None
        notes += self._open_images([(train, self.train_set), (val, self.val_set)])
        notes += [f"{train}: {note}" for note in split_checks.leave_out_without_keypoints(self.train_set)]
        for note in notes:
            rank_zero_info(note)
        for name, data, use in ((train, self.train_set, "train on"), (val, self.val_set, "score")):
            if not data.counts().any():
                raise DataError(no_box(self.folder.annotation_file(name), use).message)
        for note in split_checks.shared_images(self.train_set, self.val_set) if self._ranks()[1] == 0 else ():
            rank_zero_info(f"{val}: {note}")
        self.notes = notes

    def split(
        self, name: str, *, train: bool = False, annotation_types: Collection[AnnotationType] | None = None
    ) -> CocoDetection:
        """Read a split, and report warnings about its annotations.

        Args:
            name: name of the split.
            train: apply the training augmentation.
            annotation_types: what to read besides boxes; ``None``: what the trainer's task learns.
        """
        if annotation_types is None:
            annotation_types = getattr(self.trainer and self.trainer.lightning_module, "annotation_types", ())
        how: Any = {"annotation_types": annotation_types, "transform": self.train_transform if train else None}
        data = self.folder.dataset(name, **how, seed=self.seed, skip_missing=self.skip_broken)
        if data.annotations.warnings:
            warnings = ", ".join(f"{count:,} {kind}" for kind, count in data.annotations.warnings.items())
            rank_zero_info(f"{name}: {warnings}; python tools/check.py {self.folder.annotation_file(name)} shows them")
        return data

    def _open_images(self, splits: Sequence[tuple[str, CocoDetection]]) -> list[str]:
        """Open all images, because a broken one would end the run later. Returns notes."""
        pixels = sum(float(data.sizes().astype(float).prod(axis=1).sum()) for _, data in splits)
        if pixels > MAX_OPENED_PIXELS and not self.skip_broken:
            commands = " and ".join(split_checks.check_command(data) for _, data in splits)
            rank_zero_info(
                f"The images are not opened before training ({pixels / 1e9:,.0f} gigapixels), which takes a while: "
                f"{commands} opens them, and shows where an EXIF orientation matters"
            )
            return []
        ranks, rank = self._ranks()
        found = [split_checks.open_split(data) for _, data in splits] if rank == 0 else []
        if self.trainer is not None and ranks > 1:
            found = self.trainer.strategy.broadcast(found)
        return split_checks.judge_images(splits, found, skip_broken=self.skip_broken)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_set, self._training_batches())

    def val_dataloader(self) -> DataLoader[Batch]:
        ranks, rank = self._ranks()
        if math.ceil(len(self.val_set) / self.val_batch_size) < ranks:  # the same on every rank
            raise DataError(f"{self.val_split} has {len(self.val_set)} images, too few to score on {ranks} devices")
        batches = scoring_batches(len(self.val_set), self.val_batch_size, ranks=ranks, rank=rank)
        return self._loader(self.val_set.with_layers(), batches)

    def _loader(self, data: CocoDetection, batches: Any) -> DataLoader[Batch]:
        options = {"persistent_workers": self.workers > 0, "pin_memory": torch.cuda.is_available()}
        return make_loader(data.as_bytes(), batches, workers=self.workers, **options)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch, except the images' ids: each step reads them, and would wait for the step before it."""
        images, targets = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return images, [moved | {"image_id": given["image_id"]} for moved, given in zip(targets, batch[1])]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, targets = [as_float(image) for image in batch[0]], batch[1]
        if self.trainer is not None:  # Lightning's conversion runs before the transfer, on bytes
            images = self.trainer.precision_plugin.convert_input(images)
        return images, targets

    def on_exception(self, exception: BaseException) -> None:
        if self.trainer is not None:  # Lightning ends only the workers of the loop that failed
            self.trainer.fit_loop.teardown()

    def upcoming(self, batches: int) -> list[int]:
        """Return the ids of the images in the next batches of this rank."""
        assert self.trainer is not None
        epoch, done = self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1
        image_ids, following = self.train_set.image_ids, self._training_batches().batches(epoch)[done:][:batches]
        return [image_ids[index] for batch in following for index in batch]

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        assert trainer is not None
        epoch, done = trainer.current_epoch, trainer.fit_loop.batch_idx + 1
        progress: Any = trainer.fit_loop.epoch_progress.current
        # Lightning also counts an interrupted epoch as processed.
        if done >= trainer.num_training_batches or progress.processed > epoch:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches": done, "settings": self._order_settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn == "fit":
            refuse_changes(state_dict["settings"], self._order_settings())
            self._position = state_dict["epoch"], state_dict["batches"]

    def _order_settings(self) -> dict[str, Any]:
        """Return the settings that the order of the images depends on."""
        order = {"seed": self.seed, "training images": len(self.train_set), "group_by_shape": self.group_by_shape}
        return order | {"images per batch": self.batch_size * self._ranks()[0]}

    def _training_batches(self) -> TrainingBatches:
        (ranks, rank), (epoch, start), (width, height) = self._ranks(), self._position, self.train_set.sizes().T
        wide = ((width >= height) | (not self.group_by_shape)).tolist()
        return TrainingBatches(wide, self.batch_size, self.seed, ranks=ranks, rank=rank, epoch=epoch, start=start)

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
