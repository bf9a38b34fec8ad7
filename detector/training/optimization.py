"""Optimizer, learning rate, schedule, and averaging of the weights."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from detector.training.failures import TrainingError


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are optimized.

    Args:
        name: "adamw" or "sgd".
        lr: peak learning rate for steps of ``lr_batch`` images.
        lr_batch: images a step, over all devices and accumulated batches, that ``lr`` is meant for.
        lr_rule: how the rate scales with the images a step: "linear" (Goyal et al. 2017, for sgd), "sqrt" (Malladi et
            al. 2022, for adamw), or "constant".
        weight_decay: decay of the weights; norms and biases have none.
        momentum: for sgd; the onecycle schedule sets its own, between 0.85 and 0.95.
        schedule: "cosine" (to 0) or "multistep" after a warm-up, or "onecycle", which includes one. It is made for
            max_epochs; max_steps beside it only stops a run early.
        warmup_steps: steps of the linear warm-up from a thousandth of the rate, at most half the run.
        milestones: for multistep: the epochs at which the rate is divided by 10.
        ema: decay of an exponential moving average of the weights, such as 0.9998, which is scored and saved in their
            place. It starts lower, so that short runs forget their beginning. Default: no average.

    Raises:
        TrainingError: a value is out of its range.
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
            ("lr", self.lr > 0, "above 0"),
            ("lr_batch", self.lr_batch >= 1, "1 or more"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, such as 0.9998"),
        ):
            if not valid:
                raise TrainingError(f"must be {words}", setting=f"optimizer.{name}", value=getattr(self, name))

    def rate(self, images_per_step: int) -> float:
        """Return the peak learning rate for the given images a step."""
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
