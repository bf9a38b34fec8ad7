"""Everything that an evaluation found, as one dict of JSON types, and as tables of text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detector.coco import read_json
from detector.errors import DataError
from detector.evaluation.confusion import confusion
from detector.evaluation.metric import SUMMARY, Result, summary
from detector.evaluation.operating_points import operating_points
from detector.evaluation.proposals import Hit, recall
from detector.names import short, told_apart

Report = dict[str, Any]
SIZES = {  # COCO's, in its order
    "small": "area below 32 x 32 pixels",
    "medium": "area from 32 x 32 to 96 x 96 pixels",
    "large": "area above 96 x 96 pixels",
}
CURVES = (0.5, 0.75, 0.9)  # IoU of the precision-recall curves


def make_report(
    scorer: COCOeval,
    results: list[Result],
    *,
    about: Mapping[str, Any],
    min_score: float = 0.5,
    losses: Mapping[str, float] | None = None,
    proposals: Sequence[Hit] | None = None,
    kept_proposals: int = 0,
    speed: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> tuple[Report, str]:
    """Put together what is known of a detector on a split.

    Args:
        scorer: what :func:`~detector.evaluation.metric.match` returned by its defaults.
        results: what was matched.
        about: how it was made: ``model``, ``data``, ``command``, ...; counts are added.
        min_score: of detections in the confusion matrix and the images' outcomes.
        losses: of a mean image.
        proposals: those that may cover an object.
        kept_proposals: how many of an image's proposals the head sees.
        speed: of :func:`~detector.evaluation.timing.measure_stages`.
        notes: sentences.

    Returns:
        The report, in which an undefined number is ``None``, and pycocotools' table.
    """
    truth, image_ids = scorer.cocoGt, [int(image_id) for image_id in scorer.params.imgIds]
    scores, table = summary(scorer)
    precision, recalls = scorer.eval["precision"], scorer.eval["recall"]  # [T, R, K, A, M], [T, K, A, M]
    thresholds = [round(float(iou), 2) for iou in scorer.params.iouThrs]
    categories = [truth.cats[category] for category in scorer.params.catIds]
    objects = [a for image_id in image_ids for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
    of_class = {category["id"]: {"objects": 0} | {f"objects_{size}": 0 for size in SIZES} for category in categories}
    for annotation in objects:
        counts = of_class[annotation["category_id"]]
        counts["objects"] += 1
        for size, (low, high) in zip(SIZES, scorer.params.areaRng[1:]):
            counts[f"objects_{size}"] += int(low <= annotation["area"] <= high)
    matrix, outcomes = confusion(truth, results, image_ids, min_score=min_score)
    by_class = []
    for k, category in enumerate(categories):
        row: dict[str, Any] = {"id": category["id"], "name": category["name"], **of_class[category["id"]]}
        row["AP"] = _mean(precision[:, :, k, 0, -1])
        for name, iou in (("AP50", 0.5), ("AP75", 0.75)):
            row[name] = _mean(precision[thresholds.index(iou), :, k, 0, -1])
        row |= {f"AP{size[0]}": _mean(precision[:, :, k, a, -1]) for a, size in enumerate(SIZES, 1)}
        row |= {f"AR{size[:1]}": _mean(recalls[:, k, a, -1]) for a, size in enumerate(("", *SIZES))}
        by_class.append(row)
    scored = [k for k in range(len(categories)) if (precision[:, :, k, 0, -1] > -1).all()]  # those with objects
    at_half = precision[thresholds.index(0.5), :, :, 0, -1]
    called = told_apart(categories)
    report: Report = {
        "about": {**about, "images": len(image_ids), "objects": len(objects), "detections": len(results)},
        "scores": {name: _number(scores[name]) for name in (*SUMMARY, "AP90")},
        "by_iou": [{"iou": iou, "AP": _mean(precision[t, :, :, 0, -1])} for t, iou in enumerate(thresholds)],
        "by_size": [
            {
                "size": size,
                "range": SIZES[size],
                "objects": sum(counts[f"objects_{size}"] for counts in of_class.values()),
                "AP": _number(scores[f"AP{size[0]}"]),
                "AR": _number(scores[f"AR{size[0]}"]),
            }
            for size in SIZES
        ],
        "by_class": by_class,
        "proposals": None,
        "losses": dict(losses) if losses is not None else None,
        "curves": {
            "recall": [round(float(r), 2) for r in scorer.params.recThrs],
            "mean": {
                f"{iou:.2f}": precision[thresholds.index(iou)][:, scored, 0, -1].mean(axis=1).tolist()
                for iou in (CURVES if scored else ())
            },
            "by_class": {called[k]: at_half[:, k].tolist() for k in scored},
        },
        "operating_points": operating_points(scorer, results),
        "confusion": {
            "names": [category["name"] for category in categories],
            "matrix": matrix.tolist(),
            "min_score": min_score,
            "iou": 0.5,
        },
        "images": [
            {**asdict(one), "f1": one.f1, "file_name": truth.imgs[one.id].get("file_name", "")} for one in outcomes
        ],
        "speed": dict(speed) if speed is not None else None,
        "notes": list(notes),
    }
    if proposals is not None:
        rows = [{name: _number(value) for name, value in row.items()} for row in recall(truth, proposals, image_ids)]
        report["proposals"] = {"kept": kept_proposals, "rows": rows}
    return report, table


def newest_report(folder: Path, weights: str) -> Report | None:
    """The last report of these weights in a run's folder and the folders in it.

    Args:
        folder: the run's.
        weights: their digest.
    """
    reports = []
    for path in (*folder.glob("report.json"), *folder.glob("*/report.json")):
        try:
            report = read_json(path)
            if report["about"]["weights"] == weights:
                reports.append(report)
        except (DataError, KeyError, TypeError):  # another program's
            continue
    return max(reports, key=lambda report: str(report["about"].get("time", "")), default=None)


def as_text(report: Report, *, classes: int = 100) -> str:
    """The tables that pycocotools does not print.

    Args:
        report: of :func:`make_report`.
        classes: of more classes, only these many are shown, those with most objects.
    """
    parts = [
        "AP by IoU",
        text_table([[f"{row['iou']:.2f}" for row in report["by_iou"]], [row["AP"] for row in report["by_iou"]]]),
        "By size of the object",
        text_table(
            [["", "objects", "AP", "AR"], *([r["size"], r["objects"], r["AP"], r["AR"]] for r in report["by_size"])]
        ),
    ]
    rows = sorted(report["by_class"], key=lambda row: -row["objects"])[:classes]
    if rows:
        left_out = len(report["by_class"]) - len(rows)
        columns = [name for name in rows[0] if name != "id" and not name.startswith("objects_")]
        parts += [
            "By class" + (f" ({left_out} with fewer objects left out)" if left_out else ""),
            text_table([["" if c == "name" else c for c in columns], *([row[c] for c in columns] for row in rows)]),
        ]
        parts += _points(report, rows)
    if report["proposals"] is not None and report["proposals"]["rows"]:
        rows = report["proposals"]["rows"]
        parts += [
            "Recall of the RPN's proposals, before the head, whatever the class",
            text_table([["proposals", "AR", "ARs", "ARm", "ARl"], *(list(row.values()) for row in rows)]),
        ]
    names, confused = report["confusion"]["names"], report["confusion"]["matrix"]
    title = f"Taken for what (score from {report['confusion']['min_score']}, IoU from {report['confusion']['iou']})"
    if len(names) <= 12:
        heads = [[short(name, 12) for name in names] + ["missed"], [short(name, 30) for name in names] + ["nothing"]]
        parts += [
            f"{title}: rows are the truth, columns what was detected",
            text_table([["", *heads[0]], *([name, *row] for name, row in zip(heads[1], confused))]),
        ]
    else:
        pairs = sorted(
            ((confused[t][d], t, d) for t in range(len(names)) for d in range(len(names)) if t != d and confused[t][d]),
            key=lambda pair: (-pair[0], *pair[1:]),
        )[:10]
        if pairs:
            lines = [[short(names[t], 30), "for", short(names[d], 30), count] for count, t, d in pairs]
            parts += [f"{title}: most often", text_table(lines)]
    if report["losses"] is not None:
        parts += ["Losses", text_table([list(report["losses"]), [f"{v:.4f}" for v in report["losses"].values()]])]
    if report["speed"] is not None:
        rows = report["speed"]["rows"]
        parts += [
            f"Time of an image, median of {report['speed']['images']} (and the middle 80 %)",
            text_table(
                [
                    ["", "ms", "from", "to", "images a second"],
                    *(
                        [r["stage"], *(f"{r[c]:.1f}" for c in ("ms", "low", "high")), f"{r['images_per_second']:.1f}"]
                        for r in rows
                    ),
                ]
            ),
        ]
    parts += [f"Note: {note}" for note in report["notes"]]
    return "\n".join(part if "\n" in part else f"\n{part}" for part in parts)


def _points(report: Report, classes: Sequence[Mapping[str, Any]]) -> list[str]:
    """By class the objects' sizes, and the threshold with the highest F1; first of all classes together."""
    points = report["operating_points"]
    columns = ("score", "precision", "recall", "f1")
    rows = [
        ["all", report["about"]["objects"], *(row["objects"] for row in report["by_size"])]
        + [(points["mean"] or {}).get(column) for column in columns]
    ]
    best = {row["id"]: row for row in points["by_class"]}
    rows += [
        [one["name"], one["objects"]]
        + [one[f"objects_{size}"] for size in SIZES]
        + [best[one["id"]][column] for column in columns]
        for one in classes
    ]
    for row in rows:
        row[5] = None if row[5] is None else str(row[5])  # every digit of the score: one more detection may lie below
    return [
        f"Objects by class and size; the score from which on F1 is highest, at IoU {points['iou']:.2f}",
        text_table([["", "objects", *SIZES, "score", "precision", "recall", "F1"], *rows]),
    ]


def text_table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of cells as aligned text: words on the left, numbers on the right with three decimals, "-" for none."""
    cells = [
        ["-" if c is None else f"{c:.3f}" if isinstance(c, float) else short(str(c), 30) for c in row] for row in rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    words = any(isinstance(row[0], str) for row in rows[1:])
    lines = [
        "  ".join(
            cell.ljust(width) if words and i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _number(value: float) -> float | None:
    return None if value == -1 else value


def _mean(values: np.ndarray) -> float | None:
    """The mean of what is defined: pycocotools has -1 where there is no truth."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
