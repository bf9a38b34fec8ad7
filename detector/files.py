"""Reading JSON, and atomic writes."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from detector.errors import DataError


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises :class:`DataError` if it is missing, unreadable, cut off or no JSON."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a byte-order mark
            return json.load(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise DataError(f"{path}: not valid JSON (cut off, or not an annotation file?): {error}") from None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: at any moment, power cuts included, either the new or the old one is there.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with _replacing(path) as unfinished, open(unfinished, "wb") as file:
        file.write(content)


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON in an atomic write."""
    write_atomically(path, json.dumps(content, indent=indent).encode())


def link_atomically(source: Path, path: Path) -> None:
    """Give a file, never changed in place, a second name; a copy where the file system knows no hard links."""
    with _replacing(path) as unfinished:
        try:
            os.link(source, unfinished)
        except OSError:
            shutil.copyfile(source, unfinished)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Name a new file that, once it is written, takes the place of another (atomic write). Errors name the latter."""
    # In the same folder: a move from elsewhere would be a copy, which can be cut off.
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # it may be a second name of a good file, left by a run that was killed
    try:
        yield unfinished
        _sync(unfinished, os.O_RDWR)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)  # also where both were names of one file, and nothing was moved
    if os.name == "posix":  # the folder's entry must reach the disk as well
        with suppress(OSError):  # not every file system can; the new file is there by now
            _sync(path.parent, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
