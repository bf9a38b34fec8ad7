"""Checking the image files of a data set."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tqdm import tqdm

from detector.choices import Orientation
from detector.data.checks import Finding
from detector.data.images import (
    AMBIGUOUS_ORIENTATION,
    OVERRULED_ORIENTATION,
    read_image_with_remarks,
    without_pillow_warnings,
)
from detector.errors import DataError, SizeError, short_repr
from detector.text import alike_file

MAX_LISTED = 200_000  # maximum number of files to search for a similar name
ORIENTATION_KINDS = {  # kinds of findings by the prefix of the remark
    AMBIGUOUS_ORIENTATION: "images whose annotated size fits both orientations",
    OVERRULED_ORIENTATION: "images whose annotated size decides against the orientation setting",
}


def check_files(
    names: Iterable[str | None], folder: str | Path, where: Callable[[int], str]
) -> Iterator[tuple[int | None, Finding]]:
    """Check that image files exist, without opening them. ``names`` are relative to the folder.

    Yields errors, each with the position of its image; ``None`` for the folder. ``where`` names an image in a message
    by its position.
    """
    try:
        present = set(os.listdir(folder))  # faster than one lookup for each of COCO's 118,000 files
    except OSError as error:
        message = f"{folder}: no such image folder, or it cannot be read: {error.strerror}"
        yield None, Finding("missing image folder", "error", message)
        return
    root = Path(folder).resolve()
    by_key: dict[str, list[str]] | None = None
    for position, name in enumerate(names):
        if name is None or name in present:
            continue
        inside, is_file = True, False
        with suppress(OSError, ValueError):  # a name that no file can have: too long, with a NUL byte
            file = (root / name).resolve()
            inside, is_file = file.is_relative_to(root), file.is_file()
        if inside and is_file:
            continue
        if by_key is None:
            by_key = {}
            files = (Path(parent, other) for parent, _, others in os.walk(root) for other in others)
            for file in islice(files, MAX_LISTED):
                by_key.setdefault(_key(file.name), []).append(file.relative_to(root).as_posix())
        message = f"{where(position)} has file_name {short_repr(name)}, {'not in' if inside else 'outside'} {folder}"
        if fitting := _similar(name, root, by_key):
            message += f"; did you mean {' or '.join(map(short_repr, fitting[:2]))}?"
        kind = "missing image files" if inside else "image files outside their folder"
        yield position, Finding(kind, "error", message)


def _key(name: str) -> str:
    """Return a key that is the same for similar names, whatever their folders and suffixes."""
    return alike_file(name).rpartition(".")[0] or alike_file(name)


def _similar(name: str, root: Path, by_key: Mapping[str, Sequence[str]]) -> Sequence[str]:
    path = unquote(name).replace("\\", "/")
    with suppress(OSError, ValueError):
        if not path.startswith("/") and (root / path).resolve().is_relative_to(root) and (root / path).is_file():
            return [path]
    similar = by_key.get(_key(name), ())
    return [other for other in similar if alike_file(other) == alike_file(name)] or similar


def check_image(folder: str | Path, image: Mapping[str, Any], orientation: Orientation = "upright") -> Finding | None:
    """Decode an image, an entry of ``images``: return an error, a note on its orientation, or ``None``."""
    path = Path(folder) / image["file_name"]
    try:
        _, remarks = read_image_with_remarks(path, size=(image["width"], image["height"]), orientation=orientation)
    except DataError as error:
        kind = "sizes that differ" if isinstance(error, SizeError) else "unreadable images"
        return Finding(kind, "error", " ".join(str(error).split()))
    doubts = ((kind, remark) for start, kind in ORIENTATION_KINDS.items() for remark in remarks if start in remark)
    return next((Finding(kind, "note", f"{path}: {remark}") for kind, remark in doubts), None)


def open_images(
    folder: str | Path, images: Sequence[Mapping[str, Any]], *, orientation: Orientation = "upright", workers: int = 4
) -> Iterator[Finding | None]:
    """Yield :func:`check_image` of each image, in order, with threads and a progress bar."""
    # Warning filters are shared by all threads.
    with without_pillow_warnings(), ThreadPoolExecutor(workers) as executor:
        try:
            opened = executor.map(partial(check_image, folder, orientation=orientation), images)
            yield from tqdm(opened, "opening images", len(images), unit="image", leave=False, delay=1, disable=None)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the images in the queue
