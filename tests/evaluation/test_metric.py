"""Scores against pycocotools' own way in, loadRes, and against cases whose answer is known."""

import contextlib
import io
import json

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support.scored import result, truth
from support.tiny_models import batch, copies, tiny_rcnn

from detector.data.annotations import read_annotations
from detector.data.masks import MaskLayers, encode_masks
from detector.errors import DataError
from detector.evaluation import SUMMARY, detect_with_losses, evaluate, predict, to_results
from detector.evaluation.truth import coco_of
from detector.rcnn.sampling import seed_sampling
from detector.rcnn.swap import swap_crop_head


def test_perfect_and_nothing_and_no_truth():
    coco = truth([(1, 5, [10, 10, 40, 40]), (2, 5, [0, 0, 50, 50])])
    scores, table = evaluate(coco, [result(1, [10, 10, 40, 40]), result(2, [0, 0, 50, 50])])
    assert scores["AP"] == scores["AP90"] == scores["AR100"] == pytest.approx(1)
    assert scores["APs"] == -1
    assert "Average Precision" in table
    assert set(scores) == {*SUMMARY, "AP90"}
    scores, _ = evaluate(coco, [])
    assert scores["AP"] == scores["AP90"] == scores["AR100"] == 0
    assert evaluate(truth([]), [])[0]["AP"] == -1


def test_iou_decides_at_each_threshold():
    coco = truth([(1, 5, [0, 0, 100, 50])])
    scores, _ = evaluate(coco, [result(1, [0, 0, 100, 40])])  # IoU 0.8
    assert scores["AP50"] == scores["AP75"] == pytest.approx(1)
    assert scores["AP90"] == 0
    assert scores["AP"] == pytest.approx(0.6 + 0.1)  # .50 to .80


def test_detection_on_a_crowd_is_neither_right_nor_wrong():
    boxes = [(1, 5, [10, 10, 40, 40]), (1, 5, [60, 60, 30, 30])]
    found = [result(1, [60, 60, 30, 30], 0.99), result(1, [10, 10, 40, 40], 0.5)]
    assert evaluate(truth(boxes, crowd=(2,)), found)[0]["AP"] == pytest.approx(1)
    assert evaluate(truth(boxes[:1]), found)[0]["AP"] < 0.6


def test_unknown_images_and_categories_are_errors():
    coco = truth([(1, 5, [10, 10, 40, 40])])
    with pytest.raises(DataError, match="image_id 7"):
        evaluate(coco, [result(7, [0, 0, 1, 1])])
    with pytest.raises(DataError, match="category_id 6"):
        evaluate(coco, [{**result(1, [0, 0, 1, 1]), "category_id": 6}])


def test_only_the_named_images_count():
    coco = truth([(1, 5, [10, 10, 40, 40]), (2, 5, [0, 0, 50, 50])])
    found = [result(1, [10, 10, 40, 40])]
    assert evaluate(coco, found)[0]["AR100"] == pytest.approx(0.5)
    assert evaluate(coco, found, [1])[0]["AR100"] == pytest.approx(1)


def test_results_are_xywh_with_the_data_sets_ids():
    detections = [
        {
            "boxes": torch.tensor([[1.0, 2.0, 11.0, 5.0], [0.0, 0.0, 1.0, 1.0]]),
            "labels": torch.tensor([2, 1]),
            "scores": torch.tensor([0.5, 0.25]),
        }
    ]
    assert to_results(detections, [42], [3, 7]) == [
        {"image_id": 42, "category_id": 7, "bbox": [1, 2, 10, 3], "score": 0.5},
        {"image_id": 42, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.25},
    ]
    assert [r["category_id"] for r in to_results(detections, [42], [None, 7])] == [7]


def test_predict_restores_the_mode_and_reports_progress():
    class Fake(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            assert not torch.is_grad_enabled()
            return [
                {"boxes": torch.ones(1, 4), "labels": torch.ones(1).long(), "scores": torch.ones(1)} for _ in images
            ]

    batches = [([torch.zeros(3, 4, 4)] * 2, [{"image_id": torch.tensor(i)} for i in (1, 2)])]
    model = Fake().train()
    (found,) = predict(model, batches, [5])
    assert [r["image_id"] for r in found.results] == [1, 2]
    assert found.image_ids == [1, 2]
    assert model.training


def test_real_coco_against_load_res(coco_cc, tmp_path):
    """The truth, jittered, as detections: all 12 numbers as pycocotools' documented way in gives them."""
    path = coco_cc / "annotations" / "instances_val2017.json"
    coco = coco_of(read_annotations(path))
    found = []
    for annotation in coco.anns.values():
        x, y, w, h = annotation["bbox"]
        shift = torch.randn(4).tolist()
        box = [x + shift[0] * w / 20, y + shift[1] * h / 20, w * (1 + shift[2] / 20), h * (1 + shift[3] / 20)]
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": box,
                "score": float(torch.rand(())),
            }
        )
    scores, _ = evaluate(coco, found)
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(path))
        scorer = COCOeval(reference, reference.loadRes(str(tmp_path / "found.json")), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    assert [scores[name] for name in SUMMARY] == pytest.approx(scorer.stats.tolist(), abs=1e-12)
    assert 0.2 < scores["AP"] < 0.95


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
        given = [t | {"masks": MaskLayers.of(encode_masks(t["masks"]), *t["masks"].shape[1:])} for t in given]
    detections, losses = detect_with_losses(model.train(), images, given)
    assert model.training
    assert model.rpn.training
    assert model.roi_heads.training
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


def test_losses_of_a_split_change_no_statistic():
    model = tiny_rcnn()
    model.backbone.body["a"].append(torch.nn.BatchNorm2d(8))
    model.roi_heads.box_head.append(torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5)))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = batch()
    seed_sampling(model, [3, 4])
    _, first = detect_with_losses(model, images, copies(targets))
    _, second = detect_with_losses(model, images, copies(targets))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, loss in first.items():
        assert torch.equal(loss, second[name])  # no dropout
    assert all(module.training for module in model.modules())
