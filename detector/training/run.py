"""A training run: its folder, the trainer's callbacks, and the scoring at its end."""

import logging
import math
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from detector.errors import ModelError
from detector.evaluation.running import EvaluationOptions
from detector.evaluation.tables import refinement_table, text_table
from detector.files import link_atomically
from detector.pretrained.loading import checkpoint_of
from detector.run_folders import newest_folder, run_folder, unused_folder
from detector.signals import sigterm_as_ctrl_c
from detector.training.checkpoints import LAST, AtomicCheckpointIO, Checkpoints
from detector.training.data import CocoDataModule
from detector.training.divergence import Divergence, warn_if_all_alike
from detector.training.failures import Interrupted, TrainingError, explain
from detector.training.record import RunRecord
from detector.training.task import DetectionTask

# Lightning's advertisement.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in str(record.msg))

HALF_PRECISIONS = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")  # 16-bit weights


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
        run_dir: folder for checkpoints, logs and scores. If it holds a run, a number is added.
        ckpt_path: "last" resumes the last run in ``run_dir`` from its last checkpoint; a file resumes from that
            checkpoint. A run's ``last.ckpt`` resumes in its own folder, other files in a new one.
        save_every: number of steps between two checkpoints.
        trainer_options: options of ``lightning.Trainer``, such as ``max_epochs``, ``devices`` and ``precision``.

    Returns:
        The scores on the val split, see :func:`detector.evaluation.evaluate`; ``None`` on ranks other than 0.

    Raises:
        DataError, ModelError, TrainingError: the run cannot start or resume.
        Interrupted: Ctrl-C or SIGTERM stopped the run; the same call with ``ckpt_path="last"`` resumes it.
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
            if self.folder.resolve() != Path(run_dir).resolve():
                rank_zero_info(f"{run_dir} holds a run, so this one is written to {self.folder}")
        elif ckpt_path == "last":
            self.folder = newest_folder(Path(run_dir))
            self.checkpoint = self.folder / "checkpoints" / LAST
            if not self.checkpoint.is_file():
                rank_zero_warn(f"There is no {self.checkpoint} to resume from. STARTING FROM THE BEGINNING.")
                self.checkpoint = None
        else:
            self.checkpoint = Path(checkpoint_of(ckpt_path))
            if not self.checkpoint.is_file():
                raise ModelError("no such file", setting="ckpt_path", value=str(ckpt_path))
            # A run from an earlier checkpoint must not overwrite later ones.
            is_last = self.checkpoint.name == LAST
            self.folder = run_folder(self.checkpoint) if is_last else unused_folder(Path(run_dir))
        self._is_new = not self.folder.exists()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", every=save_every)
        self.divergence = Divergence()

    def trainer_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of ``lightning.Trainer``: the given ones, and those that a run needs."""
        others, logger = _as_list(given.get("callbacks")), given.get("logger")
        callbacks: list[Callback] = [self.checkpoints, self.divergence, RunRecord(self.folder, self.checkpoint)]
        if logger is None or logger is True:
            logger = TensorBoardLogger(str(self.folder), name="", version="")
        if logger:
            callbacks.append(LearningRateMonitor("step"))
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
        if trainer.precision in HALF_PRECISIONS:  # bfloat16 has steps of 4 pixels above 512
            message = "16-bit weights lose small steps, and 16-bit boxes whole pixels: use bf16-mixed"
            raise TrainingError(message, setting="precision", value=trainer.precision)
        for message in (".*LeafSpec.*", ".*your dataloader is not resumable.*", ".*WeightAveraging callback with a.*"):
            warnings.filterwarnings("ignore", message=message)  # the loader resumes by itself
        try:
            with sigterm_as_ctrl_c():
                with self.checkpoints.stopping_on_signals():
                    trainer.fit(task, datamodule=data, ckpt_path=self.checkpoint, weights_only=True)
                return self._finish(trainer, task, data) if trainer.is_global_zero else None
        except BaseException as error:
            # A run that failed before its first step leaves only settings and a log. A second log is another run's.
            logs = [*self.folder.glob("events.out.tfevents.*")]
            has_begun = trainer.global_step > 0 or self.checkpoints.folder.exists()
            if self._is_new and trainer.is_global_zero and not has_begun and len(logs) < 2:
                shutil.rmtree(self.folder, ignore_errors=True)
            last = self.checkpoints.last if self.checkpoints.last.exists() else None
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))  # Lightning turns the former into the latter
            if not stopped and trainer.strategy.launcher is not None:  # else the other processes wait for this one
                trainer.strategy.launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
            if stopped or self.checkpoints.signal is not None:  # another rank stopped first
                raise Interrupted(last) from None
            explanation = explain(error, task, data, last)
            if explanation is None:
                raise
            raise explanation from error

    def _finish(self, trainer: Trainer, task: DetectionTask, data: CocoDataModule) -> dict[str, float]:
        """Score the last checkpoint, and print where the results are."""
        last, ended = self.checkpoints.last, self.checkpoints.ended
        if self.checkpoint is not None and self.checkpoints.written == 0:
            longer = "give a longer max_time, or " if ended is not None and ended < math.inf else ""
            rank_zero_info(
                f"{self.checkpoint}: the run had ended, and is only scored now. To train further, {longer}start a new "
                "run from its weights"
            )
        if self.checkpoints.signal is not None and task.scored_step != trainer.global_step:
            raise KeyboardInterrupt  # it arrived after the last step
        if not last.exists():
            if self.checkpoint is None:
                hints = ("give a longer {max_time}", "remove the callback that stops it")
                raise TrainingError("the run ended before its first step, so nothing can be scored", hints=hints)
            last.parent.mkdir(parents=True, exist_ok=True)
            link_atomically(self.checkpoint, last)  # there was nothing left to train
        device = trainer.strategy.root_device
        options = EvaluationOptions(device=device, batch_size=data.val_batch_size, workers=data.workers)
        evaluation = task.evaluate(last, options)
        evaluation.write(self.folder, of_training=True)
        if evaluation.report.refinement is not None:
            print(f"\n{text_table(refinement_table(evaluation.report.refinement))}")
        for note in evaluation.report.notes:
            print(f"Note: {note}")
        print(f"\nThe run is in {self.folder}/, its AP is {evaluation.scores['AP']:.3f}.")
        print(f"Open {self.folder}/report.html, or run tensorboard --logdir {self.folder}")
        for warning in (self.divergence.warning(task), warn_if_all_alike(evaluation.results)):
            if warning is not None:
                print(f"\nWARNING: {warning}.")
        return evaluation.scores


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
