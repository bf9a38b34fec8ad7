"""One HTML page of an evaluation: plots, tables and pictures in one file that loads nothing, for any browser."""

import base64
import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from detector.drawing import COLORS, Stroke
from detector.names import clean, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASH = "–"  # noqa: RUF001  stands for a number that there is none of
INK = "#000000"  # drawn in the colour of the page's text, light or dark
LINES = tuple(color for color in COLORS if color not in (INK, "#F0E442"))  # yellow cannot be seen on white
SIDE = 960  # pixels, the longer side of a picture
OPEN = 6  # pictures of the worst images that are seen at once, and of the best; more are folded away
CLASSES = 20  # that a confusion matrix shows by name
WORST = 50  # images in the table
# rcParams of every plot, over matplotlib's own defaults: what the user's matplotlibrc says does not count.
STYLE: dict[Any, Any] = {  # Any: some versions of matplotlib have a type of their own for the keys
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "text.parse_math": False,
}
FONT = "'DejaVu Sans', sans-serif"  # as matplotlib writes STYLE's; the page's own font takes its place

# What COCO's numbers mean, in plain words.
MEANINGS = {
    "AP": "Average precision, the main number: over all classes, and over IoU thresholds from 0.50 to 0.95.",
    "AP50": "AP when a box that overlaps the truth by an IoU of 0.50 counts: found, roughly.",
    "AP75": "AP at IoU 0.75: found, with a tight box.",
    "AP90": "AP at IoU 0.90: found, with an almost exact box.",
    "APs": "AP of small objects, of less than 32 x 32 pixels.",
    "APm": "AP of medium objects, from 32 x 32 to 96 x 96 pixels.",
    "APl": "AP of large objects, of more than 96 x 96 pixels.",
    "AR1": "Average recall, the share of objects found, with the one best detection of each image and class.",
    "AR10": "Average recall with the 10 best detections of each image and class.",
    "AR100": "Average recall with the 100 best detections of each image and class.",
    "ARs": "Average recall of small objects, with 100 detections.",
    "ARm": "Average recall of medium objects, with 100 detections.",
    "ARl": "Average recall of large objects, with 100 detections.",
}


@dataclass(frozen=True)
class Mark:
    """How a box of one outcome is drawn in the pictures, and what its caption says."""

    color: str
    stroke: Stroke
    caption: str
    meaning: str


MARKS = {  # by kind of BoxOutcome
    "found": Mark(LINES[0], "thin", "name 0.90", "right: a detection of an object; each class has a colour of its own"),
    "false": Mark(
        "#E0002A", "thick", "false: name 0.90", "a false detection: no object is there, or a better detection has it"
    ),
    "confused": Mark("#B000C8", "thick", "name 0.90, is: other", "an object taken for one of another class"),
    "missed": Mark("#FFE600", "dashed", "missed: name", "an object that was not detected"),
    "crowd": Mark("#666666", "thin", "on a crowd", "a crowd, or a detection on one: neither right nor wrong"),
}


@dataclass(frozen=True)
class Picture:
    """An image of the split.

    Args:
        kind: of which end of the list it is.
        entry: its row of ``report["images"]``.
        image: with its boxes, marked by their outcome; of any size.
    """

    kind: Literal["worst", "best"]
    entry: dict[str, Any]
    image: Image.Image


@dataclass(frozen=True)
class Plot:
    """A plot and what stands around it: heading, legend of (label, colour, dashed or not), remark."""

    svg: Markup
    title: str
    legend: Sequence[tuple[str, str, bool]] = ()
    remark: str = ""


def render_page(report: Mapping[str, Any], pictures: Iterable[Picture]) -> str:
    """The HTML page of an evaluation.

    Args:
        report: the numbers, JSON types; ``None`` for one that there is none of. Names and texts may hold anything.
        pictures: the images to show, in this order; one at a time is kept, as a JPEG.

    Returns:
        The page. The same report and pictures give the same text with the same versions of the libraries.

    Raises:
        KeyError, jinja2.UndefinedError: the report lacks an entry.
    """
    environment = Environment(
        autoescape=True, finalize=_finalize, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"num": number, "count": count, "short": short, "verbatim": verbatim, "part": part}
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    shown = [{"kind": one.kind, "entry": one.entry, **_jpeg(one.image)} for one in pictures]  # may add to the notes
    sections, absent = _sections(report, shown)
    return template.render(
        report,
        sections=sections,
        absent=absent,
        meanings=MEANINGS,
        worst=WORST,
        plots=_plots(report),
        matrix=confusion_table(report["confusion"]),
        marks=MARKS,
        pictures={kind: [one for one in shown if one["kind"] == kind] for kind in ("worst", "best")},
        first=OPEN,
    )


