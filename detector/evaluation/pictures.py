"""Images of a split drawn with their ground truth and with what was detected in them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from detector.data.dataset import CocoDetection
from detector.data.drawing import Box, Mask, class_color, draw, draw_boxes, sheet
from detector.data.masks import as_rle
from detector.data.results import Result
from detector.errors import DataError
from detector.evaluation.confusion import BoxOutcome, Outcome
from detector.evaluation.page import MARKS, SIDE, Picture, encode_jpeg
from detector.evaluation.report import Report, Section
from detector.text import short

EXAMPLES = 4
FONT_SIZE = 15
BEFORE = "#FFFFFF"  # in turns with black
ORDER: tuple[Outcome, ...] = ("crowd", "found", "confused", "false", "missed")


def draw_examples(split: CocoDetection, results: list[Result], path: Path) -> None:
    """Write a picture of a few images of a split: the ground truth on the left, detections on the right."""
    # Spread over the split, those with objects first.
    order = np.argsort(split.counts() == 0, kind="stable").tolist()
    chosen = order[:: max(len(order) // EXAMPLES, 1)][:EXAMPLES]
    rows = [_pair(split, results, index) for index in chosen]
    if rows:
        sheet(rows, ["ground truth", "detections with a score of 0.5 or more"]).save(path)


def worst_and_best(
    split: CocoDetection,
    report: Report,
    outcomes: Mapping[int, Sequence[BoxOutcome]],
    unrefined: Sequence[Result] = (),
    *,
    number: int = 6,
) -> tuple[list[Picture], list[str]]:
    """Draw the images with the lowest F1, and of those with objects the ones with the highest.

    Args:
        split: the images.
        report: its rows of images.
        outcomes: of the boxes in each image.
        unrefined: detections without the refinement, which are drawn from the report's minimum score on.
        number: maximum number of the worst images, and of the best.

    Returns:
        The pictures, and notes on images that cannot be read.
    """
    best = [row for row in reversed(report.images) if row["objects"] and row["f1"] > 0]
    best.sort(key=lambda row: (-row["f1"], -row["objects"]))
    worst = [row for row in report.images if row["f1"] < 1]
    chosen: list[tuple[Literal["worst", "best"], Section]] = [
        *(("worst", row) for row in worst[:number]),
        *(("best", row) for row in best[:number]),
    ]
    index_of = {image_id: index for index, image_id in enumerate(split.image_ids)}
    before: dict[int, list[Result]] = {row["id"]: [] for _, row in chosen}
    for result in unrefined:
        if result["image_id"] in before and result["score"] >= report.confusion["min_score"]:
            before[result["image_id"]].append(result)
    pictures, notes = [], []
    for kind, row in tqdm(chosen, desc="drawing", unit="picture", leave=False, disable=None, delay=1):
        try:
            image, _ = split[index_of[row["id"]]]
        except DataError as error:  # the images of a results file have not been read before
            notes.append(f"No picture of image {row['id']}: {error}")
            continue
        drawn = draw_outcomes(image, outcomes[row["id"]], split, before[row["id"]])
        pictures.append(Picture(kind, row, *encode_jpeg(drawn)))
    return pictures, notes


def draw_outcomes(
    image: Tensor, outcomes: Sequence[BoxOutcome], split: CocoDetection, unrefined: Sequence[Result] = ()
) -> Image.Image:
    """An image with its boxes, masks and keypoints, :data:`~detector.evaluation.page.SIDE` pixels on its longer side.

    Args:
        image: [3, H, W], float in 0..1 or uint8.
        outcomes: what became of its boxes.
        split: the data that it is of; masks and keypoints of the ground truth are drawn if it reads them.
        unrefined: detections whose boxes are drawn beneath.
    """
    picture = v2.functional.to_pil_image(v2.functional.to_dtype(image, torch.uint8, scale=True))
    factor = SIDE / max(picture.size)
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    boxes = [Box(_corners(one, picture.size, factor), "", BEFORE, "dotted") for one in unrefined]
    # What is wrong lies on top.
    for outcome in sorted(outcomes, key=lambda one: ORDER.index(one.kind)):
        box = _box(outcome, split, picture.size, factor)
        mask, points = _parts(outcome, split, (image.shape[-2], image.shape[-1]), factor)
        boxes.append(replace(box, mask=mask, points=points))
    draw_boxes(picture, boxes, font_size=FONT_SIZE, layout=split.keypoints)
    return picture


def _parts(
    outcome: BoxOutcome, split: CocoDetection, size: tuple[int, int], factor: float
) -> tuple[Mask | None, list[tuple[float, float, float]] | None]:
    """The mask and the keypoints of an annotation, as far as they are read, or a detection.

    Args:
        outcome: what they are of.
        split: the data.
        size: height and width of the image.
        factor: by which the picture is enlarged.
    """
    if outcome.detection is not None:
        segmentation, points = outcome.detection.get("segmentation"), _detected(outcome.detection)
    else:
        assert outcome.truth is not None
        segmentation = outcome.truth.get("segmentation") if "masks" in split.annotation_types else None
        points = (outcome.truth.get("keypoints") or []) if "keypoints" in split.annotation_types else []
    enlarged = [(x * factor, y * factor, seen) for x, y, seen in zip(points[::3], points[1::3], points[2::3])]
    return as_rle(segmentation, *size) if segmentation else None, enlarged or None


def _detected(result: Result) -> list[float]:
    """The keypoints of a detection, all visible: what its third numbers are nobody agreed on, and all are scored."""
    points = list(result.get("keypoints", []))
    points[2::3] = [1.0] * len(points[2::3])
    return points


def _box(outcome: BoxOutcome, split: CocoDetection, size: tuple[int, int], factor: float) -> Box:
    shown = outcome.truth if outcome.detection is None else outcome.detection
    assert shown is not None
    names = {category["id"]: short(category["name"], 40) for category in split.annotations.categories}
    name = names[shown["category_id"]]
    caption = name if outcome.detection is None else f"{name} {outcome.detection['score']:.2f}"
    corners = _corners(shown, size, factor)
    if outcome.kind == "found":
        return Box(corners, caption, class_color(split.category_ids.index(shown["category_id"]) + 1))
    if outcome.kind == "crowd":
        caption = f"crowd: {name}" if outcome.detection is None else f"{caption}, on a crowd"
    elif outcome.kind == "confused":
        assert outcome.truth is not None
        caption += f", is: {names[outcome.truth['category_id']]}"
    else:
        caption = f"{outcome.kind}: {caption}"
    mark = MARKS[outcome.kind]
    return Box(corners, caption, mark.color, mark.stroke)


def _corners(shown: Mapping[str, Any], size: tuple[int, int], factor: float) -> tuple[float, float, float, float]:
    """Where the box of an annotation or a detection lies in a picture that is enlarged by a factor."""
    x, y, width, height = (side * factor for side in shown["bbox"])
    x1, x2 = (min(max(side, 0), size[0] - 1) for side in (x, x + width))
    y1, y2 = (min(max(side, 0), size[1] - 1) for side in (y, y + height))
    return x1, y1, x2, y2


def _pair(split: CocoDetection, results: list[Result], index: int) -> tuple[Image.Image, Image.Image]:
    """One image with its ground truth, and with its detections."""
    image, target = split[index]
    image_id = split.image_ids[index]
    found = _as_target(split, [result for result in results if result["image_id"] == image_id])
    left, right = (draw(image, one, split.category_names, layout=split.keypoints) for one in (target, found))
    return left, right


def _as_target(split: CocoDetection, results: list[Result]) -> dict[str, Any]:
    """Detections of an image as :func:`~detector.data.drawing.draw` takes them."""
    labels = {category: label for label, category in enumerate(split.category_ids, start=1)}
    boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    target: dict[str, Any] = {
        "boxes": boxes,
        "labels": torch.tensor([labels[result["category_id"]] for result in results], dtype=torch.int64),
        "scores": torch.tensor([result["score"] for result in results]),
    }
    if all("segmentation" in result for result in results):
        target["segmentations"] = [result["segmentation"] for result in results]
    if results and all("keypoints" in result for result in results):
        points = torch.tensor([_detected(result) for result in results], dtype=torch.float64)
        target["keypoints"] = points.reshape(len(results), -1, 3)
    return target
