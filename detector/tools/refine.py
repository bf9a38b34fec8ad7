"""The tool that trains a refinement: ``tools/refine.py``."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from detector.choices import Crop, Orientation
from detector.errors import ModelError
from detector.run_folders import run_folder
from detector.tools.cli import run_tool


def refine(
    *,
    checkpoint: str | Path | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    root: str | Path | None = None,
    dataset: str | None = None,
    train_split: str = "train2017",
    split: str = "val2017",
    annotations: str | None = None,
    images: str = "{split}",
    orientation: Orientation = "upright",
    run_dir: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    save_every: PositiveInt = 500,
    iterations: NonNegativeInt = 2,
    train_iterations: PositiveInt = 3,
    ascent_steps: NonNegativeInt = 0,
    box_gradient: Literal["exact", "bound", "off"] = "off",
    max_steps: PositiveInt = 600,
    epochs: PositiveInt | None = None,
    batch_size: PositiveInt = 4,
    lr: PositiveFloat = 1e-3,
    weight_decay: NonNegativeFloat = 1e-4,
    ema: float | None = None,
    flip: bool = True,
    cache_gb: NonNegativeFloat = 2.0,
    workers: NonNegativeInt = 2,
    seed: NonNegativeInt = 0,
    device: str | None = None,
    devices: PositiveInt | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    deterministic: bool = False,
) -> dict[str, float] | None:
    """Train a refinement of a detector's boxes: a small head on top of the frozen detector.

    The detector's weights do not change. It must not have a refinement: tools/train.py with --model.refinement null
    trains such a detector. The head crops the detector's feature maps at a box, and predicts the object's box and the
    IoU of the two. It learns from the boxes of the train split, whatever their classes. Then the split is scored
    without and with the refinement. The run folder gets checkpoints/last.ckpt, which the other tools and load_detector
    read like any other checkpoint, scores.json, detections.json, report.json and report.html.

    Examples:
        python tools/refine.py --checkpoint runs/stock --root BCCD --train_split train --split val
        python tools/refine.py --model fasterrcnn_resnet50_fpn --weights DEFAULT --crop affine --root COCO_FOLDER

    Args:
        checkpoint: A checkpoint, its run folder (the last checkpoint), a saved folder, or OWNER/NAME on Hugging Face.
        model: A torchvision detector, such as fasterrcnn_resnet50_fpn. Needs weights.
        weights: A state_dict file for the model, or the name of published weights, such as DEFAULT.
        crop: Crop with the affine crop or with RoIAlign. Default: as the detector was trained.
        root: Folder of the data set. Default: the dataset's folder in DETECTOR_DATA.
        dataset: Name of the data set, a folder in DETECTOR_DATA. Used without root.
        train_split: Name of the split to learn from.
        split: Name of the split to score.
        annotations: Annotation file, relative to root. Default: annotations/instances_{split}.json, where {split} is
            replaced.
        images: Image folder, relative to root. {split} is replaced.
        orientation: upright applies the EXIF orientation of photographs; stored ignores it. Where the annotated size
            fits only one of the two, that one is used.
        run_dir: Folder of the run. If it holds a run, a number is added. Default: RUN-refined beside the checkpoint's
            run folder, or runs/refined-MODEL.
        ckpt_path: "last" resumes the last run in run_dir from its last checkpoint; a file resumes from that checkpoint.
        save_every: Number of steps between checkpoints.
        iterations: Refinement iterations at test time.
        train_iterations: Refinement iterations in training.
        ascent_steps: Maximum number of gradient ascent steps on the predicted IoU, at test time.
        box_gradient: Gradient through the boxes between the training iterations. "off" treats boxes as constants, as
            in a cascade, "exact" is the derivative, "bound" limits it to a tenth of each iteration's own gradient.
        max_steps: Number of training steps.
        epochs: Number of passes over the images, instead of max_steps.
        batch_size: Images per step and device.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay.
        ema: Decay of an exponential moving average of the weights, such as 0.99. Default: no average.
        flip: Flip half of the images. Switch off where left and right differ, as in digits.
        cache_gb: Memory of the training device for the feature cache. Features of an 800 x 1333 image with 256 channels
            take 91 MB. Features that do not fit are computed again in each pass.
        workers: Number of processes that read images.
        seed: Seed of the weights, the order of the images and the sampling.
        device: cpu, cuda, cuda:1, ... Default: cuda if available.
        devices: Number of devices, with one process each. Default: 1, or torchrun's.
        precision: Precision of the training. Boxes are always float32, and the scoring is 32-true.
        deterministic: Make the weights reproducible bit by bit on a GPU too.

    Returns:
        The scores of the refined detector; ``None`` on all processes but the first.

    Exit codes:
        0: done.
        1: wrong input.
        2: wrong command line.
        130: interrupted. --ckpt_path last resumes.
    """
    from detector.data.categories import match_categories
    from detector.evaluation.scoring import split_for
    from detector.rcnn.box_gradient import BoxGradient
    from detector.refinement.config import RefinementConfig
    from detector.tools.source import data_folder, load_source, pick_device
    from detector.training.refinement import OPTIMIZER, RefinementData, RefinementTask
    from detector.training.run import train

    place = pick_device(device)
    folder = data_folder(root, dataset, annotations, images, orientation)
    detector, name = load_source(checkpoint, model, weights, crop)
    if detector.refinement is not None:
        hints = ["score it with tools/eval.py --refine both", "give a detector without one"]
        raise ModelError("has a refinement already", setting="checkpoint", value=str(checkpoint), hints=hints)
    score_on = split_for(detector, folder, split)
    match_categories(detector, score_on)  # fails before the training
    gradients = {"exact": BoxGradient.exact(), "bound": BoxGradient(), "off": BoxGradient(crop=0, coder=0)}
    task = RefinementTask(
        detector,
        RefinementConfig(
            iterations=iterations,
            train_iterations=train_iterations,
            ascent_steps=ascent_steps,
            box_gradient=gradients[box_gradient],
        ),
        replace(OPTIMIZER, lr=lr, weight_decay=weight_decay, ema=ema),
        cache_bytes=int(cache_gb * 1e9),
    )
    data = RefinementData(
        score_on,
        root=str(folder.root),
        train_split=train_split,
        val_split=split,
        annotations=folder.annotations,
        images=images,
        orientation=orientation,
        steps=max_steps,
        epochs=epochs,
        flip=flip,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
    )
    count = devices or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return train(
        task,
        data,
        run_dir=run_dir or _run_dir(name, model),
        ckpt_path=ckpt_path,
        save_every=save_every,
        accelerator=place.type,
        devices=[place.index] if count == 1 and place.index is not None else count,
        precision=precision,
        deterministic=deterministic,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tools/refine.py`` and return its exit code."""
    return run_tool(refine, arguments)


def _run_dir(name: str, model: str | None) -> Path:
    source = Path(name)
    if model is not None or not source.exists():
        return Path("runs") / f"refined-{model or source.name}"
    run = run_folder(source) if source.is_file() else source
    run = run if run.name not in ("", "..") else run.resolve()  # "." has no name
    return run.with_name(f"{run.name}-refined")
