"""The lists of COCO's files as columns."""

import json
from collections.abc import Collection
from contextlib import suppress
from math import nan
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Raw

from detector.errors import short_repr
from detector.files import decode_json

MAX_AREA = 1e10  # square pixels; COCO's metric ignores larger objects
MIN_COORDINATE = 1e-100  # smallest absolute value of a coordinate other than 0: smaller ones make areas underflow
Coordinate = Annotated[float, Meta(ge=-1e9, le=1e9)]
Length = Annotated[float, Meta(ge=0, le=1e9)]


class Field(NamedTuple):
    """A field of an entry: its type for msgspec, in messages and for numpy, and its default value."""

    type: Any
    meant: str
    column: str
    blank: Any = 0
    optional: bool = False


FOUR = "4 finite numbers, x, y, width and height, each 0 or from 1e-100 to 1e9 in size"
ID = Field(Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)], "an integer of 64 bits, without a decimal point", "i8")
SIZE = Field(Annotated[int, Meta(ge=1, le=2**63 - 1)], "an integer of at least 1, without a decimal point", "i8")
TEXT = Field(str, "a string", "O", None)
BOX = Field(tuple[Coordinate, Coordinate, Coordinate, Coordinate], FOUR, "4f8", (nan,) * 4)
RESULT_BOX = Field(
    tuple[Coordinate, Coordinate, Length, Length], f"{FOUR}, the latter two not negative", "4f8", (nan,) * 4, True
)
AREA = Field(Annotated[float, Meta(ge=0, le=MAX_AREA)], "a number from 0 to 1e10", "f8", nan, True)
FLAG = Field(bool | Annotated[float, Meta(ge=0, le=1, multiple_of=1)], "0 or 1", "?", optional=True)
SCORE = Field(float, "a finite number", "f8")
LAZY = dict.fromkeys(("segmentation", "keypoints"), Field(Raw, "", "O", Raw(), optional=True))  # decoded when used
IGNORE = {"ignore": Field(Any, "", "O", None, optional=True), **LAZY}
RESULTS = "results"  # the list of a results file
FIELDS: dict[str, dict[str, Field]] = {
    "images": {"id": ID, "file_name": TEXT, "width": SIZE, "height": SIZE},
    "categories": {"id": ID, "name": TEXT},
    "annotations": {"id": ID, "image_id": ID, "category_id": ID, "bbox": BOX, "area": AREA, "iscrowd": FLAG, **IGNORE},
    RESULTS: {"image_id": ID, "category_id": ID, "score": SCORE, "bbox": RESULT_BOX} | LAZY,
}


class Entries:
    """A list of a file as columns by field: ``entries["bbox"]`` is [N, 4].

    ``name`` is a key of :data:`FIELDS`, ``raws`` the JSON of each entry, ``without`` unread fields. ``wrong``
    holds missing and wrong fields by the position of their entry; [] for an entry that is not a dict.
    """

    def __init__(self, path: str | Path, name: str, raws: list[Raw], *, without: Collection[str] = ()) -> None:
        self.path, self.name, self.raws = path, name, raws
        self.fields = {name: field for name, field in FIELDS[name].items() if name not in without}
        self.wrong: dict[int, list[str]] = {}
        types = [(name, field.type, *([field.blank] if field.optional else [])) for name, field in self.fields.items()]
        self._decode = msgspec.json.Decoder(msgspec.defstruct(name, types, gc=False)).decode
        columns = np.dtype([(name, field.column) for name, field in self.fields.items()])
        try:
            self._rows = np.fromiter(map(msgspec.structs.astuple, map(self._decode, raws)), columns, len(raws))
        except ValueError:
            self._rows = np.fromiter((self._row(at, raw) for at, raw in enumerate(raws)), columns, len(raws))
        if "bbox" in self.fields:
            size = np.abs(self["bbox"])
            for position in np.flatnonzero(((size > 0) & (size < MIN_COORDINATE)).any(axis=1)).tolist():
                self["bbox"][position] = BOX.blank
                self.wrong.setdefault(position, []).append("bbox")

    def __len__(self) -> int:
        return len(self.raws)

    def __getitem__(self, field: str) -> np.ndarray:
        return self._rows[field]

    def has(self, field: str) -> np.ndarray:
        """Return whether each entry has a valid field, [N] bool."""
        has = np.ones(len(self), dtype=bool)
        has[[at for at, fields in self.wrong.items() if not fields or field in fields]] = False
        return has

    def entry(self, position: int) -> Any:
        """Return the plain value of an entry, whether valid or not."""
        return value_of(self.raws[position])

    def where(self, position: int) -> str:
        """Name an entry in a message: the file, its place in the list, and its id."""
        entry = self.entry(position)
        called = f" (id {short_repr(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""
        return f"{self.path}: {self.name}[{position}]{called}"

    def _row(self, position: int, raw: Raw) -> tuple[Any, ...]:
        """Decode an entry that may be wrong."""
        with suppress(ValueError):
            return msgspec.structs.astuple(self._decode(raw))
        row = {name: field.blank for name, field in self.fields.items()}
        try:
            given = msgspec.json.decode(raw, type=dict[str, Raw])
        except ValueError:
            self.wrong[position] = []
            return tuple(row.values())
        for name, field in self.fields.items():
            try:
                row[name] = msgspec.json.decode(given[name], type=field.type)
            except (KeyError, ValueError):
                if name in given or not field.optional:
                    self.wrong.setdefault(position, []).append(name)
        return tuple(row.values())


