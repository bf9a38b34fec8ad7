"""The image files of a data set: whether they are there, and can be read."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detector.data.images import read_image, without_pillows_warnings
from detector.data.problems import Problem
from detector.errors import DataError, SizeError, shown


def file_problems(
    names: Iterable[str | None], folder: str | Path, where: Callable[[int], str]
) -> Iterator[tuple[int | None, Problem]]:
    """Find image files that are not in their folder, by their names alone.

    Args:
        names: of the images, relative to the folder; ``None`` is passed over.
        folder: of the images.
        where: names an image in a message, by its place in ``names``.

    Yields:
        Problems, all of level "error", each with the place of its image; ``None`` for the folder's.
    """
    try:
        present = set(os.listdir(folder))  # one look, not one a file: COCO has 118,000
    except OSError as error:
        message = f"{folder}: no such image folder, or it cannot be read: {error.strerror}"
        yield None, Problem("missing image folder", "error", message)
        return
    root = Path(folder).resolve()
    for position, name in enumerate(names):
        if name is None or name in present:
            continue
        inside, there = True, False
        with suppress(OSError, ValueError):  # a name that no file can have: too long, with a NUL byte
            file = (root / name).resolve()
            inside, there = file.is_relative_to(root), file.is_file()
        message = f"{where(position)} has file_name {shown(name)}"
        if not inside:
            yield position, Problem("image files outside their folder", "error", f"{message}, outside {folder}")
        elif not there:
            yield position, Problem("missing image files", "error", f"{message}, not in {folder}")


def image_problem(folder: str | Path, image: Mapping[str, Any]) -> Problem | None:
    """Say what keeps an image, an entry of ``images``, from being read. It is decoded whole, as for training."""
    try:
        read_image(Path(folder) / image["file_name"], width=image["width"], height=image["height"])
    except DataError as error:
        kind = "sizes that differ" if isinstance(error, SizeError) else "unreadable images"
        return Problem(kind, "error", " ".join(str(error).split()))
    return None


def open_images(
    folder: str | Path, images: Sequence[Mapping[str, Any]], *, workers: int = 4
) -> Iterator[Problem | None]:
    """Open images, in threads and with a progress bar, and yield :func:`image_problem` of each, in order."""
    # Also around all threads: what each of them sets and takes back is all threads' own.
    with without_pillows_warnings(), ThreadPoolExecutor(workers) as executor:
        try:
            opened = executor.map(partial(image_problem, folder), images)
            yield from tqdm(opened, "opening images", len(images), unit="image", leave=False, delay=1, disable=None)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the images in the queue
