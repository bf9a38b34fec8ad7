"""Logs what the box gradient does in training, and says so, once, when it takes over."""

import sys
from contextlib import ExitStack
from math import inf
from statistics import fmean, median
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from detector.box_gradient import BoxGradient
from detector.watch import BoxGradientWatch, watch_box_gradient

LOOKS = 5  # that are judged together
STRONGER = 1.0  # from this ratio on the RPN follows the RoI heads rather than its own box loss
FAR = 4.0  # times its own best; without a box gradient the RPN's box loss has been seen to wander by 1.8


class BoxGradientGuard(Callback):
    """Watches one step in ``trainer.log_every_n_steps``, and logs what :class:`BoxGradientWatch` reads off it.

    Each process watches its own batches; the first one logs and speaks.
    """

    def __init__(self) -> None:
        self.ratios: list[float] = []  # of the gradient that passes the bound, over the RPN's own
        self.losses: list[float] = []  # the RPN's own box loss
        self.best: float | None = None  # of their means
        self.said = False
        self._watching = ExitStack()
        self._watch: BoxGradientWatch | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"ratios": self.ratios, "losses": self.losses, "best": self.best, "said": self.said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        task: Any = pl_module
        if task.crop == "affine" and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # which is logged
            self._watch = self._watching.enter_context(watch_box_gradient(task.model))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is None:
            return
        self._watching.close()
        seen, self._watch = self._watch.reading(), None
        pl_module.log_dict({f"box_gradient/{name}": value for name, value in seen.items()})
        task: Any = pl_module
        if self.said or "ratio" not in seen or not trainer.is_global_zero:
            return
        self.ratios.append(min(seen["ratio"], task.box_gradient.bound or inf))
        self.losses.append(float(trainer.callback_metrics["train/loss_rpn_box_reg"]))
        verdict = self.verdict(task.box_gradient)
        if verdict is not None:
            self.said = True
            print(f"\nAfter step {trainer.global_step}: {verdict}.", file=sys.stderr, flush=True)

    def verdict(self, settings: BoxGradient) -> str | None:
        """What there is to say of the last looks, once there are enough, and what to change."""
        if len(self.losses) < LOOKS:
            return None
        ratio, loss = median(self.ratios), fmean(self.losses)
        best, self.best = self.best, loss if self.best is None else min(self.best, loss)
        self.ratios, self.losses = [], []
        off = "--model.box_gradient.crop 0 --model.box_gradient.coder 0"
        usual = BoxGradient.bound
        lower = f"--model.box_gradient.bound {usual}" if (settings.bound or inf) > usual else off
        if ratio > STRONGER:
            return (
                f"the box gradient is taking over: at the RPN's deltas it is {ratio:.3g} times as strong as the gradient "
                f"of the RPN's own box loss (median of {LOOKS} steps). Start again with {lower}"
            )
        if best is not None and loss > FAR * best:
            return (
                f"the RPN's own box loss is {loss / best:.3g} times as high as at its best ({loss:.3g}, {best:.3g} "
                f"before), while the box gradient moves the proposals. Start again with {lower}"
            )
        return None
