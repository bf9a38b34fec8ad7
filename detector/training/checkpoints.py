"""Writing checkpoints: when, and how."""

import io
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_only

from detector.errors import ModelError
from detector.files import link_atomically, write_atomically
from detector.models.weights import read_weights
from detector.pretrained.loading import CHECKPOINT_KEY
from detector.training.failures import START_AGAIN, TrainingError

LAST, BEST = "last.ckpt", "best.ckpt"


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt``, from which a run resumes exactly, and ``best.ckpt``, the weights with the best score.

    ``last.ckpt`` is written every few steps, at the end of each epoch, and a step before each validation: Lightning
    would skip a validation right after the checkpoint. After Ctrl-C or SIGTERM the current step ends, ``last.ckpt`` is
    written, and the run stops. If a callback such as EarlyStopping, or the time limit, ends the run, ``last.ckpt``
    records that. A resumed run then trains no further, unless it has a longer time limit.

    Args:
        folder: the folder of the checkpoints.
        every: number of steps between two checkpoints.
    """

    def __init__(self, folder: Path, *, every: int = 500) -> None:
        self.folder, self.every, self.last = folder, every, folder / LAST
        self.best: float | None = None
        self.written = 0
        self.signal: int | None = None  # that asked the run to stop
        # The time limit in seconds that ended the run; infinity if a callback did; None if neither.
        self.ended: float | None = None
        self._handled: list[signal.Signals] = []  # signals
        self._last_step: int | None = None  # of last.ckpt

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (self.folder / BEST).exists():
            self.best = state_dict["best"]
        self.ended = state_dict["ended"]

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM stop the run after the current step, and the second one at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            self._handled = [number for number in before if before[number] is not signal.SIG_IGN]  # as under nohup
        self._set_handlers()
        try:
            yield
        finally:
            for number in self._handled:
                signal.signal(number, before[number])

    def _set_handlers(self) -> None:
        for number in self._handled:
            signal.signal(number, self._handle)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ended is not None and self.ended < _time_limit(trainer):
            self.ended = None  # there is more time now
        trainer.should_stop |= self.ended is not None  # if it were set here, Lightning would not train at all

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set_handlers()  # Lightning's own handler of SIGTERM saves nothing, and may wait for other ranks
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:
            # With max_steps, Lightning assumes that a resumed run is within an epoch. It would run the finished epoch
            # again, empty, and count it twice.
            loop.reset_restart_stage()
            loop.epoch_progress.increment_completed()
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        done, step = trainer.fit_loop.batch_idx + 1, trainer.global_step
        if done % trainer.accumulate_grad_batches or self._validation_follows(trainer, done):
            return
        stop = self._stop(trainer)
        following = min(done + trainer.accumulate_grad_batches, int(trainer.num_training_batches))
        due = step % self.every == 0 or step == trainer.max_steps or self._validation_follows(trainer, following)
        if stop or due or _ends(trainer):
            self._save(trainer, LAST)
        if stop:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Each rank decides for itself, since their numbers of batches differ.
        if trainer.state.fn == "fit" and self.signal is not None:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        within = trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches
        if trainer.state.fn == "fit" and within and self._is_best(trainer):
            self._save(trainer, BEST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_best(trainer):
            # Before last.ckpt: a run that is killed in between scores this epoch again.
            self._save(trainer, BEST)
            whole = trainer.fit_loop.batch_idx + 1 >= trainer.num_training_batches
            # A run that stopped within the epoch has saved last.ckpt there.
            if trainer.is_global_zero and (whole or self._last_step != trainer.global_step):
                link_atomically(self.folder / BEST, self.last)
        elif self._last_step != trainer.global_step:
            self._save(trainer, LAST)
        if self._stop(trainer) and trainer.global_step < trainer.estimated_stepping_batches and not _ends(trainer):
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Callbacks may stop the run after the last save, so it is certain only now. Nothing else in the file changes,
        # since its position in the epoch decides how a run with more time resumes.
        if not _ends(trainer):
            return
        self.ended = _time_limit(trainer, reached=True)
        if trainer.is_global_zero and self.last.exists():
            checkpoint = read_weights(self.last)
            checkpoint["callbacks"][self.state_key] = self.state_dict()
            AtomicCheckpointIO().save_checkpoint(checkpoint, self.last)

    def _is_best(self, trainer: Trainer) -> bool:
        """Return whether these weights were scored just now, with the best score so far."""
        score = trainer.callback_metrics.get("val/AP")
        scored_step = getattr(trainer.lightning_module, "scored_step", None)
        if score is None or scored_step != trainer.global_step:
            return False
        # Rank 0 decides, since other ranks may not see best.ckpt.
        better = trainer.strategy.broadcast(self.best is None or bool(score > self.best))
        if better:
            self.best = score.item()
        return better

    def _validation_follows(self, trainer: Trainer, done: int) -> bool:
        """Return whether the epoch ends, or validation begins, after ``done`` batches of the epoch."""
        interval = trainer.val_check_batch
        if done >= trainer.num_training_batches or not isinstance(interval, int):
            return done >= trainer.num_training_batches
        if trainer.check_val_every_n_epoch is None:  # counted from the start of the run
            done += trainer.fit_loop.total_batch_idx - trainer.fit_loop.batch_idx
        return done % interval == 0

    def _save(self, trainer: Trainer, name: str) -> None:
        weights: list[torch.Tensor] = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        if not all(norm.isfinite() for norm in torch._foreach_norm(weights)):
            raise TrainingError(f"the weights are no longer finite after step {trainer.global_step}", hints=START_AGAIN)
        trainer.save_checkpoint(self.folder / name, weights_only=False)
        self.written += 1
        if name == LAST:
            self._last_step = trainer.global_step

    def _stop(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        message = "\nStopping after this step. Press Ctrl-C again to stop at once, without saving."
        rank_zero_only(print)(message, file=sys.stderr, flush=True)


def _ends(trainer: Trainer) -> bool:
    """Return whether a callback ends the run now: it requests the end, and min_epochs and min_steps are reached."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def _time_limit(trainer: Trainer, *, reached: bool = False) -> float:
    """Return the shortest time limit of the run in seconds, or of those already reached; infinity if there is none."""
    limits = [
        callback._duration
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and callback._duration is not None
        if not reached or callback.time_elapsed() >= callback._duration
    ]
    return min(limits, default=math.inf)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads them without unpickling.

    Lightning's own class writes the file elsewhere and moves it, perhaps across file systems, without a sync.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # torch.save to a file hides the reason of a failure
        torch.save(checkpoint, buffer)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), buffer.getbuffer())
        except OSError as error:
            message = f"{path}: the checkpoint of step {checkpoint['global_step']} cannot be written: {error.strerror}"
            raise TrainingError(message, hints=("free some space, then resume",)) from error

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        checkpoint = read_weights(path)
        if CHECKPOINT_KEY not in checkpoint:
            raise ModelError(f"{path}: not a checkpoint of tools/train.py")
        return checkpoint
