"""The HTML page of a report: plots, tables and pictures in one file that loads nothing."""

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from detector.evaluation.confusion import confused_pairs
from detector.evaluation.metric import TITLES
from detector.evaluation.pictures import MARKS, Picture
from detector.evaluation.plots import make_plots
from detector.evaluation.report import Report
from detector.evaluation.tables import refined_rows
from detector.text import clean, short

DASH = "–"  # noqa: RUF001  for undefined numbers
MAX_CLASSES = 20  # of a confusion matrix; beyond it, the most frequent confusions are listed


def render_page(report: Report, pictures: Sequence[Picture]) -> str:
    """Render the HTML page of an evaluation.

    Args:
        report: the numbers. Names and texts may contain anything.
        pictures: in their order on the page.

    Returns:
        The page. The same report and pictures give the same text with the same versions of the libraries.

    Raises:
        KeyError, jinja2.UndefinedError: the report lacks an entry.
    """
    environment = Environment(
        autoescape=True, finalize=_finalize, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "num": _number,
        "count": "{:,}".format,
        "short": short,
        "verbatim": _verbatim,
        "part": _fraction,
    }
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        report.to_dict(),
        scored={iou_type: getattr(report, iou_type) for iou_type in TITLES},
        titles=TITLES,
        plots=make_plots(report),
        refined=refined_rows(report.refinement) if report.refinement else [],
        matrix=report.confusion["matrix"] if len(report.confusion["names"]) <= MAX_CLASSES else None,
        pairs=confused_pairs(report.confusion, MAX_CLASSES),
        marks=MARKS,
        pictures=[(kind, [one for one in pictures if one.kind == kind]) for kind in ("worst", "best")],
    )


def _verbatim(text: str) -> Markup:
    """Escape a command to be copied, with its lines and spaces and without invisible characters."""
    return escape("".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")))


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _fraction(value: float | None, whole: float | None = 1.0, power: float = 1.0) -> str:
    """Return the length of a bar or the strength of a colour, 0 to 1; a power below 1 raises small values."""
    if not value or not whole or not math.isfinite(value / whole):
        return "0"
    return f"{min(max(value / whole, 0), 1) ** power:.3f}"


def _finalize(value: object) -> object:
    """Clean each value before jinja2 escapes it."""
    if value is None:
        return DASH
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
