"""Command lines as they are called, and how they end."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from detector.tools.evaluate import main


@contextmanager
def refused(words: str, *, code: int = 2) -> Iterator[None]:
    """The block ends the program with this exit code and one line, in which the pattern is found."""
    with redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
        yield
    line = said.getvalue().removesuffix("\n")
    if isinstance(stop.value.code, str):  # which Python prints, and ends with 1
        line += stop.value.code
        assert code == 1
    else:
        assert code == stop.value.code
    assert re.search(rf"^error: .*{words}", line), line
    assert "\n" not in line


def score(**flags: object) -> None:
    """tools/eval.py with these flags, in this process; it ends with an exit code other than 0."""
    values = {name: str(value).lower() if isinstance(value, bool) else value for name, value in flags.items()}
    if code := main([f"--{name}={value}" for name, value in values.items()]):
        sys.exit(code)
