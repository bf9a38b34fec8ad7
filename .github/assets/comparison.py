"""Compare ways to train a detector from the same start: stock, cascade, and refinement, on four data sets.

    python .github/assets/comparison.py FOLDER                                  every row of four data sets
    python .github/assets/comparison.py FOLDER digits/stock/0 digits/cascade/0   some rows
    python .github/assets/comparison.py FOLDER --table                          the finished rows as tables
    python .github/assets/comparison.py FOLDER --time digits                    time of steps and images

A row is DATA/METHOD/SEED. DATA is digits, bccd, raccoon or deeppcb, which learn from train and are scored on val. To
choose settings, digits-part, bccd-part, ... learn from three quarters of train and are scored on the rest. deeppcb640
is deeppcb at its full size, for eight epochs; it runs only if named. All data but digits are read from DETECTOR_DATA.
FOLDER/results.json gets each row when it is done, and a second start skips it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cascade import make_cascade
from tqdm import tqdm

from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.data.folder import find_root
from detector.data.results import Result
from detector.evaluation.metric import ALL_SIZES, match
from detector.evaluation.truth import coco_of
from detector.files import write_json
from detector.tools import refine
from detector.tools.training_cli import Training, parse, training_parser
from detector.training.task import DetectionTask

SCORES = ("AP", "AP50", "AP75", "AP90")
SEEDS = (0, 1, 2)
SETS = ("digits", "bccd", "raccoon", "deeppcb")
ROUNDS = 7  # of the timing
BCCD = ["--config=configs/bccd.yaml"]
WHOLE = [
    "--data.augmentation=[RandomHorizontalFlip,RandomVerticalFlip]",  # a circuit board has no upright position
    "--data.min_size=[320,480,640]",  # in training; 640 in testing
    "--data.max_size=640",
    "--data.batch_size=1",  # so that images are not padded to the largest of a batch
    "--model.optimizer.lr_rule=sqrt",
    "--model.detector.min_size=640",
    "--model.detector.max_size=640",
]
DATA = {
    "digits": ["--config=configs/quickstart.yaml"],
    "bccd": BCCD,
    "raccoon": [*BCCD, "--model.detector.anchor_sizes=[32,64,128,192,256]"],
    "deeppcb": [*BCCD, "--trainer.max_epochs=1"],  # at 320 of 640 pixels, to save time
    "deeppcb640": [*BCCD, "--trainer.max_epochs=8", *WHOLE],
}
OFF = ["--model.box_gradient={crop: 0, coder: 0}"]
DETACHED = ["--model.refinement={box_gradient: {crop: 0, coder: 0}}"]
THROUGH = ["--model.refinement={box_gradient: {crop: 1, coder: 1, bound: null}}"]
BOUNDED = ["--model.box_gradient={crop: 1, coder: 1, bound: 0.1}"]
PLAIN = ["--model.refinement=null"]
METHODS = {
    "stock": ["--model.crop=roi_align", *OFF, *PLAIN],
    "off": [*OFF, *PLAIN],  # swapped
    "bounded": [*BOUNDED, *PLAIN],  # swapped, with the box gradient
    "longer": [*OFF, *PLAIN],  # "off" with 1.33 to 2 times the epochs
    "cascade": [*OFF, *PLAIN],
    "afterwards": [],  # "off" of the same seed, then tools/refine.py
    "detached": [*OFF, *DETACHED],  # refinement from the start
    "through": [*OFF, *THROUGH],  # and through the boxes of its iterations
    "proposals": [*BOUNDED, *DETACHED],  # "detached", and from the box head's losses into the proposals
}
LONGER = {"digits": 6, "bccd": 12, "raccoon": 12, "deeppcb": 2, "deeppcb640": 12}  # epochs


class CascadeTask(DetectionTask):
    """Trains a Cascade R-CNN."""

    def configure_model(self) -> None:
        is_new = self.model is None
        super().configure_model()
        if is_new:
            make_cascade(self.model)


def folder_of(work: Path, data: str) -> Path:
    """The folder of a data set, which is written if it is generated or a part."""
    name, _, part = data.partition("-")
    root = work / "data" / name if name == "digits" else find_root(None, name.removesuffix("640")).resolve()
    if not root.exists():
        write_digits(root)
    if not part:
        return root
    folder = work / "data" / data
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    order = np.random.default_rng(0).permutation([image["id"] for image in content["images"]]).tolist()
    for split, ids in (("val", {*order[: len(order) // 4]}), ("train", {*order[len(order) // 4 :]})):
        kept = {
            "images": [one for one in content["images"] if one["id"] in ids],
            "annotations": [one for one in content["annotations"] if one["image_id"] in ids],
        }
        write_json(folder / "annotations" / f"instances_{split}.json", content | kept)
        if not (folder / split).exists():
            (folder / split).symlink_to(root / "train")
    return folder


def parsed(work: Path, row: str) -> Training:
    """The task, the data and the trainer of a row."""
    data, method, seed = row.split("/")
    settings = [*DATA[data.partition("-")[0]], *METHODS[method], f"--seed_everything={seed}"]
    settings += [f"--data.root={folder_of(work, data)}", "--data.dataset=null", f"--run_dir={work / 'runs' / row}"]
    if method == "longer":
        settings.append(f"--trainer.max_epochs={LONGER[data.partition('-')[0]]}")
    settings += ["--trainer.check_val_every_n_epoch=1000", "--trainer.enable_model_summary=false"]
    training = parse(training_parser(), settings)
    if method == "cascade":
        training.model.__class__ = CascadeTask
    return training


def refined_afterwards(work: Path, row: str) -> dict[str, float]:
    """Train a refinement of the finished row "off" of the same data and seed."""
    data, _, seed = row.split("/")
    start = time.perf_counter()
    scores = refine(
        checkpoint=work / "runs" / data / "off" / seed,
        root=folder_of(work, data),
        train_split="train",
        split="val",
        flip=not data.startswith("digits"),
        seed=int(seed),
        run_dir=work / "runs" / row,
    )
    assert scores is not None
    return {name: scores[name] for name in SCORES} | {"minutes": (time.perf_counter() - start) / 60}


def train(work: Path, row: str) -> dict[str, float]:
    """Train a detector, and return its scores, and the minutes of its training."""
    if row.split("/")[1] == "afterwards":
        return refined_afterwards(work, row)
    training = parsed(work, row)
    start = time.perf_counter()
    training.trainer.fit(training.model, datamodule=training.datamodule)
    minutes = (time.perf_counter() - start) / 60
    training.trainer.validate(training.model, datamodule=training.datamodule, verbose=False)
    metrics = training.trainer.callback_metrics
    scores = {name: float(metrics[f"val/{name}"]) for name in SCORES}
    return scores | {"AP33": ap33(training.datamodule.val_set, training.model.results), "minutes": minutes}


def ap33(split: CocoDetection, results: list[Result]) -> float:
    """COCO's AP at an IoU of 0.33, the IoU of DeepPCB's paper."""
    scorer = match(coco_of(split.annotations), results, iouThrs=np.array([0.33]), **ALL_SIZES)
    precision = scorer.eval["precision"][0, :, :, 0, -1]
    return float(precision[precision > -1].mean())


def timing(work: Path, data: str) -> str:
    """Time training steps and images of the trained detectors in turn, as ratios to the stock model."""
    models: dict[str, Any] = {}
    for method in ("stock", "off", "cascade", "detached", "through", "proposals"):
        weights = work / "runs" / data / ("off" if method == "stock" else method) / "0" / "checkpoints" / "last.ckpt"
        if weights.exists():
            training = parsed(work, f"{data}/{method}/0")
            training.model.trainer = training.trainer
            training.trainer.datamodule = training.datamodule  # type: ignore[attr-defined]
            training.datamodule.workers = 0
            training.datamodule.setup()
            training.model.configure_model()
            training.model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
            models[method] = training.model.model
    if "stock" not in models:
        raise SystemExit(f"train {data}/off/0 first")
    images, targets = training.datamodule.on_after_batch_transfer(next(iter(training.datamodule.train_dataloader())), 0)
    spent: dict[str, list[tuple[float, float]]] = {method: [] for method in models}
    for _ in tqdm(range(ROUNDS + 1), unit="round"):
        for method, model in models.items():
            start = time.perf_counter()
            sum(model.train()(images, [dict(target) for target in targets]).values()).backward()
            between = time.perf_counter()
            with torch.no_grad():
                for image in images:
                    model.eval()([image])
            spent[method].append((between - start, (time.perf_counter() - between) / len(images)))
    lines = ["| method | step | image |\n|---|---|---|"]
    for method, seconds in spent.items():
        ratios = np.array(seconds[1:]) / np.array(spent["stock"][1:])
        low, middle, high = np.percentile(ratios, [0, 50, 100], axis=0)
        cells = [f"{m:.2f} ({a:.2f}-{b:.2f})" for a, m, b in zip(low, middle, high)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    step, image = np.median(spent["stock"][1:], axis=0)
    return "\n".join([*lines, f"stock: a step of {len(images)} images {step:.2f} s, an image {1000 * image:.0f} ms"])


def table(results: dict[str, dict[str, float]], data: str) -> str:
    """Mean and standard deviation over the seeds."""
    lines = [f"| {data} | {' | '.join(SCORES)} | runs | minutes |\n{'|---' * (len(SCORES) + 3)}|"]
    for method in METHODS:
        rows = [one for row, one in results.items() if row.rpartition("/")[0] == f"{data}/{method}"]
        if rows:
            cells = [
                f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
                for values in ([row[name] for row in rows] for name in SCORES)
            ]
            minutes = np.median([row["minutes"] for row in rows])
            lines.append(f"| {method} | {' | '.join(cells)} | {len(rows)} | {minutes:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="FOLDER")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--table", action="store_true", help="only print the finished rows")
    parser.add_argument("--time", choices=DATA, help="measure the finished rows of seed 0 of this data")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.time is not None:
        print(timing(work, options.time))
        return
    file = work / "results.json"
    rows = options.rows or [f"{data}/{method}/{seed}" for seed in SEEDS for data in SETS for method in METHODS]
    for row in () if options.table else tqdm(rows, unit="row"):
        results = json.loads(file.read_text()) if file.exists() else {}
        if row not in results:
            found = train(work, row)
            results = json.loads(file.read_text()) if file.exists() else {}
            write_json(file, results | {row: found}, indent=1)
            print(row, found)
    results = json.loads(file.read_text()) if file.exists() else {}
    for data in sorted({row.partition("/")[0] for row in results}):
        print(f"\n{table(results, data)}")


if __name__ == "__main__":
    main()
