"""The tool that scores a detector, or a file of detections: ``tools/eval.py``."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from detector.choices import Crop, Evaluator, Orientation
from detector.errors import ImageError, UsageError
from detector.run_folders import run_folder, unused_folder
from detector.tools.cli import run_tool

if TYPE_CHECKING:
    from detector.evaluation.scoring import Evaluation


def evaluate(
    *,
    checkpoint: str | Path | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    results: str | Path | None = None,
    root: str | Path | None = None,
    dataset: str | None = None,
    split: str = "val2017",
    annotations: str | None = None,
    images: str = "{split}",
    orientation: Orientation = "upright",
    refine: Literal["on", "off", "both"] | None = None,
    output: str | Path | None = None,
    limit: PositiveInt | None = None,
    skip_broken: bool = False,
    min_score: ClosedUnitInterval = 0.5,
    evaluator: Evaluator = "pycocotools",
    pictures: NonNegativeInt = 6,
    speed: NonNegativeInt = 0,
    batch_size: PositiveInt = 1,
    workers: NonNegativeInt = 2,
    device: str | None = None,
) -> "Evaluation | None":
    """Score a detector, or a file of detections, on a split of a data set in COCO's format.

    Boxes are scored, and masks and keypoints where both sides have them. Classes are matched by name. The output folder
    gets report.html (plots, the worst and the best images), report.json, scores.json and detections.json (COCO's
    results format). torchrun --nproc-per-node N tools/eval.py ... spreads the images over N devices.

    Examples:
        python tools/eval.py --checkpoint runs/quickstart --root data/digits --split val
        python tools/eval.py --model fasterrcnn_resnet50_fpn --weights DEFAULT --crop affine --root COCO_FOLDER
        python tools/eval.py --results detections.json --annotations instances_val.json

    Args:
        checkpoint: A checkpoint, its run folder (the last checkpoint), a saved folder, or OWNER/NAME on Hugging Face.
        model: A torchvision detector, such as fasterrcnn_resnet50_fpn. Needs weights.
        weights: A state_dict file for the model, or the name of published weights, such as DEFAULT.
        crop: Crop with the affine crop or with RoIAlign. Default: as the detector was trained.
        results: Score this file of detections in COCO's results format, without a detector.
        root: Folder of the data set. Default: the dataset's folder in DETECTOR_DATA.
        dataset: Name of the data set, a folder in DETECTOR_DATA. Used without root.
        split: Name of the split.
        annotations: Annotation file, relative to root. Default:
            annotations/instances_{split}.json, where {split} is replaced.
        images: Image folder, relative to root. {split} is replaced.
        orientation: upright applies the EXIF orientation of photographs; stored ignores it. Where the annotated size
            fits only one of the two, that one is used.
        refine: Run the detector's refinement or not. "both" compares the two. Default: on, if it has one.
        output: Folder to write. Default: eval-SPLIT in the run folder, or runs/eval-MODEL-SPLIT.
        limit: Score only the first N images.
        skip_broken: Skip images that cannot be read, and list them. Otherwise the first one ends the run.
        min_score: Minimum score in the confusion matrix and the pictures.
        evaluator: faster-coco-eval computes the same numbers in C++, and must be installed.
        pictures: Number of worst and of best images on the page.
        speed: Time each stage on N images after the scoring, one image at a time. 50 is a good number.
        batch_size: Images per batch. Several are padded to one size, which changes scores slightly.
        workers: Number of processes that read images.
        device: cpu, cuda, cuda:1, ... Default: cuda if available.

    Returns:
        The evaluation; ``None`` on all processes but the first.

    Exit codes:
        0: all images were scored.
        1: wrong input, or an unreadable image. The images before it are scored.
        2: wrong command line.
        3: some images were skipped with --skip_broken. 0 under torchrun, which treats other codes as a crash.
        130: interrupted. The images before it are scored.
    """
    from detector.evaluation.metric import evaluator_version
    from detector.evaluation.running import EvaluationOptions
    from detector.evaluation.scoring import evaluate_detector, evaluate_results, split_for
    from detector.tools.source import data_folder, load_source, pick_device, switch_refinement

    if sum(source is not None for source in (checkpoint, model, results)) != 1:
        hints = ("give {checkpoint}", "{model} with {weights}", "{results}")
        raise UsageError("exactly one source of detections is needed", hints=hints)
    evaluator_version(evaluator)  # fails before the run
    options = EvaluationOptions(
        limit=limit,
        min_score=min_score,
        evaluator=evaluator,
        skip_broken=skip_broken,
        speed=speed,
        batch_size=batch_size,
        workers=workers,
        compare_refinement=refine == "both",
        device=pick_device(device) if results is None else "cpu",
    )
    if results is not None:
        unused = {"weights": weights, "crop": crop, "refine": refine, "device": device, "speed": speed}
        for name, value in (unused | {"skip_broken": skip_broken}).items():
            if value:
                raise UsageError("applies to a detector; a results file is scored as it is", setting=name, value=value)
        alone = root is dataset is None
        if alone and annotations is None:
            raise UsageError("the ground truth is missing", hints=["give {annotations}", "{root} with {split}"])
        if int(os.environ.get("RANK", 0)) > 0:  # nothing to share
            return None
        folder = data_folder("." if alone else root, dataset, annotations, images, orientation)
        evaluation = evaluate_results(
            str(results),
            folder.annotation_file(split),
            options,
            images=None if alone else folder.image_folder(split),
            orientation=orientation,
            split_name=None if alone else split,
        )
        target = Path(output) if output is not None else unused_folder(Path("runs") / f"eval-{Path(results).stem}")
        evaluation.write(target, pictures=pictures)
        return evaluation
    folder = data_folder(root, dataset, annotations, images, orientation)
    detector, name = load_source(checkpoint, model, weights, crop)
    data = split_for(detector, folder, split, skip_missing=skip_broken)
    switch_refinement(detector, refine)
    if output is not None:
        target = Path(output)
    elif checkpoint is not None and Path(name).is_file():
        target = unused_folder(run_folder(Path(name)) / f"eval-{split}")
    else:
        target = unused_folder(Path("runs") / f"eval-{model or Path(name).stem}-{split}")
    target.mkdir(parents=True, exist_ok=True)  # fails before the run
    try:
        found = evaluate_detector(detector, data, options, model=name, root=str(folder.root), split_name=split)
        if found is not None:
            found.write(target, pictures=pictures)
            if isinstance(found.stopped, Exception):
                raise found.stopped  # itself: its traceback holds the loader, which goes with it
    except BaseException as error:
        with suppress(OSError):  # the folder is not empty
            target.rmdir()
        if isinstance(error, ImageError):
            error.hints += ("{skip_broken} true goes on without such images",)
        raise
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tools/eval.py`` and return its exit code."""
    return run_tool(evaluate, arguments, exit_code=_exit_code)


def _exit_code(found: "Evaluation | None") -> int:
    skipped = found is not None and found.skipped and "WORLD_SIZE" not in os.environ
    return 130 if found is not None and found.stopped else 3 if skipped else 0
