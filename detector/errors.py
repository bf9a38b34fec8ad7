"""What a user can mend, said in one sentence."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the program was given; its words are meant for the user."""


class DataError(UserError, ValueError):
    """What is wrong with a data set, an image or a results file: names the file, the entry, the field and the value."""


class SizeError(DataError):
    """An image has another size than its annotation says."""


class ModelError(UserError, ValueError):
    """What is wrong with a model's settings, weights or checkpoint."""


def sentence(error: BaseException) -> str:
    """What an error says, in one line. From a data loader's worker it comes with a traceback before it."""
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        text = text.splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return " ".join(text.split())


@contextmanager
def in_a_sentence(*others: type[Exception]) -> Iterator[None]:
    """A mistake of the user ends the program in one sentence, Ctrl-C in a word.

    Args:
        others: exceptions besides :class:`UserError` and ``OSError`` whose words are meant for the user.
    """
    known: tuple[type[Exception], ...] = (UserError, OSError, *others)
    try:
        yield
    except known as error:
        # What the failed calls held goes now, such as a loader's workers: at exit Python would wait for them.
        traceback.clear_frames(error.__traceback__)
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
