"""Training the refinement of a frozen detector."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from detector.data import split_checks
from detector.data.annotation_types import AnnotationType
from detector.data.batches import Item, TrainingBatches
from detector.data.categories import match_categories, match_notes
from detector.data.checks import no_box
from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError
from detector.evaluation.running import EvaluationOptions, Predictions, run_detector
from detector.overriding import overridden
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector, digest_of
from detector.pretrained.initial_weights import REFINEMENT
from detector.refinement.attach import add_refinement, refinement_losses
from detector.refinement.config import RefinementConfig
from detector.refinement.feature_cache import FeatureCache
from detector.training.data import CocoDataModule
from detector.training.failures import TrainingError
from detector.training.optimization import OptimizerConfig
from detector.training.task import DetectionTask

# The rate is constant: a step sees at most a few hundred boxes, whatever the number of images.
OPTIMIZER = OptimizerConfig(lr_rule="constant")
TRAINER_OPTIONS = {"max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": 5.0, "log_every_n_steps": 10}


class RefinementTask(DetectionTask):
    """Trains the refinement of a detector, whose own weights do not change.

    The classes of the data may differ from the detector's, because a refinement is class-agnostic. Every random choice
    is a function of the seed and the step.

    Args:
        detector: gets the refinement, in place.
        refinement: settings of the refinement.
        optimizer: settings of the optimizer.
        cache_bytes: memory of the :class:`~detector.refinement.feature_cache.FeatureCache`.

    Raises:
        ModelError: the detector cannot be refined or saved.
    """

    trainer_defaults: ClassVar = TRAINER_OPTIONS
    new_run = "start a new run"

    def __init__(
        self,
        detector: Detector,
        refinement: RefinementConfig = RefinementConfig(),
        optimizer: OptimizerConfig = OPTIMIZER,
        *,
        cache_bytes: int = 2 * 10**9,
    ) -> None:
        if detector.settings is None or detector.crop is None:
            raise ModelError("only detectors that tools/train.py can build can be refined: torchvision's R-CNNs")
        super().__init__(detector.settings, refinement.box_gradient, detector.crop, optimizer, refinement)
        try:
            self.model = add_refinement(detector.model, refinement)
        except TypeError as error:
            raise ModelError(f"the detector cannot be refined: {error}") from None
        self.model.requires_grad_(False)
        self.model.roi_heads.refinement.requires_grad_()
        self._description = detector.describe()
        self.cache = FeatureCache(cache_bytes)
        state = self.model.state_dict()
        self.digest = digest_of({name: state[name] for name in state if not name.startswith(REFINEMENT)})

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """None: a refinement learns only boxes."""
        return ()

    def on_fit_start(self) -> None:
        pass  # no initial weights, no advice on anchors

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return refinement_losses(self.model, images, targets, cache=self.cache)

    def description(self) -> DetectorDescription:
        return self._description

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["refined_weights"] = self.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("refined_weights") != self.digest:
            raise TrainingError("the checkpoint refines another detector", hints=("give that one", self.new_run))

    def predictions(self, detector: Detector, options: EvaluationOptions) -> tuple[Predictions, list[str]]:
        split = self.data.val_set
        ids = match_categories(detector, split)
        found = run_detector(detector.model, split, ids, options)
        assert detector.refinement is not None
        with overridden(detector.refinement, enabled=False):
            found.unrefined = run_detector(detector.model, split, ids, options).results
        return found, match_notes(detector, ids, split)


class RefinementData(CocoDataModule):
    """The images of a train split that have boxes, in batches of several epochs.

    Lightning sees them as one epoch. With few images it would otherwise write checkpoints too often. Images
    keep their size, and the detector resizes them as in testing.

    Args:
        score_on: the val split, without a transform.
        steps: number of training steps.
        epochs: number of passes over the images; replaces ``steps``.
        flip: flip every second image.
        options: see :class:`CocoDataModule`.
    """

    def __init__(
        self, score_on: CocoDetection, *, steps: int = 600, epochs: int | None = None, flip: bool = True, **options: Any
    ) -> None:
        super().__init__(augmentation=None if flip else [], min_size=None, **options)
        self.val_set, self.steps, self.epochs = score_on, steps, epochs

    def setup(self, stage: str | None = None) -> None:
        data = self.train_set = self.split(self.train_split, train=True)
        self.notes = self._open_images([(self.train_split, data)])
        if not data.counts().any():
            raise DataError(no_box(self.folder.annotation_file(self.train_split)).message)
        data.keep([image_id for image_id, boxes in zip(data.image_ids, data.counts(), strict=True) if boxes])
        shared = split_checks.shared_images(data, self.val_set) if self._ranks()[1] == 0 else ()
        self.notes += [f"{self.val_split}: {note}" for note in shared]
        for note in (*self.notes, f"{self.train_split}: {len(data):,} images with boxes to learn from"):
            rank_zero_info(note)

    def _training_batches(self) -> TrainingBatches:
        batches = super()._training_batches()
        number = self.steps if self.epochs is None else self.epochs * len(batches)
        return RepeatedBatches(**asdict(batches), number=number)


@dataclass(eq=False)
class RepeatedBatches(TrainingBatches):
    """The first ``number`` batches of consecutive epochs, as one epoch. See :class:`TrainingBatches`."""

    number: int = 0

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[list[Item]]:
        return islice(self._items(), self.start if self.epoch == self._first_epoch else 0, self.number)

    def batches(self, epoch: int) -> list[list[int]]:
        return [[index for _, index in items] for items in islice(self._items(), self.number)]

    def _items(self) -> Iterator[list[Item]]:
        for epoch in count():
            for indices in super().batches(epoch):
                yield [(epoch, index) for index in indices]
