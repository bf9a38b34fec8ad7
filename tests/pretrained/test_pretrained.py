"""Detectors that are saved and loaded from untrusted files."""

import json
import os
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors
import torch
import torchvision
from huggingface_hub import ModelCard
from torch import nn

pytest.importorskip("timm")

from support.disk import BREAK
from support.refined_models import refined
from support.tiny_detector import IDS, NAMES, SETTINGS, scene, tiny_checkpoint

from detector.errors import DataError, ModelError, UsageError
from detector.models.published import batch_norm_eps
from detector.pretrained import description, hub
from detector.pretrained.detector import Detector, digest_of
from detector.pretrained.loading import CHECKPOINT_KEY, load_checkpoint, load_detector, load_published
from detector.pretrained.model_card import model_card
from detector.tools.export import export, main

FILES = {"model.safetensors", "config.json", "README.md"}
REPORT = {
    "about": {
        "model": "last.ckpt",
        "data": "/home/somebody/secret/bccd",
        "split": "val",
        "evaluator": "pycocotools 2.0.10",
        "images": 73,
        "objects": 967,
        "time": "2030-01-02T03:04:05+00:00",
        "command": "python tools/eval.py --checkpoint last.ckpt --root='/home/my secret/bccd' --output ../secret/a/",
    },
    "scores": {"AP": 0.57712, "AP50": 0.9, "AP75": 0.6, "AP90": None},
    "notes": ["Limited: 73 images."],
}
PUBLIC_COMMAND = "python tools/eval.py --checkpoint last.ckpt --root=bccd --output a/"


