"""What can be wrong with the masks and the key points of a file in COCO's format, which not every training reads."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from detector.data.keypoints import keypoints_problem, layout_of
from detector.data.masks import is_empty, segmentation_problem
from detector.data.problems import Entry, Level, Problem, where
from detector.errors import DataError, shown

Part = Literal["masks", "keypoints"]  # as torchvision's targets call them
FIELD: dict[Part, str] = {"masks": "segmentation", "keypoints": "keypoints"}
NAME: dict[Part, str] = {"masks": "masks", "keypoints": "key points"}
NO_AREA: dict[Part, str] = {
    "masks": "has no area: by that of its box its mask is scored as one of a small or a large object",
    "keypoints": "has no area: by that of its box, which is larger, its key points are near enough or not",
}
UNLABELLED = "has key points that are all unlabelled (visibility 0): it is found, and no key point is learned from it"


def has_part(annotations: Iterable[Entry], part: Part) -> bool:
    """Whether any object has a mask, or key points; crowds do not count, from which nothing is learned."""
    return any(not lacks(annotation, part) and not annotation.get("iscrowd") for annotation in annotations)


def lacks(annotation: Entry, part: Part) -> bool:
    """Whether an object has no mask, or no key points."""
    return is_empty(annotation.get("segmentation")) if part == "masks" else not annotation.get("keypoints")


def part_problems(path: str | Path, data: Any, part: Part, *, broken: Level = "error") -> Iterator[Problem]:
    """Say what is wrong with the masks, or the key points, of annotations that are right otherwise.

    Args:
        path: of the file, for the messages.
        data: its content, in which :func:`~detector.data.problems.annotation_problems` found no error.
        part: which of them.
        broken: the level of those that cannot be read: an "error" where they are needed.

    Yields:
        The problems. Objects without any are a flaw where others have some; nothing is said where none has.
    """
    field = FIELD[part]
    without = "" if broken == "error" else f" (boxes can be trained all the same, {NAME[part]} cannot)"
    count = 0
    if part == "keypoints":
        try:
            layout = layout_of(path, data["categories"], data["annotations"])
        except DataError as error:
            yield Problem("categories with key points that do not fit", broken, f"{error}{without}")
            return
        count = 1 if layout is None else len(layout)
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    has_points = {c["id"] for c in data["categories"] if c.get("keypoints")} or {c["id"] for c in data["categories"]}
    missing: list[Problem] = []
    some = False
    for position, annotation in enumerate(data["annotations"]):
        value = annotation.get(field)
        if lacks(annotation, part):
            if not annotation.get("iscrowd") and (part == "masks" or annotation["category_id"] in has_points):
                missing.append(_missing(part, where(path, "annotations", position, annotation)))
            continue
        some = some or not annotation.get("iscrowd")
        if "area" not in annotation and not annotation.get("iscrowd"):
            at = where(path, "annotations", position, annotation)
            missing.append(Problem(f"{NAME[part]} without an area", "flaw", f"{at} {NO_AREA[part]}"))
        if part == "masks":
            what = segmentation_problem(value, *sizes[annotation["image_id"]])
        else:
            what = keypoints_problem(value, count)
        if what is not None:
            kind = "broken segmentations" if part == "masks" else "broken key points"
            at = where(path, "annotations", position, annotation)
            yield Problem(kind, broken, f"{at} has {field} {shown(value)}, {what}{without}")
        elif part == "keypoints" and not any(value[2::3]) and not annotation.get("iscrowd"):
            at = where(path, "annotations", position, annotation)
            missing.append(Problem("objects whose key points are all unlabelled", "flaw", f"{at} {UNLABELLED}"))
    if some:
        yield from missing


def _missing(part: Part, at: str) -> Problem:
    if part == "masks":
        what = "has no segmentation: where masks are trained its own is empty, where they are scored it is missed"
        return Problem("objects without a segmentation", "flaw", f"{at} {what}")
    return Problem("objects without key points", "flaw", f"{at} has no key points: it is found, and none are learned")
