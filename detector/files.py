"""Files that are written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that at any moment, power cuts included, either the new or the old one is there.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with _replacing(path) as unfinished, open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=indent).encode())


def link_whole(source: Path, path: Path) -> None:
    """Give a file, never changed in place, a second name; a copy where the file system knows no hard links."""
    with _replacing(path) as unfinished:
        try:
            os.link(source, unfinished)
        except OSError:
            with open(source, "rb") as original, open(unfinished, "wb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """The name of a new file that, once it is written, takes the place of another. An error names the latter."""
    # In the same folder: a move from elsewhere would be a copy, which can be cut off.
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # it may be a second name of a good file, left by a run that was killed
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)  # also where both were names of one file, and nothing was moved
    if os.name == "posix":  # the folder's entry must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # not every file system can; the new file is there by now
                os.fsync(folder)
        finally:
            os.close(folder)
