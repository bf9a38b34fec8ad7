"""How the weights are changed: optimizer, learning rate by the size of the step, its course, and their average."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

from detector.training.failures import TrainingError


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are changed.

    Args:
        name: "adamw" or "sgd".
        lr: peak learning rate, for steps of lr_batch images.
        lr_batch: the images a step, over all devices and accumulated batches, that lr is meant for.
        lr_rule: how the rate follows another number of images a step: "linear" (Goyal et al. 2017, found with sgd),
            "sqrt" (Malladi et al. 2022, found with adamw), or "constant".
        weight_decay: of weights; norms and biases have none.
        momentum: sgd only; the onecycle schedule takes its own, between 0.85 and 0.95.
        schedule: after the warm-up "cosine" down to 0 or "multistep"; or "onecycle", which has its own warm-up. It is
            made for max_epochs; max_steps beside them only stops a run early.
        warmup_steps: steps over which the rate climbs linearly from a thousandth; half the run at most.
        milestones: multistep only: the epochs at which the rate is divided by 10.
        ema: decay of an exponential moving average of the weights, such as 0.9998, which is then what is scored and
            saved; it starts lower, so that short runs forget their beginning. Default: no average.
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
        for name, right, what in (
            ("lr", self.lr > 0, "above 0"),
            ("lr_batch", self.lr_batch >= 1, "1 or more"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, such as 0.9998"),
        ):
            if not right:
                raise TrainingError(f"optimizer.{name} is {getattr(self, name)}: it must be {what}")

    def rate(self, images_per_step: int) -> float:
        """The peak learning rate for steps of so many images."""
        share = images_per_step / self.lr_batch
        return self.lr * {"linear": share, "sqrt": share**0.5, "constant": 1.0}[self.lr_rule]


def make_optimizer(model: nn.Module, settings: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained, at the peak rate ``lr``."""
    groups = parameter_groups(model, settings.weight_decay)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr)
    return torch.optim.SGD(groups, lr, momentum=settings.momentum)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained: those that decay, and those that do not, norms and biases: of one dimension."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimizerConfig, steps: int, epochs: float
) -> LRScheduler:
    """The course of the optimizer's learning rate over ``steps`` steps in ``epochs`` epochs; stepped once a step."""
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
    """Lightning's averaging of the weights: validation and checkpoints have the average.

    After n steps the decay is (1 + n) / (10 + n), but no more than ``decay``.
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
