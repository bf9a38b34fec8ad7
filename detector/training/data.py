"""A COCO-format data set for Lightning: splits, augmentation and loaders."""

import math
import os
import shlex
from collections.abc import Collection
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

from detector.data.annotation_types import AnnotationType
from detector.data.batches import ScoringBatches, TrainingBatches
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
from detector.errors import DataError, MissingAnnotationsError, short_repr
from detector.models.resizing import RandomShortestSize
from detector.text import listed
from detector.training.failures import TRAIN, TrainingError

# Labelled, of an image to train on, where an object has as many as COCO's persons; of others the same share.
FEWEST_KEYPOINTS = 10
MOST_COMPARED = 20_000  # images of both splits, of which each is asked for its size: seconds on a slow disk
Batch = tuple[list[Tensor], list[Target]]
# Of both splits, up to which all images are opened before training: 5 to 10 seconds on one core.
OPENED_PIXELS = 1_000_000_000


def _flips(transform: Any) -> bool:
    """Whether an augmentation, or one within it, mirrors images."""
    flips = (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)
    return isinstance(transform, flips) or any(_flips(one) for one in getattr(transform, "transforms", ()))


def _opened(data: CocoDetection) -> tuple[dict[int, str], list[Finding]]:
    """Why each image that cannot be read cannot, by its id; and notes on those whose orientation is in doubt."""
    images = [data.annotations.image(index) for index in data.annotations.find(data.image_ids)]
    broken, doubtful = {}, []
    for image, problem in zip(images, open_images(data.folder, images, orientation=data.orientation)):
        if problem is not None and problem.level == "error":
            broken[image["id"]] = problem.message
        elif problem is not None:
            doubtful.append(problem)
    return broken, doubtful


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
        orientation: "upright": turn images by their EXIF orientation, as viewers and label tools do; "stored": take
            them as stored. Where the annotated size fits only one, that one is taken.
        augmentation: transforms of torchvision.transforms.v2 for training images and their boxes, in order, each by
            its name, or with settings as {class_path: RandomHorizontalFlip, init_args: {p: 0.25}}. Default: a
            horizontal flip of every second image. tools/browse.py shows what comes out.
        min_size: after that training images are resized so that their shorter side has this many pixels; of several,
            one is drawn each time (multi-scale). "null": they keep the size that the augmentation left.
        max_size: but the longer side no more than this. Keep both at or around the detector's, for test images.
        group_by_shape: wide images share batches with wide ones, tall with tall.
        batch_size: images per step and device.
        val_batch_size: images scored at a time. With more than 1 they are padded to one size, which changes features
            near their edges, and scores a little.
        workers: processes that read images.
        seed: of order and augmentation, 0 or more. Default: that of seed_everything.
        skip_broken: open every image of both splits first, and leave out those that cannot be read. Without it a broken
            image ends the run: before its first step where opening all takes seconds, else when it comes to it.
        generate: "digits": write the synthetic set of configs/quickstart.yaml to root first, if it is not there.
    """

    advice = TRAIN

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
        least = {"batch_size": (batch_size, 1), "val_batch_size": (val_batch_size, 1), "workers": (workers, 0)}
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise DataError(f"--data.{name} is {value}: it must be {lowest} or more")
        self.root = find_root(root, dataset)
        self.folder = DataFolder(self.root, annotations, images, orientation)
        self.train_split, self.val_split = train_split, val_split
        self.annotations, self.images = annotations, images
        self.group_by_shape, self.workers = group_by_shape, workers
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        # Where Lightning puts the seed for all ranks; they must agree, or they would draw the same images.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.skip_broken = skip_broken
        self.generate = generate
        transforms = [v2.RandomHorizontalFlip()] if augmentation is None else list(augmentation)
        if min_size is not None:
            # The detector resizes test images by itself, without antialiasing; training images must look the same.
            sizes = [min_size] if isinstance(min_size, int) else list(min_size)
            transforms.append(RandomShortestSize(sizes, max_size, antialias=False))
        self.train_transform = v2.Compose(transforms) if transforms else None
        self.notes: list[str] = []  # on what the splits lack, for the report
        self._position: dict[str, int] = {}  # where a checkpoint was written

    def prepare_data(self) -> None:
        if self.generate == "digits" and not self.root.exists():
            write_digits(self.root)

    def setup(self, stage: str | None = None) -> None:
        self.val_set = self.split(self.val_split)
        if stage != "fit":
            return
        self.train_set = self.split(self.train_split, train=True)
        try:
            self.notes = [f"{self.val_split}: {note}" for note in label_as(self.val_set, self.train_set)]
        except DataError as error:
            raise DataError(f"{self.root}, {self.val_split}: {error}") from None
        self._agree_on_keypoints()
        self._open_images()
        self._leave_out_without_keypoints()
        for note in self.notes:
            rank_zero_info(note)
        if not self.train_set.counts().any():
            raise DataError(no_box(self.folder.annotation_file(self.train_split)).message)
        self._say_what_is_shared()

    def split(
        self, name: str, *, train: bool = False, annotation_types: Collection[AnnotationType] | None = None
    ) -> CocoDetection:
        """Read one split as a data set, and say what is not quite right with it.

        Args:
            name: of the split.
            train: with the training's augmentation.
            annotation_types: what is read besides boxes; ``None``: what the trainer's task learns.
        """
        transform = self.train_transform if train else None
        if annotation_types is None:
            annotation_types = getattr(self.trainer and self.trainer.lightning_module, "annotation_types", ())
        try:
            data = self.folder.dataset(
                name,
                annotation_types=annotation_types,
                transform=transform,
                seed=self.seed,
                skip_missing=self.skip_broken,
            )
        except MissingAnnotationsError as error:
            again = f"; delete {self.root} to have it written anew, with masks" if self.generate == "digits" else ""
            raise DataError(f"{error}{again}") from None
        if data.annotations.warnings:
            warnings = ", ".join(f"{count:,} {kind}" for kind, count in data.annotations.warnings.items())
            file = self.folder.annotation_file(name)
            rank_zero_info(f"{name}: {warnings}; python tools/check.py {file} shows them")
        return data

    def _agree_on_keypoints(self) -> None:
        ours, theirs = self.train_set.keypoints, self.val_set.keypoints
        if ours is None or theirs is None:  # both: masks or boxes are learned
            return
        if not ours.fits(theirs):
            raise DataError(
                f"{self.root}: {self.train_split} and {self.val_split} have different keypoints: "
                f"{short_repr(ours.names)} and {short_repr(theirs.names)}"
            )
        layout = theirs if ours == KeypointLayout.numbered(len(ours)) else ours  # names say more than numbers
        self.train_set.keypoints = self.val_set.keypoints = layout
        if len(layout) > 1 and layout.mirrored() == [*range(len(layout))] and _flips(self.train_transform):
            self.notes.append(
                f"{self.train_split}: images are mirrored in training, and by their names no keypoint is the mirror "
                f"image of another ({listed(layout.names)}): if some are, name them left_... and right_... in the "
                "categories, or train without a flip (augmentation: [])"
            )

    def _leave_out_without_keypoints(self) -> None:
        """Train on no image with next to no keypoints, as torchvision's references do."""
        layout = self.train_set.keypoints
        if layout is None:
            return
        least = math.ceil(FEWEST_KEYPOINTS * min(len(layout), len(PERSON)) / len(PERSON))
        counts = zip(self.train_set.image_ids, self.train_set.visible_keypoints(), strict=True)
        enough = [image_id for image_id, count in counts if count >= least]
        if not enough:
            file = self.folder.annotation_file(self.train_split)
            raise DataError(
                f"{file}: no image has {least} or more labelled keypoints (visibility 1 or 2), and images with fewer "
                "are not trained on"
            )
        if len(enough) < len(self.train_set):
            self.notes.append(
                f"{self.train_split}: {len(self.train_set) - len(enough):,} of {len(self.train_set):,} images have "
                f"fewer than {least} labelled keypoints and are not trained on"
            )
        self.train_set.keep(enough)

    def _check(self, split: str) -> str:
        annotations, images = map(str, (self.folder.annotation_file(split), self.folder.image_folder(split)))
        return shlex.join(["python", "tools/check.py", annotations, "--images", images])

    def _open_images(self) -> None:
        """Open all images: one that cannot be read would end the run when it comes to it, perhaps hours later."""
        splits = self._used()
        check = {name: self._check(name) for name, _ in splits}
        pixels = sum(float(data.sizes().astype(float).prod(axis=1).sum()) for _, data in splits)
        skip = self.advice.skip_broken
        if pixels > OPENED_PIXELS and not self.skip_broken:
            also = f"; {skip} also leaves broken ones out" if skip else ""
            rank_zero_info(
                f"The images are not opened before training ({pixels / 1e9:,.0f} gigapixels), which takes a while: "
                f"{' and '.join(check.values())} do that, and say where an EXIF orientation matters{also}"
            )
            return
        ranks, rank = self._ranks()
        found = [_opened(data) for _, data in splits] if rank == 0 else []
        if ranks > 1 and self.trainer is not None:  # one looks, all do the same
            found = self.trainer.strategy.broadcast(found)
        for (name, _), (_, doubtful) in zip(splits, found, strict=True):
            for kind in ORIENTATION_KINDS.values():
                of_kind = [problem.message for problem in doubtful if problem.kind == kind]
                if of_kind:
                    same = f"give eval and predict the same --orientation {self.folder.orientation}"
                    self.notes.append(f"{name}: {len(of_kind):,} {kind}, such as {of_kind[0]}; {same}")
        broken = [(name, data, reasons) for (name, data), (reasons, _) in zip(splits, found, strict=True) if reasons]
        if broken and not self.skip_broken:
            first, *others = (reason for _, _, reasons in broken for reason in reasons.values())
            more = f" (and {len(others):,} more image{'s' * (len(others) > 1)})" if others else ""
            lists = " and ".join(check[name] for name, _, _ in broken)
            without = f"; {skip} trains without them" if skip else ""
            raise DataError(f"{first}{more}: {lists} shows all{without}")
        self.notes += [f"{name}: {data.leave_out(reasons)}" for name, data, reasons in broken]

    def _used(self) -> list[tuple[str, CocoDetection]]:
        return [(self.train_split, self.train_set), (self.val_split, self.val_set)]

    @rank_zero_only
    def _say_what_is_shared(self) -> None:
        if len(self.train_set) + len(self.val_set) > MOST_COMPARED:
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
        batches = ScoringBatches(len(self.val_set), self.val_batch_size, ranks=ranks, rank=rank)
        return self._loader(self.val_set.with_layers(), batches)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images, targets = [as_float(image) for image in batch[0]], batch[1]
        if self.trainer is not None:  # Lightning casts floats before they are sent, and these were bytes
            images = self.trainer.precision_plugin.convert_input(images)
        return images, targets

    def on_exception(self, exception: BaseException) -> None:
        if self.trainer is not None:  # Lightning ends the workers of that loop alone in which it happened
            self.trainer.fit_loop.teardown()

    def upcoming(self, batches: int) -> list[int]:
        """Return the ids of the images in the next batches of this rank, after the last one that was trained on."""
        epoch, done = self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1  # type: ignore[union-attr]
        indices = [i for batch in self._training_batches().batches(epoch)[done:][:batches] for i in batch]
        image_ids = self.train_set.image_ids
        return [image_ids[index] for index in indices]

    def state_dict(self) -> dict[str, int]:
        trainer = self.trainer
        assert trainer is not None
        epoch, done = trainer.current_epoch, trainer.fit_loop.batch_idx + 1
        progress: Any = trainer.fit_loop.epoch_progress.current
        # The second: an epoch that was cut short is over for Lightning as well.
        if done >= trainer.num_training_batches or progress.processed > epoch:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches": done} | self._what_order_depends_on()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if self.trainer is None or self.trainer.state.fn != "fit":
            return  # a checkpoint that is only scored
        for name, now in self._what_order_depends_on().items():
            before = state_dict[name]
            if before != now:
                raise TrainingError(
                    f"the checkpoint was trained with {name.replace('_', ' ')} {before}, this run has {now}: go on "
                    f"with the same data, seed and devices x {self.advice.images.split()[0]}{self.advice.anew}"
                )
        self._position = state_dict

    def _what_order_depends_on(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "training_images": len(self.train_set),
            "images_per_batch": self.batch_size * self._ranks()[0],
            "group_by_shape": int(self.group_by_shape),
        }

    def _training_batches(self) -> TrainingBatches:
        return TrainingBatches(**self._order())

    def _order(self) -> dict[str, Any]:
        """What the batches are made of, and where a run goes on."""
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

    def _loader(self, dataset: CocoDetection, batches: Sampler[Any]) -> DataLoader[Batch]:
        return make_loader(
            dataset.as_bytes(),
            batches,
            workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
