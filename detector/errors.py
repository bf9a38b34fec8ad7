"""What a user can mend, said in one sentence."""

import os
import reprlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detector.signals import sigterm_as_ctrl_c


class UserError(Exception):
    """A mistake in what the program was given; its words are meant for the user."""


class DataError(UserError, ValueError):
    """What is wrong with a data set, an image or a results file: names the file, the entry, the field and the value."""


class ImageError(DataError):
    """An image that cannot be read."""


class SizeError(ImageError):
    """An image has another size than its annotation says."""


class MissingPartError(DataError):
    """Masks, or key points, are needed, and no annotation of a file has any."""


class ModelError(UserError, ValueError):
    """What is wrong with a model's settings, weights or checkpoint."""


class UsageError(UserError):
    """A mistake in a command line: flags that do not go together, or a value that a flag cannot have."""


class _Short(reprlib.Repr):
    def repr_instance(self, value: Any, level: int) -> str:
        plain = value is None or isinstance(value, (bool, float, complex))
        return repr(value) if plain else f"<{type(value).__name__}>"


_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother = 5, 200, 200  # a kilobyte of lists may be shown as gigabytes


def shown(value: Any) -> str:
    """A value of a file that anybody may have written, on one line, cut where it is long or deep."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python's limit to the digits of an integer
        return "an integer of thousands of digits"
    return text if len(text) <= 500 else f"{text[:497]}..."


def sentence(error: BaseException) -> str:
    """What an error says, in one line. From a data loader's worker it comes with a traceback before it."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        text = text.splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return " ".join(text.split())


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to mmap",
    "shared memory(shm)",
    "_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whoever says it: Python, PyTorch, or a process that reads images."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


@contextmanager
def in_a_sentence(*others: type[Exception]) -> Iterator[None]:
    """A user's mistake ends the program in one sentence, Ctrl-C and SIGTERM in a word, an unread output in silence.

    The exit code is 2 for a mistake in the command line, 1 for others, 130 for Ctrl-C.

    Args:
        others: exceptions besides :class:`UserError` and ``OSError`` whose words are meant for the user.
    """
    known: tuple[type[Exception], ...] = (UserError, OSError, *others)
    try:
        with sigterm_as_ctrl_c():
            yield
        print(end="", flush=True)  # not at exit, where Python would complain
    except known as error:
        if isinstance(error, BrokenPipeError) and _is_cut_off("\n"):
            sys.exit(141)  # what a shell says of a program that SIGPIPE ended, as of others before `| head`
        # What the failed calls held goes now, such as a loader's workers: at exit Python would wait for them.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, UsageError):
            print(f"error: {sentence(error)}", file=sys.stderr)
            sys.exit(2)
        sys.exit(f"error: {sentence(error)}")
    except (MemoryError, RuntimeError) as error:
        reader_died = "DataLoader worker (pid" in str(error)
        if not reader_died and not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        what = "a process that reads images died, probably of too little memory" if reader_died else "out of memory"
        sys.exit(f"error: {what}: take fewer or smaller images at a time, or fewer workers ({sentence(error)[:200]})")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        _is_cut_off()


def _is_cut_off(probe: str = "") -> bool:
    """Whether the standard output fails to take ``probe`` and what is left to be written; then that goes nowhere."""
    try:
        print(probe, end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
