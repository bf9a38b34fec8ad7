"""What a report says beside pycocotools' 12 numbers, against pycocotools run on a class, or counted by hand."""

import contextlib
import io
import json
from collections import Counter, defaultdict
from importlib import metadata

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval
from support.scored import annotations_of, read, result, truth
from support.tiny_models import SIZE, batch, copies, tiny_rcnn

from detector.data.annotations import read_annotations
from detector.data.results import results_file
from detector.errors import DataError, ModelError
from detector.evaluation import SUMMARY, detect_with_losses, evaluate, predict
from detector.evaluation.confusion import confusion_matrix, image_rows, match_boxes
from detector.evaluation.losses import run_rcnn
from detector.evaluation.metric import match
from detector.evaluation.operating_points import operating_points
from detector.evaluation.proposals import COUNTS, CoveringProposal, covering_proposals, recall
from detector.evaluation.report import Report, newest_report
from detector.evaluation.running import EvaluationOptions, Predictions
from detector.evaluation.scoring import evaluate_coco
from detector.evaluation.tables import report_text, text_table
from detector.evaluation.truth import coco_of, index_coco
from detector.rcnn.swap import swap_crop_head


def make_report(coco, found, *, evaluator="pycocotools", min_score=0.5, **predicted):
    """The report as a dict, and pycocotools' table."""
    predictions = Predictions(sorted(coco.imgs), found, **predicted)
    options = EvaluationOptions(evaluator=evaluator, min_score=min_score)
    evaluation = evaluate_coco(coco, predictions, about={}, options=options)
    return evaluation.report.to_dict(), evaluation.tables


def predicted(*arguments, **options):
    whole = Predictions()
    for part in predict(*arguments, **options):
        whole.add(part)
    return whole


def confusion(coco, found, image_ids, **options):
    outcomes = match_boxes(coco, found, image_ids, **options)
    return confusion_matrix(outcomes, sorted(coco.cats)), image_rows(outcomes)


def jittered(coco, seed=0, spread=0.05):
    """The truth, crowds too, moved a little, some under a wrong class, and some false detections."""
    generator = np.random.default_rng(seed)
    categories = sorted(coco.cats)
    found = []
    for annotation in coco.anns.values():
        x, y, w, h = annotation["bbox"]
        dx, dy, dw, dh = generator.normal(size=4) * spread
        wrong = generator.random() < 0.2
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": int(generator.choice(categories)) if wrong else annotation["category_id"],
                "bbox": [x + dx * w, y + dy * h, w * float(np.exp(dw)), h * float(np.exp(dh))],
                "score": float(generator.random()),
            }
        )
        if generator.random() < 0.5:
            box = [float(v) for v in generator.uniform(1, 200, size=4)]
            found.append(found[-1] | {"bbox": box, "score": float(generator.random())})
    return found


@pytest.fixture(scope="module")
def coco(coco_cc):
    return coco_of(read_annotations(coco_cc / "annotations" / "instances_val2017.json"))


def official(coco, found, categories):
    """pycocotools' 12 numbers of some categories, by its documented way in."""
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(coco, coco.loadRes(found), "bbox")
        scorer.params.catIds = categories
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return dict(zip(SUMMARY, scorer.stats.tolist()))


def test_classes_sizes_and_thresholds_are_those_of_pycocotools(coco):
    found = jittered(coco)
    report, table = make_report(coco, found)
    assert report["scores"]["AP"] == pytest.approx(official(coco, found, sorted(coco.cats))["AP"], abs=1e-12)
    assert "Average Precision" in table
    assert len(report["by_class"]) == 80
    checked = 0
    for row in report["by_class"]:
        assert row["objects"] == sum(a["category_id"] == row["id"] and not a["iscrowd"] for a in coco.anns.values())
        if row["objects"] < 10:
            continue
        checked += 1
        wanted = official(coco, found, [row["id"]])
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARs", "ARm", "ARl"):
            assert (-1.0 if row[name] is None else row[name]) == pytest.approx(wanted[name], abs=1e-12), (row, name)
        assert row["AR"] == pytest.approx(wanted["AR100"], abs=1e-12)
    assert checked > 5
    assert [row["iou"] for row in report["by_iou"]] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert np.mean([row["AP"] for row in report["by_iou"]]) == pytest.approx(report["scores"]["AP"], abs=1e-12)
    assert report["by_iou"][5]["AP"] == pytest.approx(report["scores"]["AP75"], abs=1e-12)
    for row, letter in zip(report["by_size"], "sml", strict=True):
        assert row["AP"] == report["scores"][f"AP{letter}"]
        assert row["AR"] == report["scores"][f"AR{letter}"]
    assert sum(row["objects"] for row in report["by_size"]) == report["about"]["objects"]
    assert json.loads(json.dumps(report)) == report


