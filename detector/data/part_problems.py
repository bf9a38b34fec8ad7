"""What can be wrong with the masks and the key points of a file in COCO's format, which not every training reads."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from detector.data.entries import CocoFile, Entries, value_of
from detector.data.keypoints import keypoints_problem, layout_of
from detector.data.masks import is_empty, segmentation_problem
from detector.data.problems import Level, Problem
from detector.errors import DataError, shown

Part = Literal["masks", "keypoints"]  # as torchvision's targets call them
FIELD: dict[Part, str] = {"masks": "segmentation", "keypoints": "keypoints"}
NAME: dict[Part, str] = {"masks": "masks", "keypoints": "key points"}
# Kind and description of flaws.
NO_AREA: dict[Part, tuple[str, str]] = {
    "masks": (
        "masks without an area",
        "has no area: by that of its box its mask is scored as one of a small or a large object",
    ),
    "keypoints": (
        "key points without an area",
        "has no area: by that of its box, which is larger, its key points are near enough or not",
    ),
}
MISSING: dict[Part, tuple[str, str]] = {
    "masks": (
        "objects without a segmentation",
        "has no segmentation: where masks are trained its own is empty, where they are scored it is missed",
    ),
    "keypoints": ("objects without key points", "has no key points: it is found, and none are learned"),
}
UNLABELLED = (
    "objects whose key points are all unlabelled",
    "has key points that are all unlabelled (visibility 0): it is found, and no key point is learned from it",
)


def lacks(value: Any, part: Part) -> bool:
    """Whether the value of an object's field is that of one without a mask, or without key points."""
    return is_empty(value) if part == "masks" else not value


def has_part(file: CocoFile, part: Part) -> bool:
    """Whether any object has a mask, or key points; crowds do not count, from which nothing is learned."""
    objects = file.annotations[FIELD[part]][~file.annotations["iscrowd"]]
    return any(not lacks(value_of(raw), part) for raw in objects)


def part_problems(file: CocoFile, part: Part, *, broken: Level = "error") -> Iterator[Problem]:
    """Say what is wrong with the masks, or the key points, of annotations that are right otherwise.

    Args:
        file: in which :func:`~detector.data.problems.annotation_problems` found no error.
        part: which of them.
        broken: the level of those that cannot be read: an "error" where they are needed.

    Yields:
        The problems. Objects without any are a flaw where others have some; nothing is said where none has.
    """
    field, annotations, categories = FIELD[part], file.annotations, file.categories["id"]
    without = "" if broken == "error" else f" (boxes can be trained all the same, {NAME[part]} cannot)"
    objects, no_area = ~annotations["iscrowd"], np.isnan(annotations["area"])
    has_points = np.ones(len(annotations), dtype=bool)
    count = 0
    if part == "keypoints":
        entries = [file.categories.entry(position) for position in range(len(categories))]
        try:
            layout = layout_of(file.path, entries, map(value_of, annotations[field]))
        except DataError as error:
            yield Problem("categories with key points that do not fit", broken, f"{error}{without}")
            return
        count = 1 if layout is None else len(layout)
        if any(having := [bool(entry.get("keypoints")) for entry in entries]):
            has_points = np.isin(annotations["category_id"], categories[having])
    if part == "masks":
        sides = (file.images[side][file.image_places].tolist() for side in ("width", "height"))
        found = list(map(segmentation_problem, annotations[field], *sides))
    else:
        found = [keypoints_problem(raw, count) for raw in annotations[field]]
    wrong = np.array([what is not None for what in found], dtype=bool)
    missing: list[Problem] = []
    some = bool((~wrong & objects).any())
    for position in np.flatnonzero(wrong | no_area | (part == "keypoints")).tolist():
        value, is_object = value_of(annotations[field][position]), objects[position]
        if lacks(value, part):
            if is_object and has_points[position]:
                missing.append(_flaw(annotations, position, *MISSING[part]))
            continue
        some = some or is_object
        if no_area[position] and is_object:
            missing.append(_flaw(annotations, position, *NO_AREA[part]))
        if found[position] is not None:
            kind = "broken segmentations" if part == "masks" else "broken key points"
            message = f"{annotations.where(position)} has {field} {shown(value)}, {found[position]}{without}"
            yield Problem(kind, broken, message)
        elif part == "keypoints" and is_object and not any(value[2::3]):
            missing.append(_flaw(annotations, position, *UNLABELLED))
    if some:
        yield from missing


def _flaw(annotations: Entries, position: int, kind: str, what: str) -> Problem:
    return Problem(kind, "flaw", f"{annotations.where(position)} {what}")
