"""tools/predict.py: detect objects in image files."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from detector.choices import Crop, Orientation
from detector.errors import DataError, ModelError
from detector.tools.cli import run_tool

if TYPE_CHECKING:
    from detector.data.annotations import Annotations
    from detector.pretrained import Detector
    from detector.pretrained.predict_files import Predicted


def predict(
    images: Sequence[str],
    *,
    checkpoint: str | Path | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    refine: Literal["on", "off"] | None = None,
    output: str | Path | None = None,
    min_score: ClosedUnitInterval | Literal["auto"] = 0.5,
    pictures: bool = True,
    annotations: str | None = None,
    orientation: Orientation = "upright",
    max_pixels: PositiveInt | None = None,
    batch_size: PositiveInt = 8,
    workers: NonNegativeInt = 2,
    device: str | None = None,
) -> "Predicted":
    """Detect objects in images. Writes pictures with the detections, and the detections as JSON.

    The output folder gets pictures/, predictions.json (the detections of each image, by class name) and
    detections.json (all detections in COCO's results format, which tools/eval.py --results scores). The pictures of an
    earlier run in the same folder are deleted.

    Images are read in all formats that Pillow reads here: JPEG, PNG, GIF, BMP, TIFF, WebP, PPM, JPEG 2000 and AVIF.
    Files of other image formats in a folder are counted at the end. Only the first frame or page of an image is read.
    Images of 16 bits or floats are scaled to 8 bits, as in training; predictions.json names them.

    Examples:
        python tools/predict.py photo.jpg --checkpoint runs/quickstart
        python tools/predict.py photos "more/*.png" --checkpoint FOLDER --output found --min_score 0.3
        python tools/predict.py photos --checkpoint runs/bccd --min_score auto
        python tools/predict.py val2017 --model fasterrcnn_resnet50_fpn --weights DEFAULT --annotations instances.json

    Args:
        images: Image files, folders (with their subfolders) and patterns.
        checkpoint: A checkpoint, its run folder (the last checkpoint), a saved folder, or OWNER/NAME on Hugging Face.
        model: A torchvision detector, such as fasterrcnn_resnet50_fpn. Needs weights.
        weights: A state_dict file for the model, or the name of published weights, such as DEFAULT.
        crop: Crop with the affine crop or with RoIAlign. Default: as the detector was trained.
        refine: Refine the boxes. Default: on, if the detector has one.
        output: The output folder. Default: runs/predict, with a number if that exists.
        min_score: Minimum score of detections in pictures and predictions.json. auto takes the score with the highest
            F1 per class from the last report of tools/eval.py on these weights, beside the checkpoint or in runs/.
        pictures: Write pictures.
        annotations: A COCO file that gives the image ids, by file name. Images and categories are enough.
        orientation: upright applies the EXIF orientation of photographs; stored ignores it. Where the annotated size
            fits only one of the two, that one is used.
        max_pixels: Maximum number of pixels of an image, which takes about 40 bytes of memory per pixel. Default:
            89478485, Pillow's limit.
        batch_size: Maximum number of images per batch. A batch holds images of one size.
        workers: Number of processes that read images.
        device: cpu, cuda, cuda:1, ... Default: cuda if available.

    Returns:
        The detections, and the images that could not be read.

    Exit codes:
        0: all images were read.
        1: wrong input, or a file cannot be written.
        2: wrong command line.
        3: some images could not be read. predictions.json names them.
        130: interrupted. The detections so far are written.
    """
    from detector.data.annotations import read_annotations
    from detector.pretrained.predict_files import ImageFiles, find_images, listed_suffixes, predict_files
    from detector.run_folders import unused_folder
    from detector.text import clean
    from detector.tools.source import load_source, pick_device, switch_refinement

    known = None if annotations is None else read_annotations(annotations, labelled=False)
    files, skipped = find_images(images, known)
    detector, called = load_source(checkpoint, model, weights, crop)
    switch_refinement(detector, refine)
    least = _best_scores(detector, called) if min_score == "auto" else min_score
    if known is not None:
        _take_category_ids(detector, known)
    detector.to(pick_device(device))
    folder = unused_folder(Path("runs", "predict")) if output is None else Path(output)
    done = predict_files(
        detector,
        ImageFiles(files, orientation=orientation, max_pixels=max_pixels),
        folder,
        min_score=least,
        pictures=pictures,
        batch_size=batch_size,
        workers=workers,
        head={"model": called, "crop": detector.crop, "left_out": skipped},
    )
    count = sum(len(image["detections"]) for image in done.images)
    of = f" of {len(files):,}" if len(done.images) < len(files) else ""
    written = f"{'pictures/, ' if pictures else ''}predictions.json and detections.json are in {folder}/"
    print(f"{count:,} objects in {len(done.images):,}{of} images; {written}")
    for remark in dict.fromkeys(remark for image in done.images for remark in image["remarks"]):
        first, *others = (image["path"] for image in done.images if remark in image["remarks"])
        name = clean(first) + (" and others" if others else "")
        print(f"{len(others) + 1:,} of the images ({name}): {remark}", file=sys.stderr)
    if skipped:
        print(f"left out: {listed_suffixes(skipped)} (convert them to JPEG, PNG or TIFF)", file=sys.stderr)
    if done.broken:
        print(f"{len(done.broken):,} images could not be read, see above", file=sys.stderr)
    if done.stopped:
        print("interrupted", file=sys.stderr)
    return done


def _best_scores(detector: "Detector", called: str) -> list[float]:
    """Return the score with the highest F1 for each label, from the last report on these weights, and print it."""
    from detector.data.categories import match_ids
    from detector.evaluation.report import newest_report
    from detector.run_folders import run_folder
    from detector.text import clean

    auto: Any = {"setting": "min_score", "value": "auto"}
    folders = [run_folder(Path(called)), Path("runs")] if Path(called).exists() else [Path("runs")]
    made = {"weights": detector.digest(), "refinement": detector.refinement and detector.refinement.description}
    reports = [report for folder in folders if (report := newest_report(folder, **made)) is not None]
    if not reports:
        places = " or ".join(f"{folder}/" for folder in folders)
        which = f"these weights (refinement: {made['refinement']})" if made["refinement"] else "these weights"
        raise ModelError(f"no report.json in {places} is on {which}; run tools/eval.py, or give a score", **auto)
    report = max(reports, key=lambda report: str(report.about.get("time", "")))
    about = " on ".join(clean(str(report.about[name])) for name in ("time", "data") if name in report.about)
    points = report.operating_points
    if not points.get("mean"):
        raise ModelError(f"the report of {about} has no best score; give one", **auto)
    ids = match_ids(detector, [(row["id"], row["name"]) for row in points["by_class"]])
    by_id = {row["id"]: row["score"] for row in points["by_class"] if row["score"] is not None}
    scores = [by_id.get(category, points["mean"]["score"]) for category in ids]
    span = " to ".join(dict.fromkeys((f"{min(scores):.3f}", f"{max(scores):.3f}")))
    print(f"minimum score {span}: the highest F1 of each class in the report of {about}")
    return scores


def _take_category_ids(detector: "Detector", annotations: "Annotations") -> None:
    """Give the detector's classes their ids in the annotations, by name, so that its results can be scored."""
    from detector.data.categories import match_ids, mixed_up, quoted

    theirs = [(category["id"], category["name"]) for category in annotations.categories]
    try:
        ids = match_ids(detector, theirs)
    except (DataError, ModelError) as error:
        print(f"Note: {error}. The category ids of the results are the detector's own.", file=sys.stderr)
        return
    classes = zip(detector.category_ids, detector.category_names, ids, strict=True)
    if missing := [name for own, name, found in classes if own is not None and found is None]:
        why = mixed_up(missing, [name for _, name in theirs])
        what = f"the annotations have no {quoted(missing)}{f' ({why})' if why else ''}"
        print(f"Note: {what}; detections.json leaves them out.", file=sys.stderr)
    detector.category_ids = list(ids)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return run_tool(predict, arguments, exit_code=lambda done: 130 if done.stopped else 3 if done.broken else 0)
