"""The command line of ``tools/predict.py``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pycocotools.coco import COCO
from tqdm import tqdm

from detector.categories import match_ids
from detector.coco import read_coco
from detector.command_line.source import load_source, pick_device
from detector.errors import DataError, ModelError, in_a_sentence
from detector.folders import unused_folder
from detector.image_files import find_images, predict_images
from detector.names import listed
from detector.pretrained import Crop, PretrainedDetector


def predict(
    images: Sequence[str],
    *,
    checkpoint: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    crop: Crop | None = None,
    output: str | None = None,
    min_score: float = 0.5,
    annotations: str | None = None,
    pictures: bool = True,
    batch_size: int = 8,
    workers: int = 2,
    device: str | None = None,
) -> int:
    """Detect objects in image files, as ``tools/predict.py --help`` says. Returns the exit code."""
    with in_a_sentence():
        known = None if annotations is None else read_coco(annotations)
        files = find_images(images, known)
        detector, called = load_source(checkpoint, model, weights, crop)
        category_ids = None if known is None else _ids_in(known, detector)
        detector.to(pick_device(device))
        target = unused_folder(Path("runs") / "predict") if output is None else Path(output)
        with tqdm(total=len(files), desc="detecting", unit="image", leave=False, disable=None) as bar:

            def report(broken: str | None) -> None:
                bar.update()
                if broken is not None:
                    tqdm.write(f"skipped: {broken}", file=sys.stderr)

            done = predict_images(
                detector,
                files,
                target,
                min_score=min_score,
                pictures=pictures,
                batch_size=batch_size,
                workers=workers,
                category_ids=category_ids,
                about={"model": called, "crop": detector.crop},
                on_image=report,
            )
        found = sum(len(image["detections"]) for image in done.images)
        of = f" of {len(files):,}" if len(done.images) < len(files) else ""
        what = "pictures/, predictions.json and detections.json" if pictures else "predictions.json and detections.json"
        print(f"{found:,} objects in {len(done.images):,}{of} images; {what} are in {target}/")
        if done.broken:
            print(f"{len(done.broken):,} images could not be read, see above", file=sys.stderr)
        if done.stopped:
            print("interrupted", file=sys.stderr)
            return 130
        return 3 if done.broken else 0


def _ids_in(annotations: COCO, detector: PretrainedDetector) -> Sequence[int | None] | None:
    """The annotations' ids of the detector's classes, by name, so that its results can be scored with them."""
    try:
        ids = match_ids(detector, [(i, annotations.cats[i]["name"]) for i in sorted(annotations.cats)])
    except (DataError, ModelError) as error:
        print(f"Note: {error}. The category ids of the results are the detector's own.", file=sys.stderr)
        return None
    pairs = zip(detector.category_ids, detector.category_names, ids, strict=True)
    if left := [name for own, name, found in pairs if own is not None and found is None]:
        print(f"Note: the annotations have no {listed(left)}: of those detections.json has none.", file=sys.stderr)
    return ids