def _sections(report: Mapping[str, Any], pictures: Sequence[object]) -> tuple[dict[str, str], list[str]]:
    """The sections that there are data for, by anchor, and sentences about those left out."""
    scored = any(row["AP"] is not None for row in (*report["by_iou"], *report["by_size"]))
    sections = [
        ("scores", "Scores", True, ""),
        ("curves", "Precision and recall", report["curves"].get("mean"), "No curves: there are no objects to find."),
        ("threshold", "Score threshold", report["operating_points"]["mean"], "No threshold: no object was found."),
        ("strictness", "By IoU and size", scored, ""),
        ("classes", "By class", report["by_class"], "No table of classes: there are none."),
        ("confusion", "Confusions", report["confusion"]["names"], ""),
        ("proposals", "Proposals", report["proposals"], ""),
        ("losses", "Losses", report["losses"], ""),
        ("speed", "Speed", report["speed"], ""),
        ("pictures", "Worst and best images", pictures, "No pictures: no images were given, or none asked for."),
        ("images", "The worst images", report["images"], "No table of images: there are none."),
    ]
    shown = {anchor: title for anchor, title, data, _ in sections if data}
    return shown, [sentence for anchor, _, _, sentence in sections if anchor not in shown and sentence]


# Text and numbers


def verbatim(text: str) -> Markup:
    """Text with its lines and spaces, for a command to be copied; only what cannot be seen is left out."""
    return escape("".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")))


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash if there is none."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def count(value: int | None) -> str:
    """A whole number; a dash if there is none."""
    return DASH if value is None else f"{value:,}"


def part(value: float | None, whole: float | None = 1.0, power: float = 1.0) -> str:
    """The length of a bar or the strength of a colour, 0 to 1, for CSS; a power of less than 1 lifts small ones."""
    if not value or not whole or not math.isfinite(value / whole):
        return "0"
    return f"{min(max(value / whole, 0), 1) ** power:.3f}"


def _finalize(value: object) -> object:
    """What jinja2 does to every value before it escapes it."""
    if value is None:
        return DASH
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _jpeg(picture: Image.Image) -> dict[str, Any]:
    """A picture as a data URI of at most :data:`SIDE` pixels, with its ``width`` and ``height``."""
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"uri": Markup(uri), "width": picture.width, "height": picture.height}


# Confusions


