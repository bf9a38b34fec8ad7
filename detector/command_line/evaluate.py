"""The command line of ``tools/eval.py``."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from detector.categories import labels_of_targets, match_categories, match_notes
from detector.coco import CocoDetection, find_root, read_coco
from detector.command_line.source import load_source, pick_device
from detector.errors import DataError, ModelError, UserError, in_a_sentence, sentence
from detector.evaluation.augmented import AugmentedDetector
from detector.evaluation.metric import Evaluator, evaluator_version
from detector.evaluation.ranks import gathered, joined
from detector.evaluation.results import crowded, read_results
from detector.evaluation.scoring import described, run_detector, write_evaluation
from detector.evaluation.timing import WARM_UP, measure_stages
from detector.folders import run_folder, unused_folder
from detector.models import refuse_narrow
from detector.overriding import overridden
from detector.pretrained import Crop, PretrainedDetector

WITHOUT = ": --skip_broken true goes on without such images"


def score(
    checkpoint: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    results: str | None = None,
    root: str | None = None,
    dataset: str | None = None,
    split: str = "val2017",
    annotations: str | None = None,
    images: str = "{split}",
    output: str | None = None,
    limit: int | None = None,
    skip_broken: bool = False,
    flip: bool = False,
    sizes: list[int] | None = None,
    min_score: float = 0.5,
    evaluator: Evaluator = "pycocotools",
    pictures: int = 6,
    speed: int = 0,
    batch_size: int = 1,
    workers: int = 2,
    device: str | None = None,
) -> None:
    """Score a detector with COCO's metric, by class, by size, and see what it takes for what.

    Writes report.html (plots, the worst and the best images), report.json, scores.json and detections.json (COCO's
    results format). torchrun --nproc-per-node N tools/eval.py ... spreads the images over N devices. Classes are the
    data's by their names, whatever the ids.

    Args:
        checkpoint: a checkpoint of tools/train.py or its run's folder (the last one), a folder of save_pretrained, or a
            name on Hugging Face's hub.
        model: or the name of a torchvision detector, such as fasterrcnn_resnet50_fpn or retinanet_resnet50_fpn,
        weights: with its weights: a state_dict file, or a name that torchvision publishes (DEFAULT).
        crop: "affine" scores it swapped, "roi_align" stock. Default: as the checkpoint was trained; stock.
        results: or no detector but a file of detections in COCO's results format.
        root: the data set's folder. Default: the folder DATASET in the folder that DETECTOR_DATA names.
        dataset: the data set's name, a folder of DETECTOR_DATA; used where root is not given.
        split: the split to score on.
        annotations: annotation file of a split, relative to root; {split} stands for the split. Default:
            annotations/instances_{split}.json.
        images: image folder of a split, relative to root.
        output: the folder to write to. Default: eval-SPLIT in the checkpoint's run folder; runs/eval-MODEL-SPLIT.
        limit: score only the first so many images.
        skip_broken: leave out images that cannot be read, with their objects, and name them; the exit code is then 3.
            Without it the first one ends the run, and what was found by then is scored.
        flip: test-time augmentation: also look at each image mirrored.
        sizes: test-time augmentation: look at each image with its shorter side resized to each of these pixels,
            "[640, 800, 1024]".
        min_score: detections below it are left out of the confusion matrix and of the pictures.
        evaluator: "faster-coco-eval" computes the same numbers in C++ (its package is an extra).
        pictures: how many of the worst images the page shows, and of the best; a picture takes 0.1 to 0.2 MB.
        speed: also time each stage, on so many images one at a time, after the scoring; 50 is a good number.
        batch_size: images at a time; with more than 1 they are padded to one size, which changes scores a little.
        workers: processes that read images.
        device: cpu, cuda, cuda:1, ... Default: cuda if there is one.
    """
    with in_a_sentence():
        sources = [source for source in (checkpoint, model, results) if source is not None]
        if len(sources) != 1:
            raise ModelError("give one of --checkpoint FILE, --model NAME --weights FILE, or --results FILE")
        least = {
            "limit": (limit, 1),
            "pictures": (pictures, 0),
            "speed": (speed, 0),
            "batch_size": (batch_size, 1),
            "workers": (workers, 0),
        }
        for name, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise ModelError(f"--{name} must be at least {lowest}, got {value}")
        evaluator_version(evaluator)  # now, not after the run
        if not 0 <= min_score <= 1:
            raise ModelError(f"--min_score must be from 0 to 1, got {min_score}")
        pattern = annotations or "annotations/instances_{split}.json"
        if results is not None:
            detectors: dict[str, Any] = {"weights": weights, "crop": crop, "device": device, "sizes": sizes}
            detectors |= {"flip": flip or None, "speed": speed or None, "skip_broken": skip_broken or None}
            unused = [f"--{name}" for name, value in detectors.items() if value is not None]
            if unused:
                raise ModelError(f"{' and '.join(unused)}: of a detector; a results file is scored as it is")
            if annotations is root is dataset is None:
                raise DataError("--results needs the truth: --annotations FILE, or --root FOLDER with --split NAME")
            _score_results(
                results,
                root=root,
                dataset=dataset,
                split=split,
                annotations=pattern,
                images=images,
                output=output,
                limit=limit,
                min_score=min_score,
                evaluator=evaluator,
                pictures=pictures,
            )
            return
        folder = find_root(root, dataset, flag="--root")
        data = CocoDetection(
            folder / images.replace("{split}", split),
            folder / pattern.replace("{split}", split),
            skip_missing=skip_broken,
        )
        detector, called = load_source(checkpoint, model, weights, crop)
        category_ids = match_categories(detector, data)
        place = pick_device(device)
        if output is not None:
            target = Path(output)
        else:
            file = None if checkpoint is None else called
            target = unused_folder(_beside(file, f"eval-{model or Path(called).stem}-{split}", split))
        target.mkdir(parents=True, exist_ok=True)  # now: it would be late to find out after the run that it cannot be
        detector.to(place)
        matched = match_notes(detector, category_ids, data)
        network, labels, proposals, notes = _what_to_run(detector, category_ids, data, flip, sizes or [])
        notes = matched + notes
        total, left_out = len(data), []
        if narrow := _narrow_images(network, data, limit):
            if not skip_broken:
                raise DataError(next(iter(narrow.values())))
            left_out.append(data.leave_out(narrow))
            limit = limit and limit - len(narrow)
        with joined() as (rank, ranks):
            for note in matched if rank == 0 else ():
                print(f"Note: {note}", file=sys.stderr)
            try:
                part = run_detector(
                    network,
                    data,
                    category_ids,
                    device=place,
                    batch_size=batch_size,
                    workers=workers,
                    limit=limit,
                    labels=labels,
                    proposals=proposals,
                    skip_broken=skip_broken,
                    ranks=ranks,
                    rank=rank,
                )
            except DataError as error:
                error.args = (f"{sentence(error)}{WITHOUT}",)
                raise
            found = gathered(part)
        if found is None:  # another process has it all
            return
        if found.broken:
            left_out.append(data.leave_out(found.broken))
        if left_out and not found.image_ids:
            with suppress(OSError):  # it holds something
                target.rmdir()
            raise DataError(f"none of the images that were asked for can be read: {left_out[-1]}")
        seen = f"these are the first {total - len(data) + len(found.image_ids):,} of {total:,} images"
        if isinstance(found.stopped, KeyboardInterrupt):
            notes.append(f"Stopped by Ctrl-C: {seen}.")
        elif found.stopped is not None:
            notes.append(f"Stopped by an image ({sentence(found.stopped)}): {seen}.")
        elif limit is not None:
            notes.append(f"Limited: {seen}.")
        notes += [f"{note}." for note in left_out]
        stages = None
        if speed and found.stopped is None and found.image_ids:
            stages = _times(detector.model, data, speed, len(found.image_ids), place, notes)
        write_evaluation(
            data.coco,
            found.results,
            target,
            about=described(
                model=called,
                crop=detector.crop,
                weights=detector.digest(),
                data=str(folder),
                split=split,
                device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
                evaluator=evaluator,
            ),
            split=data,
            image_ids=found.image_ids,
            evaluator=evaluator,
            pictures=pictures,
            min_score=min_score,
            losses=found.mean_losses(),
            proposals=found.proposals,
            kept_proposals=found.kept_proposals,
            speed=stages,
            notes=notes,
        )
        _say_where(target)
        for note in left_out:
            print(note, file=sys.stderr)
        if isinstance(found.stopped, KeyboardInterrupt):
            sys.exit(130)
        if found.stopped is not None:
            # The error itself: its traceback holds the loader, which goes with it.
            found.stopped.args = (f"{sentence(found.stopped)}{WITHOUT}",)
            raise found.stopped
        if left_out and ranks == 1:  # of several, torchrun would make a failure of it
            sys.exit(3)


def _what_to_run(
    detector: PretrainedDetector, category_ids: Sequence[int | None], data: CocoDetection, flip: bool, sizes: list[int]
) -> tuple[nn.Module, Tensor | None, bool, list[str]]:
    """The network, its labels of the data's (for the losses, if there can be any), whether it has proposals, notes."""
    network: Any = detector.model
    if flip or sizes:
        looks = [f"{size} pixels" for size in sizes] + ["mirrored"] * flip
        notes = [f"Test-time augmentation: {', '.join(looks)}. Losses, proposals and times are of a single look."]
        return AugmentedDetector(network, flip=flip, sizes=sizes), None, False, notes
    two_stages = isinstance(network, GeneralizedRCNN)
    if two_stages and (network.roi_heads.has_mask() or network.roi_heads.has_keypoint()):
        notes = ["No losses: those of masks and key points need annotations that are not read here."]
        return network, None, True, notes
    labels = labels_of_targets(category_ids, data)
    if labels is None:
        return network, None, two_stages, ["No losses: of some classes the detector has no label."]
    return network, labels.to(next(network.parameters()).device), two_stages, []


