"""The image files of a data set: whether they are there, and can be read."""

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

from detector.data.checks import Finding
from detector.data.images import (
    AMBIGUOUS_ORIENTATION,
    OVERRULED_ORIENTATION,
    Orientation,
    read_image_with_remarks,
    without_pillow_warnings,
)
from detector.errors import DataError, SizeError, short_repr
from detector.text import alike_file

MOST_LISTED = 200_000  # files that are looked at to find the one that may be meant: three seconds
ORIENTATION_KINDS = {  # the kinds of findings, by how the remarks on an image begin
    AMBIGUOUS_ORIENTATION: "images whose annotated size fits both orientations",
    OVERRULED_ORIENTATION: "images whose annotated size decides against the orientation setting",
}


def check_files(
    names: Iterable[str | None], folder: str | Path, where: Callable[[int], str]
) -> Iterator[tuple[int | None, Finding]]:
    """Find image files that are not in their folder, by their names alone.

    Args:
        names: of the images, relative to the folder; ``None`` is passed over.
        folder: of the images.
        where: names an image in a message, by its place in ``names``.

    Yields:
        Problems, all of level "error", each with the place of its image; ``None`` for the folder's.
    """
    try:
        present = os.listdir(folder)  # one look, not one a file: COCO has 118,000
    except OSError as error:
        message = f"{folder}: no such image folder, or it cannot be read: {error.strerror}"
        yield None, Finding("missing image folder", "error", message)
        return
    root, known = Path(folder).resolve(), set(present)
    by_key: dict[str, list[str]] | None = None
    for position, name in enumerate(names):
        if name is None or name in known:
            continue
        inside, there = True, False
        with suppress(OSError, ValueError):  # a name that no file can have: too long, with a NUL byte
            file = (root / name).resolve()
            inside, there = file.is_relative_to(root), file.is_file()
        if inside and there:
            continue
        by_key = by_key if by_key is not None else _names_by_key(root)
        message = f"{where(position)} has file_name {short_repr(name)}, {'not in' if inside else 'outside'} {folder}"
        if fitting := _fitting(name, root, by_key):
            message += f"; did you mean {' or '.join(map(short_repr, fitting[:2]))}?"
        kind = "missing image files" if inside else "image files outside their folder"
        yield position, Finding(kind, "error", message)


def _names_by_key(root: Path) -> dict[str, list[str]]:
    """The files in a folder, and below it, by their :func:`_key`; the first ones, if it holds a whole disk."""
    by_key: dict[str, list[str]] = {}
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    for file in islice(files, MOST_LISTED):
        by_key.setdefault(_key(file.name), []).append(file.relative_to(root).as_posix())
    return by_key


def _key(name: str) -> str:
    """The same for names of files that are easily mixed up: without folders and suffix, see :func:`alike_file`."""
    return alike_file(name).rpartition(".")[0] or alike_file(name)


def _fitting(name: str, root: Path, by_key: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The names by which a file may be in its folder that is called otherwise in the annotations."""
    path = unquote(name).replace("\\", "/")
    with suppress(OSError, ValueError):
        if not path.startswith("/") and (root / path).resolve().is_relative_to(root) and (root / path).is_file():
            return [path]
    fitting = by_key.get(_key(name), ())
    return [one for one in fitting if alike_file(one) == alike_file(name)] or fitting


def check_image(folder: str | Path, image: Mapping[str, Any], orientation: Orientation = "upright") -> Finding | None:
    """An error that keeps an image, an entry of ``images``, from being read, or a note on its orientation.

    The image is decoded whole, as for training.
    """
    path = Path(folder) / image["file_name"]
    try:
        _, remarks = read_image_with_remarks(path, size=(image["width"], image["height"]), orientation=orientation)
    except DataError as error:
        kind = "sizes that differ" if isinstance(error, SizeError) else "unreadable images"
        return Finding(kind, "error", " ".join(str(error).split()))
    doubts = [
        (kind, remark) for start, kind in ORIENTATION_KINDS.items() for remark in remarks if remark.startswith(start)
    ]
    return next((Finding(kind, "note", f"{path}: {remark}") for kind, remark in doubts), None)


def open_images(
    folder: str | Path, images: Sequence[Mapping[str, Any]], *, orientation: Orientation = "upright", workers: int = 4
) -> Iterator[Finding | None]:
    """Open images, in threads and with a progress bar, and yield :func:`check_image` of each, in order."""
    # Also around all threads: what each of them sets and takes back is all threads' own.
    with without_pillow_warnings(), ThreadPoolExecutor(workers) as executor:
        try:
            opened = executor.map(partial(check_image, folder, orientation=orientation), images)
            yield from tqdm(opened, "opening images", len(images), unit="image", leave=False, delay=1, disable=None)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the images in the queue
