"""Keypoints of objects: their names, their mirror images, and COCO's lists of them."""

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

MAX_KEYPOINTS = 1000  # per object
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
# A word, or a capital letter at an end: "l_hip", "LHip", "Lhip", "hipL".
SIDE = re.compile(
    r"(?i:left|right)|(?<![a-zA-Z])(?i:lt|rt|l|r)(?![a-z])|(?<![a-zA-Z])[LR](?=[a-z])|(?<=[a-z])[LR](?![a-zA-Z])"
)
_decode_numbers = msgspec.json.Decoder(list[Coordinate]).decode


@dataclass(frozen=True)
class KeypointLayout:
    """The keypoints of an object, in order.

    Args:
        names: name of each keypoint.
        skeleton: pairs of indices, from 0 on, that a line joins in pictures.

    Raises:
        ValueError: the number of names is wrong, a name is repeated, or a line joins unknown keypoints.
    """

    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MAX_KEYPOINTS or not all(type(name) is str for name in self.names):
            raise ValueError(f"keypoints must be 1 to {MAX_KEYPOINTS} names, got {short_repr(self.names)}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"several keypoints have the same name: {short_repr(self.names)}")
        for line in self.skeleton:
            if len(line) != 2 or not all(type(end) is int and 0 <= end < len(self) for end in line):
                raise ValueError(f"a line of the skeleton must join two of {len(self)} keypoints: {short_repr(line)}")

    def __len__(self) -> int:
        return len(self.names)

    def mirrored(self) -> list[int]:
        """Return the index of each keypoint's mirror image: that of "right_eye" for "left_eye"."""
        places = {name.lower(): place for place, name in enumerate(self.names)}
        swapped = (SIDE.sub(lambda side: OTHER_SIDE[side[0].lower()], name).lower() for name in self.names)
        others = [places.get(name, place) for place, name in enumerate(swapped)]
        # Two names may have the same mirror image, as "left_eye" and "Left_eye".
        return [other if others[other] == place else place for place, other in enumerate(others)]

    def fits(self, other: "KeypointLayout") -> bool:
        """Return whether both have the same keypoints. Numbered keypoints match any names."""
        numbers = self.numbered(len(self)).names
        return len(self) == len(other) and (self.names == other.names or numbers in (self.names, other.names))

    @classmethod
    def numbered(cls, count: int) -> "KeypointLayout":
        """Return a layout of nameless keypoints."""
        return cls(tuple(str(i + 1) for i in range(min(count, MAX_KEYPOINTS))))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"names": list(self.names), "skeleton": [list(line) for line in self.skeleton]}

    @classmethod
    def from_dict(cls, content: Any) -> "KeypointLayout":
        """Restore :meth:`to_dict`'s output. Raises LookupError, TypeError or ValueError for anything else."""
        return cls(tuple(content["names"]), tuple((line[0], line[1]) for line in content["skeleton"]))


# COCO's person, as in torchvision's published Keypoint R-CNN.
_PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_NAMES = ("nose", *(f"{side}_{part}" for part in _PARTS for side in ("left", "right")))
_LINES = "15-13 13-11 16-14 14-12 11-12 5-11 6-12 5-6 5-7 6-8 7-9 8-10 1-2 0-1 0-2 1-3 2-4 3-5 4-6"
PERSON = KeypointLayout(_NAMES, tuple((int(a), int(b)) for a, b in (line.split("-") for line in _LINES.split())))


def layout_of(
    path: str | Path, categories: Iterable[Mapping[str, Any]], points: Iterable[Any]
) -> KeypointLayout | None:
    """Return the keypoints of a data set, or ``None`` if it has none.

    Args:
        path: annotation file, for messages.
        categories: its categories. ``keypoints`` are names, ``skeleton`` pairs of numbers from 1 on.
        points: ``keypoints`` of its annotations, which give the number of keypoints if no category names them.

    Raises:
        DataError: the format is not COCO's, or categories have different keypoints.
    """
    found: dict[KeypointLayout, str] = {}
    for category in categories:
        if not category.get("keypoints"):
            continue
        name = str(category.get("name"))
        try:
            if not isinstance(category["keypoints"], list):
                raise TypeError(f"got {short_repr(category['keypoints'])}")
            lines = tuple((start - 1, end - 1) for start, end in category.get("skeleton") or ())
            found.setdefault(KeypointLayout(tuple(category["keypoints"]), lines), name)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}: the keypoints of the category {short(name)!r} are not in COCO's format (keypoints, a list of "
                f"names, and skeleton, pairs of numbers from 1 on): {error}"
            ) from None
    if len({layout.names for layout in found}) > 1:
        raise DataError(
            f"{path}: its categories ({listed(list(found.values()))}) have different keypoints, but a detector needs "
            "one list for all classes: use the same names, or train one detector for each"
        )
    if found:
        return next(iter(found))
    first = next((one for one in points if isinstance(one, list) and len(one) >= 3), None)
    return None if first is None else KeypointLayout.numbered(len(first) // 3)


def keypoints_error(points: bytes | Raw, count: int, *, visibility: bool = True) -> str | None:
    """Return what is wrong with the JSON of an object's keypoints.

    Args:
        points: JSON of a list of x, y and visibility of each keypoint.
        count: expected number of keypoints.
        visibility: ``False`` accepts any third number, as in detections.
    """
    try:
        value = _decode_numbers(points)
    except ValueError as error:
        return f"not a list of finite numbers: {error}"
    if len(value) != 3 * count:
        return f"{len(value)} numbers: {count} keypoints are {3 * count}, x, y and visibility of each"
    if not all(number == 0 or abs(number) >= MIN_COORDINATE for number in value):
        return f"a number that is not 0, but below {MIN_COORDINATE} in size"
    if visibility and not {0, 1, 2}.issuperset(value[2::3]):
        return "a visibility that is not 0 (not labelled), 1 (hidden) or 2 (visible)"
    return None
