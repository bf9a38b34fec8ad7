"""What is trained: a swapped detector, its losses, and its score on the val split."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from detector.data.annotation_types import AnnotationType
from detector.data.keypoints import KeypointLayout
from detector.data.results import Result, to_results
from detector.evaluation import Predictions, detect_with_losses
from detector.evaluation.metric import evaluate_types
from detector.evaluation.ranks import gathered
from detector.evaluation.truth import coco_of
from detector.models.anchors import anchor_advice
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps, set_batch_norm_eps, starts_from_own_weights
from detector.models.weights import as_model_error
from detector.pretrained.description import DetectorDescription
from detector.pretrained.initial_weights import load_initial_weights
from detector.pretrained.loading import CHECKPOINT_KEY
from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.sampling import seed_sampling
from detector.rcnn.swap import swap_crop_head
from detector.refinement.attach import add_refinement
from detector.refinement.config import RefinementConfig
from detector.seeds import seed_of, seeded
from detector.training.data import Batch, CocoDataModule
from detector.training.failures import TRAIN, TrainingError
from detector.training.optimization import OptimizerConfig, WeightEMA, make_optimizer, make_schedule


class DetectionTask(lightning.LightningModule):
    """Train and score a Faster, Mask or Keypoint R-CNN.

    All that is drawn at random in training is a function of the seed, the epoch, and the image or the batch.

    Args:
        detector: what to build.
        box_gradient: how the losses of the RoI heads move the proposals.
        crop: "affine" is the swapped model; "roi_align" is torchvision's stock one, for comparison.
        optimizer: how the weights are changed.
        refinement: let the boxes refine themselves, and learn that beside the detector, from the start.
            tools/refine.py adds it to a detector that is trained already.
    """

    advice = TRAIN

    def __init__(
        self,
        detector: DetectorConfig = DetectorConfig(),
        box_gradient: BoxGradient = BoxGradient(),
        crop: Literal["affine", "roi_align"] = "affine",
        optimizer: OptimizerConfig = OptimizerConfig(),
        refinement: RefinementConfig | None = None,
    ) -> None:
        super().__init__()
        self.detector, self.box_gradient, self.crop, self.optimizer = detector, box_gradient, crop, optimizer
        self.refinement = refinement
        self.model: Any = None  # a FasterRCNN, from configure_model on
        self.image_ids: list[int] = []  # of the batch under way
        self.results: list[Result] = []  # on rank 0: of the last scoring, on every image of the val split
        self.scored_step: int | None = None  # the step after which that was
        self._resumed: dict[str, Any] | None = None
        self._starts = False  # from weights that are not loaded yet

    @property
    def data(self) -> CocoDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """What is learned besides boxes, and read of the data."""
        return self.detector.annotation_types

    def configure_model(self) -> None:
        if self.model is None:  # the data tells the number of categories
            self._starts = starts_from_own_weights(self.detector)
            with seeded(seed_of(self.data.seed)):
                categories, layout = len(self.data.val_set.category_ids), self.data.val_set.keypoints
                points = {} if layout is None else {"num_keypoints": len(layout)}
                self.model = build_detector(self.detector, categories, pretrained=not self._starts, **points)
                if self.refinement is not None:
                    add_refinement(self.model, self.refinement)
            if self.crop == "affine":
                swap_crop_head(self.model, self.box_gradient)

    def configure_callbacks(self) -> Sequence[Callback]:
        return [] if self.optimizer.ema is None else [WeightEMA(self.optimizer.ema)]

    def on_fit_start(self) -> None:
        self._load_initial_weights()
        if self.trainer.is_global_zero:
            advice = anchor_advice(*self.data.train_set.shapes(), self.detector)
            if advice is not None:
                rank_zero_info(f"{self.data.train_split}: {advice}")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Of anchors and RoIs see _draw_by_image; this is for what else a network may draw, such as dropout.
        torch.manual_seed(seed_of(self.data.seed, self.global_rank, self.current_epoch, batch_idx))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        self.image_ids = [int(target["image_id"]) for target in targets]
        losses = self.losses(images, targets)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            values = {name: loss.item() for name, loss in losses.items()}
            raise TrainingError(
                f"the loss is not finite in step {self.global_step}, on images {self.image_ids}: {values}. Start "
                f"again with a lower {self.advice.rate}{self.advice.clip}"
            )
        size = len(images)
        self.log("train/loss", total, prog_bar=True, batch_size=size)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, prog_bar=True, batch_size=size)
        return total

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a training step brings down."""
        self._draw_by_image(self.current_epoch)
        return self.model(images, targets)

    def on_validation_start(self) -> None:
        self._load_initial_weights()
        self.results = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        self.image_ids = [int(target["image_id"]) for target in targets]
        self._draw_by_image(0)  # the same in every epoch: its losses can be compared
        detections, losses = detect_with_losses(self.model, images, targets)
        self.results += to_results(detections, self.image_ids, self.data.val_set.category_ids)
        size = len(images)
        self.log("val/loss", torch.stack(list(losses.values())).sum(), prog_bar=True, batch_size=size, sync_dist=True)
        for name, loss in losses.items():
            self.log(f"val/{name}", loss, batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        found, val_set = gathered(Predictions(results=self.results)), self.data.val_set
        self.results = [] if found is None else found.results
        scores = None
        if found is not None:
            truth = coco_of(val_set.annotations, val_set.image_ids)
            scores = evaluate_types(truth, self.results, val_set.image_ids, annotation_types=self.annotation_types)
        scores = self.trainer.strategy.broadcast(scores)
        assert scores is not None
        self.log_dict({f"val/{name}": score for name, score in scores.items()})
        self.log("AP", scores["AP"], prog_bar=True, logger=False)
        self.scored_step = self.global_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trainer, settings = self.trainer, self.optimizer
        images, asked = self.images_per_step, self._images_asked_for
        steps, steps_per_epoch = self._steps()
        lr = settings.rate(images)
        self._check_resumed(images, steps)
        made_of = (
            f"devices {trainer.world_size} x batch {self.data.batch_size} x accumulated "
            f"{trainer.accumulate_grad_batches}"
        )
        if images < asked:
            made_of += f" would be {asked}, more than {self.data.train_split} gives"
        rank_zero_info(
            f"{images} images a step ({made_of}): peak learning rate {lr:.3g} ({settings.lr:.3g} for "
            f"{settings.lr_batch} images, {settings.lr_rule}), {settings.name}, {settings.schedule}; {steps} steps, "
            f"{steps_per_epoch} an epoch"
        )
        optimizer = make_optimizer(self.model, settings, lr)
        schedule = make_schedule(optimizer, settings, steps, steps / steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def images_per_step(self) -> int:
        """The images that one step of the optimizer sees, over all devices and accumulated batches.

        No more than an epoch has: a split smaller than a batch is one batch, and Lightning steps at an epoch's end.
        """
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # which counts the batches
        batches = int(min(trainer.accumulate_grad_batches, trainer.num_training_batches))
        return min(trainer.world_size * self.data.batch_size, len(self.data.train_set)) * batches

    @property
    def _images_asked_for(self) -> int:
        return self.trainer.world_size * self.data.batch_size * self.trainer.accumulate_grad_batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values: the file loads with weights_only=True, and nothing in it names a class to import.
        checkpoint[CHECKPOINT_KEY] = self.description().to_dict() | {
            "box_gradient": asdict(self.box_gradient),
            "optimizer": asdict(self.optimizer),
            "images_per_step": self.images_per_step,
            "steps": self._steps()[0],
        }

    def description(self) -> DetectorDescription:
        """What a checkpoint says of the detector in it."""
        ids, names = self.data.train_set.category_ids, self.data.train_set.category_names
        eps, keypoints = batch_norm_eps(self.model), self.data.train_set.keypoints
        return DetectorDescription(self.detector, self.crop, ids, names, eps, self.refinement, keypoints)

    def _category_names(self) -> list[str]:
        return self.data.val_set.category_names

    def _keypoints(self) -> KeypointLayout | None:
        return self.data.val_set.keypoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._starts = False  # the file that the run began from may be gone
        saved = checkpoint[CHECKPOINT_KEY]
        with as_model_error("the checkpoint is of an earlier version of this project, or damaged"):
            description = DetectorDescription.from_dict(saved)
        if self.trainer.state.fn == "fit":
            self._resumed = saved
            self._refuse_another_model(description, saved)
        elif description.category_names != self.data.val_set.category_names:
            raise TrainingError(
                f"the checkpoint was trained on {description.category_names}, {self.data.val_split} has "
                f"{self.data.val_set.category_names}: tools/eval.py matches them by name"
            )
        set_batch_norm_eps(self.model, description.batch_norm_eps)

    def _refuse_another_model(self, description: DetectorDescription, saved: dict[str, Any]) -> None:
        if "box_gradient" not in saved:
            raise TrainingError(
                "the checkpoint is of an earlier version of this project: it can be scored, not resumed; its weights "
                "can start a new run: --model.detector.weights FILE"
            )
        before: dict[str, Any] = {"category_names": description.category_names, "crop": description.crop}
        before |= {"keypoints": description.keypoints and list(description.keypoints.names)}
        before |= _settings(description.settings)
        gradient = saved["box_gradient"]
        before |= {f"box_gradient.{name}": value for name, value in gradient.items()}
        before |= _of_training(description.refinement)
        layout = self._keypoints()
        now: dict[str, Any] = {"category_names": self._category_names(), "crop": self.crop} | _settings(self.detector)
        now |= {"keypoints": layout and list(layout.names)}
        now |= _of_training(self.refinement)
        if self.crop == "affine" and (self.box_gradient.enabled or BoxGradient(**gradient).enabled):
            now |= {f"box_gradient.{name}": value for name, value in asdict(self.box_gradient).items()}
        for name, value in now.items():
            if _plain(before.get(name)) != _plain(value):
                raise TrainingError(
                    f"the checkpoint was trained with {name} {before.get(name)}, this run has {value}: go on with the "
                    f"same{self.advice.anew}"
                )

    def _check_resumed(self, images: int, steps: int) -> None:
        """Refuse to go on with other settings: optimizer and schedule would keep those of the checkpoint."""
        if self._resumed is None:
            return
        for name, now in asdict(self.optimizer).items():
            before = self._resumed["optimizer"][name]
            if _plain(before) != _plain(now):
                raise TrainingError(
                    f"the checkpoint was trained with optimizer.{name} {before}, this run has {now}: go on with the "
                    f"same{self.advice.anew}"
                )
        before = self._resumed["images_per_step"]
        # Earlier versions wrote, and went by, those asked for; the rate in their checkpoint stays.
        if before not in (images, self._images_asked_for):
            raise TrainingError(
                f"the checkpoint was trained on {before} images a step, this run has {images}: go on with the same "
                f"devices x {self.advice.images}{self.advice.anew}"
            )
        before = self._resumed["steps"]
        if before != steps and self.optimizer.schedule != "multistep":
            raise TrainingError(
                f"the checkpoint's {self.optimizer.schedule} schedule was made for {before} steps, this run has "
                f"{steps}: go on with the same data and {self.advice.length}{self.advice.anew}"
            )

    def _steps(self) -> tuple[int, int]:
        """The steps that the schedule is made for, and those of an epoch."""
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # which counts the batches
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            return per_epoch * trainer.max_epochs, per_epoch
        if trainer.max_steps < 1:
            raise TrainingError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        return trainer.max_steps, per_epoch

    def _load_initial_weights(self) -> None:
        """Once, unless a checkpoint was loaded before: now, since only then it is known."""
        if self._starts:
            self._starts = False
            data = self.data.val_set
            rank_zero_info(load_initial_weights(self.model, self.detector, data.category_names, data.keypoints))

    def _draw_by_image(self, epoch: int) -> None:
        seed_sampling(self.model, [seed_of(self.data.seed, epoch, image_id) for image_id in self.image_ids])


def _plain(value: Any) -> Any:
    """A list for a tuple, which a configuration file may have made of it."""
    return list(value) if isinstance(value, tuple) else value


def _settings(detector: DetectorConfig) -> dict[str, Any]:
    """Those that a run goes on with. Where weights of one's own came from is past: the checkpoint has them."""
    return asdict(detector) | ({"weights": "one's own"} if starts_from_own_weights(detector) else {})


OF_TESTING = ("iterations", "ascent_steps", "iou_power", "boxes_per_image")  # these may change after the training


def _of_training(refinement: RefinementConfig | None) -> dict[str, Any]:
    """The settings of a refinement that a run goes on with, by their flags."""
    if refinement is None:
        return {"refinement": None}
    fields = {name: value for name, value in asdict(refinement).items() if name not in OF_TESTING}
    gradient = {f"box_gradient.{name}": value for name, value in fields.pop("box_gradient").items()}
    return {"refinement": True} | {f"refinement.{name}": value for name, value in (fields | gradient).items()}
