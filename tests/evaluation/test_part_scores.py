"""Masks and keypoints scored: against pycocotools' own reading of results, on synthetic truth and on real polygons."""

import contextlib
import html
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params
from support.scored import annotations_of, notes_on, read
from support.tiny_models import batch, tiny_rcnn

from detector.data.annotations import read_annotations
from detector.data.dataset import CocoDetection
from detector.data.keypoints import PERSON, KeypointLayout
from detector.data.masks import as_rle, decode_masks
from detector.data.results import to_results
from detector.errors import DataError
from detector.evaluation import evaluate
from detector.evaluation.metric import SIGMA, SUMMARIES, evaluate_types, match, scores_of
from detector.evaluation.running import EvaluationOptions
from detector.evaluation.scoring import evaluate_results, scored_types
from detector.evaluation.truth import coco_of, index_coco
from detector.models.rle_detections import detect

SIZE = (90, 120)  # height, width


def truth(count=17, *, images=3, categories=None):
    """Objects of all sizes with a polygon and keypoints, a crowd, and an object without either."""
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, images + 1):
        for _ in range(4):
            x, y = rng.uniform(0, 60), rng.uniform(0, 40)
            width, height = rng.uniform(12, 55), rng.uniform(12, 45)
            outline = [x, y, x + width, y + height / 3, x + width * 0.8, y + height, x + width / 4, y + height * 0.9]
            points = np.stack([x + rng.uniform(0, width, count), y + rng.uniform(0, height, count)], 1)
            seen = rng.integers(0, 3, count)
            seen[0] = 2
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": int(rng.choice([3, 8])),
                    "bbox": [x, y, width, height],
                    "segmentation": [outline],
                    "keypoints": np.c_[points, seen].reshape(-1).tolist(),
                    "num_keypoints": int((seen > 0).sum()),
                    "area": width * height * 0.7,
                    "iscrowd": 0,
                }
            )
    annotations[-1]["iscrowd"] = 1
    annotations = [one | {"id": number} for number, one in enumerate(annotations, start=1)]
    sizes = {"height": SIZE[0], "width": SIZE[1]}
    named = {} if count == 0 else {"keypoints": [f"p{i}" for i in range(count)], "skeleton": []}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", **sizes} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": categories or [{"id": 3, "name": "a", **named}, {"id": 8, "name": "b", **named}],
    }


def detections(content, *, shift=4.0):
    """Each object found, more or less, some of them twice or as another class."""
    rng = np.random.default_rng(1)
    results = []
    for annotation in content["annotations"] * 2:
        by = rng.uniform(-shift, shift, 2)
        outline = (np.array(annotation["segmentation"][0]).reshape(-1, 2) + by).clip(0, [SIZE[1], SIZE[0]])
        points = np.array(annotation["keypoints"]).reshape(-1, 3)[:, :2] + rng.normal(0, shift / 2, (1, 2))
        x, y, width, height = annotation["bbox"]
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"] if rng.random() < 0.9 else 3,
                "bbox": [x + by[0], y + by[1], width, height],
                "segmentation": as_rle([outline.reshape(-1).tolist()], *SIZE),
                "keypoints": np.c_[points, np.ones(len(points))].reshape(-1).tolist(),
                "score": float(rng.uniform()),
            }
        )
    return results


def by_pycocotools(content, results, kind):
    """pycocotools' own way, from results of one kind alone."""
    return scorer_of(content, results, kind).stats.tolist()


def alone(content, results, kind, *, iou=None, category=None):
    """AP by pycocotools at one threshold, or of one class, whose other numbers it then does not know."""
    settings = {} if iou is None else {"iouThrs": np.array([iou])}
    settings |= {} if category is None else {"catIds": [category]}
    scorer = scorer_of(content, results, kind, summarize=False, **settings)
    precision = scorer.eval["precision"][..., 0, -1]
    return precision[precision > -1].mean()


