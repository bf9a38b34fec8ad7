"""Optimizer, learning rate, schedule, and averaging of the weights."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from detector.training.failures import TrainingError


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer, the schedule and the average of the weights.

    Args:
        name: "adamw" or "sgd".
        lr: peak learning rate at ``lr_batch`` images per step.
        lr_batch: number of images per step, over all devices and accumulated batches, for which ``lr`` holds.
        lr_rule: scaling of the rate with the images per step: "linear" (Goyal et al. 2017, for sgd), "sqrt" (Malladi et
            al. 2022, for adamw), or "constant".
        weight_decay: weight decay. Norms and biases have none.
        momentum: momentum of sgd. onecycle sets its own, between 0.85 and 0.95.
        schedule: "cosine" (to 0) or "multistep" after a warm-up, or "onecycle", which includes one. Its length is
            max_epochs; max_steps only stops a run early.
        warmup_steps: number of steps of the linear warm-up from a thousandth of the rate, at most half of the run.
        milestones: epochs at which multistep divides the rate by 10.
        ema: decay of an exponential moving average of the weights, such as 0.9998. The average is scored and saved
            instead of the weights. The decay starts lower, so that short runs forget their start. Default: no average.

    Raises:
        TrainingError: a value is out of range.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_batch: int = 16
    lr_rule: Literal["linear", "sqrt", "constant"] = "linear"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: Literal["onecycle", "cosine", "multistep"] = "onecycle"
    warmup_steps: int = 500
    milestones: tuple[int, ...] = (8, 11)
    ema: float | None = None

    def __post_init__(self) -> None:
        for name, valid, words in (
            ("lr", 0 < self.lr < math.inf, "above 0, and finite"),
            ("lr_batch", self.lr_batch >= 1, "1 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "0 or more, and below 1"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, such as 0.9998"),
        ):
            if not valid:
                raise TrainingError(f"must be {words}", setting=f"optimizer.{name}", value=getattr(self, name))

    def rate(self, images_per_step: int) -> float:
        """Return the peak learning rate for a number of images per step."""
        share = images_per_step / self.lr_batch
        return self.lr * {"linear": share, "sqrt": share**0.5, "constant": 1.0}[self.lr_rule]


def make_optimizer(model: nn.Module, settings: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return an optimizer of the trainable parameters with peak rate ``lr``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr)
    return torch.optim.SGD(groups, lr, momentum=settings.momentum)


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimizerConfig, steps: int, epochs: float
) -> LRScheduler:
    """Return the learning rate schedule for ``steps`` steps in ``epochs`` epochs; it is stepped every step."""
    if settings.schedule == "onecycle":
        return OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=max(steps, 1))
    warmup_steps = min(settings.warmup_steps, steps // 2)
    main: LRScheduler
    if settings.schedule == "cosine":
        main = CosineAnnealingLR(optimizer, max(steps - warmup_steps, 1))
    else:
        milestones = [max(round(epoch * steps / epochs) - warmup_steps, 1) for epoch in settings.milestones]
        main = MultiStepLR(optimizer, milestones)
    if warmup_steps == 0:
        return main
    warmup = LinearLR(optimizer, start_factor=1e-3, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, main], [warmup_steps])


class WeightEMA(WeightAveraging):
    """An exponential moving average of the weights, for validation and checkpoints.

    After n steps the decay is (1 + n) / (10 + n), at most ``decay``.
    """

    def __init__(self, decay: float) -> None:
        @torch.no_grad()
        def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            steps = int(updates)
            if averaged[0].is_floating_point():
                torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))
            else:  # batch norm's counters
                torch._foreach_copy_(averaged, current)

        super().__init__(multi_avg_fn=average)
