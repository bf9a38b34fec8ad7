"""Images of a split drawn with their truth and with what was detected in them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from detector.coco import CocoDetection
from detector.drawing import draw, sheet
from detector.errors import DataError
from detector.evaluation.metric import Result
from detector.evaluation.page import Picture

EXAMPLES = 4
SHOWN = 6  # of the worst images on a page, and of the best


def draw_examples(split: CocoDetection, results: list[Result], path: Path) -> None:
    """Write a picture of a few images of a split: the truth on the left, detections on the right."""
    # Spread over the split, those with objects first.
    order = sorted(range(len(split)), key=lambda index: not len(split.targets[index][1]))
    chosen = order[:: max(len(order) // EXAMPLES, 1)][:EXAMPLES]
    rows = [_pair(split, results, index, 0.5) for index in chosen]
    if rows:
        sheet(rows, ["truth", "detections with a score of 0.5 or more"]).save(path)


def worst_and_best(split: CocoDetection, results: list[Result], report: dict[str, Any]) -> list[Picture]:
    """The pictures of a page: images that went worst, and of those with objects the ones that went best.

    One that cannot be read is left out, and the report's notes say so.
    """
    outcomes = report["images"]
    best = [one for one in reversed(outcomes) if one["objects"]]
    best.sort(key=lambda one: (-one["f1"], -one["objects"]))
    chosen: Iterable[tuple[Literal["worst", "best"], dict[str, Any]]] = [
        *(("worst", one) for one in outcomes[:SHOWN] if one["f1"] < 1),
        *(("best", one) for one in best[:SHOWN] if one["f1"] > 0),
    ]
    index_of = {image_id: index for index, image_id in enumerate(split.image_ids)}
    min_score = report["confusion"]["min_score"]
    pictures = []
    for kind, one in chosen:
        try:
            pictures.append(Picture(kind, one, *_pair(split, results, index_of[one["id"]], min_score)))
        except DataError as error:  # of a results file's images nothing was read before
            report["notes"].append(f"No picture of image {one['id']}: {error}")
    return pictures


def _pair(split: CocoDetection, results: list[Result], index: int, min_score: float) -> tuple[Image.Image, Image.Image]:
    """One image with its truth, and with its detections."""
    image, target = split[index]
    found = _as_target(split, [result for result in results if result["image_id"] == split.image_ids[index]])
    names = split.category_names
    return draw(image, target, names), draw(image, found, names, min_score=min_score)


def _as_target(split: CocoDetection, results: list[Result]) -> dict[str, Tensor]:
    labels = {category: label for label, category in enumerate(split.category_ids, start=1)}
    boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "labels": torch.tensor([labels[result["category_id"]] for result in results], dtype=torch.int64),
        "scores": torch.tensor([result["score"] for result in results]),
    }
