"""The plots of a page, as SVG in the page's colours and font."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from detector.data.drawing import COLORS
from detector.evaluation.report import Report

INK = "#000000"  # becomes the colour of the page's text, light or dark
LINES = tuple(color for color in COLORS if color not in (INK, "#F0E442"))  # yellow is invisible on white
MAX_LINES = 10  # classes in a plot; of more, the best and the worst are drawn
# rcParams over matplotlib's own defaults; the user's matplotlibrc does not count.
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
FONT = "'DejaVu Sans', sans-serif"  # as matplotlib writes it; the page's own font takes its place
MEASURES = {"precision": "precision", "recall": "recall", "f1": "F1"}
PRECISION_RECALL: dict[str, Any] = {"xlabel": "recall", "ylabel": "precision", "xlim": (0, 1.01), "ylim": (0, 1.03)}
OVER_SCORE: dict[str, Any] = {"xlabel": "score threshold", "xlim": (0, 1), "ylim": (0, 1.03)}

Line = tuple[str, Sequence[float | None], str, bool]  # label, values, colour, whether it is dashed


@dataclass(frozen=True)
class Plot:
    """A plot, its heading, its legend of (label, colour, whether it is dashed), and a remark."""

    svg: Markup
    title: str
    legend: Sequence[tuple[str, str, bool]]
    remark: str = ""


def make_plots(report: Report) -> dict[str, Plot]:
    """Return the plots that have data. Names of classes stand in the legends, which are HTML, never in the SVG."""
    plots: dict[str, Plot] = {}

    def add(name: str, title: str, x: Sequence[float], lines: Sequence[Line], settings: Any, **options: Any) -> None:
        plots[name] = _plot(name, title, x, lines, settings, **options)

    def add_ap(name: str, title: str, measure: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        ious = [row["iou"] for row in report.by_iou]
        settings = {"xlabel": f"{measure} threshold", "ylabel": "AP", "ylim": (0, 1.03), "xticks": ious[::2]}
        *first, last = ((label, [row["AP"] for row in several]) for label, several in rows.items())
        add(name, title, ious, [*((*line, INK, True) for line in first), (*last, LINES[0], False)], settings, style="o")

    recall, points = report.curves.get("recall", []), report.operating_points
    if mean := report.curves.get("mean"):
        lines = [(f"IoU {iou}", values, color, False) for (iou, values), color in zip(mean.items(), LINES)]
        add("mean", "Mean over the classes", recall, lines, PRECISION_RECALL)
    if classes := {name: one for name, one in report.curves.get("by_class", {}).items() if _finite(one).size}:
        lines, remark = _class_lines(classes, "AP50")
        add("by_class", "By class, at IoU 0.50", recall, lines, PRECISION_RECALL, remark=remark)
    if best := points["mean"]:
        curves = points["curves"]
        lines = [(label, curves["mean"][key], color, False) for (key, label), color in zip(MEASURES.items(), LINES)]
        remark = f"F1 is highest, {best['f1']:.3f}, from a score of {best['score']} on."
        options = {"remark": remark, "mark": best["score"]}
        add("threshold", "All classes together", curves["score"], lines, OVER_SCORE, **options)
        for key, label in MEASURES.items():
            lines, remark = _class_lines({name: one[key] for name, one in curves["by_class"].items()}, f"mean {label}")
            title = f"{label[0].upper()}{label[1:]} by class"
            add(key, title, curves["score"], lines, OVER_SCORE, remark=remark)
    if report.refinement:
        rows = {when: report.refinement[when]["by_iou"] for when in ("before", "after")}
        add_ap("refined", "AP by IoU threshold, before and after", "IoU", rows)
    if report.segm:
        add_ap("segm", "AP of masks and boxes", "IoU", {"boxes": report.by_iou, "masks": report.segm["by_iou"]})
    if report.keypoints:  # their OKS cannot be compared with the IoU of boxes
        add_ap("keypoints", "AP of keypoints", "OKS", {"keypoints": report.keypoints["by_iou"]})
    if report.proposals:
        steps = report.proposals["rows"]
        sizes = (("AR", "all"), ("ARs", "small"), ("ARm", "medium"), ("ARl", "large"))
        lines = [(label, [row[key] for row in steps], color, False) for (key, label), color in zip(sizes, LINES)]
        ticks = {"xticks": range(len(steps)), "xticklabels": [f"{row['at']:,}" for row in steps]}
        settings = {"xlabel": "proposals per image", "ylabel": "average recall", "ylim": (0, 1.03), **ticks}
        add("proposals", "Recall of the proposals", range(len(steps)), lines, settings, style="o")
    return plots


def _finite(values: Sequence[float | None]) -> np.ndarray:
    numbers = np.array(values, dtype=float)  # None becomes nan
    return numbers[np.isfinite(numbers)]


def _class_lines(curves: Mapping[str, Sequence[float | None]], ranked_by: str) -> tuple[list[Line], str]:
    """Return a line for each class; of many, the 5 with the highest mean and, dashed, the 5 with the lowest."""
    if len(curves) <= MAX_LINES:
        colors = (*LINES, INK)
        named = enumerate(curves.items())
        return [(label, values, colors[i % len(colors)], i >= len(colors)) for i, (label, values) in named], ""
    ordered = sorted(curves.items(), key=lambda item: -_finite(item[1]).mean() if _finite(item[1]).size else 0.0)
    lines = [(label, values, color, False) for (label, values), color in zip(ordered[:5], LINES)]
    lines += [(label, values, color, True) for (label, values), color in zip(ordered[-5:], LINES)]
    return lines, f"The 5 of {len(curves):,} classes with the highest {ranked_by} and, dashed, the 5 with the lowest."


def _plot(
    name: str,
    title: str,
    x: Sequence[float],
    lines: Sequence[Line],
    settings: Mapping[str, Any],
    *,
    remark: str = "",
    style: str = "",
    mark: float | None = None,
) -> Plot:
    """Plot lines over ``x``.

    Args:
        name: unique on the page, so that no two plots share ids.
        title: the heading.
        x: [N].
        lines: of N values each.
        settings: of matplotlib's axes.
        remark: text below the plot.
        style: matplotlib's marker.
        mark: where F1 is highest.
    """
    import matplotlib as mpl  # takes a second
    from matplotlib.figure import Figure

    file = io.StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for _, values, color, dashed in lines:
            axes.plot(x, np.array(values, dtype=float), style + ("--" if dashed else "-"), color=color, linewidth=1.8)
        if mark is not None and 0 <= mark <= 1:
            axes.axvline(mark, color=INK, linewidth=1, linestyle=":")
        axes.set(**settings)
        axes.grid()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FONT, "inherit")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to these ids, which all plots share
    over = f"{settings.get('ylabel', '')} over the {settings['xlabel']}".lstrip()
    label = f'role="img" aria-label="{escape(f"{title}, {over}")}"'
    svg = re.sub(r'width="[^"]*" height="[^"]*"', label, svg, count=1)
    legend = [(label, color.replace(INK, "currentColor"), dashed) for label, _, color, dashed in lines]
    if mark is not None:
        legend.append(("highest F1", "currentColor", True))
    return Plot(Markup(svg), title, legend, remark)
