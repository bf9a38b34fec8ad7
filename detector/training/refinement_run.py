"""Train a detector's refinement, and score the detector without it and with it."""

from pathlib import Path
from typing import Any

import lightning

from detector.data.categories import match_categories, match_notes
from detector.data.dataset import CocoDetection
from detector.evaluation.running import EvaluationOptions, run_detector
from detector.evaluation.scoring import evaluate_predictions
from detector.evaluation.tables import refinement_table, text_table
from detector.models.weights import read_weights
from detector.overriding import overridden
from detector.pretrained.loading import load_checkpoint
from detector.training.checkpoints import AtomicCheckpointIO
from detector.training.data import CocoDataModule
from detector.training.refinement_data import RefinementData
from detector.training.refinement_task import RefinementTask
from detector.training.run import Run
from detector.training.task import DetectionTask

CLIP = 5.0  # the norm of the gradient


def train_refinement(
    task: RefinementTask,
    data: RefinementData,
    score_on: CocoDetection,
    *,
    split: str,
    run_dir: str | Path = "runs/refined",
    ckpt_path: str | Path | None = None,
    save_every: int = 500,
    batch_size: int = 1,
    **trainer_options: Any,
) -> dict[str, dict[str, float]] | None:
    """Train a refinement, and score the detector without it and with it, as ``tools/refine.py``.

    The folder gets ``checkpoints/last.ckpt``, which is the refined detector, and what an evaluation of it writes:
    ``scores.json`` with its scores, ``report.json`` with those before and after, ...

    Args:
        task: what is trained.
        data: what it learns from.
        score_on: the images to score on, without a transform.
        split: their name, for the report.
        run_dir, ckpt_path, save_every: see :func:`~detector.training.train`.
        batch_size: images scored at a time.
        trainer_options: of ``lightning.Trainer``: ``devices``, ``precision``, ...

    Returns:
        The scores ``before`` and ``after``, see :func:`detector.evaluation.evaluate`; ``None`` on ranks other than 0.

    Raises:
        DataError, ModelError, TrainingError: the run cannot begin or go on; the message says why in a sentence.
        Interrupted: Ctrl-C or SIGTERM ended it; the same call with ``ckpt_path="last"`` goes on.
    """
    run = RefinementRun(run_dir, ckpt_path, save_every, score_on=score_on, split=split, batch_size=batch_size)
    run.train(lightning.Trainer(**run.trainer_options(trainer_options)), task, data)
    return run.scores


class RefinementRun(Run):
    """A run of a :class:`RefinementTask`; see :func:`train_refinement`."""

    def __init__(
        self,
        run_dir: str | Path,
        ckpt_path: str | Path | None,
        save_every: int,
        *,
        score_on: CocoDetection,
        split: str,
        batch_size: int,
    ) -> None:
        super().__init__(run_dir, ckpt_path, save_every=save_every)
        self.score_on, self.split, self.batch_size = score_on, split, batch_size
        self.scores: dict[str, dict[str, float]] | None = None

    def trainer_options(self, given: dict[str, Any]) -> dict[str, Any]:
        ours = {"max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": CLIP, "log_every_n_steps": 10}
        return super().trainer_options(ours | given)

    def _finish(self, trainer: lightning.Trainer, task: DetectionTask, data: CocoDataModule) -> dict[str, float]:
        assert isinstance(data, RefinementData)
        assert task.refinement is not None
        device = trainer.strategy.root_device
        last = self.checkpoints.last
        if not last.exists():  # there was nothing left to train: the file that was given stays as it is
            assert self.checkpoint is not None
            AtomicCheckpointIO().save_checkpoint(read_weights(self.checkpoint), last)
        detector = load_checkpoint(last)  # with averaged weights, if there are any
        detector.to(device)
        refinement = detector.refinement
        assert refinement is not None
        split = self.score_on
        ids = match_categories(detector, split)
        options = EvaluationOptions(device=device, batch_size=self.batch_size, workers=data.workers)
        with overridden(refinement, enabled=False):
            unrefined = run_detector(detector.model, split, ids, options)
        found = run_detector(detector.model, split, ids, options)
        found.unrefined = unrefined.results
        evaluation = evaluate_predictions(
            found,
            split,
            options,
            detector=detector,
            model=str(last),
            root=str(data.root),
            split_name=self.split,
            notes=match_notes(detector, ids, split),
        )
        evaluation.write(self.folder, of_training=True)
        compared = evaluation.report.refinement
        assert compared is not None
        before = {name: -1.0 if score is None else score for name, score in compared["before"]["scores"].items()}
        self.scores = {"before": before, "after": evaluation.scores}
        print(f"\n{text_table(refinement_table(compared))}")
        print(f"\nThe refined detector is {last}, and scores.json, report.html and detections.json are beside it.")
        return evaluation.scores
