"""Train on jittered boxes, mend these boxes by the trained refinement, and train again on the mended boxes.

    python .github/assets/noisy_labels.py FOLDER                                          every row
    python .github/assets/noisy_labels.py FOLDER digits-0-noisy-0.2 digits-0-mended-0.2   some rows

A row is DATA-SEED-LABELS-NOISE. The corners of each training box move by up to NOISE times its sides. A detector with a
refinement learns from these noisy boxes. Then each noisy box is refined as if it were a detection of the same training
image: by refinement iterations, or by gradient ascent on the predicted IoU, which is only reported. A new detector
learns from the boxes of the iterations, the mended ones. All are scored on the val split, whose boxes are clean.

FOLDER/results.json gets each row when it is done, and a second start skips these rows. bccd is read from DETECTOR_DATA.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_convert, clip_boxes_to_image
from tqdm import tqdm

from detector.data.digits import write_digits
from detector.data.folder import DataFolder, find_root
from detector.files import write_json
from detector.pretrained import load_detector
from detector.refinement.boxes import paired_iou
from detector.refinement.feature_cache import extract_features
from detector.refinement.inference import refine_detections

REPOSITORY = Path(__file__).parents[2]
CONFIGS = {"digits": "configs/quickstart.yaml", "bccd": "configs/bccd.yaml"}
SCORES = ("AP", "AP50", "AP75", "AP90")
ITERATIONS = {"iterations": 2, "ascent_steps": 0}  # chosen before the first run
ASCENT = {"iterations": 0, "ascent_steps": 8}
Content = dict[str, Any]  # of an annotation file


class Row(NamedTuple):
    """One training."""

    data: str
    seed: int
    labels: str  # clean, noisy or mended
    noise: float

    def __str__(self) -> str:
        return "-".join(map(str, self))


ROWS = [
    Row(data, seed, labels, noise)
    for data, seed in (("digits", 0), ("bccd", 0), ("digits", 1), ("digits", 2))
    for labels, noise in (("noisy", 0.2), ("mended", 0.2), ("clean", 0.0), ("noisy", 0.1), ("mended", 0.1))
]


def source(work: Path, data: str) -> Path:
    """The folder with the clean data."""
    if data != "digits":
        return find_root(None, data).resolve()
    root = work / "data" / data
    if not root.exists():
        write_digits(root)
    return root


def jittered(content: Content, boxes: Tensor, row: Row) -> Tensor:
    """Move each coordinate by a uniform draw of at most the noise times the side along its axis."""
    draws = np.random.default_rng([row.seed, round(100 * row.noise)]).uniform(-row.noise, row.noise, boxes.shape)
    moved = boxes + torch.from_numpy(draws).float() * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    images = [one["image_id"] for one in content["annotations"]]
    return torch.stack([clip_boxes_to_image(box, sizes[image]) for box, image in zip(moved, images)])


@torch.no_grad()
def mended(run: Path, root: Path, content: Content, boxes: Tensor, settings: dict[str, int]) -> Tensor:
    """Refine boxes as if the detector of a run had found them."""
    detector = load_detector(run).eval()
    refinement: Any = detector.refinement
    refinement.config = replace(refinement.config, iou_power=0.0, **settings)  # without rescoring the order stays
    data = DataFolder(root).dataset("train")
    image_of = torch.tensor([one["image_id"] for one in content["annotations"]])
    moved = boxes.clone()
    for index, image_id in enumerate(tqdm(data.image_ids, unit="image", desc=str(settings))):
        rows = image_of == image_id
        if rows.any():
            image = data[index][0]
            features, _, size = extract_features(detector.model, image)
            original = (image.shape[-2], image.shape[-1])
            start, ones = resize_boxes(boxes[rows], original, size), torch.ones(int(rows.sum()))
            (refined,), _, _ = refine_detections(refinement, features, ([start], [ones], [ones.long()]), [size])
            moved[rows] = clip_boxes_to_image(resize_boxes(refined, size, original), original)
    return moved


def write(root: Path, clean: Path, content: Content, boxes: Tensor) -> None:
    """Write a data set with other training boxes. Its images and its val split are links to the clean ones."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name in ("train", "val", "annotations/instances_val.json"):
        if not (root / name).exists():
            (root / name).symlink_to(clean / name)
    annotations = []
    for one, (x, y, width, height) in zip(content["annotations"], box_convert(boxes, "xyxy", "xywh").tolist()):
        kept = {name: value for name, value in one.items() if name != "segmentation"}  # it would tell the clean box
        annotations.append(kept | {"bbox": [x, y, width, height], "area": width * height})
    write_json(root / "annotations" / "instances_train.json", content | {"annotations": annotations})


def train(row: Row, root: Path, run: Path, epochs: int | None) -> dict[str, float]:
    """Run ``tools/train.py``, which resumes an unfinished run, and return its scores."""
    command = [sys.executable, "tools/train.py", "--config", CONFIGS[row.data], "--seed_everything", str(row.seed)]
    command += ["--run_dir", str(run), "--ckpt_path", "last", "--model.refinement", "{iterations: 2}"]
    command += ["--data.root", str(root), "--trainer.enable_progress_bar", "false"]
    command += [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
    start = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    scores = json.loads((run / "scores.json").read_text())
    return {name: scores[name] for name in SCORES} | {"minutes": (time.perf_counter() - start) / 60}


def result(row: Row, work: Path, epochs: int | None) -> dict[str, Any]:
    root, clean_root, teacher = work / "data" / str(row), source(work, row.data), str(row._replace(labels="noisy"))
    content = json.loads((clean_root / "annotations" / "instances_train.json").read_text())
    clean = box_convert(torch.tensor([one["bbox"] for one in content["annotations"]]).float(), "xywh", "xyxy")
    boxes = clean if row.labels == "clean" else jittered(content, clean, row)
    found: dict[str, Any] = row._asdict()
    if row.labels == "mended":
        places = work / "runs" / teacher, work / "data" / teacher
        found["by ascent"] = float(paired_iou(mended(*places, content, boxes, ASCENT), clean).mean())
        boxes = mended(*places, content, boxes, ITERATIONS)
    found["their IoU"] = float(paired_iou(boxes, clean).mean())
    write(root, clean_root, content, boxes)
    return found | train(row, root, work / "runs" / str(row), epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="FOLDER")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--epochs", type=int, help="instead of those of the configurations")
    options = parser.parse_args()
    work, file = options.work.resolve(), options.work / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    if unknown := set(options.rows) - {*map(str, ROWS)}:
        parser.error(f"unknown rows {sorted(unknown)}; there are {', '.join(map(str, ROWS))}")
    for row in ROWS:
        if str(row) in (options.rows or map(str, ROWS)) and str(row) not in results:
            results[str(row)] = result(row, work, options.epochs)
            write_json(file, results, indent=1)
    columns = ["their IoU", "by ascent", *SCORES, "minutes"]
    print(f"| {' | '.join((*Row._fields, *columns))} |\n{'|---' * (len(Row._fields) + len(columns))}|")
    for row in sorted(ROWS, key=lambda row: (row.data, row.seed, row.noise, row.labels == "mended")):
        if (one := results.get(str(row))) is not None:
            cells = [*map(str, row), *(f"{one[name]:.3f}" if name in one else "" for name in columns)]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
