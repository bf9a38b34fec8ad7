"""One HTML page of an evaluation: plots, tables and pictures in one file that loads nothing, for any browser."""

import base64
import io
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from detector.data.drawing import COLORS, Stroke
from detector.evaluation.confusion import confused_pairs
from detector.evaluation.metric import MASKS_AND_KEYPOINTS as PARTS
from detector.evaluation.report import Report
from detector.evaluation.tables import refined_rows
from detector.text import clean, short

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
    "AP50": "AP when a box that overlaps the object by an IoU of 0.50 counts: found, roughly.",
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
        uri: the image with its boxes, as a JPEG in a data URI.
        width: pixels.
        height: pixels.
    """

    kind: Literal["worst", "best"]
    entry: dict[str, Any]
    uri: Markup
    width: int
    height: int


@dataclass(frozen=True)
class Plot:
    """A plot and what stands around it: heading, legend of (label, colour, dashed or not), remark."""

    svg: Markup
    title: str
    legend: Sequence[tuple[str, str, bool]] = ()
    remark: str = ""


def render_page(evaluated: Report, pictures: Sequence[Picture]) -> str:
    """The HTML page of an evaluation.

    Args:
        evaluated: the numbers. Names and texts may hold anything.
        pictures: the images to show, in this order.

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
    report = evaluated.to_dict()
    sections, absent = _sections(report, pictures)
    return template.render(
        report,
        sections=sections,
        absent=absent,
        meanings=MEANINGS,
        worst=WORST,
        plots=_plots(report),
        report=report,
        masks_and_keypoints=PARTS,
        part_scores={kind: list(report[kind]["scores"].items()) for kind in PARTS if report.get(kind)},
        part_columns={kind: _part_columns(report[kind]) for kind in PARTS if report.get(kind)},
        refined=refined_rows(report["refinement"]) if report["refinement"] else [],
        matrix=confusion_table(report["confusion"]),
        marks=MARKS,
        pictures={kind: [one for one in pictures if one.kind == kind] for kind in ("worst", "best")},
        first=OPEN,
    )