def test_the_area_under_a_curve_is_the_ap(coco):
    found = jittered(coco)
    report, _ = make_report(coco, found)
    curves = report["curves"]
    assert len(curves["recall"]) == 101
    assert np.mean(curves["mean"]["0.50"]) == pytest.approx(report["scores"]["AP50"], abs=1e-12)
    assert np.mean(curves["mean"]["0.90"]) == pytest.approx(report["scores"]["AP90"], abs=1e-12)
    by_name = {row["name"]: row["AP50"] for row in report["by_class"]}
    assert set(curves["by_class"]) == {name for name, ap in by_name.items() if ap is not None}
    for name, curve in curves["by_class"].items():
        assert np.mean(curve) == pytest.approx(by_name[name], abs=1e-12)


def two_classes(boxes, crowd=()):
    coco = truth(boxes, crowd=crowd)
    return index_coco({**coco.dataset, "categories": [{"id": 7, "name": "b"}, {"id": 5, "name": "a"}]})


def test_confusion_is_counted_by_hand():
    boxes = [
        (1, 5, [0, 0, 20, 20]),  # found
        (1, 5, [30, 0, 20, 20]),  # taken for b
        (1, 7, [60, 0, 20, 20]),  # missed: only a box that covers a quarter, and one of a low score
        (2, 7, [0, 0, 50, 50]),  # a crowd
    ]
    found = [
        result(1, [0, 0, 20, 20], 0.9),
        result(1, [1, 0, 20, 20], 0.8),  # a second time: false
        {**result(1, [30, 0, 20, 20], 0.7), "category_id": 7},
        {**result(1, [60, 0, 10, 10], 0.9), "category_id": 7},  # false
        {**result(1, [60, 0, 20, 20], 0.4), "category_id": 7},
        {**result(2, [5, 5, 10, 10], 0.9), "category_id": 7},  # on the crowd: neither right nor wrong
        result(2, [70, 70, 10, 10], 0.9),  # false
    ]
    matrix, outcomes = confusion(two_classes(boxes, crowd=(4,)), found, [1, 2])
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 1], [2, 1, 0]]
    second, first = outcomes  # the worst first
    f1 = pytest.approx(2 / (3 + 4))
    assert first == {"id": 1, "objects": 3, "found": 1, "confused": 1, "missed": 1, "false": 2, "f1": f1}
    assert second == {"id": 2, "objects": 0, "found": 0, "confused": 0, "missed": 0, "false": 1, "f1": 0}
    matrix, _ = confusion(two_classes(boxes, crowd=(4,)), found, [1, 2], min_score=0.4)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [2, 1, 0]]
    matrix, outcomes = confusion(two_classes(boxes, crowd=(4,)), [], [2])
    assert matrix.sum() == 0
    assert outcomes[0]["f1"] == 1


def test_every_box_has_one_outcome():
    boxes = [(1, 5, [0, 0, 20, 20]), (1, 5, [30, 0, 20, 20]), (1, 7, [60, 0, 20, 20]), (2, 7, [0, 0, 50, 50])]
    coco = two_classes(boxes, crowd=(4,))
    for annotation in coco.dataset["annotations"]:
        annotation["id"] += 2**60  # pycocotools keeps what it matched as a float
    coco = index_coco(coco.dataset)
    found = [
        result(1, [0, 0, 20, 20], 0.9),
        {**result(1, [30, 0, 20, 20], 0.7), "category_id": 7},
        {**result(1, [60, 0, 20, 20], 0.4), "category_id": 7},  # too low a score
        {**result(2, [5, 5, 10, 10], 0.9), "category_id": 7},  # on the crowd
        result(2, [70, 70, 10, 10], 0.6),
    ]
    outcomes = match_boxes(coco, found, [1, 2])
    told = [
        (image_id, one.kind, one.truth and one.truth["id"] - 2**60, one.detection and found.index(one.detection))
        for image_id, boxes in outcomes.items()
        for one in boxes
    ]
    assert told == [
        (1, "found", 1, 0),
        (1, "confused", 2, 1),
        (1, "missed", 3, None),
        (2, "crowd", 4, None),
        (2, "crowd", None, 3),
        (2, "false", None, 4),
    ]


