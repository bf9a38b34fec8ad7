"""What can be wrong with the masks and the key points of a file in COCO's format, which not every training reads."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from detector.data.entries import CocoFile, value_of
from detector.data.keypoints import keypoints_problem, layout_of
from detector.data.masks import is_empty, segmentation_problem
from detector.data.problems import Level, Problem
from detector.errors import DataError, shown

Part = Literal["masks", "keypoints"]  # as torchvision's targets call them
FIELD: dict[Part, str] = {"masks": "segmentation", "keypoints": "keypoints"}
NAME: dict[Part, str] = {"masks": "masks", "keypoints": "key points"}
NO_AREA: dict[Part, str] = {
    "masks": "has no area: its box's area decides whether its mask is scored as small or large",
    "keypoints": "has no area: its box's, which is larger, is used, so that its key points are matched too easily",
}
MISSING: dict[Part, str] = {
    "masks": "has no segmentation: its mask is trained as an empty one, and scored as missed",
    "keypoints": "has no key points: its box is learned, key points are not",
}
UNLABELLED = "has key points that are all unlabelled (visibility 0): its box is learned, key points are not"


def has_part(file: CocoFile, part: Part) -> bool:
    """Whether any object has a mask, or key points; crowds do not count, from which nothing is learned."""
    objects = file.annotations[FIELD[part]][~file.annotations["iscrowd"]]
    return any(not _is_empty(value_of(raw), part) for raw in filter(bytes, objects))


def _is_empty(value: Any, part: Part) -> bool:
    return is_empty(value) if part == "masks" else not value


def part_problems(file: CocoFile, part: Part, *, broken: Level = "error") -> Iterator[Problem]:
    """Say what is wrong with the masks, or the key points, of annotations that are right otherwise.

    Args:
        file: one without errors, see :func:`~detector.data.problems.annotation_problems`.
        part: which of them.
        broken: the level of those that cannot be read: an "error" where they are needed.

    Yields:
        The problems; none where no object has the part. Objects without it are a flaw where others have it.
    """
    field, annotations, categories = FIELD[part], file.annotations, file.categories["id"]
    without = "" if broken == "error" else f" (boxes can be trained all the same, {NAME[part]} cannot)"
    objects, no_area = ~annotations["iscrowd"], np.isnan(annotations["area"])
    has_points = np.ones(len(annotations), dtype=bool)
    if not has_part(file, part):
        return
    if part == "masks":
        sides = (file.images[side][file.image_places].tolist() for side in ("width", "height"))
        found = list(map(segmentation_problem, annotations[field], *sides))
    else:
        entries = [file.categories.entry(position) for position in range(len(categories))]
        try:
            layout = layout_of(file.path, entries, map(value_of, annotations[field]))
        except DataError as error:
            yield Problem("categories with key points that do not fit", broken, f"{error}{without}")
            return
        found = [keypoints_problem(raw, len(layout) if layout else 1) for raw in annotations[field]]
        if any(having := [bool(entry.get("keypoints")) for entry in entries]):
            has_points = np.isin(annotations["category_id"], categories[having])
    wrong = np.array([what is not None for what in found], dtype=bool)
    flaws: list[tuple[str, int, str]] = []
    for position in np.flatnonzero(wrong | no_area | (part == "keypoints")).tolist():
        value, is_object = value_of(annotations[field][position]), objects[position]
        if _is_empty(value, part):
            if is_object and has_points[position]:
                kind = "objects without a segmentation" if part == "masks" else "objects without key points"
                flaws.append((kind, position, MISSING[part]))
            continue
        if no_area[position] and is_object:
            flaws.append((f"{NAME[part]} without an area", position, NO_AREA[part]))
        if found[position] is not None:
            kind = "broken segmentations" if part == "masks" else "broken key points"
            message = f"{annotations.where(position)} has {field} {shown(value)}, {found[position]}{without}"
            yield Problem(kind, broken, message)
        elif part == "keypoints" and is_object and not any(value[2::3]):
            flaws.append(("objects whose key points are all unlabelled", position, UNLABELLED))
    yield from (Problem(kind, "flaw", f"{annotations.where(at)} {what}") for kind, at, what in flaws)
