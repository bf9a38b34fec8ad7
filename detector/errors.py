"""User-facing errors."""

import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from string import Formatter
from typing import Any

from detector.signals import sigterm_as_ctrl_c


class UserError(Exception):
    """An error in the user's input. Its message is meant for the user.

    Args:
        message: what is wrong.
        setting: the name of the setting at fault, dotted ("refinement.iterations"). A command line shows its flag.
        value: the value of ``setting``.
        hints: what to do, alternatives in order of preference. Names of settings stand in braces, "lower {batch_size}";
            a command line replaces them by its flags, and drops a hint whose settings it does not have.
    """

    def __init__(self, message: str = "", *, setting: str | None = None, value: Any = None, hints: Sequence[str] = ()):
        super().__init__(message)
        self.message, self.setting, self.value, self.hints = message, setting, value, tuple(hints)

    def describe(self, flag_of: Callable[[str], str | None] = lambda name: name) -> str:
        """Return the whole message.

        Args:
            flag_of: from the name of a setting to what the reader calls it; ``None`` where the reader does not have it.
        """
        text = self.message
        if self.setting is not None:
            text = f"{flag_of(self.setting) or self.setting} {short_repr(self.value)}: {text}"
        hints = []
        for hint in self.hints:
            flags = {name: flag_of(name) for _, name, _, _ in Formatter().parse(hint) if name}
            if None not in flags.values():
                hints.append(Formatter().vformat(hint, (), flags))
        return f"{text}: {', or '.join(hints)}" if hints else text

    def __str__(self) -> str:
        return self.describe()


class DataError(UserError, ValueError):
    """What is wrong with a data set, an image or a results file: names the file, the entry, the field and the value."""


class ImageError(DataError):
    """An image that cannot be read."""


class SizeError(ImageError):
    """An image has another size than its annotation says."""


class MissingAnnotationsError(DataError):
    """Masks, or keypoints, are needed, and no annotation of a file has any."""


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


def short_repr(value: Any) -> str:
    """A value of a file that anybody may have written, on one line, cut where it is long or deep."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python's limit to the digits of an integer
        return "an integer of thousands of digits"
    return text if len(text) <= 500 else f"{text[:497]}..."


def one_line(error: BaseException, flag_of: Callable[[str], str | None] = lambda name: name) -> str:
    """Return the message of an error in one line, without the traceback that a loader's worker puts before it."""
    text = error.describe(flag_of) if isinstance(error, UserError) else str(error).strip()
    text = text or type(error).__name__
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
def exit_on_user_error(
    *others: type[Exception], flag_of: Callable[[str], str | None] = lambda name: name
) -> Iterator[None]:
    """End the program with a one-line message for a user error, out of memory, Ctrl-C, SIGTERM or a closed pipe.

    The exit code is 1, but 2 for :class:`UsageError`, 130 for Ctrl-C and SIGTERM, and 141 for a closed pipe.

    Args:
        others: exceptions that count as user errors, besides :class:`UserError` and ``OSError``.
        flag_of: see :meth:`UserError.describe`.
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
            print(f"error: {one_line(error, flag_of)}", file=sys.stderr)
            sys.exit(2)
        sys.exit(f"error: {one_line(error, flag_of)}")
    except (MemoryError, RuntimeError) as error:
        reader_died = "DataLoader worker (pid" in str(error)
        if not reader_died and not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        what = "a process that reads images died, probably of too little memory" if reader_died else "out of memory"
        sys.exit(f"error: {what}: take fewer or smaller images at a time, or fewer workers ({one_line(error)[:200]})")
    except KeyboardInterrupt as error:
        if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0:
            checkpoint = getattr(error, "checkpoint", None)  # of a training
            advice = f": to resume, add {flag_of('ckpt_path')} {checkpoint}" if checkpoint is not None else ""
            print(f"interrupted{advice}", file=sys.stderr)
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
