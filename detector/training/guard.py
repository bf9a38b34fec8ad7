"""Logs what the box gradient does in training, and says so, once, when it takes over."""

import sys
from contextlib import ExitStack
from math import inf
from statistics import fmean, median
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from detector.rcnn.box_gradient import BOUND, BoxGradient
from detector.rcnn.watch import BoxGradientWatch, watch_box_gradient

EVERY = 10  # steps; one is watched
LOOKS = 10  # that are judged together
STRONG = 0.5  # of the RPN's own gradient; as strong as that, the box gradient has been seen to double the head's loss
FAR = 4.0  # times its own best; without a box gradient the RPN's box loss has been seen to wander by 1.8


class BoxGradientGuard(Callback):
    """Watches one step in ten, or in ``trainer.log_every_n_steps`` if those are fewer.

    Logged is what :meth:`BoxGradientWatch.reading` gives. Each rank watches its own batches; rank 0 logs and
    speaks, and only of a gradient that is held less than it is by default.
    """

    def __init__(self) -> None:
        self.passed: list[float] = []  # the box gradient over the RPN's own, after the bound
        self.losses: list[float] = []  # the RPN's own box loss
        self.best: float | None = None  # of their means
        self.said = False
        self._watching = ExitStack()
        self._watch: BoxGradientWatch | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "losses": self.losses, "best": self.best, "said": self.said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        task: Any = pl_module
        logged: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        steps = min(EVERY, logged or EVERY)
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # of those that make a step
        if task.crop == "affine" and last and (trainer.global_step + 1) % steps == 0:
            self._watch = self._watching.enter_context(watch_box_gradient(task.model))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is None:
            return
        self._watching.close()
        seen, self._watch = self._watch.reading(), None
        pl_module.log_dict({f"box_gradient/{name}": value for name, value in seen.items()})
        settings: Any = pl_module.box_gradient
        # Without a ratio there was nothing for the RPN to learn: no objects.
        if self.said or "ratio" not in seen or (settings.bound or inf) <= BOUND or not trainer.is_global_zero:
            return
        self.passed.append(seen["passed"])
        self.losses.append(float(trainer.callback_metrics["train/loss_rpn_box_reg"]))
        verdict = self.verdict(settings)
        if verdict is not None:
            self.said = True
            print(f"\nAfter step {trainer.global_step}: {verdict}", file=sys.stderr, flush=True)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._watching.close()

    def verdict(self, settings: BoxGradient) -> str | None:
        """What there is to say of the last looks, once there are enough, and what to change."""
        if len(self.losses) < LOOKS:
            return None
        passed, loss = median(self.passed), fmean(self.losses)
        best, self.best = self.best, loss if self.best is None else min(self.best, loss)
        self.passed, self.losses = [], []
        instead = f"(box_gradient.bound is {settings.bound}). Start again with --model.box_gradient.bound {BOUND}"
        if passed > STRONG:
            return (
                f"the box gradient is taking over: at the RPN's deltas it is {passed:.3g} times as strong as the "
                f"gradient of the RPN's own box loss, in the median of {LOOKS} steps {instead}"
            )
        if best is not None and loss > FAR * best:
            return (
                f"the RPN's own box loss is {loss / best:.3g} times as high as at its best ({loss:.3g}, {best:.3g} "
                f"before), while the box gradient moves the proposals {instead}"
            )
        return None
