"""Training the refinement of a detector, which itself stays the same."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from detector.data.annotation_types import AnnotationType
from detector.data.batches import Item, TrainingBatches
from detector.data.categories import match_categories, match_notes
from detector.data.checks import no_box
from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError
from detector.evaluation.running import EvaluationOptions, run_detector
from detector.evaluation.scoring import Evaluation, evaluate_predictions
from detector.models.published import batch_norm_eps
from detector.overriding import overridden
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector, digest_of
from detector.pretrained.initial_weights import REFINEMENT
from detector.pretrained.loading import load_checkpoint
from detector.refinement.attach import add_refinement, refinement_losses
from detector.refinement.config import RefinementConfig
from detector.refinement.feature_cache import FeatureCache
from detector.training.data import CocoDataModule
from detector.training.failures import TrainingError
from detector.training.optimization import OptimizerConfig
from detector.training.task import DetectionTask

# The rate is constant: a step sees at most a few hundred boxes, whatever the number of images.
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_rule="constant", weight_decay=1e-4)
TRAINER_OPTIONS = {"max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": 5.0, "log_every_n_steps": 10}


class RefinementTask(DetectionTask):
    """Trains the refinement of a detector, whose own weights stay the same to the last bit.

    The classes of the data may differ from the detector's, since one refinement serves all classes. Every random choice
    is a function of the seed and the step.

    Args:
        detector: gets the refinement, in place.
        refinement: settings of the refinement.
        optimizer: how the refinement's weights are optimized.
        cache_bytes: memory of the :class:`~detector.refinement.feature_cache.FeatureCache`.

    Raises:
        ModelError: the detector cannot be refined, or could not be saved.
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
        categories, eps = (detector.category_ids, detector.category_names), batch_norm_eps(self.model)
        self._description = DetectorDescription(
            detector.settings, detector.crop, *categories, eps, refinement, detector.keypoints
        )
        self.cache = FeatureCache(cache_bytes)
        own_weights = {n: value for n, value in self.model.state_dict().items() if not n.startswith(REFINEMENT)}
        self.digest = digest_of(own_weights)

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """None: only boxes are learned, whatever the detector finds in them."""
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

    def evaluate(self, checkpoint: Path, options: EvaluationOptions) -> Evaluation:
        detector, split = load_checkpoint(checkpoint), self.data.val_set
        ids = match_categories(detector, split)
        detector.to(options.device)
        found = run_detector(detector.model, split, ids, options)
        assert detector.refinement is not None
        with overridden(detector.refinement, enabled=False):
            found.unrefined = run_detector(detector.model, split, ids, options).results
        return evaluate_predictions(
            found,
            split,
            options,
            detector=detector,
            model=str(checkpoint),
            root=str(self.data.root),
            split_name=self.data.val_split,
            notes=match_notes(detector, ids, split),
        )


class RefinementData(CocoDataModule):
    """The images of a train split that have boxes, in batches of several epochs.

    Lightning sees them as one epoch; with five images it would otherwise write a checkpoint every other step. Images
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
        augmentation: list[Any] | None = None if flip else []
        super().__init__(augmentation=augmentation, min_size=None, **options)
        self.val_set, self.steps, self.epochs = score_on, steps, epochs

    def setup(self, stage: str | None = None) -> None:
        train_set = self.train_set = self.split(self.train_split, train=True)
        self.notes = self._open_images([(self.train_split, train_set)])
        ids = [i for i, boxes in zip(train_set.image_ids, train_set.counts().tolist(), strict=True) if boxes]
        if not ids:
            raise DataError(no_box(self.folder.annotation_file(self.train_split)).message)
        train_set.keep(ids)
        for note in (*self.notes, f"{self.train_split}: {len(ids):,} images with boxes to learn from"):
            rank_zero_info(note)

    def _training_batches(self) -> TrainingBatches:
        return RepeatedBatches(None if self.epochs else self.steps, self.epochs or 1, **self._batch_options())


class RepeatedBatches(TrainingBatches):
    """The batches of several epochs as those of one.

    Args:
        number: number of batches; ``None``: those of ``epochs`` whole epochs.
        epochs: number of epochs.
        options: see :class:`TrainingBatches`.
    """

    def __init__(self, number: int | None, epochs: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.number = epochs * super().__len__() if number is None else number

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
