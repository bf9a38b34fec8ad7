"""Preparing names and notes from files of unknown origin for display."""

import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import unquote

BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_])[-_](?=[^\W\d_])")


def clean(text: str) -> str:
    """Return one line without control characters or marks that change the direction of text."""
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cs":  # an unpaired surrogate, which cannot be written to a file
            kept.append("\ufffd")
        elif category != "Cf":
            kept.append(" " if category in ("Cc", "Zl", "Zp") else character)
    return " ".join("".join(kept).split())


def short(text: str, longest: int = 60) -> str:
    """Return :func:`clean` text, cut to a number of characters."""
    text = clean(text)
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "\u2026"


def alike(name: str) -> str:
    """Return a key that ignores case, Unicode form, and blanks, hyphens and underscores between letters."""
    plain = BETWEEN_LETTERS.sub("", unicodedata.normalize("NFKC", name).casefold())
    return "".join(c for c in plain if not c.isspace() and unicodedata.category(c) != "Cf")


def alike_file(name: str) -> str:
    """Return :func:`alike` of the last component of a path or URL, percent-decoded and without its query."""
    return alike(unquote(name).partition("?")[0].replace("\\", "/").rpartition("/")[2])


def listed(names: Sequence[str], most: int = 5) -> str:
    """List the first of some names, each :func:`short`, and count the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(short(name) for name in names[:most]) + more