def scorer_of(content, results, kind, *, summarize=True, **settings):
    field = {"segm": "segmentation", "keypoints": "keypoints", "bbox": "bbox"}[kind]
    ids = ("image_id", "category_id", "score")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(content))
        coco.createIndex()
        found = coco.loadRes([{name: result[name] for name in (*ids, field)} for result in results])
        scorer = COCOeval(coco, found, kind)
        if kind == "keypoints" and content["categories"][0]["keypoints"] != list(PERSON.names):
            scorer.params.kpt_oks_sigmas = np.full(len(content["annotations"][0]["keypoints"]) // 3, SIGMA)
        for name, value in settings.items():
            setattr(scorer.params, name, value)
        scorer.evaluate()
        scorer.accumulate()
        if summarize:
            scorer.summarize()
    return scorer


@pytest.mark.parametrize("evaluator", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("kind", ["segm", "keypoints"])
@pytest.mark.parametrize("count", [17, 5])
def test_scores_are_those_of_pycocotools_own_reading(evaluator, kind, count):
    if evaluator != "pycocotools":
        pytest.importorskip("faster_coco_eval")
    content = truth(count)
    results = detections(content)
    expected = by_pycocotools(content, results, kind)
    scores, table = evaluate(index_coco(content), results, evaluator=evaluator, iou_type=kind)
    assert [scores[name] for name in SUMMARIES[kind]] == pytest.approx(expected, abs=1e-6)
    assert 0.1 < scores["AP"] < 0.95
    assert len(SUMMARIES[kind]) + 1 == len(table.splitlines())
    assert scores["AP90"] == pytest.approx(alone(content, results, kind, iou=0.9))
    assert table.endswith(
        f"IoU=0.90      | area=   all | maxDets={20 if kind == 'keypoints' else 100:3} ] = {scores['AP90']:.3f}"
    )


@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_the_truth_fed_back_is_perfect_and_stays_as_it_is(kind):
    content = truth()
    coco = index_coco(content)
    before = json.dumps(content)
    given = [one for one in content["annotations"] if not one["iscrowd"]]
    results = [
        {**one, "score": 1.0, "segmentation": as_rle(one["segmentation"], *SIZE)}
        for one in json.loads(json.dumps(given))
    ]
    assert evaluate(coco, results, iou_type=kind)[0]["AP"] == pytest.approx(1.0)
    assert json.dumps(content) == before  # pycocotools turns polygons into RLE, in place


def test_real_polygons_and_crowds_fed_back(coco_cc):
    data = CocoDetection(
        coco_cc / "val2017", coco_cc / "annotations" / "instances_val2017.json", annotation_types=("masks",)
    )
    results = []
    coco = coco_of(data.annotations)
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        rle = as_rle(annotation["segmentation"], image["height"], image["width"])
        if not annotation["iscrowd"]:
            ids = {name: annotation[name] for name in ("image_id", "category_id", "bbox")}
            results.append({**ids, "segmentation": rle, "score": 1.0})
    assert any(annotation["iscrowd"] for annotation in coco.anns.values())
    scores = evaluate_types(coco, results, data.image_ids, annotation_types=("masks",))
    assert scores["AP"] == scores["segm/AP"] == 1.0


def test_an_object_without_a_mask_is_missed_and_one_without_key_points_is_not():
    content = truth()
    results = [
        {**one, "score": 1.0, "segmentation": as_rle(one["segmentation"], *SIZE)}
        for one in json.loads(json.dumps(content["annotations"]))
        if not one["iscrowd"]
    ]
    lacking = next(one for one in content["annotations"] if not one["iscrowd"])
    del lacking["segmentation"], lacking["keypoints"], lacking["num_keypoints"]
    coco = index_coco(content)
    assert evaluate(coco, results, iou_type="segm")[0]["AR100"] < 1
    assert evaluate(coco, results, iou_type="keypoints")[0]["AR"] == 1


def test_key_points_are_scored_of_the_classes_that_have_them():
    named = {"keypoints": list(PERSON.names), "skeleton": []}
    content = truth(categories=[{"id": 3, "name": "person", **named}, {"id": 8, "name": "dog"}])
    results = detections(content)
    persons = {**content, "annotations": [one for one in content["annotations"] if one["category_id"] == 3]}
    persons["categories"] = persons["categories"][:1]
    expected = by_pycocotools(persons, [one for one in results if one["category_id"] == 3], "keypoints")
    for annotation in content["annotations"]:
        if annotation["category_id"] == 8:
            del annotation["keypoints"], annotation["num_keypoints"]
    scorer = match(index_coco(content), results, iou_type="keypoints")
    assert scorer.params.catIds == [3]
    scores = scores_of([scorer])
    assert [scores[f"keypoints/{name}"] for name in SUMMARIES["keypoints"]] == pytest.approx(expected)
    assert 0.1 < scores["keypoints/AP"] < 0.95


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_detections_as_rle_are_torchvisions_masks(kind):
    model = tiny_rcnn(kind).eval()
    images, _ = batch()
    images = [torch.nn.functional.interpolate(image[None], scale_factor=1.5)[0] for image in images]
    with torch.no_grad():
        expected, found = model(images), detect(model, images)
    for theirs, ours in zip(expected, found):
        assert torch.equal(theirs["boxes"], ours["boxes"])
        assert len(ours["boxes"])
        if kind == "keypoint":
            assert torch.equal(theirs["keypoints"], ours["keypoints"])
            continue
        masks = (theirs["masks"][:, 0] > 0.5).to(torch.uint8)
        assert torch.equal(decode_masks(ours["segmentations"], *masks.shape[1:]), masks)
        assert 0 < masks.sum() < masks.numel()
    ids = [1, 2, 3]
    assert to_results(found, [5, 6], ids) == to_results(expected, [5, 6], ids)  # masks in full do as well
    one = to_results(found, [5, 6], ids)[0]
    if kind == "keypoint":
        assert one["keypoints"] == found[0]["keypoints"][0].flatten().tolist()
    else:
        assert coco_mask.area(one["segmentation"]) == (expected[0]["masks"][0] > 0.5).sum()
    json.dumps(one)


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def test_results_of_each_kind_are_read(tmp_path):
    content = truth(5)
    known = annotations_of(content)
    results = detections(content)
    for fields, around in (
        (("segmentation",), "masks"),
        (("keypoints",), "keypoints"),
        (("bbox", "segmentation"), None),
    ):
        kept = ("image_id", "category_id", "score", *fields)
        path = write(tmp_path / "r.json", [{n: r[n] for n in kept} for r in results])
        found, notes = read(path, known), notes_on(path, known)
        assert [set(one) for one in found] == [{*kept, "bbox"}] * len(results)
        assert (around is None) == (notes == [])
        if around is not None:
            assert around in notes[0]
        if "segmentation" in fields:
            assert found[0]["segmentation"] == results[0]["segmentation"]
        if fields == ("segmentation",):
            assert found[0]["bbox"] == coco_mask.toBbox(results[0]["segmentation"]).tolist()
        if fields == ("keypoints",):
            x = results[0]["keypoints"][::3]
            assert found[0]["bbox"][0] == min(x)
            assert found[0]["bbox"][2] == max(x) - min(x)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r[1].pop("segmentation"), r"results\[1\] has no segmentation, which others have"),
        (
            lambda r: r[2]["segmentation"].update(size=[4, 4]),
            r"results\[2\] has segmentation .* an RLE of size \[4, 4\]",
        ),
        (lambda r: r[0]["segmentation"].update(counts="zz"), r"results\[0\] has segmentation .* counts"),
        (lambda r: r[3]["keypoints"].pop(), r"results\[3\] has keypoints .* 14 numbers: 5 keypoints are 15"),
        (
            lambda r: r[0]["keypoints"].extend([1, 1, 1]),
            r"results\[0\] has keypoints .* 18 numbers: 5 keypoints are 15",
        ),
        (lambda r: [one.update(keypoints=[]) for one in r[1:]], r"results\[1\] has keypoints \[\]"),
        (lambda r: r[4].pop("bbox"), r"results\[4\] has no bbox, which others have"),
        (lambda r: r[0].update(keypoints=[]), r"results\[0\] has keypoints \[\]"),
        (
            lambda r: r[3]["keypoints"].__setitem__(0, float("nan")),
            r"results\[3\] has keypoints .* not a list of finite numbers",
        ),
    ],
)
def test_broken_results_are_refused(tmp_path, change, said):
    content = truth(5)
    results = json.loads(json.dumps(detections(content)))
    change(results)
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "r.json", results), annotations_of(content))


