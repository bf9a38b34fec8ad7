"""The sections of a report, against pycocotools run on one class, or counted by hand."""

import contextlib
import io
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval
from support.scored import annotations_of, jittered, result, truth
from support.tiny_models import SIZE, batch, copies, tiny_rcnn

from detector.data.annotations import read_annotations
from detector.evaluation import SUMMARY, EvaluationOptions, Predictions, Report, detect_with_losses
from detector.evaluation.confusion import confusion_matrix, image_rows, match_boxes
from detector.evaluation.losses import run_rcnn
from detector.evaluation.metric import match
from detector.evaluation.operating_points import MEASURES, operating_points
from detector.evaluation.proposals import COUNTS, covering_proposals, recall
from detector.evaluation.report import newest_report
from detector.evaluation.running import predict
from detector.evaluation.scoring import evaluate_coco
from detector.evaluation.tables import report_text, text_table
from detector.evaluation.truth import coco_of, index_coco
from detector.rcnn.swap import swap_crop_head

NOTHING = dict.fromkeys(("score", "precision", "recall", "f1"))


def make_report(coco, found, *, min_score=0.5, **predicted):
    options = EvaluationOptions(min_score=min_score)
    return evaluate_coco(coco, Predictions(sorted(coco.imgs), found, **predicted), about={}, options=options).report


@pytest.fixture(scope="module")
def coco(coco_cc):
    return coco_of(read_annotations(coco_cc / "annotations" / "instances_val2017.json"))


@pytest.fixture(scope="module")
def found(coco):
    return jittered(coco)


@pytest.fixture(scope="module")
def report(coco, found):
    return make_report(coco, found)


def official(coco, found, categories):
    """pycocotools' 12 numbers of some categories, by its documented way in."""
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(coco, coco.loadRes(found), "bbox")
        scorer.params.catIds = categories
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return dict(zip(SUMMARY, scorer.stats.tolist()))


def test_scores_by_class_size_and_iou_are_pycocotools(coco, found, report):
    assert report.scores["AP"] == pytest.approx(official(coco, found, sorted(coco.cats))["AP"], abs=1e-12)
    assert len(report.by_class) == 80
    checked = [row for row in report.by_class if row["objects"] >= 30]
    assert len(checked) >= 3
    for row in checked:
        wanted = official(coco, found, [row["id"]])
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARs", "ARm", "ARl"):
            assert (-1.0 if row[name] is None else row[name]) == pytest.approx(wanted[name], abs=1e-12), (row, name)
        assert row["AR"] == pytest.approx(wanted["AR100"], abs=1e-12)
    assert [row["iou"] for row in report.by_iou] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert np.mean([row["AP"] for row in report.by_iou]) == pytest.approx(report.scores["AP"], abs=1e-12)
    assert report.by_iou[5]["AP"] == pytest.approx(report.scores["AP75"], abs=1e-12)
    for row, letter in zip(report.by_size, "sml", strict=True):
        assert (row["AP"], row["AR"]) == (report.scores[f"AP{letter}"], report.scores[f"AR{letter}"])
    content = report.to_dict()
    assert Report.from_dict(json.loads(json.dumps(content))) == report


