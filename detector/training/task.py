"""What is trained: a swapped detector, its optimizer and schedule, and its score on the val split."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR
from torchvision.models.detection import FasterRCNN

from detector.box_gradient import BoxGradient
from detector.evaluation import Result, evaluate, to_results
from detector.models import (
    DetectorConfig,
    ModelError,
    batch_norm_eps,
    build_detector,
    read_weights,
    set_batch_norm_eps,
)
from detector.swap import swap_crop_head
from detector.training.data import Batch, CocoDataModule

CHECKPOINT_KEY = "affine_crop_rcnn"


class TrainingError(RuntimeError):
    """Why training cannot go on."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are changed.

    Args:
        name: "adamw" or "sgd".
        lr: peak learning rate.
        weight_decay: of all parameters that are trained.
        momentum: sgd only.
        schedule: after the warm-up "cosine" down to 0 or "multistep"; or "onecycle", which has its own warm-up.
        warmup_steps: steps over which the rate climbs linearly from a thousandth.
        milestones: multistep only: the epochs at which the rate is divided by 10.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: Literal["onecycle", "cosine", "multistep"] = "onecycle"
    warmup_steps: int = 500
    milestones: tuple[int, ...] = (8, 11)


class DetectionTask(lightning.LightningModule):
    """Train and score a Faster R-CNN.

    Args:
        detector: what to build.
        box_gradient: how the losses of the RoI heads move the proposals.
        crop: "affine" is the swapped model; "roi_align" is torchvision's stock one, for comparison.
        optimizer: how the weights are changed.
    """

    def __init__(
        self,
        detector: DetectorConfig = DetectorConfig(),
        box_gradient: BoxGradient = BoxGradient(),
        crop: Literal["affine", "roi_align"] = "affine",
        optimizer: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        super().__init__()
        self.detector, self.box_gradient, self.crop, self.optimizer = detector, box_gradient, crop, optimizer
        self.model: Any = None  # a FasterRCNN, from configure_model on
        self._results: list[Result] = []

    @property
    def data(self) -> CocoDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        if self.model is None:  # the data tells the number of categories
            self.model = build_detector(self.detector, len(self.data.val_set.category_ids))
            if self.crop == "affine":
                swap_crop_head(self.model, self.box_gradient)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            ids = [int(target["image_id"]) for target in targets]
            values = {name: loss.item() for name, loss in losses.items()}
            raise TrainingError(
                f"the loss is not finite in step {self.global_step}, on images {ids}: {values}. Lower "
                "--model.optimizer.lr, or set --trainer.gradient_clip_val"
            )
        size = len(images)
        self.log("train/loss", total, prog_bar=True, batch_size=size)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, prog_bar=True, batch_size=size)
        return total

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        images, targets = batch
        ids = [int(target["image_id"]) for target in targets]
        self._results += to_results(self.model(images), ids, self.data.val_set.category_ids)

    def on_validation_epoch_end(self) -> None:
        results, self._results = self._results, []
        if self.trainer.world_size > 1:
            parts: list[list[Result]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, results)
            results = [result for part in parts for result in part]
        scores, _ = evaluate(self.data.val_set.coco, results)
        self.log_dict({f"val/{name}": score for name, score in scores.items()})
        self.log("AP", scores["AP"], prog_bar=True, logger=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings = self.optimizer
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer
        if settings.name == "adamw":
            optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )
        steps = self._steps()
        schedule = make_schedule(optimizer, settings, steps, max(self.trainer.max_epochs or 1, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise TrainingError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        return int(steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values: the file loads with weights_only=True, and nothing in it names a class to import.
        val_set = self.data.val_set
        checkpoint[CHECKPOINT_KEY] = {
            "detector": asdict(self.detector),
            "crop": self.crop,
            "batch_norm_eps": batch_norm_eps(self.model),
            "category_ids": val_set.category_ids,
            "category_names": val_set.category_names,
            "steps": self._steps(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if CHECKPOINT_KEY not in checkpoint:
            raise TrainingError("--ckpt_path is not a checkpoint of tools/train.py")
        before, now = checkpoint[CHECKPOINT_KEY]["steps"], self._steps()
        if before != now and self.optimizer.schedule != "multistep":
            raise TrainingError(
                f"the checkpoint's {self.optimizer.schedule} schedule was made for {before} steps, this run has {now}: "
                "go on with the same data, batch size and --trainer.max_epochs"
            )


def make_schedule(optimizer: torch.optim.Optimizer, settings: OptimizerConfig, steps: int, epochs: int) -> LRScheduler:
    """The learning rate's course over ``steps`` steps in ``epochs`` epochs; stepped once a step."""
    if settings.schedule == "onecycle":
        return OneCycleLR(optimizer, settings.lr, total_steps=max(steps, 1))
    warmup_steps = max(min(settings.warmup_steps, steps // 2), 1)
    warmup = LinearLR(optimizer, start_factor=1e-3, total_iters=warmup_steps)
    main: LRScheduler
    if settings.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, max(steps - warmup_steps, 1))
    else:
        milestones = [max(epoch * steps // epochs - warmup_steps, 1) for epoch in settings.milestones]
        main = MultiStepLR(optimizer, milestones)
    return SequentialLR(optimizer, [warmup, main], [warmup_steps])


@dataclass(frozen=True)
class TrainedDetector:
    """A detector out of a checkpoint, in eval mode, and the categories that its labels stand for."""

    model: FasterRCNN
    category_ids: Sequence[int]
    category_names: Sequence[str]


def load_checkpoint(path: str | Path) -> TrainedDetector:
    """Build the detector of a checkpoint of ``tools/train.py`` and load its weights. Nothing is unpickled.

    Raises:
        ModelError: the file is missing, broken, or not such a checkpoint.
    """
    checkpoint = read_weights(path)
    try:
        saved = checkpoint[CHECKPOINT_KEY]
        config = DetectorConfig(**saved["detector"])
        category_ids, category_names = list(saved["category_ids"]), list(saved["category_names"])
        model = build_detector(config, len(category_ids), pretrained=False)
        if saved["crop"] == "affine":
            swap_crop_head(model)
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        model.load_state_dict(weights)
        set_batch_norm_eps(model, saved["batch_norm_eps"])
    except ModelError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path}: not a checkpoint of tools/train.py, or damaged: {reason}") from None
    return TrainedDetector(model.eval(), category_ids, category_names)