def matched_by_hand(coco, found, score, *, most=100):
    """[right, wrong, objects] of each class at IoU 0.5, of detections from a score on, in plain Python."""

    def overlap(one, two, crowd):
        width = min(one[0] + one[2], two[0] + two[2]) - max(one[0], two[0])
        height = min(one[1] + one[3], two[1] + two[3]) - max(one[1], two[1])
        both = max(width, 0) * max(height, 0)
        return both / (one[2] * one[3] if crowd else one[2] * one[3] + two[2] * two[3] - both)

    counts = {category: [0, 0, 0] for category in coco.cats}
    of_class = defaultdict(list)
    for one in sorted(found, key=lambda r: -r["score"]):
        of_class[one["image_id"], one["category_id"]].append(one)
    for image_id in coco.imgs:
        for category, count in counts.items():
            objects = [a for a in coco.imgToAnns[image_id] if a["category_id"] == category]
            crowds = [a["bbox"] for a in objects if a["iscrowd"]]
            left = [a["bbox"] for a in objects if not a["iscrowd"]]
            count[2] += len(left)
            for one in of_class[image_id, category][:most]:
                if one["score"] < score:
                    continue
                best = max(left, key=lambda box: overlap(one["bbox"], box, False), default=None)
                if best is not None and overlap(one["bbox"], best, False) >= 0.5:
                    left.remove(best)
                    count[0] += 1
                elif not any(overlap(one["bbox"], box, True) >= 0.5 for box in crowds):
                    count[1] += 1
    return counts


def measured(right, wrong, objects):
    return (right / (right + wrong) if right + wrong else None, right / objects, 2 * right / (objects + right + wrong))


@pytest.fixture(scope="module")
def scattered():
    """Twelve images with three classes, one of them without objects, and crowds; detections of few scores."""
    generator = np.random.default_rng(3)
    boxes = [
        (i % 12, (5, 7)[int(generator.random() < 0.3)], [*generator.uniform(0, 60, 2), *generator.uniform(10, 40, 2)])
        for i in range(90)
    ]
    data = two_classes([(image, category, [float(v) for v in box]) for image, category, box in boxes]).dataset
    data["images"] = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(12)]
    data["categories"].append({"id": 9, "name": "none"})
    for annotation in data["annotations"][::11]:
        annotation["iscrowd"] = 1
    coco = index_coco(data)
    found = jittered(coco, spread=0.12)
    for one in found:
        on_it = any(a["bbox"][0] - 3 < one["bbox"][0] < a["bbox"][0] + 3 for a in coco.imgToAnns[one["image_id"]])
        one["score"] = round(0.94 * one["score"] ** (0.5 if on_it else 2), 2 if one["category_id"] == 5 else 1)  # ties
    return coco, found


def check_points(coco, found, points):
    """What is said of the best thresholds, against the detections from that score on, matched by hand."""
    points = json.loads(json.dumps(points))
    for row in points["by_class"]:
        right, wrong, objects = (
            (0, 0, 0) if row["score"] is None else matched_by_hand(coco, found, row["score"])[row["id"]]
        )
        if row["score"] is not None:
            assert (row["precision"], row["recall"], row["f1"]) == measured(right, wrong, objects)
            assert row["objects"] == objects
    best = points["mean"]
    together = np.sum(list(matched_by_hand(coco, found, best["score"]).values()), axis=0).tolist()
    assert (best["precision"], best["recall"], best["f1"]) == measured(*together)


