"""A training run: its folder, the trainer's callbacks, and the scoring at its end."""

import logging
import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from detector.errors import ImageError, ModelError, UserError, one_line
from detector.evaluation.running import EvaluationOptions
from detector.evaluation.tables import refinement_table, text_table
from detector.files import link_atomically
from detector.pretrained.loading import checkpoint_of
from detector.run_folders import newest_folder, run_folder, unused_folder
from detector.signals import sigterm_as_ctrl_c
from detector.training.checkpoints import BEST, LAST, AtomicCheckpointIO, Checkpoints
from detector.training.data import CocoDataModule
from detector.training.divergence import Divergence, warn_if_all_alike
from detector.training.failures import Interrupted, TrainingError, explain
from detector.training.record import FILE as RECORD
from detector.training.record import RunRecord
from detector.training.task import DetectionTask

# An advertisement of Lightning's.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in str(record.msg))

HALF_PRECISIONS = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")  # 16-bit weights
FILES = {
    f"checkpoints/{LAST}": "the weights that were scored",
    f"checkpoints/{BEST}": "those with the highest val AP",
    "scores.json": "the scores",
    "report.json": "the scores by class, by size and by image",
    "report.html": "a page of them, with the worst and the best images",
    "detections.json": "detections in COCO's results format",
    "examples.png": "val images: the ground truth on the left, detections on the right",
    "config.yaml": "all settings; --config takes it, for the same run again",
    RECORD: "versions, seed, data and git state",
}


def train(
    task: DetectionTask,
    data: CocoDataModule,
    *,
    run_dir: str | Path = "runs/detector",
    ckpt_path: str | Path | None = None,
    save_every: int = 500,
    **trainer_options: Any,
) -> dict[str, float] | None:
    """Train a detector, then score it on the val split, as ``tools/train.py`` does.

    Args:
        task: what to train.
        data: the splits to train and score on.
        run_dir: folder for checkpoints, logs and scores; a new run beside an old one gets a number.
        ckpt_path: "last" resumes from the last checkpoint of the last run in ``run_dir``; a file, from that
            checkpoint, in its own folder if it is a run's ``last.ckpt``, else in a new one.
        save_every: steps between two checkpoints.
        trainer_options: of ``lightning.Trainer``: ``max_epochs``, ``devices``, ``precision``, ...

    Returns:
        The scores on the val split, see :func:`detector.evaluation.evaluate`; ``None`` on ranks other than 0.

    Raises:
        DataError, ModelError, TrainingError: the run cannot start or resume.
        Interrupted: Ctrl-C or SIGTERM stopped it; the same call with ``ckpt_path="last"`` resumes.
    """
    run = Run(run_dir, ckpt_path, save_every=save_every)
    return run.train(Trainer(**run.trainer_options(task.trainer_defaults | trainer_options)), task, data)


