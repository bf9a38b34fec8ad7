"""Detectors of masks and keypoints by their settings, and out of published weights."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.models.detection import KeypointRCNN, KeypointRCNN_ResNet50_FPN_Weights, MaskRCNN
from torchvision.ops import FrozenBatchNorm2d

from detector.data.keypoints import PERSON
from detector.errors import ModelError
from detector.models.build import KeypointPredictor, _fit_predictors, build_detector
from detector.models.config import DetectorConfig
from detector.models.rle_detections import annotation_types_of, select
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector
from detector.pretrained.initial_weights import load_initial_weights
from detector.pretrained.loading import load_published

TINY = {"name": "timm/test_efficientnet", "fpn_channels": 8, "box_head_size": 16}


def tiny(part, classes=3, **options):
    pytest.importorskip("timm")
    return build_detector(DetectorConfig(**TINY, finds=part), classes, **options)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", ()),
        ("maskrcnn_resnet50_fpn", ("masks",)),
        ("maskrcnn_resnet50_fpn_v2", ("masks",)),
        ("keypointrcnn_resnet50_fpn", ("keypoints",)),
    ],
)
def test_a_torchvision_name_says_what_is_found(name, parts):
    config = DetectorConfig(name=name)
    assert config.annotation_types == parts
    with torch.device("meta"):
        model = build_detector(config, 4, num_keypoints=6)
    assert annotation_types_of(model) == parts
    heads = model.roi_heads
    assert heads.box_predictor.cls_score.out_features == 5
    if "masks" in parts:
        assert heads.mask_predictor.mask_fcn_logits.out_channels == 5
    if "keypoints" in parts:
        assert heads.keypoint_predictor.out_channels == 6


@pytest.mark.parametrize(("part", "kind"), [("masks", MaskRCNN), ("keypoints", KeypointRCNN)])
def test_a_timm_backbone_gets_the_heads(part, kind):
    model = tiny(part, num_keypoints=4)
    assert type(model) is kind
    assert annotation_types_of(model) == (part,)
    found = model.eval()([torch.rand(3, 64, 64)])[0]
    assert part in found


@pytest.mark.parametrize("part", ["masks", "keypoints"])
def test_with_256_channels_they_are_torchvisions_own(part):
    pytest.importorskip("timm")
    config = DetectorConfig(name="timm/test_efficientnet", fpn_channels=256, finds=part)
    stock = {"masks": "maskrcnn_resnet50_fpn", "keypoints": "keypointrcnn_resnet50_fpn"}[part]
    with torch.device("meta"):
        ours = build_detector(config, 90).roi_heads.state_dict()
        theirs = torchvision.models.get_model(stock, weights=None, weights_backbone=None, num_classes=91).roi_heads
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.state_dict().items()}


def test_finds_is_of_timm_alone():
    with pytest.raises(ModelError, match="maskrcnn_resnet50_fpn finds masks"):
        DetectorConfig(name="fasterrcnn_resnet50_fpn", finds="masks")
    with pytest.raises(ModelError, match="finds must be one of masks, keypoints, or nothing, got 'mask'"):
        DetectorConfig(**TINY, finds="mask")


def test_settings_of_before_find_boxes():
    assert DetectorConfig.from_dict({"name": "timm/test_efficientnet"}).annotation_types == ()


def test_a_backbone_of_published_weights_is_held_as_torchvision_holds_it():
    for name in ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"):
        with torch.device("meta"):
            model = build_detector(DetectorConfig(name=name, weights="runs/x"), 2, pretrained=True)
        assert any(isinstance(module, FrozenBatchNorm2d) for module in model.backbone.modules())
        trained = {n.split(".")[1] for n, p in model.backbone.named_parameters() if p.requires_grad}
        assert "conv1" not in trained
        assert annotation_types_of(model) == DetectorConfig(name=name).annotation_types


def test_predictors_of_published_weights_are_fitted_to_the_data():
    with torch.device("meta"):
        mask, points = (
            torchvision.models.get_model(name, weights=None, weights_backbone=None)
            for name in ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn")
        )
        _fit_predictors(mask.roi_heads, 4, 17)
        _fit_predictors(points.roi_heads, 2, 5)
    assert mask.roi_heads.box_predictor.cls_score.out_features == 4
    assert mask.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 4
    assert mask.roi_heads.mask_predictor.conv5_mask.in_channels == 256
    assert points.roi_heads.keypoint_predictor.kps_score_lowres.weight.shape[:2] == (512, 5)
    assert points.roi_heads.keypoint_predictor.out_channels == 5


def test_a_persons_points_are_torchvisions():
    meta = KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta
    assert list(PERSON.names) == meta["keypoint_names"]


@pytest.mark.parametrize(("points", "names"), [(17, PERSON.names), (3, ("1", "2", "3"))])
def test_weights_of_a_keypoint_rcnn(tmp_path, points, names):
    model = torchvision.models.get_model(
        "keypointrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_keypoints=points
    )
    torch.save(model.state_dict(), tmp_path / "w.pth")
    detector = load_published("keypointrcnn_resnet50_fpn", str(tmp_path / "w.pth"))
    assert detector.category_names == ["person"]
    assert detector.category_ids == [1]
    assert detector.keypoints.names == names
    assert detector.settings.annotation_types == ("keypoints",)
    assert torch.equal(
        detector.model.state_dict()["rpn.head.conv.0.0.weight"], model.state_dict()["rpn.head.conv.0.0.weight"]
    )


def test_rows_of_classes_are_kept_by_name_in_the_mask_predictor_too(tmp_path):
    torch.manual_seed(1)
    theirs = tiny("masks", 3)
    settings = DetectorConfig(**TINY, finds="masks")
    Detector(theirs, [1, 2, 3], ["a", "b", "c"], settings=settings).save_pretrained(tmp_path / "saved")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "w.pth")
    name = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    rows = theirs.state_dict()[name]
    torch.manual_seed(2)
    ours = tiny("masks", 3)
    anew = ours.state_dict()[name].clone()
    load_initial_weights(ours, replace(settings, weights=str(tmp_path / "saved")), ["c", "x", "a"])
    found = ours.state_dict()[name]
    assert torch.equal(found[[0, 1, 3]], rows[[0, 3, 1]])
    assert torch.equal(found[2], anew[2])
    said = load_initial_weights(ours, replace(settings, weights=str(tmp_path / "w.pth")), ["x", "y", "z"])
    assert "begin anew" not in said  # the file names none: taken in order
    assert torch.equal(ours.state_dict()[name], rows)


def test_heatmaps_are_of_32_bits_under_autocast():
    predictor = KeypointPredictor(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert predictor(torch.rand(2, 8, 7, 7)).dtype == torch.float32


def test_a_description_keeps_the_layout_and_refuses_damage():
    settings = DetectorConfig(**TINY, finds="keypoints")
    description = DetectorDescription(settings, "affine", [1], ["person"], {}, None, PERSON)
    content = description.to_dict()
    assert DetectorDescription.from_dict(content) == description
    for damage in (None, {"names": [], "skeleton": []}, {"names": ["a"], "skeleton": [[0, 5]]}, {"names": 3}):
        with pytest.raises((ModelError, LookupError, TypeError), match="keypoints"):
            DetectorDescription.from_dict(content | {"keypoints": damage})


def test_some_of_the_detections():
    found = {"scores": torch.tensor([0.9, 0.2, 0.5]), "segmentations": [{"a": 1}, {"b": 2}, {"c": 3}]}
    some = select(found, found["scores"] > 0.3)
    assert some["segmentations"] == [{"a": 1}, {"c": 3}]
    assert some["scores"].tolist() == pytest.approx([0.9, 0.5])