class TestScoreThreshold:
    def test_no_score_is_better_than_the_best(self, scattered):
        coco, found = scattered
        points = operating_points(match(coco, found), found)
        check_points(coco, found, points)
        rows = {row["id"]: row for row in points["by_class"]} | {"mean": points["mean"]}
        scores = sorted({one["score"] for one in found}, reverse=True)
        reached = {key: [] for key in rows}
        for score in scores:
            counts = matched_by_hand(coco, found, score)
            counts["mean"] = np.sum(list(counts.values()), axis=0).tolist()
            for key, (right, wrong, objects) in counts.items():
                reached[key].append(measured(right, wrong, objects)[2] if objects else 0)
        for key in (5, 7, "mean"):
            highest = scores[int(np.argmax(reached[key]))]  # of equal ones the first, which is the highest
            assert rows[key]["f1"] == max(reached[key])
            of_class = [one["score"] for one in found if key in (one["category_id"], "mean")]
            assert max((other for other in of_class if other < highest), default=-1) < rows[key]["score"] <= highest
        assert 0.1 < points["mean"]["score"] < 0.9
        assert dict(rows[9], objects=0) == {"id": 9, "name": "none", "objects": 0} | dict.fromkeys(
            ("score", "precision", "recall", "f1")
        )

    def test_curves_are_those_of_each_threshold(self, scattered):
        coco, found = scattered
        curves = operating_points(match(coco, found), found)["curves"]
        assert curves["score"] == [i / 100 for i in range(101)]
        assert set(curves["by_class"]) == {"a", "b"}  # no object is of the third
        for i in (0, 1, 37, 50, 99, 100):
            counts = matched_by_hand(coco, found, i / 100)
            wanted = measured(*np.sum(list(counts.values()), axis=0).tolist())
            assert tuple(curves["mean"][name][i] for name in ("precision", "recall", "f1")) == wanted
            of_class = tuple(curves["by_class"]["a"][name][i] for name in ("precision", "recall", "f1"))
            assert of_class == measured(*counts[5])
        assert curves["mean"]["precision"][100] is None

    def test_on_real_data_with_crowds(self, coco):
        found = jittered(coco)
        report, _ = make_report(coco, found)
        check_points(coco, found, report["operating_points"])
        assert 0.3 < report["operating_points"]["mean"]["f1"] < 0.9

    def test_both_evaluators_say_the_same(self, scattered):
        pytest.importorskip("faster_coco_eval")
        coco, found = scattered
        some = sorted(coco.imgs)[:7]
        for image_ids in (None, some):
            slow, fast = (
                operating_points(match(coco, found, image_ids, evaluator=evaluator), found)
                for evaluator in ("pycocotools", "faster-coco-eval")
            )
            assert slow == fast
            assert slow["mean"]["score"] is not None

    def test_of_equal_ones_the_highest_with_few_decimals(self):
        coco = truth([(1, 5, [0, 0, 20, 20]), (1, 5, [30, 0, 20, 20]), (2, 5, [0, 0, 20, 20])])
        right = [result(1, [0, 0, 20, 20], 0.87654321), result(1, [30, 0, 20, 20], 0.123456)]
        wrong = [result(2, [50, 50, 20, 20], 0.8765), result(2, [70, 50, 20, 20], 0.5), result(2, [70, 70, 9, 9], 0.4)]

        def best(found):
            row = operating_points(match(coco, found), found)["by_class"][0]
            return row["score"], row["precision"], row["recall"], row["f1"]

        assert best(right) == (0.12, 1, 2 / 3, 0.8)
        # The 0.5 of both: 2 x 1 / (3 + 1), and 2 x 2 / (3 + 5).
        assert best(right + wrong) == (0.87654, 1, 1 / 3, 0.5)
        tied = [one | {"score": 0.87654321} for one in wrong[:1]]
        assert best(right[:1] + tied) == (0.87, 0.5, 1 / 3, 0.4)  # both or none
        assert best([one | {"score": 3e200} for one in right]) == (3e200, 1, 2 / 3, 0.8)  # a results file may say so
        close = [right[0], wrong[0] | {"score": float(np.nextafter(0.87654321, 0))}]
        assert best(close)[:2] == (0.87654321, 1)

    def test_nothing_right_and_nothing_to_find(self):
        none = dict.fromkeys(("score", "precision", "recall", "f1"))
        for coco, row in (
            (truth([(1, 5, [0, 0, 20, 20])]), {"objects": 1, **none, "recall": 0, "f1": 0}),
            (truth([]), {"objects": 0, **none}),
        ):
            for found in ([], [result(1, [50, 50, 20, 20])]):
                points = operating_points(match(coco, found), found)
                assert points["by_class"] == [{"id": 5, "name": "a", **row}]
                assert points["mean"] is None
        assert points["curves"]["mean"] == points["curves"]["by_class"] == {}

    def test_the_best_hundred_of_an_image_as_the_metric(self):
        coco = truth([(1, 5, [0, 0, 20, 20]), (1, 5, [30, 0, 20, 20])])
        found = [result(1, [0, 0, 20, 20], 0.9)] + [result(1, [60, 60, 9, 9], 0.8)] * 99
        found.append(result(1, [30, 0, 20, 20], 0.7))
        curves = operating_points(match(coco, found), found)["curves"]["mean"]
        assert curves["recall"][0] == 0.5

    def test_the_text_has_every_digit(self, scattered):
        coco, found = scattered
        report, _ = make_report(coco, found)
        report["operating_points"]["mean"]["score"] = 0.43756
        lines = report_text(Report.from_dict(report)).split("Objects by class and size")[1].splitlines()
        rows = {line.split()[0]: line.split()[1:] for line in lines[2:6]}
        best = report["operating_points"]["mean"]
        three = [f"{best[name]:.3f}" for name in ("precision", "recall", "f1")]
        sizes = [str(row["objects"]) for row in report["by_size"]]
        assert rows["all"] == [str(report["about"]["objects"]), *sizes, "0.43756", *three]
        assert rows["none"] == ["0", "0", "0", "0", "-", "-", "-", "-"]


