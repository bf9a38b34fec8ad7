"""Reading JSON, and atomic writes."""

import codecs
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from detector.errors import DataError

# Beginnings of files that are not JSON in UTF-8. A letter and a zero byte are UTF-16 without a byte order mark.
NOT_JSON = {
    b"\x1f\x8b": "not valid JSON: the file is compressed (gzip); unpack it",
    b"PK\x03\x04": "not valid JSON: the file is a ZIP archive; unpack it",
    **dict.fromkeys(
        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"[\0", b"\0"),
        "not UTF-8, but UTF-16 or UTF-32: save it as UTF-8",
    ),
}
CHUNK = 2**24  # bytes decoded at a time in the search for invalid UTF-8
# Python writes NaN, Infinity and unpaired surrogates, which JSON does not allow.
WORDS = {b"-Infinity": b"-1e998", b"Infinity": b"1e998", b"NaN": b"1e999"}  # too large for any type
TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|-?Infinity|NaN', re.DOTALL)
HALVES = re.compile(  # group 1: an unpaired surrogate
    rb"\\(?:\\|u[dD](?:[89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|([89a-fA-F][\da-fA-F]{2})))"
)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable, empty, cut off, not UTF-8, or not JSON.
    """
    content = _content(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise DataError(f"{path}: not valid JSON: {error}") from None


def decode_json(path: str | Path, kind: Any) -> Any:
    """Decode a large JSON file into a msgspec type. Fields that the type does not declare are skipped.

    NaN and Infinity are read as numbers that no type accepts, and unpaired surrogates as U+FFFD.

    Raises:
        DataError: as :func:`read_json`.
    """
    content = _content(path)
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError:
        raise DataError(f"{path}: not valid JSON: lists or dicts are nested too deeply") from None
    except ValueError as error:
        found = re.search(r"\(byte (\d+)\)", str(error))
        place = f"{_place(content, int(found[1]))}: " if found else ""
        what = "the file is cut off" if "Input data was truncated" in str(error) else f"{place}{error}"
        valid = TOKENS.sub(_as_json, content)
        if valid == content:
            raise DataError(f"{path}: not valid JSON: {what}") from None
    try:
        return msgspec.json.decode(valid, type=kind)
    except ValueError as error:  # its byte offset is not that of the file
        raise DataError(f"{path}: not valid JSON: {str(error).partition(' (byte')[0]}") from None


def _as_json(token: re.Match[bytes]) -> bytes:
    return WORDS.get(token[0]) or HALVES.sub(lambda half: rb"\ufffd" if half[1] else half[0], token[0])


def _place(content: bytes, byte: int) -> str:
    line, column = content.count(b"\n", 0, byte) + 1, byte - content.rfind(b"\n", 0, byte)
    return f"line {line}, column {column}"


def _content(path: str | Path) -> bytes:
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not content or content.isspace():
        raise DataError(f"{path}: not valid JSON: the file is empty")
    for start, what in NOT_JSON.items():
        if content.startswith(start):
            raise DataError(f"{path}: {what}")
    byte = _first_not_utf8(content)
    if byte is not None and content.lstrip()[:1] in b'{["':  # otherwise it is not text
        where = f"{_place(content, byte)}: byte 0x{content[byte]:02x}"
        raise DataError(f"{path}: not UTF-8 ({where}), but cp1252 or the like: save it as UTF-8")
    return content


def _first_not_utf8(content: bytes) -> int | None:
    """Return the position of the first byte that is not UTF-8. A truncated character at the end does not count."""
    if content.isascii():
        return None
    start = 0
    try:
        while done := codecs.utf_8_decode(memoryview(content)[start : start + CHUNK])[1]:  # up to a whole character
            start += done
    except UnicodeDecodeError as error:
        return start + error.start
    return None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: even after a power cut it has either the old or the new content.

    Raises:
        OSError: the file cannot be written. The old content stays.
    """
    with _replacing(path) as unfinished, open(unfinished, "wb") as file:
        file.write(content)


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON as :func:`write_atomically` does."""
    write_atomically(path, json.dumps(content, indent=indent).encode())


def link_atomically(source: Path, path: Path) -> None:
    """Hard-link a file that is never changed in place, or copy it where hard links are not supported."""
    with _replacing(path) as unfinished:
        try:
            os.link(source, unfinished)
        except OSError:
            shutil.copyfile(source, unfinished)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` once it is written. Errors name ``path``."""
    # In the same folder: a move from elsewhere would be a copy, which can be interrupted.
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # a killed run may have left it as a hard link to a good file
    try:
        yield unfinished
        _sync(unfinished, os.O_RDWR)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)  # os.replace does nothing if both are links to one file
    if os.name == "posix":  # the directory entry must reach the disk as well
        with suppress(OSError):  # not supported by every file system
            _sync(path.parent, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
