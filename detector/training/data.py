"""The data module: splits in COCO's layout, their checks, augmentation and loaders."""

import math
import os
import shlex
from collections.abc import Collection, Sequence
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from detector.data.annotation_types import AnnotationType
from detector.data.batches import TrainingBatches, scoring_batches
from detector.data.categories import label_as
from detector.data.checks import Finding, no_box
from detector.data.dataset import CocoDetection, Target, as_float
from detector.data.digits import write_digits
from detector.data.folder import DataFolder, find_root
from detector.data.image_files import ORIENTATION_KINDS, open_images
from detector.data.images import Orientation
from detector.data.keypoints import PERSON, KeypointLayout
from detector.data.loading import make_loader
from detector.data.shared_images import equal_files
from detector.errors import DataError, short_repr
from detector.models.resizing import RandomShortestSize
from detector.text import listed
from detector.training.failures import refuse_changes

Batch = tuple[list[Tensor], list[Target]]
MIN_PERSON_KEYPOINTS = 10  # labelled ones of a training image, of COCO's 17; other layouts need the same share
MAX_COMPARED_IMAGES = 20_000  # of both splits; a slow disk takes seconds for their sizes
MAX_OPENED_PIXELS = 1_000_000_000  # of both splits; 5 to 10 seconds on one core