def test_a_file_of_masks_is_told_from_one_of_boxes(tmp_path, capsys):
    content = truth(5)
    results = detections(content)
    annotations = write(tmp_path / "a.json", content)
    masks = write(
        tmp_path / "r.json", [{n: v for n, v in r.items() if n not in ("bbox", "keypoints")} for r in results]
    )
    evaluate_results(str(masks), annotations, EvaluationOptions()).write(tmp_path / "masks", pictures=0)
    assert "Masks (segm)" in capsys.readouterr().out
    report = json.loads((tmp_path / "masks" / "report.json").read_text())
    scores = json.loads((tmp_path / "masks" / "scores.json").read_text())
    assert report["keypoints"] is None
    assert (
        report["segm"]["scores"]["AP"]
        == scores["segm/AP"]
        == pytest.approx(by_pycocotools(content, results, "segm")[0])
    )
    assert [row["name"] for row in report["segm"]["by_class"]] == ["a", "b"]
    for row in report["segm"]["by_class"]:
        assert row["AP"] == pytest.approx(alone(content, results, "segm", category=row["id"]))
    for row in report["segm"]["by_iou"]:
        assert row["AP"] == pytest.approx(alone(content, results, "segm", iou=row["iou"]))
    page = (tmp_path / "masks" / "report.html").read_text()
    assert '<h2 id="segm">' in page
    assert '<h2 id="keypoints">' not in page
    boxes = write(
        tmp_path / "r.json", [{n: r[n] for n in ("image_id", "category_id", "bbox", "score")} for r in results]
    )
    evaluate_results(str(boxes), annotations, EvaluationOptions()).write(tmp_path / "boxes", pictures=0)
    assert json.loads((tmp_path / "boxes" / "report.json").read_text())["segm"] is None
    assert 'id="segm"' not in (tmp_path / "boxes" / "report.html").read_text()  # the word may be in the command


