"""The training task: a detector, its losses, and its scores on the val split."""

import math
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from detector.choices import Crop
from detector.data.annotation_types import AnnotationType
from detector.data.results import Result, to_results
from detector.evaluation.losses import detect_with_losses
from detector.evaluation.metric import match_types, summaries
from detector.evaluation.running import EvaluationOptions, Predictions, gathered, run_detector
from detector.evaluation.scoring import Evaluation, evaluate_predictions
from detector.evaluation.truth import coco_of
from detector.models.anchors import anchor_advice
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps, set_batch_norm_eps, starts_from_own_weights
from detector.models.weights import as_model_error
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector
from detector.pretrained.initial_weights import load_initial_weights
from detector.pretrained.loading import CHECKPOINT_KEY, load_checkpoint
from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.sampling import seed_sampling
from detector.rcnn.swap import swap_crop_head
from detector.refinement.attach import add_refinement
from detector.refinement.config import RefinementConfig
from detector.seeds import seed_of, seeded
from detector.training.data import Batch, CocoDataModule
from detector.training.failures import START_AGAIN, TrainingError, flattened, refuse_changes
from detector.training.optimization import OptimizerConfig, WeightEMA, make_optimizer, make_schedule

# Settings of a refinement that may change after training.
TEST_TIME = {f"refinement.{name}" for name in ("iterations", "ascent_steps", "iou_power")}


