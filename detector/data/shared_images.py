"""Finding images that two splits share, by the content of their files."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def equal_files(first: Iterable[Path], second: Iterable[Path]) -> dict[Path, Path]:
    """Find the files of one list that are byte-identical to a file of another.

    Only files of equal size are read, and only those with the same bytes in their middle are read whole. Missing and
    irregular files are skipped.

    Returns:
        Each such file of the first list, in order, with the first identical file of the second.
    """
    ours, theirs = dict.fromkeys(first), dict.fromkeys(second)
    keys: tuple[Callable[[Path], int | bytes], ...] = (_size, _middle, _digest)
    for key in keys:
        ours, theirs = _with_keys(key, ours), _with_keys(key, theirs)
        shared = set(ours.values()) & set(theirs.values())
        ours, theirs = ({path: value for path, value in one.items() if value in shared} for one in (ours, theirs))
    found = {value: path for path, value in reversed(theirs.items())}
    return {path: found[value] for path, value in ours.items()}


def _with_keys(key: Callable[[Path], int | bytes], paths: Iterable[Path]) -> dict[Path, int | bytes | None]:
    keys: dict[Path, int | bytes | None] = {}
    for path in paths:
        with suppress(OSError, ValueError):  # ValueError: a name that no file can have
            keys[path] = key(path)
    return keys


def _size(path: Path) -> int:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    return status.st_size


def _middle(path: Path) -> bytes:
    with open(path, "rb") as file:  # bitmaps of one resolution have equal sizes and beginnings
        file.seek(max(os.fstat(file.fileno()).st_size // 2 - 2048, 0))
        return file.read(4096)


def _digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