def test_truth_without_masks_leaves_them_unscored_and_says_so(tmp_path):
    content = truth(5)
    results = detections(content)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    annotations = write(tmp_path / "a.json", content)
    evaluate_results(str(write(tmp_path / "r.json", results)), annotations, EvaluationOptions()).write(
        tmp_path / "e", pictures=0
    )
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert report["segm"] is None
    assert report["keypoints"] is not None
    assert "No segm scores: the annotations have no masks." in report["notes"]


def test_another_number_of_key_points_is_not_scored_and_that_is_said(tmp_path):
    results = write(tmp_path / "r.json", detections(truth(5)))
    annotations = write(tmp_path / "a.json", truth(17))
    evaluate_results(str(results), annotations, EvaluationOptions()).write(tmp_path / "e", pictures=0)
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert report["keypoints"] is None
    assert report["segm"] is not None
    said = "No keypoints scores: detections have 5 keypoints, the annotations 17."
    assert report["notes"] == [said]


def test_objects_that_lack_something_are_counted_in_the_notes(tmp_path):
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
    annotations = write(tmp_path / "a.json", content)
    file = write(tmp_path / "r.json", results)
    evaluate_results(str(file), annotations, EvaluationOptions()).write(tmp_path / "e", pictures=0)
    notes = json.loads((tmp_path / "e" / "report.json").read_text())["notes"]
    counts = [note.partition(".")[0] for note in notes]
    assert counts == [
        "Objects without a segmentation: 2",
        "Masks without an area: 2",
        "Objects without keypoints: 1",
        "Objects whose keypoints are all unlabelled: 3",
        "Keypoints without an area: 3",
    ]
    split = CocoDetection.__new__(CocoDetection)
    split.annotation_types, split.keypoints = ("masks",), None
    split.annotations = read_annotations(annotations, annotation_types=("masks",))
    assert scored_types(split, ["masks"]) == (["masks"], notes[:2])


def test_what_is_counted_wrong_is_said_in_the_notes(tmp_path):
    content = truth(5)
    given = [one for one in content["annotations"] if not one["iscrowd"]]
    results = detections(content)
    for annotation in given:
        annotation["area"] = 1
    given[0]["ignore"] = 1
    given[1]["segmentation"] = [[given[1]["bbox"][0], given[1]["bbox"][1]] * 3]
    file, annotations = write(tmp_path / "r.json", results), write(tmp_path / "a.json", content)
    evaluate_results(str(file), annotations, EvaluationOptions()).write(tmp_path / "e", pictures=0)
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert [note.partition(".")[0] for note in report["notes"]] == [
        f"Areas that are far from their boxes': {len(given)}",
        "Annotations with ignore 1: 1",
        "Masks without a pixel: 1",
    ]
    # Of boxes alone, too.
    boxes = [{n: r[n] for n in ("image_id", "category_id", "bbox", "score")} for r in results]
    evaluate_results(str(write(tmp_path / "r.json", boxes)), annotations, EvaluationOptions()).write(
        tmp_path / "b", pictures=0
    )
    notes = json.loads((tmp_path / "b" / "report.json").read_text())["notes"]
    assert notes == report["notes"][:2]