def _times(
    model: nn.Module, data: CocoDetection, rounds: int, images: int, place: torch.device, notes: list[str]
) -> dict[str, Any] | None:
    """The times of the stages on the images that were scored. Whatever happens: the scores are worth keeping."""
    with tqdm(total=rounds + WARM_UP, desc="timing", unit="image", leave=False, disable=None) as bar:
        try:
            return measure_stages(model, data, images=rounds, among=images, device=place, on_image=bar.update)
        except (KeyboardInterrupt, UserError, RuntimeError, MemoryError) as stop:
            reason = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else sentence(stop)[:200]
            notes.append(f"No times: stopped by {reason} while they were taken.")
            return None


def _narrow_images(network: Any, data: CocoDetection, limit: int | None) -> dict[int, str]:
    """Before the run, of which nothing would come: images of which nothing is left in the size that is looked at."""
    several = isinstance(network, AugmentedDetector)
    model = network.model if several else network
    own = (model.transform.min_size[-1], model.transform.max_size)
    narrow = {}
    for min_size, max_size in network.sizes if several else [own]:
        with overridden(model.transform, min_size=(min_size,), max_size=max_size):
            for image_id in data.image_ids[:limit]:
                info = data.coco.imgs[image_id]
                try:
                    refuse_narrow(model, info["height"], info["width"])
                except DataError as error:
                    narrow[image_id] = f"{info['file_name']} (id {image_id}): {error}"
    return narrow


