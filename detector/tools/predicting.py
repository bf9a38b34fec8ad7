"""What ``tools/predict.py`` does."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from detector.data.annotations import Annotations, read_annotations
from detector.data.categories import match_ids, mixed_up, quoted
from detector.data.images import Orientation
from detector.errors import DataError, ModelError, exit_on_user_error
from detector.evaluation.report import newest_report
from detector.pretrained.description import Crop
from detector.pretrained.detector import Detector
from detector.pretrained.predict_files import PredictOptions, count_by_suffix, find_images, predict_files
from detector.run_folders import run_folder, unused_folder
from detector.text import clean
from detector.tools.source import load_source, pick_device, switch_refinement


def predict(
    images: Sequence[str],
    *,
    checkpoint: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    refine: Literal["on", "off"] | None = None,
    output: str | None = None,
    min_score: float | Literal["auto"] = 0.5,
    annotations: str | None = None,
    orientation: Orientation = "upright",
    pictures: bool = True,
    batch_size: int = 8,
    workers: int = 2,
    max_pixels: int | None = None,
    device: str | None = None,
) -> int:
    """Detect objects in image files, as ``tools/predict.py --help`` says. Returns the exit code."""
    with exit_on_user_error():
        known = None if annotations is None else read_annotations(annotations, labelled=False)
        found = find_images(images, known)
        detector, called = load_source(checkpoint, model, weights, crop)
        switch_refinement(detector, refine)
        category_ids = None if known is None else _ids_in(known, detector)
        least: float | list[float]
        least = _scores_of_report(called, detector) if min_score == "auto" else min_score
        detector.to(pick_device(device))
        target = unused_folder(Path("runs") / "predict") if output is None else Path(output)
        done = predict_files(
            detector,
            found.files,
            target,
            PredictOptions(
                min_score=least,
                pictures=pictures,
                batch_size=batch_size,
                workers=workers,
                orientation=orientation,
                max_pixels=max_pixels,
                category_ids=category_ids,
            ),
            head={
                "model": called,
                "crop": detector.crop,
                "left_out": Counter(path.suffix.lower() for path in found.skipped),
            },
        )
        count = sum(len(image["detections"]) for image in done.images)
        of = f" of {len(found.files):,}" if len(done.images) < len(found.files) else ""
        what = "pictures/, predictions.json and detections.json" if pictures else "predictions.json and detections.json"
        print(f"{count:,} objects in {len(done.images):,}{of} images; {what} are in {target}/")
        for remark, paths in done.remarks.items():
            name = clean(str(paths[0])) + (" and others" if len(paths) > 1 else "")
            print(f"{len(paths):,} of the images ({name}): {remark}", file=sys.stderr)
        if found.skipped:
            print(
                f"left out: {count_by_suffix(found.skipped)} (not read here; convert them to JPEG, PNG or TIFF)",
                file=sys.stderr,
            )
        if done.broken:
            print(f"{len(done.broken):,} images could not be read, see above", file=sys.stderr)
        if done.stopped:
            print("interrupted", file=sys.stderr)
            return 130
        return 3 if done.broken else 0


def _scores_of_report(called: str, detector: Detector) -> list[float]:
    """The score of each label from which on F1 is highest, in the last report of these weights; says which."""
    home = Path(called)
    folders = [run_folder(home), Path("runs")] if home.exists() else [Path("runs")]
    digest = detector.digest()
    reports = [report for folder in folders if (report := newest_report(folder, digest)) is not None]
    if not reports:
        places = " and ".join(f"{folder}/" for folder in folders)
        raise ModelError(
            f"--min_score auto: tools/eval.py has not scored these weights (of all report.json in {places} none is of "
            "them); run it first, or give a score"
        )
    newest = max(reports, key=lambda report: str(report.about.get("time", "")))
    which = f"--min_score auto: the report of {clean(str(newest.about.get('time', '')))}"
    points = newest.operating_points
    if points == {}:
        raise ModelError(f"{which} has no scores to take; run tools/eval.py again, or give a score")
    try:
        rows = points["by_class"]
        ids = match_ids(detector, [(row["id"], row["name"]) for row in rows])  # as tools/eval.py did
        if points["mean"] is None:
            raise ModelError(f"{which} says that nothing was found right, so no score is best; give one")
        overall = points["mean"]["score"]
        of_class = {row["id"]: row["score"] for row in rows if row["score"] is not None}
        scores = [of_class.get(category, overall) for category in ids]
        if not all(type(score) in (int, float) and 0 <= score <= 1 for score in (*scores, overall)):
            raise ValueError("a score must be a number from 0 to 1")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise DataError(f"{which} is damaged: operating_points: {type(error).__name__} {error}") from None
    span = f"{min(scores):.3f}" if len(set(scores)) == 1 else f"{min(scores):.3f} to {max(scores):.3f}, by class"
    about = newest.about
    on = f" on {about['images']} images of {clean(str(about['data']))}" if {"images", "data"} <= about.keys() else ""
    print(f"{which}: scores from {span} on, where F1 was highest{on}")
    return scores


def _ids_in(annotations: Annotations, detector: Detector) -> Sequence[int | None] | None:
    """The annotations' ids of the detector's classes, by name, so that its results can be scored with them."""
    try:
        ids = match_ids(detector, [(category["id"], category["name"]) for category in annotations.categories])
    except (DataError, ModelError) as error:
        print(f"Note: {error}. The category ids of the results are the detector's own.", file=sys.stderr)
        return None
    pairs = zip(detector.category_ids, detector.category_names, ids, strict=True)
    if left := [name for own, name, found in pairs if own is not None and found is None]:
        why = mixed_up(left, [category["name"] for category in annotations.categories])
        print(
            f"Note: the annotations have no {quoted(left)}: of those detections.json has none"
            f"{f' ({why})' if why else ''}.",
            file=sys.stderr,
        )
    return ids