def test_objects_are_counted_by_class_and_size(coco):
    report, _ = make_report(coco, [])
    bounds = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    counts = Counter(
        (a["category_id"], size)
        for a in coco.anns.values()
        for size, (low, high) in bounds.items()
        if not a["iscrowd"] and low <= a["area"] <= high
    )
    for row in report["by_class"]:
        assert [row[f"objects_{size}"] for size in bounds] == [counts[row["id"], size] for size in bounds]
    by_size = [sum(counts[category, size] for category in coco.cats) for size in bounds]
    assert [row["objects"] for row in report["by_size"]] == by_size
    assert min(by_size) > 100


def test_more_than_a_hundred_detections_are_all_counted():
    coco = truth([(1, 5, [0, 0, 20, 20])])
    found = [result(1, [50, 50, 10, 10], 0.9)] * 150 + [result(1, [0, 0, 20, 20], 0.6)]
    matrix, _ = confusion(coco, found, [1, 2])
    assert matrix.tolist() == [[1, 0], [150, 0]]


def test_confusion_adds_up_on_real_data(coco):
    found = jittered(coco)
    image_ids = sorted(coco.imgs)
    matrix, outcomes = confusion(coco, found, image_ids, min_score=0.3)
    per_class = [sum(a["category_id"] == c and not a["iscrowd"] for a in coco.anns.values()) for c in sorted(coco.cats)]
    assert matrix[:-1].sum(axis=1).tolist() == per_class
    assert sum(one["objects"] for one in outcomes) == sum(per_class)
    assert sum(one["found"] for one in outcomes) == np.trace(matrix)
    assert sum(one["false"] for one in outcomes) == matrix[-1].sum()
    assert [one["f1"] for one in outcomes] == sorted(one["f1"] for one in outcomes)
    assert {one["id"] for one in outcomes} == set(image_ids)
    assert matrix[:-1, :-1].sum() - np.trace(matrix) > 10  # confused


def test_nothing_found_and_nothing_to_find():
    for coco in (truth([(1, 5, [0, 0, 20, 20])]), truth([])):
        report, _ = make_report(coco, [])
        assert report["scores"]["APl"] is None
        text = report_text(Report.from_dict(report))
        assert "None" not in text
        assert "nan" not in text
    assert report["scores"]["AP"] is None
    assert report["curves"]["mean"] == {}
    no_classes = index_coco({"images": [], "annotations": [], "categories": []})
    report, _ = make_report(no_classes, [], proposals=[])
    assert report["by_class"] == []
    assert report["proposals"]["rows"] == []
    report_text(Report.from_dict(report))


def test_text_shows_every_table():
    coco = two_classes([(1, 5, [0, 0, 20, 20]), (2, 7, [0, 0, 90, 90])])
    found = [result(1, [0, 0, 20, 20]), {**result(2, [50, 50, 10, 10]), "category_id": 7}]
    speed = {
        "images": 3,
        "rows": [{"stage": "backbone", "ms": 1.25, "low": 1.0, "high": 2.0, "images_per_second": 800}],
    }
    proposals = [CoveringProposal(1, 5, [0, 0, 20, 20])]
    losses = Counter({"loss_classifier": 0.5, "loss_box_reg": 0.25})
    report, _ = make_report(coco, found, losses=losses, proposals=proposals, kept_proposals=200)
    assert report["proposals"]["kept"] == 200
    text = report_text(Report.from_dict(report | {"speed": speed, "notes": ["A note."]}))
    for words in ("0.50   0.55", "small", "missed", "nothing", "0.3750", "backbone", "800.0", "Note: A note.", "1000"):
        assert words in text, words
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["300"])
    assert row == ["300", "0.500", "1.000", "0.000", "-"]


def test_many_classes_are_listed_by_what_is_confused_most(coco, monkeypatch):
    monkeypatch.setattr("detector.evaluation.tables.MAX_CLASSES", 5)
    report, _ = make_report(coco, jittered(coco), min_score=0.0)
    text = report_text(Report.from_dict(report))
    assert "75 with fewer objects" in text
    assert "most frequent" in text
    assert " as " in text


def test_two_classes_of_one_name_have_a_curve_each():
    coco = truth([(1, 5, [0, 0, 20, 20]), (2, 7, [0, 0, 90, 90])])
    coco = index_coco({**coco.dataset, "categories": [{"id": 7, "name": "a"}, {"id": 5, "name": "a"}]})
    report, _ = make_report(coco, [])
    assert set(report["curves"]["by_class"]) == {"a (5)", "a (7)"}


def test_names_cannot_break_a_table():
    rows = text_table([["", "AP"], ["a\nb\x1b[31m" + "c" * 100, 0.5], ["d", None]]).splitlines()
    assert len(rows) == 3
    assert "\x1b" not in rows[1]
    assert len(rows[1]) < 60
    assert rows[2].split() == ["d", "-"]