def test_objects_by_class_and_size(coco, report):
    bounds = {"": (-1, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}
    objects = [(a["category_id"], a["area"]) for a in coco.anns.values() if not a["iscrowd"]]
    for row in report.by_class:
        for size, (low, high) in bounds.items():
            assert row[f"objects{size}"] == sum(c == row["id"] and low <= area <= high for c, area in objects)
    assert report.about["objects"] == sum(row["objects"] for row in report.by_size) == len(objects)


def test_the_area_under_a_curve_is_the_ap(report):
    assert len(report.curves["recall"]) == 101
    for iou, name in (("0.50", "AP50"), ("0.75", "AP75"), ("0.90", "AP90")):
        assert np.mean(report.curves["mean"][iou]) == pytest.approx(report.scores[name], abs=1e-12)
    by_name = {row["name"]: row["AP50"] for row in report.by_class if row["AP50"] is not None}
    assert {name: np.mean(curve) for name, curve in report.curves["by_class"].items()} == pytest.approx(by_name)


def two_classes(boxes, crowd=(), names=("b", "a")):
    coco = truth(boxes, crowd=crowd)
    return index_coco({**coco.dataset, "categories": [{"id": i, "name": name} for i, name in zip((7, 5), names)]})


def test_two_classes_of_one_name_have_a_curve_each():
    coco = two_classes([(1, 5, [0, 0, 20, 20]), (2, 7, [0, 0, 90, 90])], names=("a", "a"))
    assert set(make_report(coco, []).curves["by_class"]) == {"a (5)", "a (7)"}


BOXES = [
    (1, 5, [0, 0, 20, 20]),  # found
    (1, 5, [30, 0, 20, 20]),  # detected as b
    (1, 7, [60, 0, 20, 20]),  # missed: the detections cover a quarter of it, or have a low score
    (2, 7, [0, 0, 50, 50]),  # a crowd
]
FOUND = [
    result(1, [0, 0, 20, 20], 0.9),
    result(1, [1, 0, 20, 20], 0.8),  # a second time: false
    {**result(1, [30, 0, 20, 20], 0.7), "category_id": 7},
    {**result(1, [60, 0, 10, 10], 0.9), "category_id": 7},  # false
    {**result(1, [60, 0, 20, 20], 0.4), "category_id": 7},
    {**result(2, [5, 5, 10, 10], 0.9), "category_id": 7},  # on the crowd: neither right nor wrong
    result(2, [70, 70, 10, 10], 0.9),  # false
]


def test_confusion_matrix_and_images_counted_by_hand():
    report = make_report(two_classes(BOXES, crowd=(4,)), FOUND)
    assert report.confusion == {"names": ["a", "b"], "matrix": [[1, 1, 0], [0, 0, 1], [2, 1, 0]]} | {
        "min_score": 0.5,
        "iou": 0.5,
    }
    f1 = pytest.approx(2 / (3 + 4))
    assert report.images == [  # the worst first
        {"id": 2, "objects": 0, "found": 0, "confused": 0, "missed": 0, "false": 1, "f1": 0, "file_name": "2.png"},
        {"id": 1, "objects": 3, "found": 1, "confused": 1, "missed": 1, "false": 2, "f1": f1, "file_name": "1.png"},
    ]
    outcomes = match_boxes(two_classes(BOXES, crowd=(4,)), FOUND, [1, 2], min_score=0.4)
    assert confusion_matrix(outcomes, [5, 7]).tolist() == [[1, 1, 0], [0, 1, 0], [2, 1, 0]]
    nothing = match_boxes(two_classes(BOXES, crowd=(4,)), [], [2])
    assert confusion_matrix(nothing, [5, 7]).sum() == 0
    assert image_rows(nothing)[0]["f1"] == 1


def test_every_box_has_one_outcome():
    data = two_classes(BOXES, crowd=(4,)).dataset
    for annotation in data["annotations"]:
        annotation["id"] += 2**60  # pycocotools keeps what it matched as a float
    outcomes = match_boxes(index_coco(data), FOUND, [1, 2])
    assert {
        (image_id, one.kind, one.truth and one.truth["id"] - 2**60, one.detection and FOUND.index(one.detection))
        for image_id, boxes in outcomes.items()
        for one in boxes
    } == {
        *((1, "found", 1, 0), (1, "confused", 2, 2), (1, "missed", 3, None), (1, "false", None, 1)),
        *((1, "false", None, 3), (2, "crowd", 4, None), (2, "crowd", None, 5), (2, "false", None, 6)),
    }
    assert [len(boxes) for boxes in outcomes.values()] == [5, 3]


def overlap(one, two, crowd=False):
    width = min(one[0] + one[2], two[0] + two[2]) - max(one[0], two[0])
    height = min(one[1] + one[3], two[1] + two[3]) - max(one[1], two[1])
    both = max(width, 0) * max(height, 0)
    return both / (one[2] * one[3] if crowd else one[2] * one[3] + two[2] * two[3] - both)


def matched_by_hand(coco, found, score):
    """[right, wrong, objects] of each class at IoU 0.5, of detections from a score on, in plain Python."""
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
            for box in (one["bbox"] for one in of_class[image_id, category][:100] if one["score"] >= score):
                best = max(left, key=lambda other: overlap(box, other), default=None)
                if best is not None and overlap(box, best) >= 0.5:
                    left.remove(best)
                    count[0] += 1
                elif not any(overlap(box, crowd, True) >= 0.5 for crowd in crowds):
                    count[1] += 1
    return counts | {"mean": np.sum(list(counts.values()), axis=0).tolist()}


def measured(right, wrong, objects):
    return (right / (right + wrong) if right + wrong else None, right / objects, 2 * right / (objects + right + wrong))


@pytest.fixture(scope="module")
def scattered():
    """Twelve images with three classes, one of them without objects, and crowds; detections of few scores."""
    rng = np.random.default_rng(3)
    boxes = [
        (i % 12, (5, 7)[int(rng.random() < 0.3)], [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(10, 40, 2).tolist()])
        for i in range(90)
    ]
    data = two_classes(boxes).dataset
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


class TestOperatingPoints:
    def test_no_other_score_is_better(self, scattered):
        coco, found = scattered
        points = operating_points(match(coco, found), found)
        rows = {row["id"]: row for row in points["by_class"]} | {"mean": points["mean"]}
        scores = sorted({one["score"] for one in found}, reverse=True)
        counts = {score: matched_by_hand(coco, found, score) for score in scores}
        for key in (5, 7, "mean"):
            reached = [measured(*counts[score][key])[2] for score in scores]
            highest = scores[int(np.argmax(reached))]  # the first of equal ones is the highest
            others = [one["score"] for one in found if key in (one["category_id"], "mean") and one["score"] < highest]
            assert max(others, default=-1) < rows[key]["score"] <= highest
            right = measured(*matched_by_hand(coco, found, rows[key]["score"])[key])
            assert tuple(rows[key][name] for name in MEASURES) == right
            assert key == "mean" or rows[key]["objects"] == counts[highest][key][2]
        assert rows[9] == {"id": 9, "name": "none", "objects": 0, **NOTHING}
        assert points["curves"]["score"] == [i / 100 for i in range(101)]
        for i in (0, 37, 50, 99, 100):
            wanted = measured(*matched_by_hand(coco, found, i / 100)["mean"])
            assert tuple(points["curves"]["mean"][name][i] for name in MEASURES) == wanted

    def test_both_evaluators(self, scattered):
        pytest.importorskip("faster_coco_eval")
        coco, found = scattered
        for image_ids in (None, sorted(coco.imgs)[:7]):
            slow, fast = (
                operating_points(match(coco, found, image_ids, evaluator=evaluator), found)
                for evaluator in ("pycocotools", "faster-coco-eval")
            )
            assert slow == fast

    def test_the_highest_of_equal_thresholds_with_few_decimals(self):
        coco = truth([(1, 5, [0, 0, 20, 20]), (1, 5, [30, 0, 20, 20]), (2, 5, [0, 0, 20, 20])])
        right = [result(1, [0, 0, 20, 20], 0.87654321), result(1, [30, 0, 20, 20], 0.123456)]
        wrong = [result(2, [50, 50, 20, 20], 0.8765), result(2, [70, 50, 20, 20], 0.5), result(2, [70, 70, 9, 9], 0.4)]

        def best(found):
            row = operating_points(match(coco, found), found)["by_class"][0]
            return row["score"], row["precision"], row["recall"], row["f1"]

        assert best(right) == (0.12, 1, 2 / 3, 0.8)
        assert best(right + wrong) == (0.87654, 1, 1 / 3, 0.5)  # 0.5 is 2 / (3 + 1), and 4 / (3 + 5)
        assert best([right[0], wrong[0] | {"score": 0.87654321}]) == (0.87, 0.5, 1 / 3, 0.4)  # both or none
        assert best([one | {"score": 3e200} for one in right]) == (3e200, 1, 2 / 3, 0.8)
        assert best([right[0], wrong[0] | {"score": float(np.nextafter(0.87654321, 0))}])[:2] == (0.87654321, 1)

    @pytest.mark.parametrize("boxes", [[(1, 5, [0, 0, 20, 20])], []])
    @pytest.mark.parametrize("found", [[], [result(1, [50, 50, 20, 20])]])
    def test_nothing_found_or_nothing_to_find(self, boxes, found):
        points = operating_points(match(truth(boxes), found), found)
        numbers = {"recall": 0, "f1": 0} if boxes else {}
        assert points["by_class"] == [{"id": 5, "name": "a", "objects": len(boxes), **NOTHING, **numbers}]
        assert points["mean"] is None
        assert bool(points["curves"]["mean"]) == bool(boxes)

    def test_the_best_hundred_of_an_image_count(self):
        coco = truth([(1, 5, [0, 0, 20, 20]), (1, 5, [30, 0, 20, 20])])
        found = [result(1, [0, 0, 20, 20], 0.9), *[result(1, [60, 60, 9, 9], 0.8)] * 99]
        found.append(result(1, [30, 0, 20, 20], 0.7))
        assert operating_points(match(coco, found), found)["curves"]["mean"]["recall"][0] == 0.5


class TestProposals:
    def test_recording_changes_no_detection(self):
        few, many = (
            swap_crop_head(tiny_rcnn(rpn_post_nms_top_n_test=n, rpn_pre_nms_top_n_test=600)).eval() for n in (5, 1000)
        )
        images, targets = batch()
        images = [torch.nn.functional.interpolate(image[None], scale_factor=2)[0] for image in images]  # resized by 0.5
        targets = [target | {"boxes": 2 * target["boxes"]} for target in targets]
        with torch.no_grad():
            wanted = few(images)
            proposed = many.rpn(many.transform(images)[0], many.backbone(many.transform(images)[0].tensors))[0]
            for given in (None, copies(targets)):
                found, losses, proposals = run_rcnn(few, images, given, min_proposals=1000)
                assert set(losses) == set(detect_with_losses(few, images, copies(targets))[1] if given else ())
                for one, two in zip(wanted, found, strict=True):
                    assert all(torch.allclose(one[name], two[name]) for name in one)
                for boxes, resized in zip(proposals, proposed, strict=True):
                    assert len(boxes) > 20
                    torch.testing.assert_close(boxes, resized * 2)

    def test_covering_proposals_suffice(self, coco):
        """Recall of all proposals by pycocotools, against that of the covering ones alone."""
        rng = np.random.default_rng(0)
        everything, kept, known = [], [], annotations_of(coco.dataset)
        image_ids = sorted(coco.imgs)[:6]
        for image_id in image_ids:
            boxes = [[*rng.uniform(0, 300, 2), *rng.uniform(5, 300, 2)] for _ in range(350)]
            for x, y, w, h in (one["bbox"] for one in coco.imgToAnns[image_id] for _ in range(3)):
                dx, dy, dw, dh = rng.normal(size=4) * 0.1
                boxes.append([x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)])
            rng.shuffle(boxes)
            xywh = torch.tensor(np.array(boxes))
            kept += covering_proposals(known, image_id, torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
            everything += [{"image_id": image_id, "bbox": list(box), "score": -i} for i, box in enumerate(boxes)]
        assert len(kept) < len(everything) / 4
        rows = recall(coco, kept, image_ids)
        assert recall(coco, everything, image_ids) == rows
        assert [row["at"] for row in rows] == list(COUNTS)
        assert 0.05 < rows[0]["AR"] < rows[1]["AR"] < rows[2]["AR"]
        one = [{"image_id": 1, "bbox": [0, 0, 20, 20], "score": -250.0}]
        rows = recall(truth([(1, 5, [0, 0, 20, 20])]), one, [1, 2])
        assert [(row["AR"], row["ARl"]) for row in rows] == [(0, -1), (1, -1), (1, -1)]


def test_losses_and_proposals_of_a_batch():
    model = swap_crop_head(tiny_rcnn(box_batch_size_per_image=1000, rpn_batch_size_per_image=1000)).eval()
    images, targets = batch()
    numbered = [target | {"image_id": torch.tensor(i)} for i, target in enumerate(targets, 1)]
    boxes = [
        (i, 5, [x1, y1, x2 - x1, y2 - y1]) for i, t in enumerate(targets, 1) for x1, y1, x2, y2 in t["boxes"].tolist()
    ]
    dataset = truth(boxes).dataset
    dataset["images"] = [one | {"width": SIZE, "height": SIZE} for one in dataset["images"]]

    def losses_of(labels):
        with torch.no_grad():
            options = {"labels": torch.tensor(labels), "proposals_of": annotations_of(dataset)}
            return predict(model, images, numbered, [5, 6], **options)

    found = losses_of([0, 2, 1])
    assert {one["image_id"] for one in found.proposals} == {1, 2}
    assert found.kept_proposals == 50
    swapped = [{**target, "labels": 3 - target["labels"]} for target in targets]
    wanted = {name: loss.item() for name, loss in detect_with_losses(model, images, copies(swapped))[1].items()}
    losses, other = found.mean_losses(), losses_of([0, 1, 2]).mean_losses()
    assert losses == pytest.approx({"loss": sum(wanted.values()), **wanted}, rel=1e-4)
    assert other["loss_rpn_box_reg"] == pytest.approx(losses["loss_rpn_box_reg"])
    assert other["loss_classifier"] != pytest.approx(losses["loss_classifier"], rel=1e-3)
    assert predict(model, images, numbered, [5, 6]).mean_losses() is None


def test_before_and_after_a_refinement():
    """The object is found with an IoU of 0.8 before, and of 1 after."""
    coco = truth([(1, 5, [0, 0, 100, 100])])
    report = make_report(coco, [result(1, [0, 0, 100, 100])], unrefined=[result(1, [0, 0, 100, 80])])
    assert report.refinement["after"] == {"scores": report.scores, "by_iou": report.by_iou}
    before = report.refinement["before"]
    assert before["scores"]["AP"] == pytest.approx(0.7)
    assert before["scores"]["APs"] is None  # there are no small ones
    assert [row["AP"] for row in before["by_iou"]] == pytest.approx([1] * 7 + [0] * 3)
    lines = [line.split() for line in report_text(report).splitlines()]
    for row in ("AP 0.700 1.000 +0.300", "AP75 1.000 1.000 +0.000", "AP90 0.000 1.000 +1.000"):
        assert row.split() in lines


class TestText:
    def test_every_table(self):
        coco = two_classes([(1, 5, [0, 0, 20, 20]), (2, 7, [0, 0, 90, 90])])
        found = [result(1, [0, 0, 20, 20]), {**result(2, [50, 50, 10, 10]), "category_id": 7}]
        proposals = [{"image_id": 1, "bbox": [0, 0, 20, 20], "score": -5.0}]
        losses = Counter({"loss_classifier": 0.5, "loss_box_reg": 0.25})
        report = make_report(coco, found, losses=losses, proposals=proposals, kept_proposals=200)
        row = {"stage": "backbone", "ms": 1.25, "low": 1.0, "high": 2.0, "images_per_second": 800}
        report.speed, report.notes = {"images": 3, "rows": [row]}, ["A note."]
        report.operating_points["mean"]["score"] = 0.43756
        lines = [" ".join(line.split()) for line in report_text(report).splitlines()]
        for line in (
            "small 1 1.000 1.000",
            "a 1 1.000 1.000 1.000 1.000 - - 1.000 1.000 - -",
            "all 2 1 1 0 0.43756 0.500 0.500 0.500",  # with every digit of the score
            "300 0.500 1.000 0.000 -",
            "a 1 0 0",
            "false detections 0 1 0",
            "0.3750 0.2500 0.1250",
            "backbone 1.2 1.0 2.0 800.0",
            "Note: A note.",
        ):
            assert line in lines

    def test_many_classes(self, report, monkeypatch):
        monkeypatch.setattr("detector.evaluation.tables.MAX_CLASSES", 5)
        text = report_text(report)
        assert "75 with fewer objects" in text
        assert " as " in text.partition("Confusion")[2]

    @pytest.mark.parametrize("classes", [1, 0])
    def test_nothing_found(self, classes):
        coco = truth([])
        coco = index_coco(coco.dataset | {"categories": coco.dataset["categories"][:classes]})
        report = make_report(coco, [], kept_proposals=9)
        assert report.scores["AP"] is None
        assert report.curves["mean"] == {}
        assert "None" not in report_text(report)
        assert "nan" not in report_text(report)

    def test_names_cannot_break_a_table(self):
        rows = text_table([["", "AP"], ["a\nb\x1b[31m" + "c" * 100, 0.5], ["d", None]]).splitlines()
        assert len(rows) == 3
        assert "\x1b" not in rows[1]
        assert len(rows[1]) < 60
        assert rows[2].split() == ["d", "-"]


def test_the_newest_report_of_the_same_weights(tmp_path):
    for name, weights, time in (
        (".", "w", "2026-01-01"),
        ("eval-val", "w", "2026-01-03"),
        ("eval-val-2", "w", "2026-01-02"),
        ("eval-other", "v", "2026-01-04"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "report.json").write_text(json.dumps({"about": {"weights": weights, "time": time}}))
    for name, content in (("list", "[1]"), ("other", '{"a": 1}'), ("text", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(content)
    assert newest_report(tmp_path, weights="w").about["time"] == "2026-01-03"
    assert newest_report(tmp_path, weights="u") is None
    assert newest_report(tmp_path, weights="w", refinement="off") is None
