"""Keypoints of objects: their names, which of them are each other's mirror image, and COCO's lists as tensors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw

from detector.data.entries import MIN_COORDINATE, Coordinate
from detector.errors import DataError, short_repr
from detector.text import listed, short

MOST = 1000  # keypoints of an object
NUMBERS = msgspec.json.Decoder(list[Coordinate])
SIDES = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
# A word, or a capital at an end: "l_hip", "LHip", "Lhip", "hipL".
SIDE = re.compile(
    r"(?i:left|right)|(?<![a-zA-Z])(?i:lt|rt|l|r)(?![a-z])|(?<![a-zA-Z])[LR](?=[a-z])|(?<=[a-z])[LR](?![a-zA-Z])"
)


@dataclass(frozen=True)
class KeypointLayout:
    """What the keypoints of an object are.

    Args:
        names: of each.
        skeleton: pairs of keypoints, from 0 on, with a line between them in pictures.

    Raises:
        ValueError: there is none, or too many, or two have one name; or a line between points that there are not.
    """

    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MOST or not all(type(name) is str for name in self.names):
            raise ValueError(f"keypoints must be 1 to {MOST} names, got {short_repr(self.names)}")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"the name {short_repr(twice)} is that of several keypoints")
        for line in self.skeleton:
            if len(line) != 2 or not all(type(end) is int and 0 <= end < len(self.names) for end in line):
                raise ValueError(
                    f"a line of the skeleton must join two of {len(self.names)} points, got {short_repr(line)}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def mirrored(self) -> list[int]:
        """Of each point the place of the one that it becomes in a mirror: of "left_eye" that of "right_eye"."""
        place = {name.lower(): number for number, name in enumerate(self.names)}
        others = [place.get(_other_side(name), number) for number, name in enumerate(self.names)]
        # Each other's: a name may be written in two ways.
        return [other if others[other] == number else number for number, other in enumerate(others)]

    def fits(self, other: "KeypointLayout") -> bool:
        """Whether both are of the same points in the same order; numbers, of points that nobody named, fit any name."""
        numbers = self.numbered(len(self)).names
        return len(self) == len(other) and (self.names == other.names or numbers in (self.names, other.names))

    @classmethod
    def numbered(cls, count: int) -> "KeypointLayout":
        """That of points that nobody named."""
        return cls(tuple(f"{i + 1}" for i in range(min(count, MOST))))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"names": list(self.names), "skeleton": [list(line) for line in self.skeleton]}

    @classmethod
    def from_dict(cls, content: Any) -> "KeypointLayout":
        """What :meth:`to_dict` made. Raises LookupError, TypeError or ValueError if it is not."""
        return cls(tuple(content["names"]), tuple((line[0], line[1]) for line in content["skeleton"]))


# That of COCO's persons, which torchvision's published Keypoint R-CNN finds.
PERSON = KeypointLayout(
    (
        *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
        *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
        *("left_knee", "right_knee", "left_ankle", "right_ankle"),
    ),
    (
        *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8)),
        *((7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
    ),
)


def layout_of(
    path: str | Path, categories: Iterable[Mapping[str, Any]], points: Iterable[Any]
) -> KeypointLayout | None:
    """The layout of a data set's keypoints, ``None`` if it has none.

    Args:
        path: of the annotation file, for messages.
        categories: its categories; ``keypoints`` are names, ``skeleton`` pairs of numbers from 1 on, as in COCO.
        points: the ``keypoints`` of its annotations: the first that has any tells their number where no category names
            them.

    Raises:
        DataError: the categories name different ones, which one detector cannot find, or not as COCO does.
    """
    found: dict[KeypointLayout, str] = {}
    for category in categories:
        if not category.get("keypoints"):
            continue
        try:
            if not isinstance(category["keypoints"], list):
                raise TypeError(f"got {short_repr(category['keypoints'])}")
            lines = tuple((start - 1, end - 1) for start, end in category.get("skeleton") or ())
            layout = KeypointLayout(tuple(category["keypoints"]), lines)
        except (TypeError, ValueError) as error:
            name = short(str(category.get("name")))
            raise DataError(
                f"{path}: the category {name!r} has keypoints that are not COCO's (keypoints, a list of names, and "
                f"skeleton, pairs of numbers from 1 on): {error}"
            ) from None
        found.setdefault(layout, str(category.get("name")))
    if len({layout.names for layout in found}) > 1:
        raise DataError(
            f"{path}: its categories ({listed(list(found.values()))}) have different keypoints, and a detector finds "
            "the same of all classes: give them one list of names, or train them apart"
        )
    if found:
        return next(iter(found))
    first = next((one for one in points if isinstance(one, list) and len(one) >= 3), None)
    return None if first is None else KeypointLayout.numbered(len(first) // 3)


def keypoints_problem(points: bytes | Raw, count: int, *, visibility: bool = True) -> str | None:
    """Say what is wrong with the JSON of an object's keypoints. A detection's third number may be anything."""
    try:
        value = NUMBERS.decode(points)
    except ValueError as error:
        return f"not a list of finite numbers: {error}"
    if len(value) != 3 * count:
        return f"{len(value)} numbers: {count} keypoints are {3 * count}, x, y and visibility of each"
    if not all(number == 0 or abs(number) >= MIN_COORDINATE for number in value):
        return f"a number that is not 0, but below {MIN_COORDINATE} in size"
    if visibility and not {0, 1, 2}.issuperset(value[2::3]):
        return "a visibility that is not 0 (not labelled), 1 (hidden) or 2 (visible)"
    return None


def _other_side(name: str) -> str:
    """A name, in small letters, with left and right exchanged. It need not be a name that there is."""
    return SIDE.sub(lambda word: SIDES[word[0].lower()], name).lower()
