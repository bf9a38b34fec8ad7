"""Everything that an evaluation found, as one dict of JSON types, and as tables of text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detector.data.results import Result
from detector.errors import DataError
from detector.evaluation.confusion import confused_pairs, confusion
from detector.evaluation.metric import SUMMARY, IouType, scores_of, summary
from detector.evaluation.operating_points import operating_points
from detector.evaluation.proposals import Hit, recall
from detector.files import read_json
from detector.text import short, told_apart

Report = dict[str, Any]
SIZES = {  # COCO's, in its order
    "small": "area below 32 x 32 pixels",
    "medium": "area from 32 x 32 to 96 x 96 pixels",
    "large": "area above 96 x 96 pixels",
}
PARTS: dict[IouType, str] = {"segm": "Masks", "keypoints": "Keypoints"}
REFINED = ("AP", "AP50", "AP75", "AP90")  # the scores that tell what a refinement did
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
    unrefined: Sequence[COCOeval] = (),
    parts: Sequence[COCOeval] = (),
    speed: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> tuple[Report, str]:
    """Put together what is known of a detector on a split.

    Args:
        scorer: what :func:`~detector.evaluation.metric.match` returned by its defaults.
        results: the detections that were matched.
        about: how they were made: ``model``, ``data``, ``command``, ...; counts are added.
        min_score: detections below it are left out of the confusion matrix and of the images' outcomes.
        losses: the losses of a mean image.
        proposals: the proposals that may cover an object.
        kept_proposals: how many of an image's proposals the head sees.
        unrefined: as ``scorer`` and ``parts`` together, of what the detector finds without its refinement.
        parts: as ``scorer``, of masks and keypoints.
        speed: the times of :func:`~detector.evaluation.timing.measure_stages`.
        notes: sentences on what is to be known of the scores.

    Returns:
        The report, in which an undefined number is ``None``, and the table of :func:`~detector.evaluation.evaluate`; of
        several kinds the tables.
    """
    truth, image_ids = scorer.cocoGt, [int(image_id) for image_id in scorer.params.imgIds]
    scores, table = summary(scorer)
    precision = scorer.eval["precision"]  # [T, R, K, A, M]
    thresholds = [round(float(iou), 2) for iou in scorer.params.iouThrs]
    categories = [truth.cats[category] for category in scorer.params.catIds]
    objects = [a for image_id in image_ids for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
    of_class = {category["id"]: {"objects": 0} | {f"objects_{size}": 0 for size in SIZES} for category in categories}
    for annotation in objects:
        counts = of_class[annotation["category_id"]]
        counts["objects"] += 1
        for size, (low, high) in zip(SIZES, scorer.params.areaRng[1:]):
            counts[f"objects_{size}"] += int(low <= annotation["area"] <= high)
    matrix, images = confusion(truth, results, image_ids, min_score=min_score)
    by_class = []
    for k, category in enumerate(categories):
        by_class.append(
            {"id": category["id"], "name": category["name"], **of_class[category["id"]], **_of_class(scorer, k)}
        )
    scored = [k for k in range(len(categories)) if (precision[:, :, k, 0, -1] > -1).all()]  # those with objects
    at_half = precision[thresholds.index(0.5), :, :, 0, -1]
    called = told_apart(categories)
    report: Report = {
        "about": {**about, "images": len(image_ids), "objects": len(objects), "detections": len(results)},
        "scores": {name: _number(scores[name]) for name in (*SUMMARY, "AP90")},
        "by_iou": _by_iou(scorer),
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
        "images": [{**image, "file_name": truth.imgs[image["id"]].get("file_name", "")} for image in images],
        "segm": None,
        "keypoints": None,
        "refinement": None,
        "speed": dict(speed) if speed is not None else None,
        "notes": list(notes),
    }
    for part in parts:
        kind, classes = part.params.iouType, [truth.cats[category] for category in part.params.catIds]
        of_part, of_table = summary(part)
        report[kind] = {
            "scores": {name: _number(value) for name, value in of_part.items()},
            "by_iou": _by_iou(part),
            "by_class": [{"id": one["id"], "name": one["name"], **_of_class(part, k)} for k, one in enumerate(classes)],
        }
        table += f"\n\n{PARTS[kind]} ({kind})\n{of_table}"
    if unrefined:
        report["refinement"] = {
            when: {
                "scores": {name: _number(score) for name, score in scores_of(scorers).items()},
                "by_iou": _by_iou(scorers[0]),
            }
            for when, scorers in (("before", unrefined), ("after", (scorer, *parts)))
        }
    if proposals is not None:
        rows = [{name: _number(value) for name, value in row.items()} for row in recall(truth, proposals, image_ids)]
        report["proposals"] = {"kept": kept_proposals, "rows": rows}
    return report, table


def _of_class(scorer: COCOeval, k: int) -> dict[str, float | None]:
    """The scores of a class, by its number: AP, at two IoU, and by size, and AR; of keypoints none are small."""
    precision, recalls = scorer.eval["precision"], scorer.eval["recall"]  # [T, R, K, A, M], [T, K, A, M]
    thresholds = [round(float(iou), 2) for iou in scorer.params.iouThrs]
    sizes = scorer.params.areaRngLbl[1:]
    row = {"AP": _mean(precision[:, :, k, 0, -1])}
    row |= {f"AP{iou}": _mean(precision[thresholds.index(iou / 100), :, k, 0, -1]) for iou in (50, 75)}
    row |= {f"AP{size[0]}": _mean(precision[:, :, k, a, -1]) for a, size in enumerate(sizes, 1)}
    return row | {f"AR{size[:1]}": _mean(recalls[:, k, a, -1]) for a, size in enumerate(("", *sizes))}


def newest_report(folder: Path, weights: str) -> Report | None:
    """The last report of these weights in a run's folder and the folders in it.

    Args:
        folder: the folder of the run.
        weights: the digest of the weights.
    """
    reports = []
    for path in (*folder.glob("report.json"), *folder.glob("*/report.json")):
        try:
            report = read_json(path)
            if report["about"]["weights"] == weights:
                reports.append(report)
        except (DataError, KeyError, TypeError):  # a file of another program
            continue
    return max(reports, key=lambda report: str(report["about"].get("time", "")), default=None)


def as_text(report: Report, *, classes: int = 100) -> str:
    """The tables that pycocotools does not print.

    Args:
        report: what :func:`make_report` returned.
        classes: how many classes are shown at most, those with most objects.
    """
    by_iou, by_size = report["by_iou"], report["by_size"]
    tables: list[tuple[str, list[list[Any]]]] = [
        ("AP by IoU", [[f"{row['iou']:.2f}" for row in by_iou], [row["AP"] for row in by_iou]]),
        ("By size of the object", _rows(by_size, ("size", "objects", "AP", "AR"), ("", "objects", "AP", "AR"))),
    ]
    shown = sorted(report["by_class"], key=lambda row: -row["objects"])[:classes]
    if shown:
        left_out = len(report["by_class"]) - len(shown)
        columns = [name for name in shown[0] if name != "id" and not name.startswith("objects_")]
        title = "By class" + (f" ({left_out} with fewer objects left out)" if left_out else "")
        tables += [(title, _rows(shown, columns, ("", *columns[1:]))), _points(report, shown)]
    for kind, name in PARTS.items():
        if part := report.get(kind):
            listed = {row["id"]: row for row in part["by_class"]}
            rows = [listed[row["id"]] for row in shown if row["id"] in listed]
            if rows:
                columns = [column for column in rows[0] if column != "id"]
                tables.append((f"{name} by class", _rows(rows, columns, ("", *columns[1:]))))
    if report["proposals"] and report["proposals"]["rows"]:
        columns = ["at", "AR", "ARs", "ARm", "ARl"]
        title = "Recall of the RPN's proposals, before the head, whatever the class"
        tables.append((title, _rows(report["proposals"]["rows"], columns, ("proposals", *columns[1:]))))
    names, confused = report["confusion"]["names"], report["confusion"]["matrix"]
    title = f"Taken for what (score from {report['confusion']['min_score']}, IoU from {report['confusion']['iou']})"
    if len(names) <= 12:
        heads = ["", *(short(name, 12) for name in names), "missed"]
        rows = [[name, *row] for name, row in zip([*names, "nothing"], confused)]
        tables.append((f"{title}: rows are the ground truth, columns what was detected", [heads, *rows]))
    elif pairs := confused_pairs(report["confusion"], 10):
        tables.append((f"{title}: most often", [[truth, "for", found, count] for truth, found, count in pairs]))
    if report["refinement"]:
        tables.append(("Without the refinement, and with it", refinement_table(report["refinement"])))
    if losses := report["losses"]:
        tables.append(("Losses", [list(losses), [f"{value:.4f}" for value in losses.values()]]))
    if speed := report["speed"]:
        times = ("ms", "low", "high", "images_per_second")
        rows = [[row["stage"], *(f"{row[name]:.1f}" for name in times)] for row in speed["rows"]]
        title = f"Time of an image, median of {speed['images']} (and the middle 80 %)"
        tables.append((title, [["", "ms", "from", "to", "images a second"], *rows]))
    texts = [f"\n{title}\n{text_table(rows)}" for title, rows in tables]
    return "\n".join([*texts, *(f"\nNote: {note}" for note in report["notes"])])


def refined_rows(refinement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a refinement did, as rows of ``score``, ``before``, ``after`` and ``difference``; ``None`` if undefined.

    Args:
        refinement: the section of a report.
    """
    rows = []
    for name in (name for name in refinement["after"]["scores"] if name.rpartition("/")[2] in REFINED):
        before, after = (refinement[when]["scores"][name] for when in ("before", "after"))
        difference = None if before is None or after is None else after - before
        rows.append({"score": name, "before": before, "after": after, "difference": difference})
    return rows


