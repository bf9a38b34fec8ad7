"""A training that diverges without ever leaving the finite numbers: its loss is far above its own past, for long."""

import sys
from collections.abc import Sequence
from math import inf
from statistics import fmean
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from detector.data.results import Result
from detector.rcnn.box_gradient import BOUND
from detector.training.failures import TRAIN, Advice

FIRST, BLOCK = 10, 50  # batches; the first ones stand for the loss before anything was learnt
LONG = 3  # blocks in a row, of which a short burst spoils two
# Batches of one image wander by 1.2; for one block, a trained detector that is trained on at the full rate by 1.7, and
# a rate that climbs too high by 2.6. A training on photographs that the box gradient wrecked stayed at 2.1 to 3.9.
FACTOR = 2.0
FLAT = 0.01  # between the highest and the lowest score


class Divergence(Callback):
    """Says so, once, when the loss is far above its own past for long.

    The losses of 50 batches, but for the five highest, are averaged, and the mean is compared with the lowest one
    before, or with that of the first ten batches. Only ratios count, so the scale of the loss does not. It is read
    every 50 batches: a GPU does not wait for it in between. Each rank sees its own batches; rank 0 speaks.
    """

    def __init__(self) -> None:
        self.best: float | None = None  # mean
        self.now: float | None = None  # the last one
        self.far = 0  # how many in a row were far above the best
        self._losses: list[Tensor | float] = []
        self._said = False

    def state_dict(self) -> dict[str, Any]:
        losses = [float(loss) for loss in self._losses]
        return {"best": self.best, "now": self.now, "far": self.far, "losses": losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.now, self.far = state_dict["best"], state_dict["now"], state_dict["far"]
        self._losses = list(state_dict["losses"])

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)  # which it was divided by
        if len(self._losses) < (FIRST if self.best is None else BLOCK):
            return
        losses = sorted(float(loss) for loss in self._losses)
        self._losses = []
        self.now = fmean(losses[: len(losses) - len(losses) // 10])
        self.far = self.far + 1 if self.best is not None and self.now > FACTOR * self.best else 0
        self.best = self.now if self.best is None else min(self.best, self.now)
        if self.far >= LONG and not self._said:
            self._said = True
            print(f"\nAfter step {trainer.global_step}: {self.verdict(pl_module)}", file=sys.stderr, flush=True)

    def verdict(self, task: Any) -> str | None:
        """What there is to say of the loss as it is now, and what to change; ``None`` if it is not far above."""
        if self.far < LONG or self.best is None or self.now is None:
            return None
        words: Advice = getattr(task, "advice", TRAIN)
        advice = f"{words.rate} ({task.optimizer.lr:g}){words.clip.replace('with ', '')}"
        settings = task.box_gradient
        if words is TRAIN and task.crop == "affine" and settings.enabled and (settings.bound or inf) > BOUND:
            advice += f", or hold the box gradient back: --model.box_gradient.bound {BOUND}"
        return (
            f"the loss has been {self.now / self.best:.3g} times as high as at its best for {self.far * BLOCK} batches "
            f"({self.now:.3g}, {self.best:.3g} before): the training diverges. Start again with a lower {advice}"
        )


def all_alike(results: Sequence[Result]) -> str | None:
    """What there is to say of detections that all have the same score; ``None`` if they have not."""
    scores = [result["score"] for result in results]
    if len(scores) < 20 or max(scores) - min(scores) > FLAT:
        return None
    return (
        f"all {len(scores):,} detections score between {min(scores):.3f} and {max(scores):.3f}: the detector tells "
        "nothing apart. It diverged, or was hardly trained"
    )
