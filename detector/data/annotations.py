"""Annotation files in COCO's instances format, read with pycocotools and checked."""

import contextlib
import io
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from detector.data.part_problems import FIELD, NAME, Part, has_part, part_problems
from detector.data.problems import MOST_AREA, Problem, annotation_problems
from detector.errors import DataError, MissingPartError
from detector.files import read_json

NEEDED: dict[Part, str] = {
    "masks": "a detector of masks needs one of each object: polygons or an RLE",
    "keypoints": "a detector of key points needs them: COCO has them in person_keypoints_*.json",
}


def read_coco(path: str | Path, *, parts: Collection[Part] = ()) -> COCO:
    """Read an annotation file of COCO's instances format.

    ``iscrowd`` may be missing (0 is meant), and ``area`` (the box's is taken; COCO's own files give the mask's).

    Args:
        path: ``instances_*.json``: a dict with ``images``, ``annotations`` and ``categories``.
        parts: what is read besides boxes: "masks", "keypoints" or both. Others are not looked at.

    Returns:
        pycocotools' index of the file; its attribute ``flaws`` counts what is left out or clipped, by kind.

    Raises:
        DataError: the file cannot be read, a field is missing or of the wrong type, an id is used twice, or an
            annotation names an image or a category that is not there: the first "error" of
            :func:`~detector.data.problems.annotation_problems`, and how many more there are; or a mask or key points
            that are to be read are broken, or no object has any.
    """
    data = read_json(path)
    flaws = refuse(annotation_problems(path, data), f"{path}")
    for part in parts:
        if not has_part(data["annotations"], part):
            raise MissingPartError(f"{path}: no object has {NAME[part]} ({FIELD[part]}), and {NEEDED[part]}")
        flaws += refuse(part_problems(path, data, part), f"{path}")
    for annotation in data["annotations"]:
        _, _, width, height = annotation["bbox"]
        annotation.setdefault("iscrowd", 0)
        # A box of a negative size is an object that nobody can find, as one without a size is.
        annotation.setdefault("area", min(max(width, 0) * max(height, 0), MOST_AREA))
    if any(annotation["id"] == 0 for annotation in data["annotations"]):
        for number, annotation in enumerate(data["annotations"], start=1):
            annotation["id"] = number  # pycocotools takes 0 for none; nothing else reads the ids
    coco = index_coco(data)
    coco.flaws = flaws
    return coco


def index_coco(data: dict[str, Any]) -> COCO:
    """Return pycocotools' index of a dict in COCO's format, without what its constructor prints."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def refuse(problems: Iterable[Problem], checked: str | None = None) -> Counter[str]:
    """Raise the first error among problems, or count the flaws. With ``checked`` as arguments the tool lists all."""
    problems = list(problems)
    messages = [problem.message for problem in problems if problem.level == "error"]
    if messages:
        more = len(messages) - 1
        lists = "" if checked is None else f": tools/check.py {checked} lists them"
        raise DataError(messages[0] + (f" (and {more:,} more problem{'s' * (more > 1)}{lists})" if more else ""))
    return Counter(problem.kind for problem in problems if problem.level == "flaw")