class TestProposals:
    def test_recorded_ones_change_no_detection_and_are_those_of_a_larger_cut(self):
        model = swap_crop_head(tiny_rcnn(rpn_post_nms_top_n_test=5, rpn_pre_nms_top_n_test=600)).eval()
        more = swap_crop_head(tiny_rcnn(rpn_post_nms_top_n_test=1000, rpn_pre_nms_top_n_test=600)).eval()
        more.load_state_dict(model.state_dict())
        images, targets = batch()
        seen = []
        more.rpn.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        with torch.no_grad():
            wanted = model(images)
            more(images)
            found, none, proposals = run_rcnn(model, images, min_proposals=1000)
            with_losses, losses, _ = run_rcnn(model, images, copies(targets), min_proposals=1000)
        assert (none, set(losses)) == ({}, set(detect_with_losses(model, images, copies(targets))[1]))
        for one, two, three in zip(wanted, found, with_losses, strict=True):
            for name in one:
                assert torch.equal(one[name], two[name])
                torch.testing.assert_close(one[name], three[name])
        assert len(seen[0][0]) > 20
        for boxes, all_of_them in zip(proposals, seen[0], strict=True):
            torch.testing.assert_close(boxes, all_of_them)  # 64-pixel images are not resized
        assert "post_nms_top_n" not in model.rpn.__dict__

    def test_what_covers_no_object_may_be_left_out(self, coco):
        """Recall of all proposals by pycocotools, against that of the covering ones alone."""
        generator = np.random.default_rng(0)
        everything, kept = [], []
        known = annotations_of(coco.dataset)
        image_ids = sorted(coco.imgs)[:30]
        for image_id in image_ids:
            boxes = [[*generator.uniform(0, 300, 2), *generator.uniform(5, 300, 2)] for _ in range(350)]
            for annotation in coco.imgToAnns[image_id]:
                x, y, w, h = annotation["bbox"]
                for _ in range(3):
                    dx, dy, dw, dh = generator.normal(size=4) * 0.1
                    boxes.append([x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)])
            generator.shuffle(boxes)
            xywh = torch.tensor(np.array(boxes))
            kept += covering_proposals(known, image_id, torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
            everything += [CoveringProposal(image_id, rank, list(box)) for rank, box in enumerate(boxes)]
        assert len(kept) < len(everything) / 4
        wanted = recall(coco, everything, image_ids)
        assert recall(coco, kept, image_ids) == wanted
        assert [row["at"] for row in wanted] == list(COUNTS)
        assert 0.05 < wanted[0]["AR"] < wanted[1]["AR"] < wanted[2]["AR"]

    def test_a_proposal_counts_from_its_rank_on(self):
        coco = truth([(1, 5, [0, 0, 20, 20])])
        rows = recall(coco, [CoveringProposal(1, 250, [0, 0, 20, 20])], [1, 2])
        assert [row["AR"] for row in rows] == [0, 1, 1]
        assert [row["ARl"] for row in rows] == [-1, -1, -1]


def test_losses_and_proposals_of_a_split():
    model = swap_crop_head(tiny_rcnn()).eval()
    images, targets = batch()
    batches = [
        ([image], [target | {"image_id": torch.tensor(i)}]) for i, (image, target) in enumerate(zip(images, targets), 1)
    ]
    annotations = [
        {"id": n, "image_id": i, "category_id": 5, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1, "iscrowd": 0}
        for i, target in enumerate(targets, 1)
        for n, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist(), 10 * i)
    ]
    info = [{"id": i, "file_name": "", "width": SIZE, "height": image.shape[1]} for i, image in enumerate(images, 1)]
    coco = index_coco({"images": info, "annotations": annotations, "categories": [{"id": 5, "name": "a"}]})
    found = predicted(model, batches, [5, 6], labels=torch.tensor([0, 2, 1]), proposals_of=annotations_of(coco.dataset))
    swapped = [{**copies([target])[0], "labels": 3 - target["labels"]} for target in targets]
    torch.manual_seed(0)
    wanted = [detect_with_losses(model, [image], [target])[1] for image, target in zip(images, swapped)]
    losses = found.mean_losses()
    assert losses["loss"] == pytest.approx(sum(v for k, v in losses.items() if k != "loss"))
    mean = np.mean([float(one["loss_objectness"]) for one in wanted])
    assert losses["loss_objectness"] == pytest.approx(mean, abs=0.1)  # anchors are drawn
    assert set(losses) == {"loss", *wanted[0]}
    assert {hit.image_id for hit in found.proposals} == {1, 2}
    assert predicted(model, batches, [5, 6]).mean_losses() is None


