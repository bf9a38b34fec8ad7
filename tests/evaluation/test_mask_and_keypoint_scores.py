"""Scores of masks and keypoints against pycocotools' own reading of results; notes on what is not scored."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params
from support.scored import annotations_of
from support.tiny_models import batch, tiny_rcnn

from detector.data.annotations import read_annotations
from detector.data.checks import CENTRES
from detector.data.keypoints import PERSON, KeypointLayout
from detector.data.masks import as_rle, decode_masks
from detector.data.results import to_results
from detector.evaluation import EvaluationOptions, evaluate
from detector.evaluation.metric import SIGMA, SUMMARIES, match, match_types, summaries
from detector.evaluation.scoring import evaluate_results, scored_types
from detector.evaluation.truth import coco_of, index_coco
from detector.models.rle_detections import detect

SIZE = (90, 120)  # height, width
FIELD = {"segm": "segmentation", "keypoints": "keypoints", "bbox": "bbox"}
IDS = ("image_id", "category_id", "score")


def truth(count=17, *, categories=None):
    """Three images with objects of all sizes with a polygon and keypoints, and a crowd."""
    rng = np.random.default_rng(0)
    annotations = []
    for number in range(1, 13):
        x, y, width, height = rng.uniform([0, 0, 12, 12], [60, 40, 55, 45]).tolist()
        outline = [x, y, x + width, y + height / 3, x + width * 0.8, y + height, x + width / 4, y + height * 0.9]
        points = np.stack([x + rng.uniform(0, width, count), y + rng.uniform(0, height, count)], 1)
        visible = np.append(2, rng.integers(0, 3, count - 1))
        one = {"id": number, "image_id": (number + 3) // 4, "category_id": int(rng.choice([3, 8]))}
        one |= {"bbox": [x, y, width, height], "area": width * height * 0.7, "iscrowd": int(number == 12)}
        one |= {"segmentation": [outline], "keypoints": np.c_[points, visible].reshape(-1).tolist()}
        annotations.append(one | {"num_keypoints": int((visible > 0).sum())})
    named = {"keypoints": [f"p{i}" for i in range(count)], "skeleton": []}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2, 3)],
        "annotations": annotations,
        "categories": categories or [{"id": 3, "name": "a", **named}, {"id": 8, "name": "b", **named}],
    }


def detections(content):
    """Each object found twice, approximately, some as another class."""
    rng = np.random.default_rng(1)
    results = []
    for annotation in content["annotations"] * 2:
        by = rng.uniform(-4, 4, 2)
        outline = (np.array(annotation["segmentation"][0]).reshape(-1, 2) + by).clip(0, [SIZE[1], SIZE[0]])
        points = np.array(annotation["keypoints"]).reshape(-1, 3)[:, :2] + rng.normal(0, 2, (1, 2))
        x, y, width, height = annotation["bbox"]
        category = annotation["category_id"] if rng.random() < 0.9 else 3
        one = {"image_id": annotation["image_id"], "category_id": category, "score": float(rng.uniform())}
        one |= {"bbox": [x + by[0], y + by[1], width, height]}
        one |= {"segmentation": as_rle([outline.reshape(-1).tolist()], *SIZE)}
        results.append(one | {"keypoints": np.c_[points, np.ones(len(points))].reshape(-1).tolist()})
    return results


def only(results, *fields):
    return [{name: one[name] for name in (*IDS, *fields)} for one in results]


def scorer_of(content, results, kind, *, summarize=False, **settings):
    """pycocotools' own way, from results of one kind alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(content))
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(only(results, FIELD[kind])), kind)
        if kind == "keypoints" and content["categories"][0]["keypoints"] != list(PERSON.names):
            scorer.params.kpt_oks_sigmas = np.full(len(content["annotations"][0]["keypoints"]) // 3, SIGMA)
        vars(scorer.params).update(settings)
        scorer.evaluate()
        scorer.accumulate()
        if summarize:
            scorer.summarize()
    return scorer


def official_ap(content, results, kind, **settings):
    precision = scorer_of(content, results, kind, **settings).eval["precision"][..., 0, -1]
    return pytest.approx(precision[precision > -1].mean())


@pytest.mark.parametrize("evaluator", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("kind", ["segm", "keypoints"])
@pytest.mark.parametrize("count", [17, 5])
def test_scores_are_pycocotools(evaluator, kind, count):
    if evaluator != "pycocotools":
        pytest.importorskip("faster_coco_eval")
    content = truth(count)
    results = detections(content)
    expected = scorer_of(content, results, kind, summarize=True).stats.tolist()
    scores, table = evaluate(index_coco(content), results, evaluator=evaluator, iou_type=kind)
    assert [scores[name] for name in SUMMARIES[kind]] == pytest.approx(expected, abs=1e-6)
    assert 0.1 < scores["AP"] < 0.95
    assert len(SUMMARIES[kind]) + 1 == len(table.splitlines())
    assert scores["AP90"] == official_ap(content, results, kind, iouThrs=np.array([0.9]))


@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_the_truth_as_results_is_perfect_and_unchanged(kind):
    """pycocotools turns polygons into RLE in place."""
    content = truth()
    coco, before = index_coco(content), json.dumps(content)
    results = [
        {**one, "score": 1.0, "segmentation": as_rle(one["segmentation"], *SIZE)}
        for one in json.loads(before)["annotations"]
        if not one["iscrowd"]
    ]
    assert evaluate(coco, results, iou_type=kind)[0]["AP"] == pytest.approx(1.0)
    assert json.dumps(content) == before
    lacking = content["annotations"][0]
    del lacking["segmentation"], lacking["keypoints"], lacking["num_keypoints"]
    scores, _ = evaluate(index_coco(content), results, iou_type=kind)
    if kind == "segm":
        assert scores["AR100"] < 1  # missed
    else:
        assert scores["AR"] == 1  # not counted


def test_real_polygons_and_crowds(coco_cc):
    path = coco_cc / "annotations" / "instances_val2017.json"
    coco, results = coco_of(read_annotations(path, annotation_types=("masks",))), []
    for annotation in coco.anns.values():
        if not annotation["iscrowd"]:
            image = coco.imgs[annotation["image_id"]]
            ids = {name: annotation[name] for name in ("image_id", "category_id", "bbox")}
            mask = as_rle(annotation["segmentation"], image["height"], image["width"])
            results.append({**ids, "segmentation": mask, "score": 1.0})
    assert len(results) < len(coco.anns)
    scores, _ = summaries(match_types(coco, results, coco.imgs, annotation_types=("masks",)))
    assert scores["AP"] == scores["segm/AP"] == 1.0


def test_keypoints_are_scored_for_the_classes_that_have_them():
    named = {"keypoints": list(PERSON.names), "skeleton": []}
    content = truth(categories=[{"id": 3, "name": "person", **named}, {"id": 8, "name": "dog"}])
    results = detections(content)
    expected = official_ap(content, results, "keypoints", catIds=[3])
    for annotation in content["annotations"]:
        if annotation["category_id"] == 8:
            del annotation["keypoints"], annotation["num_keypoints"]
    scorer = match(index_coco(content), results, iou_type="keypoints")
    assert scorer.params.catIds == [3]
    assert summaries([scorer])[0]["keypoints/AP"] == expected


@pytest.mark.parametrize(("names", "own"), [(PERSON.names, True), (None, True), ([f"p{i}" for i in range(17)], False)])
def test_tolerances_of_seventeen_keypoints(names, own):
    # COCO's evaluation page, times 1000
    coco = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    assert pytest.approx(sum(coco) / 17 / 1000) == SIGMA
    named = {} if names is None else {"keypoints": list(names), "skeleton": []}
    content = truth(categories=[{"id": 3, "name": "a", **named}, {"id": 8, "name": "b", **named}])
    scorer = match(index_coco(content), detections(content), iou_type="keypoints")
    expected = Params("keypoints").kpt_oks_sigmas if own else np.full(17, SIGMA)
    assert scorer.params.kpt_oks_sigmas == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_detections_with_rle_are_torchvisions(kind):
    model = tiny_rcnn(kind).eval()
    images = [torch.nn.functional.interpolate(image[None], scale_factor=1.5)[0] for image in batch()[0]]
    with torch.no_grad():
        expected, found = model(images), detect(model, images)
    for theirs, ours in zip(expected, found):
        assert torch.equal(theirs["boxes"], ours["boxes"])
        assert len(ours["boxes"])
        if kind == "keypoint":
            assert torch.equal(theirs["keypoints"], ours["keypoints"])
        else:
            masks = (theirs["masks"][:, 0] > 0.5).to(torch.uint8)
            assert torch.equal(decode_masks(ours["segmentations"], *masks.shape[1:]), masks)
            assert 0 < masks.sum() < masks.numel()
    results = to_results(found, [5, 6], [1, 2, 3])
    assert results == to_results(expected, [5, 6], [1, 2, 3])
    if kind == "keypoint":
        assert results[0]["keypoints"] == found[0]["keypoints"][0].flatten().tolist()
    else:
        assert coco_mask.area(results[0]["segmentation"]) == (expected[0]["masks"][0] > 0.5).sum()
    json.dumps(results)


@pytest.fixture
def evaluation_of(tmp_path, monkeypatch):
    """Evaluate results and annotations from files. Pages have no plots, which take a second."""
    monkeypatch.setattr("detector.evaluation.page.make_plots", lambda report: {})

    def run(results, content, **options):
        for name, value in (("r.json", results), ("a.json", content)):
            (tmp_path / name).write_text(json.dumps(value))
        images = options.pop("images", None)
        return evaluate_results(
            str(tmp_path / "r.json"), tmp_path / "a.json", EvaluationOptions(**options), images=images
        )

    return run


def test_results_with_masks_and_with_boxes_alone(evaluation_of, tmp_path):
    content = truth(5)
    results = detections(content)
    evaluation = evaluation_of(only(results, "segmentation"), content)
    report = evaluation.report
    assert "Masks (segm)" in evaluation.tables
    assert report.keypoints is None
    assert report.segm["scores"]["AP"] == evaluation.scores["segm/AP"] == official_ap(content, results, "segm")
    assert [row["name"] for row in report.segm["by_class"]] == ["a", "b"]
    for row in report.segm["by_class"]:
        assert row["AP"] == official_ap(content, results, "segm", catIds=[row["id"]])
    for row in report.segm["by_iou"]:
        assert row["AP"] == official_ap(content, results, "segm", iouThrs=np.array([row["iou"]]))
    evaluation.write(tmp_path / "masks")
    assert json.loads((tmp_path / "masks" / "scores.json").read_text()) == evaluation.scores
    page = (tmp_path / "masks" / "report.html").read_text()
    assert ('<h2 id="segm">' in page, '<h2 id="keypoints">' in page) == (True, False)
    boxes = only(results, "bbox")
    report = evaluation_of(boxes, content).report
    assert (report.segm, report.notes) == (None, [])
    for one in boxes:
        one["bbox"] = np.add(one["bbox"], [0, 0, *one["bbox"][:2]]).tolist()
    (note,) = evaluation_of(boxes, content).report.notes
    assert "corners" in note


def test_annotations_without_masks_or_with_other_keypoints(evaluation_of):
    content = truth(5)
    results = detections(content)
    other = evaluation_of(results, truth(17)).report
    assert (other.segm is None, other.keypoints) == (False, None)
    (note,) = other.notes
    assert "5 keypoints" in note
    assert "17" in note
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    report = evaluation_of(results, content).report
    assert (report.segm, report.keypoints is None) == (None, False)
    assert [note for note in report.notes if "segm" in note and "masks" in note]
    known = annotations_of(truth(2), annotation_types=("keypoints",))
    assert scored_types(["keypoints"], KeypointLayout(("p0", "p1")), known) == (["keypoints"], [])
    for names in (("p1", "p0"), ("p0", "p1", "p2")):
        types, (note,) = scored_types(["keypoints"], KeypointLayout(names), known)
        assert types == []


def test_warnings_about_the_annotations_are_notes(evaluation_of):
    content = truth(5)
    given = [one for one in content["annotations"] if not one["iscrowd"]]
    results = detections(content)
    for annotation in given[:2]:
        del annotation["segmentation"]
    del given[2]["keypoints"], given[2]["num_keypoints"]
    for annotation in given[3:6]:
        annotation["keypoints"][2::3] = [0] * 5
        annotation["num_keypoints"] = 0
    for annotation in given[:4]:
        del annotation["area"]
    given[6]["ignore"] = 1
    given[7]["segmentation"] = [[given[7]["bbox"][0], given[7]["bbox"][1]] * 3]
    for annotation in given[8:]:
        annotation["area"] = 1
    notes = [note.partition(".")[0] for note in evaluation_of(results, content).report.notes]
    assert sorted(notes) == [
        "Annotations with ignore 1: 1",
        f"Areas that are far from their boxes': {len(given) - 8}",
        "Keypoints without an area: 3",
        "Masks without a pixel: 1",
        "Masks without an area: 2",
        "Objects whose keypoints are all unlabelled: 3",
        "Objects without a segmentation: 2",
        "Objects without keypoints: 1",
    ]
    assert len(evaluation_of(only(results, "bbox"), content).report.notes) == 2


def test_boxes_that_change_ap_are_noted(evaluation_of):
    content = truth(5)
    given = [one for one in content["annotations"] if not one["iscrowd"]]
    results = only(detections(content), "bbox")
    given[0]["bbox"][2] = 0
    given[1]["bbox"][0] = 1e6
    content["annotations"].append(given[2] | {"id": 10_000})
    notes = [note.partition(".")[0] for note in evaluation_of(results, content).report.notes]
    assert {"Empty boxes: 1", "Boxes outside their image: 1", "Duplicate boxes: 1"} <= {*notes}


def test_boxes_that_look_like_centres_are_noted(evaluation_of):
    content = truth(5)
    results = only(detections(content), "bbox")
    for annotation in content["annotations"]:
        annotation["bbox"] = [70, 50, 60, 60]
    (note,) = [note for note in evaluation_of(results, content).report.notes if CENTRES[1:] in note]
    assert "tools/check.py" in note


def test_images_that_cannot_be_drawn_are_noted_in_all_files(evaluation_of, tmp_path):
    content = truth(5)
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        (tmp_path / "images" / image["file_name"]).write_bytes(b"broken")
    evaluation_of(detections(content), content, images=tmp_path / "images").write(tmp_path / "e")
    notes = json.loads((tmp_path / "e" / "report.json").read_text())["notes"]
    assert notes
    assert all("No picture of image" in note for note in notes)
    assert (tmp_path / "e" / "report.html").read_text().count("No picture of image") == len(notes)


def test_crowded_images_and_limits_are_noted(evaluation_of):
    content = truth(5)
    for category in content["categories"]:
        category.pop("keypoints")
    for annotation in content["annotations"][:4]:  # of the first image; the layout is that of all images
        annotation.pop("keypoints")
    evaluation = evaluation_of(detections(truth(5)) * 60, content, limit=1)
    assert evaluation.scores["keypoints/AP"] == -1
    assert evaluation.scores["AP"] > 0
    assert evaluation.report.about["images"] == 1
    assert [note for note in evaluation.report.notes if "1 of 3 images" in note]
    assert [note for note in evaluation.report.notes if "100 results" in note]
