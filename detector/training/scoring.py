"""Score a split from end to end: predict, evaluate, write, draw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from detector.coco import CocoDetection
from detector.drawing import draw, sheet
from detector.evaluation import Result, evaluate, predict
from detector.training.data import collate
from detector.training.files import write_json

EXAMPLES = 4


def score_split(
    model: nn.Module,
    split: CocoDetection,
    folder: Path,
    *,
    category_ids: Sequence[int | None] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    workers: int = 2,
) -> dict[str, float]:
    """Score a detector on a split, print pycocotools' table, and write everything to a folder.

    Args:
        model: a detector on ``device``.
        split: the data, without a transform.
        folder: gets ``scores.json``, ``detections.json`` (COCO's results format) and ``examples.png`` (a few
            images, the truth on the left, detections on the right).
        category_ids: the category id of each label, from label 1 on; those of ``split`` by default.
        device: where to run.
        batch_size: images at a time.
        workers: processes that read images.

    Returns:
        The scores, as :func:`~detector.evaluation.evaluate`.
    """
    category_ids = split.category_ids if category_ids is None else category_ids
    loader: DataLoader[Any] = DataLoader(
        split,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
    with tqdm(total=len(split), desc="scoring", unit="image", leave=False) as bar:
        results = predict(model, loader, category_ids, device=device, on_batch=bar.update)
    return write_scores(split, results, folder)


def write_scores(split: CocoDetection, results: list[Result], folder: Path) -> dict[str, float]:
    """Score results, print pycocotools' table, and write what :func:`score_split` does."""
    scores, table = evaluate(split.coco, results)
    print(table)
    print(f" Average Precision  (AP) @[ IoU=0.90      | area=   all | maxDets=100 ] = {scores['AP90']:0.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "detections.json", results)
    write_json(folder / "scores.json", scores)
    draw_examples(split, results, folder / "examples.png")
    return scores


def draw_examples(split: CocoDetection, results: list[Result], path: Path) -> None:
    """Write a picture of a few images of a split: the truth on the left, detections on the right."""
    labels = {category: label for label, category in enumerate(split.category_ids, start=1)}
    # Spread over the split, those with objects first.
    order = sorted(range(len(split)), key=lambda index: not len(split.targets[index][1]))
    chosen = order[:: max(len(order) // EXAMPLES, 1)][:EXAMPLES]
    rows = []
    for index in chosen:
        image, target = split[index]
        found = [result for result in results if result["image_id"] == int(target["image_id"])]
        boxes = torch.tensor([result["bbox"] for result in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        detections = {
            "boxes": boxes,
            "labels": torch.tensor([labels[result["category_id"]] for result in found], dtype=torch.int64),
            "scores": torch.tensor([result["score"] for result in found]),
        }
        rows.append([draw(image, target, split.category_names), draw(image, detections, split.category_names)])
    if rows:
        sheet(rows, ["truth", "detections with a score of 0.5 or more"]).save(path)