LISTS = ("images", "categories", "annotations")
LIST = list[Raw] | str | int | float | bool | None  # the entries, or another value in their place
_Lists: Any = msgspec.defstruct("_Lists", [(name, LIST | dict, None) for name in LISTS])


class CocoFile:
    """An annotation file: ``images``, ``categories`` and ``annotations``, each empty where it is missing.

    ``missing`` holds messages on missing and invalid lists by name, or under "file" if the file holds no dict.
    ``image_places`` and ``category_places`` are the positions of each annotation's image and category, [L]; -1 where
    there is none.

    Args:
        path: ``instances_*.json``, ``person_keypoints_*.json`` or another file of their format.
        fields: the fields among :data:`LAZY` that are read.
        labelled: read the annotations. COCO's test files have none.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """

    def __init__(self, path: str | Path, *, fields: Collection[str] = tuple(LAZY), labelled: bool = True) -> None:
        content = decode_json(path, _Lists | LIST)
        self.path = path
        self.missing: dict[str, str] = {}
        if not isinstance(content, _Lists):
            what = f"must hold a dict with images, annotations and categories, not a {type_name(content)}"
            self.missing["file"], content = what, _Lists([], [], [])
        lists: list[Entries] = []
        for name in LISTS:
            raws = [] if name == "annotations" and not labelled else getattr(content, name)
            if not isinstance(raws, list):
                self.missing[name], raws = f"{name!r} must be a list, got {type_name(raws)}", []
            lists.append(Entries(path, name, raws, without=LAZY.keys() - set(fields)))
        self.images, self.categories, self.annotations = lists

        self.image_places = self._places(self.images, "image_id")
        self.category_places = self._places(self.categories, "category_id")

    def _places(self, entries: Entries, field: str) -> np.ndarray:
        known = np.flatnonzero(entries.has("id"))
        places = find(entries["id"][known], self.annotations[field])
        return np.where(self.annotations.has(field) & (places >= 0), np.append(known, -1)[places], -1)


def find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the index of each wanted id in ``ids``; -1 where it is missing."""
    if not len(ids):
        return np.full(len(wanted), -1)
    order = np.argsort(ids, kind="stable")
    places = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[places] == wanted, places, -1)


def value_of(raw: Raw | bytes) -> Any:
    """Return the plain value of raw JSON; ``None`` if it is empty."""
    text = bytes(raw)
    try:
        return msgspec.json.decode(text) if text else None
    except ValueError:  # a number that is too large; decode_json writes NaN as 1e999
        text = text.replace(b"1e999", b"NaN")
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 400 else digits)


def type_name(value: Any) -> str:
    """Return the name of a JSON value's type, for messages."""
    return "nothing" if value is None else type(value).__name__
