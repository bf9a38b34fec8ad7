"""The command line of ``tools/predict.py``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from detector.coco import read_coco
from detector.command_line.source import load_source, pick_device
from detector.errors import in_a_sentence
from detector.folders import unused_folder
from detector.image_files import find_images, predict_images
from detector.pretrained import Crop


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
        files = find_images(images, None if annotations is None else read_coco(annotations))
        detector, called = load_source(checkpoint, model, weights, crop)
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
