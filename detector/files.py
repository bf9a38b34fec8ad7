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

# How files begin that are not JSON in UTF-8. A letter and a zero byte are UTF-16 without a mark.
NO_UTF8_JSON = {
    b"\x1f\x8b": "not valid JSON: the file is compressed (gzip); unpack it",
    b"PK\x03\x04": "not valid JSON: the file is a ZIP archive; unpack it",
    **dict.fromkeys(
        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"[\0", b"\0"),
        "not UTF-8, but UTF-16 or UTF-32: save it as UTF-8",
    ),
}
AT_ONCE = 2**24  # bytes that are decoded at a time, only to see whether they can be
# Python writes these although JSON does not allow them: words for numbers, and halves of surrogate pairs.
NUMBERS = {b"-Infinity": b"-1e998", b"Infinity": b"1e998", b"NaN": b"1e999"}  # too large for a float, so refused
HALVES = re.compile(  # group 1: a half without the other
    rb"\\(?:\\|u[dD](?:[89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|([89a-fA-F][\da-fA-F]{2})))"
)
CUT_OFF = "Input data was truncated"  # msgspec's words


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it is missing, unreadable, empty, cut off, not UTF-8, or not JSON.
    """
    content = _content(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise DataError(f"{path}: not valid JSON: {error}") from None


def decode_json(path: str | Path, kind: Any) -> Any:
    """Read a large JSON file as values of one of msgspec's types; what the type does not name is not built.

    NaN and Infinity, which Python writes although JSON does not allow them, are read as numbers that no type takes, and
    halves of surrogate pairs as U+FFFD.

    Raises:
        DataError: as :func:`read_json`.
    """
    content = _content(path)
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError:
        raise DataError(f"{path}: not valid JSON: lists or dicts lie too deep in each other") from None
    except ValueError as error:  # msgspec's own, and of a text that is not UTF-8
        mended = _without_halves(_without_words(content))
        if mended == content:
            raise DataError(f"{path}: not valid JSON: {_with_place(error, content)}") from None
    try:
        return msgspec.json.decode(mended, type=kind)
    except ValueError as error:  # its place is one in other bytes
        raise DataError(f"{path}: not valid JSON: {str(error).partition(' (byte')[0]}") from None


def _with_place(error: ValueError, content: bytes) -> str:
    """What msgspec says of a text, with line and column where it names a byte."""
    if CUT_OFF in str(error):
        return "the file is cut off"
    found = re.search(r"\(byte (\d+)\)", str(error))
    if not found:
        return str(error)
    return f"{_place(content, int(found[1]))}: {error}"


def _place(content: bytes, byte: int) -> str:
    line, column = content.count(b"\n", 0, byte) + 1, byte - content.rfind(b"\n", 0, byte)
    return f"line {line}, column {column}"


def _without_halves(content: bytes) -> bytes:
    """JSON with U+FFFD in place of each half of a surrogate pair."""
    return HALVES.sub(lambda found: rb"\ufffd" if found[1] else found[0], content)


def _without_words(content: bytes) -> bytes:
    """JSON with numbers in place of NaN and Infinity. After an odd number of quotes a word is in a string: it stays."""
    for word, number in NUMBERS.items():
        if word not in content:
            continue
        first, *others = content.split(word)
        pieces, in_string = [first], False
        for before, after in zip([first, *others], others):
            in_string ^= before.replace(rb"\\", b"").replace(rb"\"", b"").count(b'"') % 2 == 1
            pieces += [word if in_string else number, after]
        content = b"".join(pieces)
    return content


def _content(path: str | Path) -> bytes:
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)  # some editors begin a file with it
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not content or content.isspace():
        raise DataError(f"{path}: not valid JSON: the file is empty")
    for start, what in NO_UTF8_JSON.items():
        if content.startswith(start):
            raise DataError(f"{path}: {what}")
    byte = _first_not_utf8(content)
    if byte is not None and content.lstrip()[:1] in b'{["':  # or it is no text at all
        where = f"{_place(content, byte)}: byte 0x{content[byte]:02x}"
        raise DataError(f"{path}: not UTF-8 ({where}), but cp1252 or the like: save it as UTF-8")
    return content


def _first_not_utf8(content: bytes) -> int | None:
    """The position of the first byte that is not UTF-8, or ``None``. A letter cut off at the end does not count."""
    if content.isascii():
        return None
    start = 0
    while start < len(content):
        try:
            done = codecs.utf_8_decode(memoryview(content)[start : start + AT_ONCE])[1]  # up to the last whole letter
        except UnicodeDecodeError as error:
            return start + error.start
        if not done:
            break
        start += done
    return None


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