def refinement_table(refinement: Mapping[str, Any]) -> list[list[Any]]:
    """:func:`refined_rows` for :func:`text_table`."""
    rows = refined_rows(refinement)
    table = [[row["score"], row["before"], row["after"], _signed(row["difference"])] for row in rows]
    return [["", "before", "after", "difference"], *table]


def _rows(dicts: Sequence[Mapping[str, Any]], keys: Sequence[str], heads: Sequence[str]) -> list[list[Any]]:
    return [list(heads), *([one[key] for key in keys] for one in dicts)]


def _points(report: Report, classes: Sequence[Mapping[str, Any]]) -> tuple[str, list[list[Any]]]:
    """By class the objects' sizes, and the threshold with the highest F1; first of all classes together."""
    points = report["operating_points"]
    best = {row["id"]: row for row in points["by_class"]}
    counted = [("all", [report["about"]["objects"], *(row["objects"] for row in report["by_size"])], points["mean"])]
    sizes = ("objects", *(f"objects_{size}" for size in SIZES))
    counted += [(one["name"], [one[size] for size in sizes], best[one["id"]]) for one in classes]
    rows: list[list[Any]] = [["", "objects", *SIZES, "score", "precision", "recall", "F1"]]
    for name, counts, point in counted:
        score, *measured = ((point or {}).get(key) for key in ("score", "precision", "recall", "f1"))
        # Every digit of the score: one more detection may lie below.
        rows.append([name, *counts, None if score is None else str(score), *measured])
    return f"Objects by class and size; the score from which on F1 is highest, at IoU {points['iou']:.2f}", rows


def text_table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of cells as aligned text: words on the left, numbers on the right with three decimals, "-" for none."""
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


def _by_iou(scorer: COCOeval) -> list[dict[str, Any]]:
    """AP at each IoU threshold, from the precision of all sizes at the most detections."""
    precision = scorer.eval["precision"]  # [T, R, K, A, M]
    return [
        {"iou": round(float(iou), 2), "AP": _mean(precision[t, :, :, 0, -1])}
        for t, iou in enumerate(scorer.params.iouThrs)
    ]


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.3f}"


def _number(value: float) -> float | None:
    return None if value == -1 else value


def _mean(values: np.ndarray) -> float | None:
    """The mean of what is defined: pycocotools has -1 where there are no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