def _score_results(
    results: str,
    *,
    root: str | None,
    dataset: str | None,
    split: str,
    annotations: str,
    images: str,
    output: str | None,
    limit: int | None,
    min_score: float,
    evaluator: Evaluator,
    pictures: int,
) -> None:
    """Score a results file; the images are looked at only to draw them, and may be missing."""
    if int(os.environ.get("RANK", 0)) > 0:  # there is nothing to share
        return
    alone = root is None and dataset is None
    folder = Path() if alone else find_root(root, dataset, flag="--root")
    file = folder / annotations.replace("{split}", split)
    truth = read_coco(file)
    found = read_results(results, truth)
    notes = []
    data = None
    if not alone:
        try:
            data = CocoDetection(folder / images.replace("{split}", split), file)
        except DataError as error:
            notes.append(f"No pictures: {error}")
    image_ids = sorted(truth.imgs)[:limit]
    if limit is not None:
        notes.append(f"Limited to the first {len(image_ids):,} of {len(truth.imgs):,} images.")
    if count := crowded(found):
        notes.append(f"{count:,} images have more than 100 results of one class; the metric looks at the best 100.")
    kept = set(image_ids)
    target = unused_folder(Path("runs") / f"eval-{Path(results).stem}") if output is None else Path(output)
    write_evaluation(
        truth,
        [result for result in found if result["image_id"] in kept],
        target,
        about=described(
            model=results,
            crop=None,
            weights=None,
            data=str(file),
            split=None if alone else split,
            device="none",
            evaluator=evaluator,
        ),
        split=data,
        image_ids=image_ids,
        evaluator=evaluator,
        pictures=pictures,
        min_score=min_score,
        notes=notes,
    )
    _say_where(target)


def _beside(checkpoint: str | None, name: str, short: str) -> Path:
    """Where results go: into the run's folder, if it is a run's checkpoint."""
    if checkpoint is not None and Path(checkpoint).is_file():
        return run_folder(Path(checkpoint)) / f"eval-{short}"
    return Path("runs") / name


def _say_where(folder: Path) -> None:
    print(f"\nreport.html, report.json, scores.json and detections.json are in {folder}/")
