"""User-facing errors."""

import os
import re
import reprlib
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detector.signals import sigterm_as_ctrl_c

FlagOf = Callable[[str], str | None]  # from the name of a setting to the reader's name for it, None if it has none


class UserError(Exception):
    """An error in the user's input. Its message is meant for the user.

    Args:
        message: what is wrong.
        setting: the dotted name of the invalid setting ("refinement.iterations"). A command line shows its flag.
        value: the value of ``setting``.
        hints: what to do, alternatives in order of preference. Names of settings stand in braces, "lower {batch_size}".
            A command line replaces them by its flags, and drops a hint whose settings it does not have.
    """

    def __init__(self, message: str = "", *, setting: str | None = None, value: Any = None, hints: Sequence[str] = ()):
        super().__init__(message)
        self.message, self.setting, self.value, self.hints = message, setting, value, tuple(hints)

    def describe(self, flag_of: FlagOf = str) -> str:
        """Return the message with the setting, its value and the hints."""
        text = self.message
        if self.setting is not None:
            text = f"{flag_of(self.setting) or self.setting} {short_repr(self.value)}: {text}"
        hints = []
        for hint in self.hints:
            words = re.split(r"{([\w.]+)}", hint)  # odd-numbered pieces are names
            flags = [flag_of(name) for name in words[1::2]]
            if None not in flags:
                words[1::2] = map(str, flags)
                hints.append("".join(words))
        return f"{text}: {', or '.join(hints)}" if hints else text

    def __str__(self) -> str:
        return self.describe()


class DataError(UserError, ValueError):
    """A data set, an image or a results file is invalid. The message names the file, entry, field and value."""


class ImageError(DataError):
    """An image cannot be read."""


class SizeError(ImageError):
    """The size of an image differs from the annotated size."""


class MissingAnnotationsError(DataError):
    """A file lacks required masks or keypoints."""


class ModelError(UserError, ValueError):
    """A model's settings, weights or checkpoint are invalid."""


class UsageError(UserError):
    """The command line is invalid: flags exclude each other, or a flag has an invalid value."""


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 5, 200, 200  # nested lists would grow exponentially


def short_repr(value: Any) -> str:
    """Return the repr of an untrusted value in one line of at most 500 characters."""
    try:
        text = _short.repr(value).replace("\n", " ")
    except ValueError:  # Python limits the digits of an integer
        return "an integer of thousands of digits"
    return text if len(text) <= 500 else f"{text[:497]}..."


def one_line(error: BaseException, flag_of: FlagOf = str) -> str:
    """Return an error's message as one line, without the traceback that a loader's worker prepends."""
    text = error.describe(flag_of) if isinstance(error, UserError) else str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        text = f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"  # without the number of the error
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return " ".join(text.split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, in Python, PyTorch or a loader's worker."""
    said = r"out of memory|allocate memory|enough memory|unable to mmap|shared memory\(shm\)|_alloc_failed"
    return isinstance(error, MemoryError) or re.search(said, str(error), re.IGNORECASE) is not None


@contextmanager
def exit_on_user_error(flag_of: FlagOf = str) -> Iterator[None]:
    """End the program with a one-line message for a user error, out of memory, Ctrl-C, SIGTERM or a closed pipe.

    The exit code is 2 for :class:`UsageError`, 130 for Ctrl-C and SIGTERM, 141 for a closed pipe, and 1 otherwise.
    """
    try:
        with sigterm_as_ctrl_c():
            yield
        print(end="", flush=True)  # at exit, Python would print a failure itself
    except KeyboardInterrupt as error:
        if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0:
            is_path = [re.match("--ckpt[_-]path", word) is not None for word in sys.argv]
            follows = [False, *(flag and "=" not in word for flag, word in zip(is_path, sys.argv))]
            kept = [word for word, *skipped in zip(sys.argv, is_path, follows) if not any(skipped)]
            command = shlex.join(["python", *kept])
            same = "the same command with" if "TORCHELASTIC_RUN_ID" in os.environ else command
            checkpoint = getattr(error, "checkpoint", None)  # of a training
            advice = "" if checkpoint is None else f"; to resume: {same} --ckpt_path {checkpoint}"
            print(f"interrupted{advice}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_cut_off("\n"):
            sys.exit(141)  # as shells report a program that SIGPIPE ended
        message = one_line(error, flag_of)
        # The last is Lightning's, for mutually exclusive settings. It is not imported here.
        if not isinstance(error, (UserError, OSError)) and type(error).__name__ != "MisconfigurationException":
            if not is_out_of_memory(error) and "DataLoader worker (pid" not in message:
                raise
            hints = ("lower {batch_size}", "lower {workers}", "use smaller images")
            message = UserError(f"probably out of memory ({message[:200]})", hints=hints).describe(flag_of)
        # Release what the failed calls hold, such as a loader's workers: Python would wait for them at exit.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, UsageError):
            sys.exit(f"error: {message}")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        _is_cut_off()


def _is_cut_off(probe: str = "") -> bool:
    """Print and flush. Return whether the reader has closed the pipe; later output is then discarded."""
    try:
        print(probe, end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