class DetectionTask(lightning.LightningModule):
    """Trains and scores a Faster, Mask or Keypoint R-CNN.

    Every random choice in training is a function of the seed, the epoch, and the image or the batch.

    Args:
        detector: settings of the detector.
        box_gradient: how the losses of the RoI heads move the proposals.
        crop: "affine" for the swapped model, "roi_align" for torchvision's, for comparison.
        optimizer: settings of the optimizer.
        refinement: adds a refinement of the boxes, trained with the detector from the start. tools/refine.py adds one
            to a trained detector.
    """

    trainer_defaults: ClassVar[dict[str, Any]] = {}
    new_run = "start a new run from its weights, with any settings: {weights} FILE"  # the alternative to resuming

    def __init__(
        self,
        detector: DetectorConfig = DetectorConfig(),
        box_gradient: BoxGradient = BoxGradient(),
        crop: Crop = "affine",
        optimizer: OptimizerConfig = OptimizerConfig(),
        refinement: RefinementConfig | None = None,
    ) -> None:
        super().__init__()
        self.detector, self.box_gradient, self.crop, self.optimizer = detector, box_gradient, crop, optimizer
        self.refinement = refinement
        self.model: Any = None  # a FasterRCNN, after configure_model
        self.image_ids: list[int] = []  # of the current batch
        self.results: list[Result] = []  # of the last validation, on the whole val split; on rank 0
        self.scored_step: int | None = None  # step of the last validation
        self._resumed: dict[str, Any] | None = None  # training settings of the checkpoint
        self._must_load_weights = False

    @property
    def data(self) -> CocoDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """The annotation types that are learned and read from the data, besides boxes."""
        return self.detector.annotation_types

    def configure_model(self) -> None:
        if self.model is None:  # only now the number of categories is known
            self._must_load_weights = starts_from_own_weights(self.detector)
            with seeded(seed_of(self.data.seed)):
                categories, layout = len(self.data.val_set.category_ids), self.data.val_set.keypoints
                points = {} if layout is None else {"num_keypoints": len(layout)}
                self.model = build_detector(self.detector, categories, pretrained=not self._must_load_weights, **points)
                if self.refinement is not None:
                    add_refinement(self.model, self.refinement)
            if self.crop == "affine":
                swap_crop_head(self.model, self.box_gradient)

    def configure_callbacks(self) -> list[Callback]:
        return [] if self.optimizer.ema is None else [WeightEMA(self.optimizer.ema)]

    def on_fit_start(self) -> None:
        self._load_initial_weights()
        if self.trainer.is_global_zero and (advice := anchor_advice(*self.data.train_set.shapes(), self.detector)):
            rank_zero_info(f"{self.data.train_split}: {advice}")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # For dropout and the like; the sampling of anchors and RoIs has its own seeds.
        torch.manual_seed(seed_of(self.data.seed, self.global_rank, self.current_epoch, batch_idx))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        self.image_ids = [int(target["image_id"]) for target in targets]
        losses = self.losses(images, targets)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            values = {name: loss.item() for name, loss in losses.items()}
            where = f"in step {self.global_step}, on images {self.image_ids}"
            raise TrainingError(f"the loss is not finite {where} ({values})", hints=START_AGAIN)
        logged = {"loss": total, **losses}
        self.log_dict({f"train/{name}": logged[name] for name in logged}, prog_bar=True, batch_size=len(images))
        return total

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses of a batch, by name."""
        self._seed_sampling(self.current_epoch)
        return self.model(images, targets)

    def on_validation_start(self) -> None:
        self._load_initial_weights()
        self.results = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        self.image_ids = [int(target["image_id"]) for target in targets]
        self._seed_sampling(0)  # the same in every epoch, so that losses can be compared
        detections, losses = detect_with_losses(self.model, images, targets)
        self.results += to_results(detections, self.image_ids, self.data.val_set.category_ids)
        options: Any = {"batch_size": len(images), "sync_dist": True}
        self.log("val/loss", torch.stack(list(losses.values())).sum(), prog_bar=True, **options)
        self.log_dict({f"val/{name}": losses[name] for name in losses}, **options)

    def on_validation_epoch_end(self) -> None:
        found, val_set, scores = gathered(Predictions(results=self.results)), self.data.val_set, None
        self.results = [] if found is None else found.results
        if found is not None:
            truth = coco_of(val_set.annotations, val_set.image_ids)
            types = self.annotation_types
            scores, _ = summaries(match_types(truth, self.results, val_set.image_ids, annotation_types=types))
        scores = self.trainer.strategy.broadcast(scores)
        assert scores is not None
        self.log_dict({f"val/{name}": score for name, score in scores.items()})
        self.log("AP", scores["AP"], prog_bar=True, logger=False)
        self.scored_step = self.global_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings, (images, steps, steps_per_epoch) = self.optimizer, self.plan()
        if self._resumed is not None:
            refuse_changes(self._resumed, self._training_settings(), new_run=self.new_run)
        lr, devices, accumulated = settings.rate(images), self.trainer.world_size, self.trainer.accumulate_grad_batches
        all_there = images == devices * self.data.batch_size * accumulated
        rank_zero_info(
            f"{images} images a step (devices {devices} x batch {self.data.batch_size} x accumulated {accumulated}"
            f"{'' if all_there else f', more than {self.data.train_split} has'}): peak learning rate {lr:.3g} "
            f"({settings.lr:.3g} for {settings.lr_batch} images, {settings.lr_rule}), {settings.name}, "
            f"{settings.schedule}; {steps} steps, {steps_per_epoch} an epoch"
        )
        optimizer = make_optimizer(self.model, settings, lr)
        schedule = make_schedule(optimizer, settings, steps, steps / steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def plan(self) -> tuple[int, int, int]:
        """Return the images in an optimizer step, the steps that the schedule is made for, and those of an epoch.

        A step's images are those of all devices and accumulated batches, but at most those of an epoch: a split smaller
        than a batch is one batch, and Lightning steps at an epoch's end.
        """
        trainer = self.trainer
        if trainer.limit_train_batches == 0:
            raise TrainingError("there is no batch to train on", hints=("raise {limit_train_batches}",))
        trainer.fit_loop.setup_data()  # counts the batches
        batches, accumulated = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        images = min(trainer.world_size * self.data.batch_size, len(self.data.train_set)) * min(accumulated, batches)
        steps_per_epoch = math.ceil(batches / accumulated)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            return images, steps_per_epoch * trainer.max_epochs, steps_per_epoch
        if trainer.max_steps < 1:
            raise TrainingError("the schedule needs an end", hints=("set {max_epochs}", "set {max_steps}"))
        return images, trainer.max_steps, steps_per_epoch

    def description(self) -> DetectorDescription:
        """Return the description of the detector for a checkpoint."""
        data, eps = self.data.train_set, batch_norm_eps(self.model)
        categories = (data.category_ids, data.category_names)
        return DetectorDescription(self.detector, self.crop, *categories, eps, self.refinement, data.keypoints)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values, so that the file loads with weights_only=True.
        resume = {"model": self._model_settings(), "training": self._training_settings()}
        checkpoint[CHECKPOINT_KEY] = self.description().to_dict() | {"resume": resume}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._must_load_weights = False  # the file of the initial weights may be gone
        saved = checkpoint[CHECKPOINT_KEY]
        with as_model_error("the checkpoint is damaged"):
            description = DetectorDescription.from_dict(saved)
            model, self._resumed = (dict(saved["resume"][part]) for part in ("model", "training"))
        refuse_changes(model, self._model_settings(), new_run=self.new_run)
        set_batch_norm_eps(self.model, description.batch_norm_eps)

    def _model_settings(self) -> dict[str, Any]:
        """Return the settings of the model that a resumed run must share with its checkpoint."""
        description = self.description()
        settings: dict[str, Any] = {
            "category_names": description.category_names,
            "crop": self.crop,
            "keypoints": description.keypoints and list(description.keypoints.names),
            "box_gradient": self.crop == "affine" and self.box_gradient.enabled,
            "refinement": self.refinement is not None,
            **flattened("detector", self.detector),
        }
        if starts_from_own_weights(self.detector):
            settings["detector.weights"] = "own weights"  # wherever they were, the checkpoint has them now
        if settings["box_gradient"]:
            settings |= flattened("box_gradient", self.box_gradient)
        if self.refinement is not None:
            settings |= flattened("refinement", self.refinement)
        return {name: value for name, value in settings.items() if name not in TEST_TIME}

    def _training_settings(self) -> dict[str, Any]:
        """Return the settings of optimizer and schedule that a resumed run must share as well."""
        images, steps, _ = self.plan()
        return flattened("optimizer", self.optimizer) | {
            "images a step (devices x batch_size x accumulated batches)": images,
            "number of steps": None if self.optimizer.schedule == "multistep" else steps,
        }

    def evaluate(self, checkpoint: Path, options: EvaluationOptions) -> Evaluation:
        """Evaluate a checkpoint of this training on the val split; the last validation is not repeated."""
        detector = load_checkpoint(checkpoint).to(options.device)  # with averaged weights, if there are any
        found, notes = self.predictions(detector, options)
        about: Any = {"model": str(checkpoint), "root": str(self.data.root), "split_name": self.data.val_split}
        return evaluate_predictions(found, self.data.val_set, options, detector=detector, notes=notes, **about)

    def predictions(self, detector: Detector, options: EvaluationOptions) -> tuple[Predictions, list[str]]:
        """Return a detector's predictions on the val split, and notes for the report."""
        split = self.data.val_set
        if self.scored_step == self.trainer.global_step:
            return Predictions(split.image_ids, self.results), self.data.notes
        # The run stopped within an epoch, or had ended before.
        with self.trainer.precision_plugin.forward_context():
            return run_detector(detector.model, split, split.category_ids, options), self.data.notes

    def _load_initial_weights(self) -> None:
        """Load the initial weights, once; not earlier, because a checkpoint may replace them."""
        if self._must_load_weights:
            self._must_load_weights = False
            data = self.data.val_set
            rank_zero_info(load_initial_weights(self.model, self.detector, data.category_names, data.keypoints))

    def _seed_sampling(self, epoch: int) -> None:
        seed_sampling(self.model, [seed_of(self.data.seed, epoch, image_id) for image_id in self.image_ids])