def _sections(report: Mapping[str, Any], pictures: Sequence[object]) -> tuple[dict[str, str], list[str]]:
    """The sections that there are data for, by anchor, and sentences about those left out."""
    scored = any(row["AP"] is not None for row in (*report["by_iou"], *report["by_size"]))
    sections = [
        ("scores", "Scores", True, ""),
        *((kind, name, report.get(kind), "") for kind, name in PARTS.items()),
        ("refinement", "With and without the refinement", report["refinement"], ""),
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


def _part_columns(part: Mapping[str, Any]) -> tuple[str, ...]:
    rows = part["by_class"]
    return tuple(name for name in rows[0] if name not in ("id", "name", "AP")) if rows else ()


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


def encode_jpeg(picture: Image.Image) -> tuple[Markup, int, int]:
    """Encode a picture of at most :data:`SIDE` pixels as a data URI. Returns it with its width and height."""
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85, optimize=True)
    uri = Markup("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return uri, picture.width, picture.height


# Confusions


def confusion_table(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """A confusion matrix that a reader can take in.

    Args:
        confusion: ``names`` of n classes and ``matrix`` [n + 1, n + 1]: rows are the ground truth, the last one false
            detections; columns what it was detected as, the last one missed objects.

    Returns:
        ``names`` and ``matrix`` of the same layout, in which all classes but the :data:`CLASSES` with most confusions
        are one, "other classes", if there are more; ``others``, how many that is; ``totals``, the rows' sums; and
        ``pairs``, the most frequent confusions as (truth, detected as, count).
    """
    names, n = list(confusion["names"]), len(confusion["names"])
    matrix = np.array(confusion["matrix"], dtype=np.int64).reshape(n + 1, n + 1)
    others = max(n - CLASSES, 0)
    if others:
        confused = matrix[:-1, :-1] * ~np.eye(n, dtype=bool)
        # Sorted by class again after the choice; of equals, the first ones.
        chosen = np.sort(np.argsort(-(confused.sum(0) + confused.sum(1)), kind="stable")[:CLASSES])
        group = np.full(n + 1, CLASSES)  # of each class: its new row, or that of the others
        group[chosen] = np.arange(CLASSES)
        group[-1] = CLASSES + 1
        member = np.eye(CLASSES + 2, dtype=np.int64)[group]
        matrix = member.T @ matrix @ member
        names = [names[i] for i in chosen] + ["other classes"]
    return {
        "names": names,
        "matrix": matrix.tolist(),
        "others": others,
        "totals": matrix.sum(1).tolist(),
        "pairs": confused_pairs(confusion, CLASSES) if others else [],
    }


# Plots

Line = tuple[str, Sequence[float | None], str, bool]  # label, values, colour, dashed or not


def _plots(report: Mapping[str, Any]) -> dict[str, Plot]:
    """All plots that there are data for. Names of classes stand in the legends, which are HTML, never in the SVG."""
    plots = {}
    drawn, points = report["curves"], report["operating_points"]
    axes: dict[str, Any] = {"xlabel": "recall", "ylabel": "precision", "xlim": (0, 1.01), "ylim": (0, 1.03)}
    if drawn.get("mean"):
        lines = [(f"IoU {iou}", values, color, False) for (iou, values), color in zip(drawn["mean"].items(), LINES)]
        plots["mean"] = _lines("mean", "Mean over the classes", drawn["recall"], lines, **axes)
    named = {name: values for name, values in drawn.get("by_class", {}).items() if _finite(values).size}
    if named:
        lines, remark = _class_lines(named, "AP50")
        title = "By class, at IoU 0.50"
        plots["by_class"] = _lines("by_class", title, drawn["recall"], lines, remark=remark, **axes)
    if best := points["mean"]:
        scores, curves = points["curves"]["score"], points["curves"]
        axes = {"xlabel": "score threshold", "xlim": (0, 1), "ylim": (0, 1.03)}
        measures = {"precision": "precision", "recall": "recall", "f1": "F1"}
        lines = [(measures[key], curves["mean"][key], color, False) for key, color in zip(measures, LINES)]
        remark = f"F1 is highest, {number(best['f1'])}, from a score of {best['score']} on."
        title = "All classes together"
        plots["threshold"] = _lines("threshold", title, scores, lines, remark=remark, mark=best["score"], **axes)
        for key, label in measures.items():
            lines, remark = _class_lines({name: one[key] for name, one in curves["by_class"].items()}, f"mean {label}")
            title = f"{label[0].upper()}{label[1:]} by class"
            plots[key] = _lines(key, title, scores, lines, remark=remark, **axes)
    if report["refinement"]:
        ious = [row["iou"] for row in report["by_iou"]]
        lines = [
            (label, [row["AP"] for row in report["refinement"][when]["by_iou"]], color, dashed)
            for label, when, color, dashed in (("before", "before", INK, True), ("after", "after", LINES[0], False))
        ]
        axes = {"xlabel": "IoU threshold", "ylabel": "AP", "ylim": (0, 1.03), "xticks": ious[::2]}
        plots["refined"] = _lines("refined", "AP by IoU threshold, before and after", ious, lines, style="o", **axes)
    for kind, what in PARTS.items():
        if report.get(kind):
            ious = [row["iou"] for row in report["by_iou"]]
            lines = [(what.lower(), [row["AP"] for row in report[kind]["by_iou"]], LINES[0], False)]
            title, over = f"AP of {what.lower()}", "OKS"
            if kind == "segm":  # the OKS of keypoints is another measure than the IoU of boxes
                lines.insert(0, ("boxes", [row["AP"] for row in report["by_iou"]], INK, True))
                title, over = f"{title} and boxes", "IoU"
            axes = {"xlabel": f"{over} threshold", "ylabel": "AP", "ylim": (0, 1.03), "xticks": ious[::2]}
            plots[kind] = _lines(kind, title, ious, lines, style="o", **axes)
    for key, title, names, measured in (
        ("by_iou", "AP by IoU threshold", [f"{row['iou']:.2f}" for row in report["by_iou"]], ("AP",)),
        ("by_size", "AP and AR by size of the objects", [row["size"] for row in report["by_size"]], ("AP", "AR")),
    ):
        if any(row["AP"] is not None for row in report[key]):
            bars = {name: [row[name] for row in report[key]] for name in measured}
            plots[key] = _bars(key, title, names, bars)
    if report["proposals"]:
        rows = report["proposals"]["rows"]
        sizes = (("AR", "all"), ("ARs", "small"), ("ARm", "medium"), ("ARl", "large"))
        lines = [(label, [row[key] for row in rows], color, False) for (key, label), color in zip(sizes, LINES)]
        axes = {"xlabel": "proposals an image", "ylabel": "average recall", "ylim": (0, 1.03)}
        axes |= {"xticks": range(len(rows)), "xticklabels": [f"{row['at']:,}" for row in rows]}
        title = "Recall of the proposals"
        plots["proposals"] = _lines("proposals", title, range(len(rows)), lines, style="o", **axes)
    stages = [row for row in report["speed"]["rows"] if row["stage"] != "total"] if report["speed"] else []
    if stages:
        plots["speed"] = _stages(stages)
    return plots


def _finite(values: Sequence[float | None]) -> np.ndarray:
    numbers = np.array(values, dtype=float)  # None becomes nan
    return numbers[np.isfinite(numbers)]


def _class_lines(curves: Mapping[str, Sequence[float | None]], ranked_by: str) -> tuple[list[Line], str]:
    """A line for each of up to 10 classes; of more, the 5 best and, dashed, the 5 worst by the mean; and a remark."""
    if len(curves) <= 10:
        colors = (*LINES, INK)
        named = enumerate(curves.items())
        return [(label, values, colors[i % len(colors)], i >= len(colors)) for i, (label, values) in named], ""
    ordered = sorted(curves.items(), key=lambda item: -_finite(item[1]).mean() if _finite(item[1]).size else 0.0)
    lines = [(label, values, color, False) for (label, values), color in zip(ordered[:5], LINES)]
    lines += [(label, values, color, True) for (label, values), color in zip(ordered[-5:], LINES)]
    return lines, f"Of {len(curves):,} classes the 5 with the highest {ranked_by} and, dashed, the 5 with the lowest."


def _lines(
    name: str,
    title: str,
    x: Sequence[float],
    lines: Sequence[Line],
    *,
    style: str = "",
    remark: str = "",
    mark: float | None = None,
    **settings: Any,
) -> Plot:
    """Lines over ``x``, on axes with matplotlib's ``settings``, and perhaps a mark where F1 is highest."""

    def draw(axes: "Axes") -> None:
        for _, values, color, dashed in lines:
            dashes = "--" if dashed else "-"
            axes.plot(x, np.array(values, dtype=float), style + dashes, color=color, linewidth=1.8)
        if mark is not None and 0 <= mark <= 1:
            axes.axvline(mark, color=INK, linewidth=1, linestyle=":")
        axes.set(**settings)
        axes.grid()

    legend = [(label, color.replace(INK, "currentColor"), dashed) for label, _, color, dashed in lines]
    if mark is not None:
        legend.append(("highest F1", "currentColor", True))
    over = f"{settings.get('ylabel', '')} over the {settings['xlabel']}".lstrip()
    return Plot(_svg(name, f"{title}, {over}", draw), title, legend, remark)


def _bars(name: str, title: str, names: Sequence[str], bars: Mapping[str, Sequence[float | None]]) -> Plot:
    """A bar from 0 to 1 for each name and measure, with its number."""
    names = [short(one, 12).encode("ascii", "replace").decode() for one in names]  # or matplotlib warns of its font
    thickness = 0.8 / len(bars)

    def draw(axes: "Axes") -> None:
        for i, (values, color) in enumerate(zip(bars.values(), LINES)):
            places = [place + (i - (len(bars) - 1) / 2) * thickness for place in range(len(names))]
            axes.barh(places, [value or 0 for value in values], 0.95 * thickness, color=color)
            for place, value in zip(places, values):
                axes.text((value or 0) + 0.01, place, number(value), va="center", fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1.12), xticks=np.linspace(0, 1, 6))
        axes.invert_yaxis()
        axes.grid(axis="x")

    legend = [(label, color, False) for label, color in zip(bars, LINES)]
    return Plot(_svg(name, title, draw), title, legend)


def _stages(stages: Sequence[Mapping[str, Any]]) -> Plot:
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
    svg = _svg("speed", "Time of the stages, one behind the other", draw, height=1.3)
    return Plot(svg, "Where the time goes", legend)


def _svg(name: str, label: str, draw: Callable[["Axes"], None], *, height: float = 3.4) -> Markup:
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