class Run:
    """The folder of a run, and the callbacks that fill it. See :func:`train` for the arguments.

    Raises:
        ModelError: there is no file at ``ckpt_path``.
        TrainingError: ``save_every`` is below 1.
    """

    def __init__(self, run_dir: str | Path, ckpt_path: str | Path | None = None, *, save_every: int = 500) -> None:
        if save_every < 1:
            raise TrainingError("must be 1 or more", setting="save_every", value=save_every)
        self.checkpoint: Path | None = None
        if ckpt_path is None:
            self.folder = unused_folder(Path(run_dir))
        elif ckpt_path == "last":
            self.folder = newest_folder(Path(run_dir))
            self.checkpoint = self.folder / "checkpoints" / LAST
            if not self.checkpoint.is_file():
                _print_loudly(f"There is no {self.checkpoint} to resume from. STARTING FROM THE BEGINNING.")
                self.checkpoint = None
        else:
            self.checkpoint = Path(checkpoint_of(ckpt_path))
            if not self.checkpoint.is_file():
                raise ModelError("no such file", setting="ckpt_path", value=str(ckpt_path))
            # From an earlier checkpoint, a run must not write over later ones.
            last = self.checkpoint.name == LAST
            self.folder = run_folder(self.checkpoint) if last else unused_folder(Path(run_dir))
        self._is_new = not self.folder.exists()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", every=save_every)
        self.divergence = Divergence()

    def trainer_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of ``lightning.Trainer``: the given ones, and those that a run needs.

        Raises:
            TrainingError: the precision has 16-bit weights.
        """
        _refuse_half_precision(given.get("precision"))
        callbacks: list[Callback] = [
            self.checkpoints,
            self.divergence,
            RunRecord(self.folder, self.checkpoint),
            StepTimes(self.checkpoints),
        ]
        logger = given.get("logger")
        if logger is None or logger is True:
            logger = TensorBoardLogger(str(self.folder), name="", version="")
        if logger:
            callbacks.append(LearningRateMonitor("step"))
        others = _as_list(given.get("callbacks"))
        # Lightning's default depends on whether rich is installed.
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in others):
            callbacks.append(TQDMProgressBar())
        return {
            **given,
            "default_root_dir": given.get("default_root_dir") or str(self.folder),
            "num_sanity_val_steps": given.get("num_sanity_val_steps") or 0,
            "use_distributed_sampler": False,  # the batches are divided already
            "enable_checkpointing": True,
            "logger": logger,
            "callbacks": [*others, *callbacks],
            "plugins": [*_as_list(given.get("plugins")), AtomicCheckpointIO()],
        }

    def train(self, trainer: Trainer, task: DetectionTask, data: CocoDataModule) -> dict[str, float] | None:
        """Train and score; see :func:`train`."""
        _refuse_half_precision(trainer.precision)  # which a plugin may have set
        for message in (".*LeafSpec.*", ".*your dataloader is not resumable.*", ".*WeightAveraging callback with a.*"):
            warnings.filterwarnings("ignore", message=message)  # the loader resumes by itself
        try:
            with sigterm_as_ctrl_c(), self._removing_empty_folder(trainer):
                with self.checkpoints.stopping_on_signals(verbose=trainer.is_global_zero):
                    trainer.fit(task, datamodule=data, ckpt_path=self.checkpoint, weights_only=True)
                if self.checkpoint is not None and self.checkpoints.written == 0:
                    timed_out = self.checkpoints.ended is not None and self.checkpoints.ended < math.inf
                    rank_zero_info(
                        f"{self.checkpoint}: the run had ended, and is only scored now. To train further, "
                        f"{'give a longer max_time, or ' if timed_out else ''}start a new run from its weights"
                    )
                return self._finish(trainer, task, data) if trainer.is_global_zero else None
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the former into the latter
            raise self._interrupted() from None
        except Exception as error:
            if trainer.strategy.launcher is not None:  # else the other processes would wait for this one
                trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
            if self.checkpoints.signal is not None:  # another rank stopped first
                raise self._interrupted() from None
            explanation = self._explain(error, task, data)
            if explanation is error:
                raise
            raise explanation from error

    @contextmanager
    def _removing_empty_folder(self, trainer: Trainer) -> Iterator[None]:
        """Remove the folder of a run that fails before its first step, since it holds only the settings."""
        try:
            yield
        except BaseException:
            # Loggers write before anything else. A second log is another run's.
            logs = list(self.folder.glob("events.out.tfevents.*"))
            empty = trainer.global_step == 0 and not self.checkpoints.folder.exists() and len(logs) < 2
            if self._is_new and empty and trainer.is_global_zero:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _finish(self, trainer: Trainer, task: DetectionTask, data: CocoDataModule) -> dict[str, float]:
        """Score the last checkpoint, and print what the folder holds."""
        last = self.checkpoints.last
        if self.checkpoints.signal is not None and task.scored_step != trainer.global_step:
            raise KeyboardInterrupt  # it came after the last step
        if not last.exists():
            if self.checkpoint is None:
                raise TrainingError(
                    "the run ended before its first step, so nothing can be scored",
                    hints=("give a longer {max_time}", "remove the callback that stops it"),
                )
            last.parent.mkdir(parents=True, exist_ok=True)
            link_atomically(self.checkpoint, last)  # there was nothing left to train
        options = EvaluationOptions(
            device=trainer.strategy.root_device, batch_size=data.val_batch_size, workers=data.workers
        )
        evaluation = task.evaluate(last, options)
        evaluation.write(self.folder, of_training=True)
        if evaluation.report.refinement is not None:
            print(f"\n{text_table(refinement_table(evaluation.report.refinement))}")
        for note in evaluation.report.notes:
            print(f"Note: {note}")
        print(f"\nThe run is in {self.folder}/")
        for name, content in FILES.items():
            if (self.folder / name).exists():
                print(f"  {name:22} {content}")
        print(f"  AP {evaluation.scores['AP']:.3f}\n  tensorboard --logdir {self.folder}")
        for warning in (self.divergence.warning(task), warn_if_all_alike(evaluation.results)):
            if warning is not None:
                print(f"\nWARNING: {warning}.")
        return evaluation.scores

    def _interrupted(self) -> Interrupted:
        last = self.checkpoints.last
        return Interrupted(last if last.exists() else None)

    def _explain(self, error: Exception, task: DetectionTask, data: CocoDataModule) -> Exception:
        """Return a user error that also names the last good checkpoint, or the error itself if it is unforeseen."""
        upcoming: list[int] = []
        if task.training:
            with suppress(Exception):  # the run may not have come that far
                upcoming = data.upcoming(2 * max(data.workers, 1))
        last, is_image = self.checkpoints.last, isinstance(error, ImageError) and not data.skip_broken
        known: UserError | None = explain(error, task.global_step, task.image_ids, upcoming)
        if known is None:
            if not isinstance(error, (UserError, OSError)) or not (last.exists() or is_image):
                return error
            of_worker = "Original Traceback" in str(error)
            known = error if isinstance(error, UserError) and not of_worker else TrainingError(one_line(error))
        message, hints = known.message, list(known.hints)
        if is_image:
            weights = f" {{weights}} {last}" if last.exists() else ""
            hints.append(f"leave such images out in a new run: {{skip_broken}} true{weights}")
        if last.exists():
            message += f" (the last good checkpoint is {last})"
        return TrainingError(message, setting=known.setting, value=known.value, hints=hints)


class StepTimes(Callback):
    """Logs the time of a step and how much of it is waiting for data, and prints the means at the end."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._between: Any = None  # what may have come between two steps
        self._end: float | None = None  # of the previous step, if nothing came in between
        self._wait = 0.0
        self._times: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        between = (trainer.current_epoch, self._checkpoints.written, pl_module.scored_step)
        if between != self._between:
            self._between, self._end = between, None
        self._wait = 0.0 if self._end is None else time.perf_counter() - self._end

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.perf_counter()
        if self._end is not None:
            self._times.append((now - self._end, self._wait))
            pl_module.log_dict({"time/step": now - self._end, "time/data": self._wait})
        self._end = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._times and trainer.is_global_zero:
            step, wait = (fmean(times) for times in zip(*self._times))
            print(f"{step:.3f} s a step, of which {wait:.3f} s were spent waiting for data")


def _refuse_half_precision(precision: Any) -> None:
    """Refuse 16-bit boxes and targets: bfloat16 has steps of 4 pixels above 512."""
    if precision in HALF_PRECISIONS:
        raise TrainingError(
            "16-bit weights lose small steps, and 16-bit boxes whole pixels",
            setting="precision",
            value=precision,
            hints=("use bf16-mixed, which keeps both in 32 bits",),
        )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


@rank_zero_only
def _print_loudly(message: str) -> None:
    line = "=" * min(len(message), 100)
    print(f"\n{line}\n{message}\n{line}\n", file=sys.stderr, flush=True)