def test_every_loss_is_of_the_labels_that_were_given():
    """Taking the classes for one another must change the classifier's loss, and that alone."""
    model = tiny_rcnn(box_batch_size_per_image=1000, rpn_batch_size_per_image=1000).eval()
    images, targets = batch()
    batches = [([image], [target | {"image_id": torch.tensor(1)}]) for image, target in zip(images, targets)]
    kept, exchanged = (
        predicted(model, batches, [5, 6], labels=torch.tensor(labels)).mean_losses()
        for labels in ([0, 1, 2], [0, 2, 1])
    )
    assert kept["loss_rpn_box_reg"] == pytest.approx(exchanged["loss_rpn_box_reg"])
    assert kept["loss_classifier"] != pytest.approx(exchanged["loss_classifier"], rel=1e-3)


class TestResultsFile:
    def read(self, tmp_path, content):
        path = tmp_path / "found.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read(path, annotations_of(truth([(1, 5, [0, 0, 20, 20])]).dataset))

    def test_what_is_right_is_kept(self, tmp_path):
        good = result(1, [0, 0.5, 20, 0])
        assert self.read(tmp_path, [{**good, "segmentation": [], "id": 9}]) == [good]
        assert self.read(tmp_path, []) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_id": 7}, r"results\[1\] has image_id 7, which the annotations do not have"),
            ({"category_id": 6}, r"results\[1\] has category_id 6, which the annotations do not have"),
            ({"image_id": "1"}, r"results\[1\] has image_id '1', must be an integer"),
            ({"image_id": True}, "must be an integer"),
            ({"score": float("nan")}, r"results\[1\] has score nan, must be a finite number"),
            ({"score": "0.5"}, "must be a finite number"),
            ({"score": None}, "must be a finite number"),
            ({"bbox": [1, 2, 3]}, r"results\[1\] has bbox \[1, 2, 3\], must be 4 finite numbers"),
            ({"bbox": [1, 2, -3, 4]}, "not negative"),
            ({"bbox": [1, 2, float("inf"), 4]}, "must be 4 finite numbers"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, change, message):
        good = result(1, [0, 0, 20, 20])
        with pytest.raises(DataError, match=message):
            self.read(tmp_path, [good, good | change])

    @pytest.mark.parametrize("field", ["image_id", "category_id", "score"])
    def test_a_field_that_is_missing(self, tmp_path, field):
        bad = result(1, [0, 0, 20, 20])
        del bad[field]
        with pytest.raises(DataError, match=rf"no {field}.*1 more"):
            self.read(tmp_path, [bad, bad])

    @pytest.mark.parametrize("size", [1e200, 1e-200])
    def test_boxes_whose_iou_is_no_number_would_match_everything(self, tmp_path, size):
        box = [0, 0, size, size]
        coco = truth([(1, 5, box)])
        coco.anns[1]["area"] = 1
        assert evaluate(coco, [result(1, [0, 0, size, size / 8])])[0]["AP50"] == pytest.approx(1)  # pycocotools
        with pytest.raises(DataError, match="each 0 or from 1e-100 to 1e9 in size"):
            self.read(tmp_path, [result(1, box)])

    def test_scores_are_floats(self, tmp_path):
        lowest = result(1, [0, 0, 20, 20], -(2**63))
        others = [result(1, [50, 50, 20, 20], -n) for n in range(5)]
        found = self.read(tmp_path, [lowest, *others])
        assert all(type(one["score"]) is float for one in found)
        assert evaluate(truth([(1, 5, [0, 0, 20, 20])]), found)[0]["AP50"] == pytest.approx(1 / 6)

    def test_other_files(self, tmp_path):
        with pytest.raises(DataError, match=r"not a results file.*this is an annotation file"):
            self.read(tmp_path, {"images": [], "annotations": [], "categories": []})
        with pytest.raises(DataError, match="not a results file: it must hold a list"):
            self.read(tmp_path, "3")
        with pytest.raises(DataError, match="must be a dict"):
            self.read(tmp_path, [[1]])
        with pytest.raises(DataError, match="not valid JSON"):
            self.read(tmp_path, '[{"image_id": 1')
        with pytest.raises(DataError, match="no such file"):
            results_file(tmp_path / "nothing.json")