def test_results_of_another_convention_are_scored_and_remarked(tmp_path):
    content = truth(5)
    results = [{n: r[n] for n in ("image_id", "category_id", "bbox", "score")} for r in detections(content)]
    right = write(tmp_path / "right.json", results)
    for result in results:
        x, y, w, h = result["bbox"]
        result["bbox"] = [x, y, x + w, y + h]
    corners = write(tmp_path / "corners.json", results)
    annotations, options = write(tmp_path / "a.json", content), EvaluationOptions()
    for file in (right, corners):
        evaluate_results(str(file), annotations, options).write(tmp_path / file.stem, pictures=0)
    noted = [json.loads((tmp_path / name / "report.json").read_text())["notes"] for name in ("right", "corners")]
    assert noted[0] == []
    (note,) = noted[1]
    assert "corners (x1, y1, x2, y2)" in note
    assert note in html.unescape((tmp_path / "corners" / "report.html").read_text())


def test_notes_made_while_the_page_is_drawn_are_in_the_report_as_well(tmp_path):
    content = truth(5)
    annotations, file = write(tmp_path / "a.json", content), write(tmp_path / "r.json", detections(content))
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        (tmp_path / "images" / image["file_name"]).write_bytes(b"broken")
    evaluate_results(str(file), annotations, EvaluationOptions(), images=tmp_path / "images").write(tmp_path / "e")
    notes = json.loads((tmp_path / "e" / "report.json").read_text())["notes"]
    assert any("No picture of image" in note for note in notes)
    page = (tmp_path / "e" / "report.html").read_text()
    assert page.count("No picture of image") == len(notes)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "b", "c")])
def test_key_points_of_other_names_are_not_scored_and_that_is_said(names):
    annotations = SimpleNamespace(warnings={})
    data = SimpleNamespace(
        annotation_types=("keypoints",), keypoints=KeypointLayout(("a", "b")), annotations=annotations
    )
    assert scored_types(data, ["keypoints"], KeypointLayout(("a", "b"))) == (["keypoints"], [])
    parts, (note,) = scored_types(data, ["keypoints"], KeypointLayout(names))
    assert parts == []
    assert "No keypoints scores" in note


@pytest.mark.parametrize(("names", "own"), [(PERSON.names, True), (None, True), ([f"p{i}" for i in range(17)], False)])
def test_seventeen_points_of_other_names_are_no_persons(names, own):
    named = {} if names is None else {"keypoints": list(names), "skeleton": []}
    content = truth(categories=[{"id": 3, "name": "a", **named}, {"id": 8, "name": "b", **named}])
    scorer = match(index_coco(content), detections(content), iou_type="keypoints")
    sigmas = scorer.params.kpt_oks_sigmas
    assert sigmas == pytest.approx(Params("keypoints").kpt_oks_sigmas if own else np.full(17, SIGMA))


def test_the_tolerance_of_other_points_is_the_mean_of_cocos():
    # sigmas of COCO's evaluation page, times 1000
    coco = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
    assert pytest.approx(sum(coco) / 17 / 1000) == SIGMA


def test_images_without_key_points_are_scored_as_part_of_a_set_that_has_them(tmp_path):
    """As with --limit, or after Ctrl-C, where no category names the points."""
    content = truth(5)
    first = content["images"][0]["id"]
    for category in content["categories"]:
        category.pop("keypoints", None)
    for annotation in content["annotations"]:
        if annotation["image_id"] == first:
            annotation.pop("keypoints", None)
    annotations, results = write(tmp_path / "a.json", content), write(tmp_path / "r.json", detections(truth(5)))
    evaluate_results(str(results), annotations, EvaluationOptions(limit=1)).write(tmp_path / "e", pictures=0)
    scores = json.loads((tmp_path / "e" / "scores.json").read_text())
    assert scores["keypoints/AP"] == -1
    assert scores["AP"] > 0
