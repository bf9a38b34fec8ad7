"""Files that are written whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, power cuts included, either the new or the old one is there.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    unfinished = _unfinished(path)
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _move(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=indent).encode())


def link_whole(source: Path, path: Path) -> None:
    """Give a file, never changed in place, a second name; a copy where the file system knows no hard links."""
    unfinished = _unfinished(path)
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    _move(unfinished, path)


def _unfinished(path: Path) -> Path:
    """In the same folder: a move from elsewhere would be a copy, which can be cut off."""
    return path.with_name(f".{path.name}.unfinished")


def _move(source: Path, path: Path) -> None:
    os.replace(source, path)
    if os.name == "posix":  # the folder's entry must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
