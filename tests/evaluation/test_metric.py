"""Scores against pycocotools' documented way in, loadRes, and against cases whose answer is known."""

import contextlib
import io
import json
from importlib import metadata

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support.scored import jittered, result, truth
from support.tiny_models import batch, copies, tiny_rcnn

from detector.data.annotations import read_annotations
from detector.data.masks import MaskLayers, encode_masks
from detector.errors import DataError, ModelError
from detector.evaluation import SUMMARY, detect_with_losses, evaluate, to_results
from detector.evaluation.running import predict
from detector.evaluation.truth import coco_of, index_coco
from detector.rcnn.sampling import seed_sampling
from detector.rcnn.swap import swap_crop_head


def test_perfect_half_nothing_and_no_truth():
    coco = truth([(1, 5, [10, 10, 40, 40]), (2, 5, [0, 0, 50, 50])])
    scores, table = evaluate(coco, [result(1, [10, 10, 40, 40]), result(2, [0, 0, 50, 50])])
    assert scores["AP"] == scores["AP90"] == scores["AR100"] == pytest.approx(1)
    assert scores["APs"] == -1
    assert "Average Precision" in table
    assert set(scores) == {*SUMMARY, "AP90"}
    assert evaluate(coco, [result(1, [10, 10, 40, 40])])[0]["AR100"] == pytest.approx(0.5)
    assert evaluate(coco, [result(1, [10, 10, 40, 40])], [1])[0]["AR100"] == pytest.approx(1)
    scores, _ = evaluate(coco, [])
    assert scores["AP"] == scores["AP90"] == scores["AR100"] == 0
    assert evaluate(truth([]), [])[0]["AP"] == -1


def test_an_annotation_with_id_0():
    coco = truth([(1, 5, [10, 10, 40, 40]), (2, 5, [0, 0, 50, 50])])
    for annotation in coco.dataset["annotations"]:
        annotation["id"] -= 1
    coco = index_coco(coco.dataset)
    assert evaluate(coco, [result(1, [10, 10, 40, 40]), result(2, [0, 0, 50, 50])])[0]["AP"] == pytest.approx(1)


def test_iou_thresholds():
    scores, _ = evaluate(truth([(1, 5, [0, 0, 100, 50])]), [result(1, [0, 0, 100, 40])])  # IoU 0.8
    assert scores["AP50"] == scores["AP75"] == pytest.approx(1)
    assert scores["AP90"] == 0
    assert scores["AP"] == pytest.approx(0.6 + 0.1)  # .50 to .80


def test_detection_on_a_crowd_is_neither_right_nor_wrong():
    boxes = [(1, 5, [10, 10, 40, 40]), (1, 5, [60, 60, 30, 30])]
    found = [result(1, [60, 60, 30, 30], 0.99), result(1, [10, 10, 40, 40], 0.5)]
    assert evaluate(truth(boxes, crowd=(2,)), found)[0]["AP"] == pytest.approx(1)
    assert evaluate(truth(boxes[:1]), found)[0]["AP"] < 0.6


@pytest.mark.parametrize(("field", "value"), [("image_id", 7), ("category_id", 6)])
def test_unknown_images_and_categories_are_errors(field, value):
    with pytest.raises(DataError, match=f"{field} {value}"):
        evaluate(truth([(1, 5, [10, 10, 40, 40])]), [result(1, [0, 0, 1, 1]) | {field: value}])


@pytest.mark.parametrize("ids", [(0, 1), (2**60, 2**60 + 1)])
def test_annotation_ids_that_pycocotools_mistakes(tmp_path, ids):
    """0 stands for no match, and large ids do not survive as floats."""
    data = truth([(1, 5, [0, 0, 20, 20]), (2, 5, [0, 0, 20, 20])]).dataset
    for number, annotation in zip(ids, data["annotations"]):
        annotation["id"] = number
    (tmp_path / "truth.json").write_text(json.dumps(data))
    found = [result(1, [0, 0, 20, 20]), result(2, [0, 0, 20, 20])]
    assert evaluate(coco_of(read_annotations(tmp_path / "truth.json")), found)[0]["AP"] == pytest.approx(1)


