"""Warnings about a training that diverges with a finite loss."""

import sys
from collections.abc import Sequence
from math import inf
from statistics import fmean
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from detector.data.results import Result
from detector.rcnn.box_gradient import BOUND

FIRST, BLOCK = 10, 50  # batches; the first ones give the initial loss
PATIENCE = 3  # consecutive blocks; a short burst spoils two
FACTOR = 2.0  # times the best loss, between those of healthy and diverging trainings
FLAT = 0.01  # between the highest and the lowest score


class Divergence(Callback):
    """Warns once when the loss stays far above its best.

    The mean loss of 50 batches, without the five highest, is compared with the lowest mean before it and with that of
    the first ten batches. Losses are read every 50 batches, which avoids synchronisation in between. Only rank 0 warns.
    """

    def __init__(self) -> None:
        self.best: float | None = None  # mean
        self.now: float | None = None  # the latest mean
        self.far = 0  # consecutive blocks far above the best
        self._losses: list[Tensor | float] = []
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "now": self.now, "far": self.far, "losses": [float(one) for one in self._losses]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.now, self.far, losses = (state_dict[name] for name in ("best", "now", "far", "losses"))
        self._losses = list(losses)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)  # Lightning divides by it
        if len(self._losses) < (FIRST if self.best is None else BLOCK):
            return
        losses = sorted(float(loss) for loss in self._losses)
        self._losses = []
        self.now = fmean(losses[: len(losses) - len(losses) // 10])
        self.far = self.far + 1 if self.best is not None and self.now > FACTOR * self.best else 0
        self.best = self.now if self.best is None else min(self.best, self.now)
        if self.far >= PATIENCE and not self._warned:
            self._warned = True
            print(f"\nAfter step {trainer.global_step}: {self.warning(pl_module)}", file=sys.stderr, flush=True)

    def warning(self, task: Any) -> str | None:
        """Return a warning about the current loss and what to change; ``None`` if it is not far above the best."""
        if self.far < PATIENCE or self.best is None or self.now is None:
            return None
        remedies = [f"a lower lr ({task.optimizer.lr:g})"]
        joint = "gradient_clip_val" not in task.trainer_defaults  # a refinement clips, and needs no bound
        remedies += ["gradient_clip_val"] if joint else []
        if joint and task.crop == "affine" and task.box_gradient.enabled and (task.box_gradient.bound or inf) > BOUND:
            remedies.append(f"box_gradient.bound {BOUND}")
        return (
            f"the training diverges: the loss has been {self.now / self.best:.3g} times its best for "
            f"{self.far * BLOCK} batches ({self.now:.3g}, {self.best:.3g} before). Start again with "
            f"{', or '.join(remedies)}"
        )


def warn_if_all_alike(results: Sequence[Result]) -> str | None:
    """Return a warning if all detections have the same score, else ``None``."""
    scores = [result["score"] for result in results]
    if len(scores) < 20 or max(scores) - min(scores) > FLAT:
        return None
    return (
        f"all {len(scores):,} detections score between {min(scores):.3f} and {max(scores):.3f}: the detector has "
        "diverged or is hardly trained"
    )