class CocoDataModule(lightning.LightningDataModule):
    """Train and val splits of a data set in COCO's layout.

    Args:
        root: the data set's folder. Default: the folder ``dataset`` in the folder that the environment variable
            DETECTOR_DATA names.
        dataset: the data set's name, a folder of DETECTOR_DATA; used if root is not given.
        train_split: the split to train on.
        val_split: the split to score on.
        annotations: annotation file of a split, relative to root; {split} stands for the split.
        images: image folder of a split, relative to root.
        orientation: "upright": turn images by their EXIF orientation, as viewers and label tools do; "stored": take
            them as stored. If the annotated size fits only one of them, that one is taken.
        augmentation: transforms of torchvision.transforms.v2 for training images and their boxes, in order, each by
            its name, or with settings as {class_path: RandomHorizontalFlip, init_args: {p: 0.25}}. Default: a
            horizontal flip of every second image. tools/browse.py shows the result.
        min_size: length in pixels of the shorter side that training images are resized to after augmentation; a random
            one of several. Default: 800. null: images keep their size.
        max_size: maximum length in pixels of the longer side.
        group_by_shape: batches of wide images and batches of tall ones, so that less is padded.
        batch_size: training images a step and device.
        val_batch_size: val images at a time. With more than 1, images are padded to one size, which changes features
            near their edges, and scores slightly.
        workers: number of processes that read images.
        seed: seed of order and augmentation, 0 or more. Default: that of seed_everything.
        skip_broken: open every image of both splits first, and leave out those that cannot be read. Without it, a
            broken image ends the run: before its first step if opening all images takes seconds, else when it is read.
        generate: "digits" writes the synthetic set of configs/quickstart.yaml to root first, if it is not there.

    Raises:
        DataError: a value is out of its range, or there is no root.
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
        self.root = find_root(root, dataset)
        self.folder = DataFolder(self.root, annotations, images, orientation)
        self.train_split, self.val_split = train_split, val_split
        self.annotations, self.images = annotations, images
        self.group_by_shape, self.workers = group_by_shape, workers
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        # PL_GLOBAL_SEED is the same on all ranks. With different seeds they would train on the same images.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.skip_broken, self.generate = skip_broken, generate
        transforms = [v2.RandomHorizontalFlip()] if augmentation is None else list(augmentation)
        if min_size is not None:
            # Without antialiasing, as the detector resizes images in testing.
            sizes = [min_size] if isinstance(min_size, int) else list(min_size)
            transforms.append(RandomShortestSize(sizes, max_size, antialias=False))
        self.train_transform = v2.Compose(transforms) if transforms else None
        self.notes: list[str] = []  # on the splits, for the report
        self._position: dict[str, Any] = {}  # of the checkpoint to resume from

    def prepare_data(self) -> None:
        if self.generate == "digits" and not self.root.exists():
            write_digits(self.root)

    def setup(self, stage: str | None = None) -> None:
        self.val_set, self.train_set = self.split(self.val_split), self.split(self.train_split, train=True)
        try:
            notes = [f"{self.val_split}: {note}" for note in label_as(self.val_set, self.train_set)]
        except DataError as error:
            raise DataError(f"{self.root}, {self.val_split}: {error}") from None
        notes += self._match_keypoints()
        notes += self._open_images([(self.train_split, self.train_set), (self.val_split, self.val_set)])
        notes += self._leave_out_without_keypoints()
        for note in notes:
            rank_zero_info(note)
        if not self.train_set.counts().any():
            raise DataError(no_box(self.folder.annotation_file(self.train_split)).message)
        self._report_shared_images()
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
        data = self.folder.dataset(
            name,
            annotation_types=annotation_types,
            transform=self.train_transform if train else None,
            seed=self.seed,
            skip_missing=self.skip_broken,
        )
        if data.annotations.warnings:
            warnings = ", ".join(f"{count:,} {kind}" for kind, count in data.annotations.warnings.items())
            rank_zero_info(f"{name}: {warnings}; python tools/check.py {self.folder.annotation_file(name)} shows them")
        return data

    def _match_keypoints(self) -> list[str]:
        """Give both splits the same keypoint names. Returns notes."""
        ours, theirs = self.train_set.keypoints, self.val_set.keypoints
        if ours is None or theirs is None:  # both are: boxes or masks are learned
            return []
        if not ours.fits(theirs):
            raise DataError(
                f"{self.root}: {self.train_split} and {self.val_split} have different keypoints: "
                f"{short_repr(ours.names)} and {short_repr(theirs.names)}"
            )
        layout = theirs if ours == KeypointLayout.numbered(len(ours)) else ours  # names say more than numbers
        self.train_set.keypoints = self.val_set.keypoints = layout
        if len(layout) == 1 or layout.mirrored() != [*range(len(layout))] or not _flips(self.train_transform):
            return []
        return [
            f"{self.train_split}: images are mirrored in training, but no keypoint's name ({listed(layout.names)}) "
            "makes it the mirror image of another. If some are, name them left_... and right_... in the categories, or "
            "train without a flip (augmentation: [])"
        ]

    def _leave_out_without_keypoints(self) -> list[str]:
        """Leave out training images with few keypoints, as torchvision's references do. Returns notes."""
        layout = self.train_set.keypoints
        if layout is None:
            return []
        least = math.ceil(MIN_PERSON_KEYPOINTS * min(len(layout), len(PERSON)) / len(PERSON))
        total, counts = len(self.train_set), self.train_set.visible_keypoints()
        kept = [image_id for image_id, count in zip(self.train_set.image_ids, counts, strict=True) if count >= least]
        if not kept:
            raise DataError(
                f"{self.folder.annotation_file(self.train_split)}: no image has {least} or more labelled keypoints "
                "(visibility 1 or 2), and images with fewer are not trained on"
            )
        self.train_set.keep(kept)
        left_out = f"{total - len(kept):,} of {total:,} images have fewer than {least} labelled keypoints"
        return [f"{self.train_split}: {left_out} and are not trained on"] if len(kept) < total else []

    def _open_images(self, splits: Sequence[tuple[str, CocoDetection]]) -> list[str]:
        """Open all images, since a broken one would end the run later. Returns notes.

        Raises:
            DataError: an image cannot be read, and ``skip_broken`` is off.
        """
        checks = {}
        for name, _ in splits:
            files = [str(self.folder.annotation_file(name)), "--images", str(self.folder.image_folder(name))]
            checks[name] = shlex.join(["python", "tools/check.py", *files])
        pixels = sum(float(data.sizes().astype(float).prod(axis=1).sum()) for _, data in splits)
        if pixels > MAX_OPENED_PIXELS and not self.skip_broken:
            rank_zero_info(
                f"The images are not opened before training ({pixels / 1e9:,.0f} gigapixels), which takes a while: "
                f"{' and '.join(checks.values())} opens them, and shows where an EXIF orientation matters"
            )
            return []
        ranks, rank = self._ranks()
        found = [_opened(data) for _, data in splits] if rank == 0 else []
        if ranks > 1 and self.trainer is not None:
            found = self.trainer.strategy.broadcast(found)
        notes, broken = [], []
        for (name, data), (reasons, doubtful) in zip(splits, found, strict=True):
            for kind in ORIENTATION_KINDS.values():
                if messages := [finding.message for finding in doubtful if finding.kind == kind]:
                    notes.append(
                        f"{name}: {len(messages):,} {kind}, such as {messages[0]}; give eval and predict the same "
                        f"--orientation {self.folder.orientation}"
                    )
            if reasons:
                broken.append((name, data, reasons))
        if broken and not self.skip_broken:
            first, *others = (reason for _, _, reasons in broken for reason in reasons.values())
            more = f" (and {len(others):,} more image{'s' * (len(others) > 1)})" if others else ""
            commands = " and ".join(checks[name] for name, _, _ in broken)
            raise DataError(f"{first}{more}", hints=(f"{commands} shows all", "train without them: {skip_broken} true"))
        return notes + [f"{name}: {data.leave_out(reasons)}" for name, data, reasons in broken]

    @rank_zero_only
    def _report_shared_images(self) -> None:
        if len(self.train_set) + len(self.val_set) > MAX_COMPARED_IMAGES:
            return
        shared = len(equal_files(self.val_set.files(), self.train_set.files()))
        if shared:
            rank_zero_info(
                f"{self.val_split}: {shared:,} of {len(self.val_set):,} images are byte for byte in "
                f"{self.train_split}, too, and score too high; tools/check.py --other names them"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_set, self._training_batches())

    def val_dataloader(self) -> DataLoader[Batch]:
        ranks, rank = self._ranks()
        if math.ceil(len(self.val_set) / self.val_batch_size) < ranks:  # the same on every rank
            raise DataError(f"{self.val_split} has {len(self.val_set)} images, too few to score on {ranks} devices")
        batches = scoring_batches(len(self.val_set), self.val_batch_size, ranks=ranks, rank=rank)
        return self._loader(self.val_set.with_layers(), batches)

    def _loader(self, data: CocoDetection, batches: Any) -> DataLoader[Batch]:
        persistent, pinned = self.workers > 0, torch.cuda.is_available()
        return make_loader(
            data.as_bytes(), batches, workers=self.workers, persistent_workers=persistent, pin_memory=pinned
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, targets = [as_float(image) for image in batch[0]], batch[1]
        if self.trainer is not None:  # Lightning converts floats before they are sent, when these are bytes
            images = self.trainer.precision_plugin.convert_input(images)
        return images, targets

    def on_exception(self, exception: BaseException) -> None:
        if self.trainer is not None:  # Lightning ends only the workers of the loop that failed
            self.trainer.fit_loop.teardown()

    def upcoming(self, batches: int) -> list[int]:
        """Return the ids of the images in the next batches of this rank."""
        assert self.trainer is not None
        epoch, done = self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1
        indices = [i for batch in self._training_batches().batches(epoch)[done:][:batches] for i in batch]
        image_ids = self.train_set.image_ids
        return [image_ids[index] for index in indices]

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        assert trainer is not None
        epoch, done = trainer.current_epoch, trainer.fit_loop.batch_idx + 1
        progress: Any = trainer.fit_loop.epoch_progress.current
        # Lightning also counts an epoch that was cut short as processed.
        if done >= trainer.num_training_batches or progress.processed > epoch:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches": done, "settings": self._order_settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn == "fit":
            refuse_changes(state_dict["settings"], self._order_settings())
            self._position = state_dict

    def _order_settings(self) -> dict[str, Any]:
        """Return what the order of the images depends on."""
        return {
            "seed": self.seed,
            "training images": len(self.train_set),
            "images per batch": self.batch_size * self._ranks()[0],
            "group_by_shape": self.group_by_shape,
        }

    def _training_batches(self) -> TrainingBatches:
        return TrainingBatches(**self._batch_options())

    def _batch_options(self) -> dict[str, Any]:
        ranks, rank = self._ranks()
        width, height = self.train_set.sizes().T
        return {
            "wide": ((width >= height) | (not self.group_by_shape)).tolist(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "ranks": ranks,
            "rank": rank,
            "epoch": self._position.get("epoch", 0),
            "start": self._position.get("batches", 0),
        }

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)


def _flips(transform: Any) -> bool:
    """Return whether an augmentation, or one inside it, mirrors images."""
    flips = (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)
    return isinstance(transform, flips) or any(_flips(one) for one in getattr(transform, "transforms", ()))


def _opened(data: CocoDetection) -> tuple[dict[int, str], list[Finding]]:
    """Open all images. Returns why an image cannot be read, by its id, and notes on doubtful orientations."""
    images = [data.annotations.image(index) for index in data.annotations.find(data.image_ids)]
    findings = [*zip(images, open_images(data.folder, images, orientation=data.orientation))]
    broken = {image["id"]: one.message for image, one in findings if one is not None and one.level == "error"}
    return broken, [one for _, one in findings if one is not None and one.level != "error"]