def save_checkpoint(path, **changes):
    torch.save(tiny_checkpoint(**changes), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt")


@pytest.fixture(scope="module")
def detector(checkpoint):
    return load_checkpoint(checkpoint)


@pytest.fixture
def saved(detector, tmp_path):
    detector.save(tmp_path / "saved")
    return tmp_path / "saved"


def found_by(detector, pixels=None):
    (found,) = detector.detect_batch([scene() if pixels is None else pixels])
    return found


def assert_same(detector, other):
    ours, theirs = detector.model.state_dict(), other.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = found_by(detector), found_by(other)
    assert len(ours["boxes"])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def change(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


class Poison:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


# ---- saved and loaded


@pytest.mark.parametrize("crop", ["affine", "roi_align"])
def test_a_checkpoint_saved_and_loaded_is_the_same_detector(tmp_path, crop):
    settings = replace(SETTINGS, aspect_ratios=(0.3, 1.0, 3.0), box_nms_threshold=0.3)
    detector = load_checkpoint(save_checkpoint(tmp_path / "last.ckpt", crop=crop, settings=settings))
    detector.save(tmp_path / "saved")
    again = load_detector(tmp_path / "saved")
    assert_same(detector, again)
    assert again.crop == detector.crop == crop
    assert (again.category_ids, again.category_names, again.settings) == (IDS, NAMES, settings)
    assert again.model.roi_heads.nms_thresh == 0.3
    assert set(batch_norm_eps(again.model).values()) == {0.25}
    assert again.model.transform.image_mean == detector.model.transform.image_mean
    assert again.digest() == detector.digest()
    assert not any(part.training for part in again.modules())
    assert next(p for p in again.parameters() if p.dim() == 4 and min(p.shape) > 1).is_contiguous(
        memory_format=torch.channels_last
    )


def test_saving_replaces_what_was_saved_before(saved, tmp_path):
    assert {path.name for path in saved.iterdir()} == FILES
    with safetensors.safe_open(saved / "model.safetensors", "pt") as content:
        assert "roi_heads.box_predictor.cls_score.weight" in content.keys()  # noqa: SIM118 (it is no dict)
    other = load_checkpoint(save_checkpoint(tmp_path / "o.ckpt", crop="roi_align", names=["one"], ids=[1]))
    other.save(saved)
    assert {path.name for path in saved.iterdir()} == FILES
    again = load_detector(str(saved))
    assert_same(other, again)
    assert again.category_names == ["one"]
    assert "platelet" not in (saved / "README.md").read_text()


@pytest.mark.parametrize("call", BREAK)
def test_a_full_disk_leaves_the_saved_detector(saved, detector, tmp_path, monkeypatch, call):
    other = load_checkpoint(save_checkpoint(tmp_path / "other.ckpt", names=["one"], ids=[1]))
    with monkeypatch.context() as patch:
        BREAK[call](patch)
        with pytest.raises(OSError, match="No space left"):
            other.save(saved)
    assert {path.name for path in saved.iterdir()} == FILES
    assert_same(load_detector(saved), detector)


def test_a_detector_without_settings_is_not_saved(tmp_path):
    with pytest.raises(ModelError):
        Detector(nn.Linear(1, 1), [1], ["one"]).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_push_to_hub_sends_the_three_files(detector, monkeypatch, tmp_path):
    sent = {}

    class Hub:
        def __init__(self, token):
            assert token == "t"

        def create_repo(self, repository, **options):
            assert options == {"exist_ok": True, "private": True}
            return type("Repository", (), {"repo_id": repository})

        def upload_folder(self, *, repo_id, folder_path):
            sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return f"address of {repo_id}"

    monkeypatch.setattr(hub, "HfApi", Hub)
    assert detector.push_to_hub("me/cells", report=REPORT, token="t", private=True) == "address of me/cells"
    detector.save(tmp_path, report=REPORT)
    assert sent == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_digest_depends_on_names_types_shapes_and_values():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    assert digest_of(one) == digest_of(dict(reversed(one.items())))
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"].view(torch.int32), "b": one["b"]},
        {"a": one["a"][None], "b": one["b"]},
        {"a": one["a"] + 1e-6, "b": one["b"]},
        {"a": one["a"]},
    ]
    assert len({digest_of(one), *map(digest_of, others)}) == 6


# ---- the model card


def test_a_card_without_scores(saved):
    card = ModelCard.load(saved / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("affine-crop-rcnn", "object-detection")
    assert "faster-r-cnn" in card.data.tags
    assert card.data.eval_results is None
    for text in ("tools/eval.py", SETTINGS.name, ".[timm]", "`red cell`, `white cell`, `platelet`", "load_detector"):
        assert text in card.text


@pytest.mark.parametrize(
    ("section", "task", "row"),
    [
        (None, None, "| AP | 0.577 |"),
        ("segm", "image-segmentation", "| mask AP50 | 0.800 | at IoU 0.50 |"),
        ("keypoints", "keypoint-detection", "| keypoints AP50 | 0.800 | at OKS 0.50 |"),
    ],
)
def test_a_card_shows_the_scores_and_not_the_folder_of_the_data(detector, tmp_path, section, task, row):
    more = {} if section is None else {section: {"scores": {"AP": 0.5, "AP50": 0.8, "AP75": None}}}
    detector.save(tmp_path, report=REPORT | more)
    card = ModelCard.load(tmp_path / "README.md")
    expected = {
        ("object-detection", "AP"): 0.5771,
        ("object-detection", "AP50"): 0.9,
        ("object-detection", "AP75"): 0.6,
    }
    if section is not None:
        expected |= {(task, "AP"): 0.5, (task, "AP50"): 0.8}
    assert {(one.task_type, one.metric_type): one.metric_value for one in card.data.eval_results} == expected
    assert {result.dataset_name for result in card.data.eval_results} == {"bccd, val"}
    for text in (row, "| AP90 | - |", "73 images", "967 objects", "2030-01-02", "Limited", PUBLIC_COMMAND):
        assert text in card.text
    assert "secret" not in str(card)


def test_a_generated_card_is_replaced_and_a_users_own_stays(detector, saved):
    detector.save(saved, report=REPORT)
    assert "| AP | 0.577 |" in (saved / "README.md").read_text()
    detector.save(saved)
    assert "| AP | 0.577 |" not in (saved / "README.md").read_text()
    (saved / "README.md").write_bytes(b"My own \xff card.")
    detector.save(saved, report=REPORT)
    assert (saved / "README.md").read_bytes() == b"My own \xff card."


def test_names_are_shown_as_they_are_and_do_nothing(tmp_path):
    names = ["a|b", "`rm -rf`", "new\nline", "---\nlicense: evil\n---\n", "<script>alert(1)</script>", "", "# head"]
    names += ["\u2028x", "{{ jinja }}", "[x](http://evil)", "a\ud800"]  # JSON may hold half a surrogate pair
    about = {
        "data": "da`ta|<b>\n---",
        "split": "x\n---\n# y",
        "command": "python ```\n# z\n---",
        "time": "<script>\n---",
        "evaluator": "<script>\n---\n",
    }
    report = REPORT | {"about": REPORT["about"] | about, "notes": ["<script>\n---\n# note"]}
    detector = load_checkpoint(save_checkpoint(tmp_path / "last.ckpt", names=names, ids=range(1, len(names) + 1)))
    detector.save(tmp_path / "saved", report=report)
    assert load_detector(tmp_path / "saved").category_names == names
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert "license" not in card.data.to_dict()
    lines = card.text.splitlines()
    assert "---" not in lines
    assert [line for line in lines if line.startswith("#")] == [f"# Affine-crop R-CNN: {SETTINGS.name}", "## Scores"]
    for name in ("a/b", "'rm -rf'", "new line", "--- license: evil ---", "<script>alert(1)</script>", " ", "# head"):
        assert f"`{name}`" in card.text
    assert "`{{ jinja }}`, `[x](http://evil)`" in card.text
    outside = "".join("\n".join(line for line in lines if not line.startswith("```")).split("`")[::2])
    assert "<script>" not in outside
    assert "evil" not in outside
    assert card.text.count("```") == 4


@pytest.mark.parametrize(
    "changes",
    [{"about": []}, {"scores": {"AP": "high"}}, {"notes": None}],
)
def test_a_damaged_report_is_refused_before_anything_is_written(detector, tmp_path, changes):
    with pytest.raises(DataError, match="report"):
        detector.save(tmp_path / "saved", report=REPORT | changes)
    assert not (tmp_path / "saved").exists()


# ---- tools/export.py --format pretrained


def test_export_writes_the_scores_of_these_weights(detector, checkpoint, tmp_path, capsys):
    home = tmp_path / "run"
    (home / "checkpoints").mkdir(parents=True)
    last = home / "checkpoints" / "last.ckpt"
    last.write_bytes(checkpoint.read_bytes())
    digest = detector.digest()
    for number, (weights, ap) in enumerate([("sha256:other", 0.9), (digest, 0.4), (digest, None)]):
        (home / f"eval-{number}").mkdir()
        about = REPORT["about"] | {"weights": weights, "time": f"203{number}-01-02"}
        report = REPORT | {"about": about, "scores": {"AP": ap}}
        (home / f"eval-{number}" / "report.json").write_text(json.dumps(report))
        export(checkpoint=str(home), format="pretrained")
        assert ("without scores" in capsys.readouterr().out) == (number == 0)
        card = (home / "pretrained" / "README.md").read_text()
        assert ["## Scores", "| AP | 0.400 |", "| AP | - |"][number] in card
    assert export(checkpoint=str(home / "pretrained"), format="pretrained") == home / "pretrained"  # itself
    assert "2032-01-02" in capsys.readouterr().out
    (home / "pretrained" / "README.md").write_text("mine")
    export(checkpoint=str(last), format="pretrained")
    assert "was edited" in capsys.readouterr().out


def test_export_replaces_no_other_folder(checkpoint, tmp_path):
    other = tmp_path / "bert"
    other.mkdir()
    for content in ('{"model_type": "bert"}', "[]", "not JSON"):
        (other / "config.json").write_text(content)
        with pytest.raises(DataError) as caught:
            export(checkpoint=str(checkpoint), format="pretrained", output=str(other))
        assert (caught.value.setting, caught.value.value) == ("output", str(other))
        assert [path.name for path in other.iterdir()] == ["config.json"]
    with pytest.raises(DataError, match="output"):
        export(checkpoint=str(checkpoint), format="pretrained", output=str(other / "config.json"))
    (other / "config.json").unlink()
    for _ in range(2):
        export(checkpoint=str(checkpoint), format="pretrained", output=str(other))
    assert {path.name for path in other.iterdir()} == FILES
    with pytest.raises(DataError, match="output"):
        export(checkpoint=str(checkpoint), output=str(other))  # a file cannot be a folder


@pytest.mark.parametrize("name", ["x.torchscript", "x.pt", "x.v2", "x.ONNX.gz"])
def test_export_to_another_format_is_refused_at_once(tmp_path, name):
    with pytest.raises(UsageError, match="output"):
        export(checkpoint="nothing.ckpt", output=str(tmp_path / name))
    for options in ({"output": str(tmp_path / "x.v2/x")}, {"format": "pretrained", "output": str(tmp_path / name)}):
        with pytest.raises(ModelError, match=r"nothing\.ckpt"):
            export(checkpoint="nothing.ckpt", **options)
    for options in ({"output": str(tmp_path / "x.onnx")}, {"batch_size": 2}, {"speed": 1}):
        with pytest.raises(UsageError):
            export(checkpoint="nothing.ckpt", format="pretrained", **options)
    assert not list(tmp_path.iterdir())


def test_export_writes_an_onnx_file_with_the_categories(checkpoint, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "new" / "model.onnx"
    assert main([f"--checkpoint={checkpoint}", f"--output={path}", "--speed=1"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    (classes,) = (p.value for p in onnx.load(path).metadata_props if p.key == "classes")
    assert [(one["name"], one["category_id"]) for one in json.loads(classes)] == list(zip(NAMES, IDS))


# ---- the network


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No name is resolved. Returns the hosts that were asked for, and the waits before another try."""
    asked = []

    def refuse(host, *args, **options):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: asked.append("it tries again"))
    return asked


def test_without_a_network_a_name_is_given_up_at_once(offline, tmp_path):
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(ModelError, match=r"^nobody/nothing-there") as caught:
            load_detector("nobody/nothing-there", cache_dir=tmp_path, **options)
        assert "\n" not in str(caught.value)
    assert set(offline) == {"huggingface.co"}


def test_invalid_names_are_refused_unasked(offline, tmp_path):
    with pytest.raises(ModelError, match="bad name"):
        load_detector("bad name/!", cache_dir=tmp_path)
    assert offline == []


def test_a_fetched_repository_is_available_offline(saved, offline, tmp_path, detector):
    """In the layout of the hub's cache."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--me--cells" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    saved.rename(snapshot)
    assert_same(load_detector("me/cells", cache_dir=cache), detector)
    offline.clear()
    load_detector(snapshot)  # a folder needs no network
    assert offline == []


# ---- damaged and hostile files


def test_every_byte_of_the_weights_is_checked(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    damaged = [
        content[:p] + bytes([content[p] ^ 1]) + content[p + 1 :] for p in (len(content) - 1, len(content) // 2, 200)
    ]
    for one in (*damaged, *(content[:length] for length in (0, 7, 100, len(content) - 1))):
        path.write_bytes(one)
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            load_detector(saved)
    path.write_bytes(content)
    load_detector(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError, match=f"saved.* {name}"):
        load_detector(saved)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 5000, '{"detector": {}}'])
def test_a_damaged_config(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_detector(saved)


@pytest.mark.parametrize("field", ["detector", "crop", "categories", "batch_norm_eps", "weights_digest"])
def test_a_config_with_a_missing_field_or_a_wrong_type(saved, field):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({name: config[name] for name in config if name != field}))
    with pytest.raises(ModelError, match=rf"config\.json: .*{field}"):
        load_detector(saved)
    for value in (None, 7, [7], {"x": 7}, "x", [{}], [[]]):
        change(saved / "config.json", **{field: value})
        with pytest.raises(ModelError, match=r"config\.json"):
            load_detector(saved)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("name", "timm/../../x", "timm"),
        ("name", "maskrcnn_resnet50_fpn", "in the file"),
        ("fpn_channels", 10**6, "in the file"),
        ("box_head_size", -1, "box_head_size"),
        ("unheard_of", 1, "unheard_of"),
    ],
)
def test_settings_of_another_detector(saved, setting, value, reason):
    change(saved / "config.json", detector=asdict(SETTINGS) | {setting: value})
    with pytest.raises(ModelError, match=rf"config\.json: .*{reason}"):
        load_detector(saved)


@pytest.mark.parametrize("setting", ["fpn_channels", "box_head_size"])
def test_sizes_beyond_the_file_take_no_memory(saved, checkpoint, tmp_path, setting, monkeypatch):
    """The network is built on the meta device until it is known to fit the file."""
    built = []
    build = description.build_detector
    monkeypatch.setattr(
        description,
        "build_detector",
        lambda *args, **options: built.append(build(*args, **options)) or built[-1],
    )
    content = torch.load(checkpoint, weights_only=True)
    for size in (10**5, 2**31 - 1):
        content[CHECKPOINT_KEY]["detector"] = asdict(SETTINGS) | {setting: size}
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(ModelError, match=r"other\.ckpt"):
            load_checkpoint(tmp_path / "other.ckpt")
        change(saved / "config.json", detector=content[CHECKPOINT_KEY]["detector"])
        with pytest.raises(ModelError, match=r"config\.json"):
            load_detector(saved)
    assert all(parameter.is_meta for model in built for parameter in model.parameters())


def test_a_pickle_is_not_run(tmp_path, checkpoint):
    harm = tmp_path / "harm"
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"] = Poison(harm)
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(content, tmp_path / "poison.ckpt", **options)
        with pytest.raises(ModelError, match=r"poison\.ckpt"):
            load_checkpoint(tmp_path / "poison.ckpt")
        with pytest.raises(ModelError, match=r"poison\.ckpt"):
            load_published("fasterrcnn_mobilenet_v3_large_320_fpn", str(tmp_path / "poison.ckpt"))
    assert not harm.exists()
    torch.load(tmp_path / "poison.ckpt", weights_only=False)
    assert harm.exists()  # it does run where it may


def test_a_flipped_byte_in_a_checkpoint(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    value = torch.load(checkpoint, weights_only=True)["state_dict"]["model.roi_heads.box_head.fc6.weight"]
    place = content.index(value.numpy().tobytes()[:64]) + 5
    (tmp_path / "bad.ckpt").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ModelError, match=r"bad\.ckpt: .*checksum"):
        load_checkpoint(tmp_path / "bad.ckpt")


@pytest.mark.parametrize("content", [[], {}, {CHECKPOINT_KEY: None}, {CHECKPOINT_KEY: {}, "state_dict": {}}])
def test_a_checkpoint_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ModelError, match=r"other\.ckpt"):
        load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("value", [None, "x", torch.zeros(4).to_sparse(), torch.zeros(3)])
def test_a_checkpoint_with_invalid_weights(checkpoint, tmp_path, value):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.roi_heads.box_predictor.cls_score.bias"] = value
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ModelError, match=r"other\.ckpt"):
        load_checkpoint(tmp_path / "other.ckpt")


# ---- torchvision's detectors

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"


def published(path, name=SMALL, classes=3):
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    torch.save(model.state_dict(), path)
    return path


def test_a_published_detector_is_loaded_saved_and_loaded(tmp_path):
    detector = load_published(SMALL, str(published(tmp_path / "weights.pth")))
    assert detector.category_names == ["class 1", "class 2"]
    assert detector.category_ids == [None, None]
    assert detector.crop == "roi_align"
    detector.settings = replace(detector.settings, score_threshold=0.0)
    detector.model.roi_heads.score_thresh = 0.0
    detector.save(tmp_path / "saved")
    again = load_detector(tmp_path / "saved")
    assert again.category_ids == [None, None]
    assert_same(detector, again)
    again.crop_by("affine")
    assert again.crop == "affine"
    assert torch.allclose(found_by(detector)["scores"], found_by(again)["scores"], atol=1e-4)


def test_91_classes_are_cocos(tmp_path):
    detector = load_published(SMALL, str(published(tmp_path / "weights.pth", classes=91)))
    assert len(detector.category_ids) == 90
    assert detector.category_names[0] == "person"
    assert detector.category_ids[:13] == [*range(1, 12), None, 13]  # COCO has no category 12


def test_weights_of_another_detector(tmp_path, checkpoint):
    path = str(published(tmp_path / "weights.pth"))
    for name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"):
        with pytest.raises(ModelError, match=rf"weights\.pth: .*{name}"):
            load_published(name, path)
    with pytest.raises(ModelError, match=r"last\.ckpt"):
        load_published(SMALL, str(checkpoint))
    with pytest.raises(ModelError, match=r"weights\.pth"):
        load_detector(path)
    with pytest.raises(ModelError, match="resnet50"):
        load_published("resnet50", path)


def test_a_detector_without_a_second_stage_is_neither_swapped_nor_saved(tmp_path):
    name = "ssdlite320_mobilenet_v3_large"
    detector = load_published(name, str(published(tmp_path / "weights.pth", name)))
    assert detector.crop is None
    detector.detect(scene(), min_score=0)
    detector.detect(scene(2, 3000), min_score=0)
    with pytest.raises(ModelError) as caught:
        detector.crop_by("affine")
    assert caught.value.setting == "crop"
    with pytest.raises(ModelError):
        detector.save(tmp_path / "saved")


# ---- refinements


@pytest.fixture
def refining(checkpoint):
    detector = load_checkpoint(checkpoint)
    refined(detector.model, iterations=3, ascent_steps=4)
    return detector


def test_a_refinement_is_saved_and_loaded_and_can_be_switched_off(refining, detector, tmp_path):
    refining.save(tmp_path)
    again = load_detector(tmp_path)
    assert_same(refining, again)
    assert again.refinement.config == refining.refinement.config
    assert again.refinement.enabled
    assert again.digest() != detector.digest()
    assert not torch.equal(found_by(again)["boxes"], found_by(detector)["boxes"])
    again.refinement.enabled = False
    assert torch.equal(found_by(again)["boxes"], found_by(detector)["boxes"])
    assert detector.refinement is None


def test_a_card_names_the_refinement(refining, detector):
    card = model_card(refining.describe(), REPORT | {"about": REPORT["about"] | {"refinement": "off"}}).text
    for text in ("3 iterations", "4 steps", "detector.refinement.enabled = False", "without the refinement"):
        assert text in card
    assert "refine" not in model_card(detector.describe()).text


@pytest.mark.parametrize(
    ("change_to", "named"),
    [
        (lambda fields: "on", "refinement"),
        (lambda fields: fields | {"iterations": 10**9}, r"refinement\.iterations"),
        (lambda fields: fields | {"unknown": 1}, "unknown"),
        (lambda fields: fields | {"box_gradient": 3}, "refinement"),
        (lambda fields: {}, "box_gradient"),
    ],
)
def test_an_invalid_refinement_is_named(refining, tmp_path, change_to, named):
    refining.save(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())["refinement"]
    change(tmp_path / "config.json", refinement=change_to(fields))
    with pytest.raises(ModelError, match=rf"config\.json: .*{named}") as caught:
        load_detector(tmp_path)
    assert "\n" not in str(caught.value)
