"""The plots of a page, as SVG in the page's colours and font."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from detector.data.drawing import COLORS
from detector.evaluation.report import Report, Section

INK = "#000000"  # becomes the colour of the page's text, light or dark
SOLID = 5  # lines of a plot in different colours; 5 more have the same colours, dashed
# rcParams over matplotlib's own defaults; the user's matplotlibrc does not count.
STYLE: dict[Any, Any] = {  # Any: some versions of matplotlib define a type for the keys
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
}
FONT = "'DejaVu Sans', sans-serif"  # as matplotlib writes it; the page's own font takes its place
SIZES = {"AR": "all", "ARs": "small", "ARm": "medium", "ARl": "large"}
MEASURES = {"precision": "precision", "recall": "recall", "f1": "F1"}

Plot = dict[str, Any]  # "svg", "title", and "legend": (label, colour, whether it is dashed) of each line
Lines = Mapping[str, Sequence[float | None]]  # the values by the label of the line


def make_plots(report: Report) -> dict[str, Plot]:
    """Return the plots that have data. Class names appear in the HTML legends, never in the SVG."""
    recall, mean, classes = (report.curves.get(name, {}) for name in ("recall", "mean", "by_class"))
    points, by_class = report.operating_points, "By class, at IoU 0.50"
    if len(classes) > 2 * SOLID:
        by_class += f": the 5 of {len(classes):,} with the highest AP50 and, dashed, the 5 with the lowest"
        ordered = sorted(classes, key=lambda name: -np.mean(classes[name]))
        classes = {name: classes[name] for name in ordered[:SOLID] + ordered[-SOLID:]}

    def add(name: str, title: str, axes: str, x: Sequence[float], lines: Lines) -> None:
        if lines:
            mark = points["mean"]["score"] if name == "threshold" else None
            plots[name] = _plot(name, title, axes, x, lines, mark=mark)

    def add_ap(name: str, title: str, sections: Mapping[str, Section], measure: str = "IoU") -> None:
        lines = {label: [row["AP"] for row in section["by_iou"]] for label, section in sections.items()}
        add(name, title, f"AP over {measure} threshold", [row["iou"] for row in report.by_iou], lines)

    plots: dict[str, Plot] = {}
    lines = {f"IoU {iou}": values for iou, values in mean.items()}
    add("mean", "Mean over the classes", "precision over recall", recall, lines)
    add("by_class", by_class, "precision over recall", recall, classes)
    if points["mean"]:
        lines = {label: points["curves"]["mean"][key] for key, label in MEASURES.items()}
        axes = "precision, recall and F1 over score threshold"
        add("threshold", "All classes together", axes, points["curves"]["score"], lines)
    add_ap("refined", "AP by IoU threshold, before and after", report.refinement or {})
    if report.segm:
        add_ap("segm", "AP of masks and boxes", {"boxes": report.to_dict(), "masks": report.segm})
    if report.keypoints:  # their OKS cannot be compared with the IoU of boxes
        add_ap("keypoints", "AP of keypoints", {"keypoints": report.keypoints}, "OKS")
    if report.proposals:
        rows = report.proposals["rows"]
        lines, counts = {label: [row[key] for row in rows] for key, label in SIZES.items()}, [row["at"] for row in rows]
        add("proposals", "Recall of the proposals", "average recall over proposals per image", counts, lines)
    return plots


def _plot(name: str, title: str, axes: str, x: Sequence[float], lines: Lines, *, mark: float | None) -> Plot:
    """Plot lines over ``x``.

    Args:
        name: unique on the page, so that no two plots share ids.
        title: the heading.
        axes: "Y over X", the names of both.
        x: [N].
        lines: N values for each label.
        mark: where F1 is highest.
    """
    import matplotlib as mpl  # takes a second
    from matplotlib.figure import Figure

    legend = [(label, COLORS[i % SOLID], i >= SOLID) for i, label in enumerate(lines)]
    ylabel, _, xlabel = axes.partition(" over ")
    file, marker = io.StringIO(), "o" if len(x) < 20 else ""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        plot = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03))
        for (_, color, dashed), values in zip(legend, lines.values(), strict=True):
            plot.plot(x, np.array(values, dtype=float), marker + ("--" if dashed else "-"), color=color)
        if mark is not None and 0 <= mark <= 1:
            plot.axvline(mark, color=INK, linestyle=":", linewidth=1)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FONT, "inherit")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to these ids, which all plots share
    label = f'role="img" aria-label="{escape(f"{title}, {axes}")}"'
    svg = re.sub(r'width="[^"]*" height="[^"]*"', label, svg, count=1)
    if mark is not None:
        legend.append(("highest F1", "currentColor", True))
    return {"svg": Markup(svg), "title": title, "legend": legend}