def test_a_box_of_negative_size_is_an_object_that_nobody_finds(tmp_path):
    data = truth([(1, 5, [0, 0, 20, 20]), (1, 5, [60, 60, 10, -5]), (1, 5, [60, 60, -10, -5])]).dataset
    for annotation in data["annotations"]:
        del annotation["area"]
    (tmp_path / "truth.json").write_text(json.dumps(data))
    scores, _ = evaluate(coco_of(read_annotations(tmp_path / "truth.json")), [result(1, [0, 0, 20, 20])])
    assert scores["AR100"] == pytest.approx(1 / 3)


def test_results_of_detections():
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 5.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]),
        "labels": torch.tensor([2, 1, 0]),  # 0 is the background
        "scores": torch.tensor([0.5, 0.25, 0.1]),
    }
    assert to_results([found], [42], [3, 7]) == [
        {"image_id": 42, "category_id": 7, "bbox": [1, 2, 10, 3], "score": 0.5},
        {"image_id": 42, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.25},
    ]
    assert [one["category_id"] for one in to_results([found], [42], [None, 7])] == [7]


def test_batches_with_images_that_cannot_be_read():
    def fake(images):
        return [{"boxes": torch.ones(1, 4), "labels": torch.ones(1).long(), "scores": torch.ones(1)} for _ in images]

    image, broken = torch.zeros(3, 4, 4), {"image_id": 3, "broken": "why"}
    one = predict(fake, [image, None, image], [{"image_id": torch.tensor(1)}, broken, {"image_id": 2}], [5])
    assert [found["image_id"] for found in one.results] == one.image_ids == [1, 2]
    assert one.broken == predict(fake, [None], [broken], [5]).broken == {3: "why"}


def test_real_coco_against_load_res(coco_cc, tmp_path):
    path = coco_cc / "annotations" / "instances_val2017.json"
    found = jittered(coco_of(read_annotations(path)))
    scores, _ = evaluate(coco_of(read_annotations(path)), found)
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(path))
        scorer = COCOeval(reference, reference.loadRes(str(tmp_path / "found.json")), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    assert [scores[name] for name in SUMMARY] == pytest.approx(scorer.stats.tolist(), abs=1e-12)
    assert 0.2 < scores["AP"] < 0.95


def test_the_faster_evaluator_agrees(coco_cc):
    pytest.importorskip("faster_coco_eval")
    coco = coco_of(read_annotations(coco_cc / "annotations" / "instances_val2017.json"))
    found = jittered(coco, spread=0.12)
    for results, image_ids in ((found, None), (found, sorted(coco.imgs)[:10]), ([], None)):
        slow, table = evaluate(coco, results, image_ids)
        fast, fast_table = evaluate(coco, results, image_ids, evaluator="faster-coco-eval")
        assert fast == pytest.approx(slow, abs=1e-6)
        assert fast_table == table


def test_a_missing_evaluator_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ModelError, match="faster-coco-eval"):
        evaluate(truth([]), [], evaluator="faster-coco-eval")


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_losses_and_detections_of_one_pass_are_those_of_two(kind, swapped):
    model = tiny_rcnn(kind)
    if swapped:
        swap_crop_head(model)
    images, targets = batch()
    seed_sampling(model, [3, 4])
    numbers = {"rpn_pre_nms_top_n_train": 1000, "rpn_post_nms_top_n_train": 50}  # as in testing
    as_in_testing = tiny_rcnn(kind, **numbers)
    as_in_testing.load_state_dict(model.state_dict())
    seed_sampling(as_in_testing, [3, 4])
    with torch.no_grad():
        expected = as_in_testing.train()(images, copies(targets))
        wanted = model.eval()(images)
    given = copies(targets)
    if kind == "mask":  # in layers, which are resized before they are masks
        given = [one | {"masks": MaskLayers.of(encode_masks(one["masks"]), *one["masks"].shape[1:])} for one in given]
    detections, losses = detect_with_losses(model.train(), images, given)
    assert all(module.training for module in model.modules())
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
        assert not loss.requires_grad
    for found, want in zip(detections, wanted, strict=True):
        assert len(found["boxes"])
        if "masks" in want:
            assert found["segmentations"] == encode_masks(want.pop("masks").flatten(0, 1))
        for name in want:
            torch.testing.assert_close(found[name], want[name])


def test_losses_change_no_statistic_and_drop_nothing():
    model = tiny_rcnn()
    model.backbone.body["a"].append(torch.nn.BatchNorm2d(8))
    model.roi_heads.box_head.append(torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5)))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = batch()
    seed_sampling(model, [3, 4])
    first, second = (detect_with_losses(model, images, copies(targets))[1] for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(loss, second[name]) for name, loss in first.items())