def confusion_table(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """A confusion matrix that a reader can take in.

    Args:
        confusion: ``names`` of n classes and ``matrix`` [n + 1, n + 1], rows the truth, columns what it was detected
            as; the last row false detections, the last column missed objects.

    Returns:
        ``names`` and ``matrix`` of the same layout, in which all classes but the :data:`CLASSES` with most confusions
        are one, "other classes", if there are more; ``others``, how many that is; ``totals``, the rows' sums; and
        ``pairs``, the most frequent confusions as (truth, detected as, count).
    """
    names = list(confusion["names"])
    matrix = np.array(confusion["matrix"], dtype=np.int64).reshape(len(names) + 1, len(names) + 1)
    confused = matrix[:-1, :-1].copy()
    np.fill_diagonal(confused, 0)
    others = 0
    if len(names) > CLASSES:
        # Sorted by class again after the choice; of equals, the first ones.
        chosen = np.sort(np.argsort(-(confused.sum(0) + confused.sum(1)), kind="stable")[:CLASSES])
        group = np.full(len(names) + 1, CLASSES)  # of each class: its new row, or that of the others
        group[chosen] = np.arange(CLASSES)
        group[-1] = CLASSES + 1
        member = np.eye(CLASSES + 2, dtype=np.int64)[group]
        matrix = member.T @ matrix @ member
        others = len(names) - CLASSES
    order = np.argsort(-confused, axis=None, kind="stable")[:CLASSES]
    rows, columns = np.unravel_index(order, confused.shape)
    pairs = [(names[i], names[j], int(confused[i, j])) for i, j in zip(rows, columns) if confused[i, j]]
    return {
        "names": [names[i] for i in chosen] + ["other classes"] if others else names,
        "matrix": matrix.tolist(),
        "others": others,
        "totals": matrix.sum(1).tolist(),
        "pairs": pairs if others else [],
    }


# Plots


def _plots(report: Mapping[str, Any]) -> dict[str, Plot]:
    """All plots that there are data for. Names of classes stand in the legends, which are HTML, never in the SVG."""
    plots = {}
    drawn = report["curves"]
    if drawn.get("mean"):
        lines = [(f"IoU {iou}", values, color, False) for (iou, values), color in zip(drawn["mean"].items(), LINES)]
        plots["mean"] = _curves("mean", "Mean over the classes", drawn["recall"], lines)
    named = {name: values for name, values in drawn.get("by_class", {}).items() if _finite(values).size}
    if named:
        lines, remark = _class_lines(named, "AP50")
        plots["by_class"] = _curves("by_class", "By class, at IoU 0.50", drawn["recall"], lines, remark)
    points = report["operating_points"]
    if points["mean"]:
        plots["threshold"] = _threshold(points)
        for key, label in (("f1", "F1"), ("precision", "precision"), ("recall", "recall")):
            of_class = {name: curves[key] for name, curves in points["curves"]["by_class"].items()}
            lines, remark = _class_lines(of_class, f"mean {label}")
            title = f"{label[0].upper()}{label[1:]} by class"
            plots[key] = _over_scores(key, title, points["curves"]["score"], lines, remark)
    if any(row["AP"] is not None for row in report["by_iou"]):
        plots["by_iou"] = _by_iou(report["by_iou"])
    if any(row["AP"] is not None for row in report["by_size"]):
        plots["by_size"] = _by_size(report["by_size"])
    if report["proposals"]:
        plots["proposals"] = _proposals(report["proposals"]["rows"])
    stages = [row for row in report["speed"]["rows"] if row["stage"] != "total"] if report["speed"] else []
    if stages:
        plots["speed"] = _speed(stages)
    return plots


def _finite(values: Sequence[float | None]) -> np.ndarray:
    numbers = np.array(values, dtype=float)  # None becomes nan
    return numbers[np.isfinite(numbers)]


def _plot(name: str, label: str, draw: Callable[["Axes"], None], *, height: float = 3.4) -> Markup:
    """An SVG to be put into HTML, 5 inches wide: as wide as its column, in its colours and its font.

    Args:
        name: one of its own for every plot of a page; no two plots share ids.
        label: what it shows, for those who cannot see it.
        draw: draws on the axes. Its black becomes the colour of the page's text.
        height: inches.
    """
    import matplotlib as mpl  # a second of importing
    from matplotlib.figure import Figure

    file = io.StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(5, height), layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FONT, "inherit")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would be the whole page's
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to them, and every plot has the same
    size = r'width="[^"]*" height="[^"]*"'
    return Markup(re.sub(size, f'role="img" aria-label="{escape(label)}"', svg, count=1))


def _curves(
    name: str,
    title: str,
    recall: Sequence[float],
    lines: Sequence["Line"],
    remark: str = "",
) -> Plot:
    """Precision over recall."""

    def draw(axes: "Axes") -> None:
        for _, values, color, dashed in lines:
            style = "--" if dashed else "-"
            axes.plot(recall, np.array(values, dtype=float), style, color=color, linewidth=1.8)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
        axes.grid()

    legend = [(label, color.replace(INK, "currentColor"), dashed) for label, _, color, dashed in lines]
    return Plot(_plot(name, f"Precision over recall: {title}", draw), title, legend, remark)


Line = tuple[str, Sequence[float | None], str, bool]  # label, values, colour, dashed or not


def _class_lines(curves: Mapping[str, Sequence[float | None]], rank: str) -> tuple[list[Line], str]:
    """A line for each of up to 10 classes; of more, the 5 best and, dashed, the 5 worst by the mean; and a remark."""
    if len(curves) <= 10:
        colors = (*LINES, INK)
        return [
            (label, values, colors[i % len(colors)], i >= len(colors))
            for i, (label, values) in enumerate(curves.items())
        ], ""
    ordered = sorted(curves.items(), key=lambda item: -_finite(item[1]).mean() if _finite(item[1]).size else 0.0)
    lines = [(label, values, color, False) for (label, values), color in zip(ordered[:5], LINES)]
    lines += [(label, values, color, True) for (label, values), color in zip(ordered[-5:], LINES)]
    return lines, f"Of {len(curves):,} classes the 5 with the highest {rank} and, dashed, the 5 with the lowest."


def _threshold(points: Mapping[str, Any]) -> Plot:
    """Precision, recall and F1 of all classes together."""
    curves, best = points["curves"]["mean"], points["mean"]
    names = (("precision", "precision"), ("recall", "recall"), ("f1", "F1"))
    lines = [(label, curves[key], color, False) for (key, label), color in zip(names, LINES)]
    remark = f"F1 is highest, {number(best['f1'])}, from a score of {best['score']} on."
    return _over_scores("threshold", "All classes together", points["curves"]["score"], lines, remark, best["score"])