class TestFasterEvaluator:
    def test_all_numbers_agree_on_real_data_with_crowds(self, coco):
        pytest.importorskip("faster_coco_eval")
        assert sum(a["iscrowd"] for a in coco.anns.values()) > 3
        for seed in (0, 1):
            found = jittered(coco, seed, spread=0.02 + 0.1 * seed)
            slow, table = evaluate(coco, found)
            fast, fast_table = evaluate(coco, found, evaluator="faster-coco-eval")
            assert fast == pytest.approx(slow, abs=1e-6)
            assert len(fast) == 13
            assert fast_table == table
            reports = [
                make_report(coco, found, evaluator=evaluator)[0] for evaluator in ("pycocotools", "faster-coco-eval")
            ]
            for one, two in zip(*(report["by_class"] for report in reports), strict=True):
                assert one == pytest.approx(two, abs=1e-6)
        assert 0.1 < slow["AP"] < 0.9

    def test_some_images_and_nothing_found(self, coco):
        pytest.importorskip("faster_coco_eval")
        found = jittered(coco)
        image_ids = sorted(coco.imgs)[:10]
        assert evaluate(coco, found, image_ids, evaluator="faster-coco-eval")[0] == pytest.approx(
            evaluate(coco, found, image_ids)[0], abs=1e-6
        )
        assert evaluate(coco, [], evaluator="faster-coco-eval")[0] == evaluate(coco, [])[0]

    def test_its_package_is_named_where_it_is_missing(self, monkeypatch):
        def missing(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", missing)
        with pytest.raises(ModelError, match=r"affine-crop-rcnn\[faster\]"):
            evaluate(truth([]), [], evaluator="faster-coco-eval")


def test_annotation_id_0_is_an_object_like_any_other(tmp_path):
    """pycocotools marks a detection as matched by the annotation's id, and takes 0 for not matched."""
    data = truth([(1, 5, [0, 0, 20, 20]), (2, 5, [0, 0, 20, 20])]).dataset
    for number, annotation in enumerate(data["annotations"]):
        annotation["id"] = number
    (tmp_path / "truth.json").write_text(json.dumps(data))
    found = [result(1, [0, 0, 20, 20]), result(2, [0, 0, 20, 20])]
    assert evaluate(coco_of(read_annotations(tmp_path / "truth.json")), found)[0]["AP"] == pytest.approx(1)


def test_a_box_of_a_negative_size_is_an_object_that_nobody_finds(tmp_path):
    data = truth([(1, 5, [0, 0, 20, 20]), (1, 5, [60, 60, 10, -5]), (1, 5, [60, 60, -10, -5])]).dataset
    for annotation in data["annotations"]:
        del annotation["area"]
    (tmp_path / "truth.json").write_text(json.dumps(data))
    coco, found = coco_of(read_annotations(tmp_path / "truth.json")), [result(1, [0, 0, 20, 20])]
    report, _ = make_report(coco, found)
    assert report["scores"]["AR100"] == pytest.approx(1 / 3)
    assert report["about"]["objects"] == sum(report["confusion"]["matrix"][0]) == 3


def test_the_newest_report_of_the_same_weights_is_found(tmp_path):
    def write(name, weights, time, ap):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        content = {"about": {"weights": weights, "time": time}, "scores": {"AP": ap}}
        (folder / "report.json").write_text(json.dumps(content))

    assert newest_report(tmp_path, "w") is None
    write(".", "w", "2026-01-01", 0.1)
    write("eval-val", "w", "2026-01-03", 0.3)
    write("eval-val-2", "w", "2026-01-02", 0.2)
    write("eval-other", "v", "2026-01-04", 0.4)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("[1]")
    assert newest_report(tmp_path, "w").scores["AP"] == 0.3


def test_what_a_refinement_did_is_scored_before_and_after():
    """The object is found by an IoU of 0.8 before, and of 1 after."""
    coco = truth([(1, 5, [0, 0, 100, 100])])
    before, after = [result(1, [0, 0, 100, 80])], [result(1, [0, 0, 100, 100])]
    report, _ = make_report(coco, after, unrefined=before)
    assert report["scores"]["AP"] == pytest.approx(1)
    section = report["refinement"]
    assert section["after"] == {"scores": report["scores"], "by_iou": report["by_iou"]}
    assert section["before"]["scores"]["AP"] == pytest.approx(0.7)
    ious = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert [row["iou"] for row in section["before"]["by_iou"]] == ious
    assert [row["AP"] for row in section["before"]["by_iou"]] == pytest.approx([1] * 7 + [0] * 3)
    assert [row["AP"] for row in section["after"]["by_iou"]] == pytest.approx([1] * 10)
    lines = [line.split() for line in report_text(Report.from_dict(report)).splitlines()]
    assert ["AP", "0.700", "1.000", "+0.300"] in lines
    assert ["AP75", "1.000", "1.000", "+0.000"] in lines
    assert ["AP90", "0.000", "1.000", "+1.000"] in lines
    assert section["before"]["scores"]["APs"] is None  # there are no small ones
    assert make_report(coco, after)[0]["refinement"] is None
