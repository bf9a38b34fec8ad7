"""A detector's refinement trained, its settings told, and the detector scored without it and with it."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from detector.data.categories import match_categories, match_notes
from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError, one_line
from detector.evaluation.choosing import best_refinement, score_refinements
from detector.evaluation.report import refinement_table, text_table
from detector.evaluation.running import run_detector
from detector.evaluation.scoring import scored_types
from detector.evaluation.writing import EvaluationOptions, described, write_evaluation
from detector.files import read_json, write_json
from detector.models.rle_detections import annotation_types_of
from detector.models.weights import read_weights
from detector.overriding import overridden
from detector.pretrained.detector import Detector
from detector.pretrained.loading import CHECKPOINT_KEY, load_checkpoint
from detector.refinement.config import RefinementConfig
from detector.training.checkpoints import AtomicCheckpointIO
from detector.training.data import CocoDataModule
from detector.training.refinement_data import RefinementData
from detector.training.refinement_task import RefinementTask
from detector.training.run import Run
from detector.training.task import DetectionTask

CLIP = 5.0  # the norm of the gradient
CHOSEN = "chosen.json"


def train_refinement(
    task: RefinementTask,
    data: RefinementData,
    score_on: CocoDetection,
    *,
    split: str,
    run_dir: str | Path = "runs/refined",
    ckpt_path: str | Path | None = None,
    save_every: int = 500,
    candidates: Sequence[RefinementConfig] = (),
    batch_size: int = 1,
    **trainer_options: Any,
) -> dict[str, dict[str, float]] | None:
    """Train a refinement, tell its settings, and score the detector without it and with it, as ``tools/refine.py``.

    The folder gets ``checkpoints/last.ckpt``, which is the refined detector, ``scores.json`` with the scores
    ``before`` and ``after``, ``chosen.json`` with those of the candidates, if there are any, and what
    :func:`~detector.evaluation.writing.write_evaluation` writes of the refined detector.

    Args:
        task: what is trained.
        data: what it learns from.
        score_on: the images to score on, without a transform.
        split: their name, for the report.
        run_dir, ckpt_path, save_every: see :func:`~detector.training.train`.
        candidates: settings, of which the best on the images held apart is taken; the task's where there are none, or
            where no class of the train split is one of the detector's.
        batch_size: images scored at a time.
        trainer_options: of ``lightning.Trainer``: ``devices``, ``precision``, ...

    Returns:
        The scores ``before`` and ``after``, see :func:`detector.evaluation.evaluate`; ``None`` on ranks other than 0.

    Raises:
        DataError, ModelError, TrainingError: the run cannot begin or go on; the message says why in a sentence.
        Interrupted: Ctrl-C or SIGTERM ended it; the same call with ``ckpt_path="last"`` goes on.
    """
    run = RefinementRun(
        run_dir, ckpt_path, save_every, score_on=score_on, split=split, candidates=candidates, batch_size=batch_size
    )
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
        candidates: Sequence[RefinementConfig],
        batch_size: int,
    ) -> None:
        super().__init__(run_dir, ckpt_path, save_every=save_every)
        self.score_on, self.split, self.candidates, self.batch_size = score_on, split, candidates, batch_size
        self.scores: dict[str, dict[str, float]] | None = None

    def trainer_options(self, given: dict[str, Any]) -> dict[str, Any]:
        ours = {"max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": CLIP, "log_every_n_steps": 10}
        return super().trainer_options(ours | given)

    def _watches(self) -> list[Callback]:
        return []  # there are no proposals to guard

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
        if self.candidates and data.apart is not None:
            self._choose(detector, data.apart, task.refinement, data.workers)
        refinement = detector.refinement
        assert refinement is not None
        split = self.score_on
        ids = match_categories(detector, split)
        parts, of_parts = scored_types(split, annotation_types_of(detector.model), detector.keypoints)
        running: dict[str, Any] = {"device": device, "batch_size": self.batch_size, "workers": data.workers}
        with overridden(refinement, enabled=False):
            unrefined = run_detector(detector.model, split, ids, **running)
        found = run_detector(detector.model, split, ids, **running)
        after = write_evaluation(
            found,
            split.annotations,
            self.folder,
            EvaluationOptions(),
            about=described(detector, model=str(last), data=str(data.root), split=self.split, device=device),
            split=split,
            annotation_types=parts,
            unrefined=unrefined,
            notes=[*match_notes(detector, ids, split), *of_parts],
            of_training=True,
        )
        refinement_report = read_json(self.folder / "report.json")["refinement"]
        before = refinement_report["before"]["scores"]
        self.scores = {"before": {name: -1.0 if of is None else of for name, of in before.items()}, "after": after}
        write_json(self.folder / "scores.json", self.scores)
        print(f"\n{text_table(refinement_table(refinement_report))}")
        print(f"\nThe refined detector is {last}, and scores.json, report.html and detections.json are beside it.")
        return after

    def _choose(self, detector: Detector, apart: CocoDetection, default: RefinementConfig, workers: int) -> None:
        """Take the candidate that is best on the images held apart, in the run's last checkpoint as well."""
        refinement = detector.refinement
        assert refinement is not None
        # As trained, whatever the candidates say of that; a checkpoint of a run that had ended has chosen before.
        candidates = list(
            dict.fromkeys(
                replace(refinement.config, looks=one.looks, climbs=one.climbs) for one in (default, *self.candidates)
            )
        )
        try:
            match_categories(detector, apart)
        except (ModelError, DataError) as error:  # of no harm to the training, whose classes may be any
            print(
                f"\nNote: looks and climbs stay {default.looks} and {default.climbs}: which are best cannot be told on "
                f"the images held apart, for {one_line(error)}."
            )
            best = candidates[0]
        else:
            best = self._best(detector, apart, candidates, workers)
        refinement.configure(best)
        checkpoint = read_weights(self.checkpoints.last)
        if RefinementConfig.from_dict(checkpoint[CHECKPOINT_KEY]["refinement"]) != best:
            checkpoint[CHECKPOINT_KEY]["refinement"] = asdict(best)
            AtomicCheckpointIO().save_checkpoint(checkpoint, self.checkpoints.last)

    def _best(
        self, detector: Detector, apart: CocoDetection, candidates: Sequence[RefinementConfig], workers: int
    ) -> RefinementConfig:
        """The best candidate, with the scores of all printed and written; the first is the default."""
        device = next(detector.parameters()).device
        scores = score_refinements(
            detector, apart, candidates, device=device, batch_size=self.batch_size, workers=workers
        )
        best = best_refinement(candidates, scores, candidates[0])
        rows = [{"looks": one.looks, "climbs": one.climbs} | of for one, of in zip(candidates, scores, strict=True)]
        chosen = {"images": len(apart), "chosen": asdict(best), "candidates": rows}
        write_json(self.folder / CHOSEN, chosen, indent=1)
        print(f"\nOn {len(apart):,} images held apart:\nlooks climbs {'AP':>7} {'AP75':>7} {'AP90':>7}")
        for one, of in zip(candidates, scores, strict=True):
            mark = "  <- chosen" if one == best else ""
            print(f"{one.looks:5} {one.climbs:6} {of['AP']:7.4f} {of['AP75']:7.4f} {of['AP90']:7.4f}{mark}")
        return best
