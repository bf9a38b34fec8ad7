"""Images of a split with their ground truth and their detections."""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from detector.data.dataset import CocoDetection
from detector.data.drawing import COLORS, Box, Stroke, class_color, draw_boxes, sheet
from detector.data.masks import as_rle
from detector.data.results import Result
from detector.errors import DataError
from detector.evaluation.confusion import BoxOutcome, Outcome
from detector.evaluation.report import Report, Section
from detector.text import short

EXAMPLES = 4  # images in examples.png
EXAMPLE_SIDE = 480  # pixels, their longer side
SIDE = 960  # pixels, the longer side of the other pictures
FONT_SIZE = 15


@dataclass(frozen=True)
class Mark:
    color: str
    stroke: Stroke


MARKS: dict[Outcome, Mark] = {  # in the order of drawing: mistakes on top
    "crowd": Mark("#666666", "thin"),
    "found": Mark(COLORS[0], "thin"),  # on the page; in pictures each class has its own colour
    "confused": Mark("#B000C8", "thick"),
    "false": Mark("#E0002A", "thick"),
    "missed": Mark("#FFE600", "dashed"),
}
BEFORE = Mark("#FFFFFF", "dotted")  # boxes without the refinement


@dataclass(frozen=True)
class Picture:
    """A picture of the page."""

    kind: Literal["worst", "best"]
    entry: Section  # the image's row of the report
    uri: Markup  # the image with its boxes, a JPEG in a data URI
    width: int
    height: int


def draw_examples(split: CocoDetection, outcomes: Mapping[int, Sequence[BoxOutcome]], path: Path) -> None:
    """Write a picture of a few images of a split: the ground truth on the left, detections on the right."""
    # Spread over the split, those with objects first.
    order = np.argsort(split.counts() == 0, kind="stable").tolist()
    rows = []
    for index in order[:: max(len(order) // EXAMPLES, 1)][:EXAMPLES]:
        boxes = outcomes.get(split.image_ids[index], [])
        truth = [BoxOutcome("found", one.truth, None) for one in boxes if one.truth and one.kind != "crowd"]
        found = [BoxOutcome("found", None, one.detection) for one in boxes if one.detection]
        rows.append([draw_outcomes(split[index][0], several, split, side=EXAMPLE_SIDE) for several in (truth, found)])
    if rows:
        sheet(rows, ["ground truth", "detections"]).save(path)


def worst_and_best(
    split: CocoDetection | None,
    report: Report,
    outcomes: Mapping[int, Sequence[BoxOutcome]],
    unrefined: Sequence[Result] = (),
    *,
    number: int = 6,
) -> tuple[list[Picture], list[str]]:
    """Draw the images with the lowest F1, and the images with the highest among those with objects.

    Args:
        split: the images. Without them nothing is drawn.
        report: its rows of images.
        outcomes: of the boxes in each image.
        unrefined: detections without the refinement, which are drawn from the report's minimum score on.
        number: maximum number of the worst images, and of the best.

    Returns:
        The pictures, and notes on images that cannot be read.
    """
    if split is None:
        return [], []
    worst = [row for row in report.images if row["f1"] < 1]
    best = [row for row in reversed(report.images) if row["objects"] and row["f1"] > 0]
    best.sort(key=lambda row: (-row["f1"], -row["objects"]))
    index_of = {image_id: index for index, image_id in enumerate(split.image_ids)}
    before = defaultdict(list)
    for result in unrefined:
        if result["score"] >= report.confusion["min_score"]:
            before[result["image_id"]].append(result)
    pictures, notes = [], []
    chosen = [("worst", row) for row in worst[:number]] + [("best", row) for row in best[:number]]
    for kind, row in tqdm(chosen, desc="drawing", unit="picture", leave=False, disable=None, delay=1):
        try:
            image, _ = split[index_of[row["id"]]]
        except DataError as error:  # the images of a results file have not been read before
            notes.append(f"No picture of image {row['id']}: {error}")
            continue
        drawn, file = draw_outcomes(image, outcomes[row["id"]], split, before[row["id"]]), io.BytesIO()
        drawn.save(file, "JPEG", quality=85, optimize=True)
        uri = Markup("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
        pictures.append(Picture(kind, row, uri, *drawn.size))
    return pictures, notes


def draw_outcomes(
    image: Tensor,
    outcomes: Sequence[BoxOutcome],
    split: CocoDetection,
    unrefined: Sequence[Result] = (),
    *,
    side: int = SIDE,
) -> Image.Image:
    """Draw an image with its boxes, masks and keypoints.

    Args:
        image: [3, H, W], float in 0..1 or uint8.
        outcomes: of its boxes.
        split: the data. Masks and keypoints of the ground truth are drawn if it reads them.
        unrefined: detections whose boxes are drawn below the others.
        side: the longer side of the picture in pixels.
    """
    picture = v2.functional.to_pil_image(v2.functional.to_dtype(image, torch.uint8, scale=True))
    factor = side / max(picture.size)
    width, height = (max(round(length * factor), 1) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    names = {category["id"]: short(category["name"], 40) for category in split.annotations.categories}

    def corners(shown: Mapping[str, Any]) -> tuple[float, float, float, float]:
        x, y, w, h = (length * factor for length in shown["bbox"])
        return tuple(np.clip([x, y, x + w, y + h], 0, [width - 1, height - 1] * 2).tolist())

    boxes = [Box(corners(one), "", BEFORE.color, BEFORE.stroke) for one in unrefined]
    for kind, mark in MARKS.items():
        for outcome in (one for one in outcomes if one.kind == kind):
            shown: Any = outcome.detection or outcome.truth
            segmentation, points = shown.get("segmentation"), np.reshape(shown.get("keypoints") or [], (-1, 3))
            if outcome.detection is not None:
                points[:, 2] = 1  # the third number of a detected keypoint has no agreed meaning
            else:
                segmentation = segmentation if "masks" in split.annotation_types else None
                points = points if "keypoints" in split.annotation_types else points[:0]
            category, color = shown["category_id"], mark.color
            if kind == "found" and category in split.category_ids:  # val may have classes that train lacks
                color = class_color(split.category_ids.index(category) + 1)
            mask = as_rle(segmentation, image.shape[-2], image.shape[-1]) if segmentation else None
            scaled = (points * [factor, factor, 1]).tolist() or None
            boxes.append(Box(corners(shown), _caption(outcome, names), color, mark.stroke, mask, scaled))
    draw_boxes(picture, boxes, font_size=FONT_SIZE, layout=split.keypoints)
    return picture


def _caption(outcome: BoxOutcome, names: Mapping[int, str]) -> str:
    kind, detection = outcome.kind, outcome.detection
    true_class = names[outcome.truth["category_id"]] if outcome.truth else ""
    if detection is None:
        return true_class if kind == "found" else f"{kind}: {true_class}"
    caption = f"{names[detection['category_id']]} {detection['score']:.2f}"
    more = {"crowd": f"{caption}, on a crowd", "confused": f"{caption}, is: {true_class}", "false": f"false: {caption}"}
    return more.get(kind, caption)
