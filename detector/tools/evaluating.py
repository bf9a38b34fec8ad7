"""What ``tools/eval.py`` does."""

import argparse
import os
from pathlib import Path

from detector.data.folder import DataFolder, find_root
from detector.errors import ImageError, UsageError, exit_on_user_error, one_line
from detector.evaluation.metric import evaluator_version
from detector.evaluation.scoring import evaluate_detector, evaluate_results
from detector.evaluation.writing import EvaluationOptions
from detector.run_folders import run_folder, unused_folder
from detector.tools.source import load_source, pick_device, split_for, switch_refinement


def score(flags: argparse.Namespace) -> int:
    """Score what the flags of ``tools/eval.py`` name. Returns the exit code."""
    with exit_on_user_error():
        if sum(source is not None for source in (flags.checkpoint, flags.model, flags.results)) != 1:
            raise UsageError("give one of --checkpoint FILE, --model NAME --weights FILE, or --results FILE")
        evaluator_version(flags.evaluator)  # now, not after the run
        options = EvaluationOptions(
            limit=flags.limit,
            min_score=flags.min_score,
            evaluator=flags.evaluator,
            pictures=flags.pictures,
            skip_broken=flags.skip_broken,
            speed=flags.speed,
            batch_size=flags.batch_size,
            workers=flags.workers,
            compare_refinement=flags.refine == "both",
            device=pick_device(flags.device) if flags.results is None else "cpu",
        )
        return _score_detector(flags, options) if flags.results is None else _score_results(flags, options)


def _data_folder(flags: argparse.Namespace) -> DataFolder:
    root = find_root(flags.root, flags.dataset, flag="--root")
    return DataFolder(root, flags.annotations or DataFolder.annotations, flags.images, flags.orientation)


def _score_results(flags: argparse.Namespace, options: EvaluationOptions) -> int:
    unused = [
        f"--{name}" for name in ("weights", "crop", "refine", "device", "speed", "skip_broken") if getattr(flags, name)
    ]
    if unused:
        raise UsageError(f"{' and '.join(unused)}: of a detector; a results file is scored as it is")
    alone = flags.root is flags.dataset is None
    if alone and flags.annotations is None:
        raise UsageError("--results needs the ground truth: --annotations FILE, or --root FOLDER with --split NAME")
    folder = DataFolder(Path(), flags.annotations) if alone else _data_folder(flags)
    if int(os.environ.get("RANK", 0)) > 0:  # there is nothing to share
        return 0
    target = Path(flags.output) if flags.output else unused_folder(Path("runs") / f"eval-{Path(flags.results).stem}")
    evaluate_results(
        flags.results,
        folder.annotation_file(flags.split),
        target,
        options,
        images=None if alone else folder.image_folder(flags.split),
        orientation=flags.orientation,
        split=None if alone else flags.split,
    )
    return 0


def _score_detector(flags: argparse.Namespace, options: EvaluationOptions) -> int:
    folder, split = _data_folder(flags), flags.split
    detector, called = load_source(flags.checkpoint, flags.model, flags.weights, flags.crop)
    data = split_for(detector, folder, split, skip_missing=flags.skip_broken)
    switch_refinement(detector, flags.refine)
    if flags.output is not None:
        target = Path(flags.output)
    elif flags.checkpoint is not None and Path(called).is_file():
        target = unused_folder(run_folder(Path(called)) / f"eval-{split}")
    else:
        target = unused_folder(Path("runs") / f"eval-{flags.model or Path(called).stem}-{split}")
    try:
        found = evaluate_detector(detector, data, target, options, model=called, root=str(folder.root), split=split)
        if found is None:  # rank 0 has it all
            return 0
        if isinstance(found.stopped, KeyboardInterrupt):
            return 130
        if found.stopped is not None:
            raise found.stopped  # itself: its traceback holds the loader, which goes with it
    except ImageError as error:
        error.args = (f"{one_line(error)}: --skip_broken true goes on without such images",)
        raise
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # of several, torchrun would make a failure of a code
    return 3 if found.broken and alone else 0