def _over_scores(
    name: str, title: str, scores: Sequence[float], lines: Sequence[Line], remark: str, best: float | None = None
) -> Plot:
    """What is measured over the least score, with a mark at the best one."""

    def draw(axes: "Axes") -> None:
        for _, values, color, dashed in lines:
            axes.plot(scores, np.array(values, dtype=float), "--" if dashed else "-", color=color, linewidth=1.8)
        if best is not None and 0 <= best <= 1:
            axes.axvline(best, color=INK, linewidth=1, linestyle=":")
        axes.set(xlabel="score threshold", xlim=(0, 1), ylim=(0, 1.03))
        axes.grid()

    legend = [(label, color.replace(INK, "currentColor"), dashed) for label, _, color, dashed in lines]
    if best is not None:
        legend.append(("highest F1", "currentColor", True))
    return Plot(_plot(name, f"{title}, over the score threshold", draw), title, legend, remark)


def _by_iou(rows: Sequence[Mapping[str, Any]]) -> Plot:
    def draw(axes: "Axes") -> None:
        places = range(len(rows))
        axes.barh(places, [row["AP"] or 0 for row in rows], color=LINES[0])
        for place, row in zip(places, rows):
            axes.text((row["AP"] or 0) + 0.01, place, number(row["AP"]), va="center", fontsize=10)
        axes.set_yticks(places, [f"{row['iou']:.2f}" for row in rows])
        axes.set(xlabel="AP", ylabel="IoU threshold", xlim=(0, 1.12), xticks=np.linspace(0, 1, 6))
        axes.invert_yaxis()
        axes.grid(axis="x")

    return Plot(_plot("by_iou", "AP by IoU threshold", draw), "AP by IoU threshold")


def _by_size(rows: Sequence[Mapping[str, Any]]) -> Plot:
    bars = (("AP", LINES[0]), ("AR", LINES[4]))

    def draw(axes: "Axes") -> None:
        for side, (key, color) in zip((-0.2, 0.2), bars):
            places = [place + side for place in range(len(rows))]
            axes.bar(places, [row[key] or 0 for row in rows], 0.38, color=color)
            for place, row in zip(places, rows):
                axes.text(place, (row[key] or 0) + 0.015, number(row[key]), ha="center", fontsize=10)
        # ASCII: matplotlib warns of what its font lacks.
        names = [short(row["size"], 12).encode("ascii", "replace").decode() for row in rows]
        axes.set_xticks(range(len(rows)), names)
        axes.set(ylim=(0, 1.1), yticks=np.linspace(0, 1, 6))
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")

    legend = [(key, color, False) for key, color in bars]
    return Plot(_plot("by_size", "AP and AR by size of the objects", draw), "AP and AR by size", legend)


def _proposals(rows: Sequence[Mapping[str, Any]]) -> Plot:
    lines = (
        ("AR", "all", LINES[0]),
        ("ARs", "small", LINES[1]),
        ("ARm", "medium", LINES[2]),
        ("ARl", "large", LINES[3]),
    )
    places = range(len(rows))

    def draw(axes: "Axes") -> None:
        for key, _, color in lines:
            axes.plot(places, np.array([row[key] for row in rows], dtype=float), "o-", color=color, linewidth=1.8)
        axes.set_xticks(places, [f"{row['at']:,}" for row in rows])
        axes.set(xlabel="proposals an image", ylabel="average recall", ylim=(0, 1.03))
        axes.margins(x=0.1)
        axes.grid()

    legend = [(label, color, False) for _, label, color in lines]
    return Plot(_plot("proposals", "Recall of the proposals", draw), "Recall of the proposals", legend)


def _speed(stages: Sequence[Mapping[str, Any]]) -> Plot:
    """One bar of all stages, one behind the other."""
    colors = [LINES[i % len(LINES)] for i in range(len(stages))]

    def draw(axes: "Axes") -> None:
        left = 0.0
        for row, color in zip(stages, colors):
            axes.barh(0, row["ms"] or 0, left=left, color=color, height=0.5)
            left += row["ms"] or 0
        axes.set(xlabel="milliseconds an image", yticks=[], ylim=(-0.4, 0.4), xlim=(0, left or 1))
        axes.spines["left"].set_visible(False)

    legend = [(f"{row['stage']}, {number(row['ms'], 1)} ms", color, False) for row, color in zip(stages, colors)]
    return Plot(
        _plot("speed", "Time of the stages, one behind the other", draw, height=1.3), "Where the time goes", legend
    )
