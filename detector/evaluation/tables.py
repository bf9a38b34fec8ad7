"""A report as tables of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from detector.evaluation.confusion import confused_pairs
from detector.evaluation.metric import TITLES
from detector.evaluation.report import OBJECT_COUNTS, SIZE_RANGES, Report, Section
from detector.text import short

Table = list[list[Any]]
MAX_CLASSES = 100  # rows of the tables by class
MAX_MATRIX = 12  # classes of a confusion matrix; beyond it, the most frequent confusions are listed
REFINED = ("AP", "AP50", "AP75", "AP90")  # the scores that are compared before and after a refinement


def report_text(report: Report) -> str:
    """Return the tables of a report that pycocotools does not print, and its notes."""
    classes = sorted(report.by_class, key=lambda row: -row["objects"])[:MAX_CLASSES]
    hidden = len(report.by_class) - len(classes)
    tables = {
        "AP by IoU": [[f"{row['iou']:.2f}" for row in report.by_iou], [row["AP"] for row in report.by_iou]],
        "By object size": _table(report.by_size, ("size", "objects", "AP", "AR")),
    }
    if classes:
        columns = [name for name in classes[0] if name not in ("id", *OBJECT_COUNTS[1:])]
        tables["By class" + f" ({hidden} with fewer objects are not shown)" * bool(hidden)] = _table(classes, columns)
        iou = f"at IoU {report.operating_points['iou']:.2f}"
        title = f"Objects by class and size, and the score threshold with the highest F1 {iou}"
        tables[title] = _operating_points(report, classes)
    for iou_type, name in TITLES.items():
        known = {row["id"]: row for row in (getattr(report, iou_type) or {"by_class": ()})["by_class"]}
        if rows := [known[row["id"]] for row in classes if row["id"] in known]:
            tables[f"{name} by class"] = _table(rows, [column for column in rows[0] if column != "id"])
    if report.proposals and report.proposals["rows"]:
        columns = ["AR", "ARs", "ARm", "ARl"]
        rows = [{"": row["at"], **row} for row in report.proposals["rows"]]
        title = "Recall of the RPN's proposals, before the box head, for all classes together"
        tables[title] = [["proposals", *columns], *_table(rows, ["", *columns])[1:]]
    title, table = _confusion(report.confusion)
    if table:
        tables[title] = table
    if report.refinement:
        tables["Before and after the refinement"] = refinement_table(report.refinement)
    if report.losses:
        tables["Losses"] = [list(report.losses), [f"{value:.4f}" for value in report.losses.values()]]
    if report.speed:
        columns = ["ms", "low", "high", "images_per_second"]
        rows = [[row["stage"], *(f"{row[key]:.1f}" for key in columns)] for row in report.speed["rows"]]
        title = f"Milliseconds per image, median of {report.speed['images']} images (and the middle 80 %)"
        tables[title] = [["", "ms", "from", "to", "images per second"], *rows]
    texts = [f"\n{title}\n{text_table(rows)}" for title, rows in tables.items()]
    return "\n".join([*texts, *(f"\nNote: {note}" for note in report.notes)])


def refined_rows(refinement: Section) -> list[Section]:
    """Return ``score``, ``before``, ``after`` and ``difference`` of each of :data:`REFINED`; ``None`` if undefined."""
    rows = []
    for name in (name for name in refinement["after"]["scores"] if name.rpartition("/")[2] in REFINED):
        before, after = (refinement[when]["scores"][name] for when in ("before", "after"))
        difference = None if before is None or after is None else after - before
        rows.append({"score": name, "before": before, "after": after, "difference": difference})
    return rows


def refinement_table(refinement: Section) -> Table:
    """Return :func:`refined_rows` for :func:`text_table`."""
    table = _table(refined_rows(refinement), ("score", "before", "after", "difference"))
    return [table[0], *([*cells, None if last is None else f"{last:+.3f}"] for *cells, last in table[1:])]


def text_table(rows: Sequence[Sequence[Any]]) -> str:
    """Align cells: words on the left, numbers on the right with three decimals, "-" for ``None``."""
    cells = [
        ["-" if c is None else f"{c:.3f}" if isinstance(c, float) else short(str(c), 30) for c in row] for row in rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    words = any(isinstance(row[0], str) for row in rows[1:])
    lines = []
    for first, *others in cells:
        line = [first.ljust(widths[0]) if words else first.rjust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append(f"  {'  '.join(line)}".rstrip())
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """Return a head, empty over the first column, and the rows."""
    return [["", *columns[1:]], *([row[column] for column in columns] for row in rows)]


def _operating_points(report: Report, classes: Sequence[Section]) -> Table:
    """Return the objects by class and size, and the thresholds, with all classes together first."""
    points = report.operating_points
    best = {row["id"]: row for row in points["by_class"]}
    counts = [report.about["objects"], *(row["objects"] for row in report.by_size)]
    counted = [("all", counts, points["mean"] or {})]
    counted += [(row["name"], [row[key] for key in OBJECT_COUNTS], best[row["id"]]) for row in classes]
    table: Table = [["", "objects", *SIZE_RANGES, "score", "precision", "recall", "F1"]]
    for name, numbers, point in counted:
        score = point.get("score")  # with all its digits: rounded, it may admit another detection
        measures = [point.get(key) for key in ("precision", "recall", "f1")]
        table.append([name, *numbers, None if score is None else str(score), *measures])
    return table


def _confusion(confusion: Section) -> tuple[str, Table]:
    """Return the confusion matrix or, for many classes, the most frequent confusions."""
    names = confusion["names"]
    title = f"Confusion (minimum score {confusion['min_score']}, minimum IoU {confusion['iou']})"
    if len(names) <= MAX_MATRIX:
        head = ["", *(short(name, 12) for name in names), "missed"]
        rows = [[name, *row] for name, row in zip([*names, "false detections"], confusion["matrix"])]
        return f"{title}: rows are the ground truth, columns the detected classes", [head, *rows]
    pairs = [[true, "as", detected, count] for true, detected, count in confused_pairs(confusion, 10)]
    return f"{title}: the most frequent ones", pairs
