"""Detectors that are saved and loaded, none of which is trusted."""

import email.message
import importlib.metadata
import json
import os
import socket
import time
from dataclasses import asdict, replace

import pytest
import safetensors
import torch
import torchvision
from huggingface_hub import ModelCard
from torch import nn

pytest.importorskip("timm")

from support.commands import refused
from support.disk import BREAK
from support.refined_models import refined
from support.tiny_detector import IDS, NAMES, SETTINGS, scene, tiny_checkpoint

from detector.errors import DataError, ModelError
from detector.models.published import batch_norm_eps
from detector.pretrained import description, hub
from detector.pretrained.detector import Detector, digest_of
from detector.pretrained.loading import CHECKPOINT_KEY, load_checkpoint, load_detector, load_published
from detector.tools.exporting import export

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
        "command": "python tools/eval.py --checkpoint last.ckpt",
    },
    "scores": {"AP": 0.57712, "AP50": 0.9, "AP75": 0.6, "AP90": None},
    "notes": ["Test-time augmentation: mirrored."],
}


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
    detector.save_pretrained(tmp_path / "saved")
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
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


# ---- there and back


@pytest.mark.parametrize("crop", ["affine", "roi_align"])
def test_a_checkpoint_saved_and_loaded_is_the_same_detector(tmp_path, crop):
    detector = load_checkpoint(save_checkpoint(tmp_path / "last.ckpt", crop=crop))
    detector.save_pretrained(tmp_path / "saved")
    again = Detector.from_pretrained(tmp_path / "saved")
    assert_same(detector, again)
    assert again.crop == detector.crop == crop
    assert (again.category_ids, again.category_names) == (IDS, NAMES)
    assert again.settings == SETTINGS
    assert set(batch_norm_eps(again.model).values()) == {0.25}
    assert again.model.transform.image_mean == detector.model.transform.image_mean
    assert again.digest() == detector.digest()
    assert not any(part.training for part in again.modules())
    assert next(p for p in again.parameters() if p.dim() == 4 and min(p.shape) > 1).is_contiguous(
        memory_format=torch.channels_last
    )


def test_batch_norm_eps_and_normalisation_matter(detector, saved):
    """Else the comparison above would not see that they are lost."""
    eps = json.loads((saved / "config.json").read_text())["batch_norm_eps"]
    change(saved / "config.json", batch_norm_eps=dict.fromkeys(eps, 0.5))
    assert not torch.equal(found_by(Detector.from_pretrained(saved))["scores"][:3], found_by(detector)["scores"][:3])


def test_the_files_are_the_hubs_three_and_no_pickle(saved):
    assert {path.name for path in saved.iterdir()} == FILES
    with safetensors.safe_open(saved / "model.safetensors", "pt") as content:
        assert "roi_heads.box_predictor.cls_score.weight" in content.keys()  # noqa: SIM118 (it is no dict)
    assert not (saved / "model.safetensors").read_bytes().startswith((b"PK", b"\x80"))


def test_load_detector_takes_a_folder_and_a_checkpoint(saved, checkpoint):
    assert_same(load_detector(saved), load_detector(str(checkpoint)))


def test_saving_again_replaces_the_detector(saved, tmp_path):
    other = load_checkpoint(save_checkpoint(tmp_path / "o.ckpt", crop="roi_align", names=["one"], ids=[1]))
    other.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == FILES
    again = Detector.from_pretrained(saved)
    assert_same(other, again)
    assert again.category_names == ["one"]
    assert "platelet" not in (saved / "README.md").read_text()


@pytest.mark.parametrize("call", BREAK)
def test_a_full_disk_leaves_the_detector_that_was_there(saved, detector, tmp_path, monkeypatch, call):
    other = load_checkpoint(save_checkpoint(tmp_path / "other.ckpt", names=["one"], ids=[1]))
    with monkeypatch.context() as patch:
        BREAK[call](patch)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == FILES
    assert_same(Detector.from_pretrained(saved), detector)


def test_only_what_can_be_built_again_is_saved(tmp_path):
    detector = Detector(nn.Linear(1, 1), [1], ["one"])
    with pytest.raises(ModelError, match=r"only detectors that tools/train.py can build can be saved"):
        detector.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_push_to_hub_sends_the_three_files(detector, monkeypatch, tmp_path):
    sent = {}

    class Hub:
        def __init__(self, **options):
            pass

        def create_repo(self, **options):
            return type("Repository", (), {"repo_id": "me/" + options["repo_id"]})

        def upload_folder(self, *, folder_path, **options):
            sent.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return "address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    address = detector.save_pretrained(tmp_path / "cells", push_to_hub=True, model_card_kwargs={"report": REPORT})
    assert address == "address"
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert b"0.577" in sent["README.md"]


# ---- the card


def test_a_card_says_what_it_is_and_that_it_was_not_scored(saved):
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "affine-crop-rcnn"
    assert card.data.pipeline_tag == "object-detection"
    assert "faster-rcnn" in card.data.tags
    assert card.data.eval_results is None
    assert "It was not scored" in card.text
    assert "timm/test_efficientnet" in card.text
    assert "`red cell`, `white cell`, `platelet`" in card.text
    assert "from_pretrained" in card.text


def test_a_card_says_how_to_install_what_reads_it(saved, detector, monkeypatch):
    assert 'To load it, `pip install -e ".[timm]"` in a clone of its repository.' in (saved / "README.md").read_text()
    assert "made with affine-crop-rcnn." in (saved / "README.md").read_text()
    detector = Detector(detector.model, IDS, NAMES, settings=replace(SETTINGS, name="fasterrcnn_resnet50_fpn"))
    for urls in (["Repository, https://a.example/b, c", "Docs, https://d.example"], None):
        package = email.message.Message()
        for url in urls or ():
            package["Project-URL"] = url
        monkeypatch.setattr("importlib.metadata.metadata", lambda name, package=package: package)
        text = detector.generate_model_card().text
        home = "(https://a.example/b, c)" if urls else ""
        assert f"made with {'[affine-crop-rcnn]' if urls else 'affine-crop-rcnn'}{home}." in text
        assert f"`pip install -e .` in a clone of {'[its repository]' if urls else 'its repository'}{home}." in text


def test_a_card_of_a_package_that_is_not_installed(detector, monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.metadata", nothing)
    assert "made with affine-crop-rcnn." in detector.generate_model_card().text


def test_a_card_shows_the_scores_and_not_where_the_data_lies(detector, tmp_path):
    detector.save_pretrained(tmp_path, model_card_kwargs={"report": REPORT})
    card = ModelCard.load(tmp_path / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "AP": 0.5771,
        "AP50": 0.9,
        "AP75": 0.6,
    }
    assert {result.dataset_name for result in card.data.eval_results} == {"bccd, val"}
    assert "| AP | 0.577 |" in card.text
    assert "| AP90 | - |" in card.text
    assert "73 images with 967 objects of `bccd, val`, `2030-01-02`" in card.text
    assert "Test-time augmentation: mirrored." in card.text
    assert REPORT["about"]["command"] in card.text
    assert "secret" not in str(card)


@pytest.mark.parametrize(
    ("kind", "task", "row"),
    [
        ("segm", "image-segmentation", "| mask AP50 | 0.800 | at IoU 0.50 |"),
        ("keypoints", "keypoint-detection", "| keypoints AP50 | 0.800 | at OKS 0.50 |"),
    ],
)
def test_a_card_shows_the_scores_of_masks_and_key_points_apart(detector, tmp_path, kind, task, row):
    report = REPORT | {kind: {"scores": {"AP": 0.5, "AP50": 0.8, "AP75": None}}}
    detector.save_pretrained(tmp_path, model_card_kwargs={"report": report})
    card = ModelCard.load(tmp_path / "README.md")
    results = {(one.task_type, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results == {
        ("object-detection", "AP"): 0.5771,
        ("object-detection", "AP50"): 0.9,
        ("object-detection", "AP75"): 0.6,
        (task, "AP"): 0.5,
        (task, "AP50"): 0.8,
    }
    assert row in card.text


def test_scores_that_are_undefined_are_no_results(detector, tmp_path):
    detector.save_pretrained(tmp_path, model_card_kwargs={"report": REPORT | {"scores": {"AP": None}}})
    card = ModelCard.load(tmp_path / "README.md")
    assert "| AP | - |" in card.text
    assert not card.data.eval_results


def test_our_card_is_written_again_and_a_users_own_stays(detector, saved):
    detector.save_pretrained(saved, model_card_kwargs={"report": REPORT})
    assert "| AP | 0.577 |" in (saved / "README.md").read_text()
    detector.save_pretrained(saved)
    assert "It was not scored" in (saved / "README.md").read_text()
    (saved / "README.md").write_bytes(b"My own \xff card.")
    detector.save_pretrained(saved, model_card_kwargs={"report": REPORT})
    assert (saved / "README.md").read_bytes() == b"My own \xff card."


HOSTILE = [
    "a|b",
    "`rm -rf`",
    "new\nline",
    "---\nlicense: evil\n---\n",
    "<script>alert(1)</script>",
    "",
    "# head",
    "\u2028x",
    "{{ jinja }}",
    "[x](http://evil)",
]


def test_names_are_shown_as_they_are_and_do_nothing(tmp_path):
    names = HOSTILE
    path = save_checkpoint(tmp_path / "last.ckpt", names=names, ids=range(1, len(names) + 1))
    report = REPORT | {
        "about": REPORT["about"]
        | {
            "data": "da`ta|<b>\n---",
            "split": "x\n---\n# y",
            "command": "python ```\n# z\n---",
            "time": "<script>\n---",
            "evaluator": "<script>\n---\n",
        },
        "notes": ["<script>\n---\n# note"],
    }
    detector = load_checkpoint(path)
    detector.save_pretrained(tmp_path / "saved", model_card_kwargs={"report": report})
    assert Detector.from_pretrained(tmp_path / "saved").category_names == names
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert "license" not in card.data.to_dict()
    lines = card.text.splitlines()
    assert "---" not in lines
    assert [line for line in lines if line.startswith("#")] == [
        "# Affine-crop R-CNN: timm/test_efficientnet",
        "## Scores",
    ]
    (classes,) = [line for line in lines if line.startswith("It finds")]
    assert (
        "`a/b`, `'rm -rf'`, `new line`, `--- license: evil ---`, `<script>alert(1)</script>`, ` `, `# head`" in classes
    )
    assert "`{{ jinja }}`, `[x](http://evil)`." in classes
    outside = "".join("\n".join(line for line in lines if not line.startswith("```")).split("`")[::2])
    assert "<script>" not in outside
    assert "evil" not in outside
    assert card.text.count("```") == 4


def test_of_many_names_a_hundred_are_listed(tmp_path):
    names = [f"n{number}" for number in range(130)]
    detector = load_checkpoint(save_checkpoint(tmp_path / "last.ckpt", names=names, ids=range(130)))
    detector.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "It finds 130 classes" in text
    assert "`n99` and 30 more" in text
    assert "n100" not in text


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"about": REPORT["about"]},
        REPORT | {"scores": {"AP": "high"}},
        REPORT | {"about": {"data": 1}},
        REPORT | {"about": REPORT["about"] | {"images": "many"}},
        REPORT | {"notes": None},
        {"about": [], "scores": []},
    ],
)
def test_a_damaged_report_is_refused_before_anything_is_written(detector, tmp_path, report):
    with pytest.raises(DataError, match=r"report: not of tools/eval\.py, or damaged"):
        detector.save_pretrained(tmp_path / "saved", model_card_kwargs={"report": report})
    assert not (tmp_path / "saved").exists()


# ---- tools/export.py --format pretrained


def test_export_writes_the_scores_of_these_weights(detector, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "run"
    (home / "checkpoints").mkdir(parents=True)
    last = home / "checkpoints" / "last.ckpt"
    last.write_bytes(checkpoint.read_bytes())
    export(checkpoint=str(last), format="pretrained")
    assert "no scores" in capsys.readouterr().out
    for number, (weights, ap) in enumerate(
        [("sha256:other", 0.9), (detector.digest(), 0.4), (detector.digest(), None)]
    ):
        (home / f"eval-{number}").mkdir()
        about = REPORT["about"] | {"weights": weights, "time": f"203{number}-01-02"}
        report = REPORT | {"about": about, "scores": {"AP": ap}}
        (home / f"eval-{number}" / "report.json").write_text(json.dumps(report))
        export(checkpoint=str(last), format="pretrained")
        printed = capsys.readouterr().out
        assert ("no scores" in printed) == (number == 0)
        card = (home / "pretrained" / "README.md").read_text()
        assert ["It was not scored", "| AP | 0.400 |", "| AP | - |"][number] in card
    export(checkpoint=str(home / "pretrained"), format="pretrained")  # beside it, which is itself
    assert f"{home / 'pretrained'}/: model.safetensors" in (printed := capsys.readouterr().out)
    assert "The card has the scores of 2032-01-02" in printed
    (home / "pretrained" / "README.md").write_text("mine")
    export(checkpoint=str(last), format="pretrained")
    assert "README.md is as it was" in capsys.readouterr().out


def test_export_overwrites_nobodys_folder(checkpoint, tmp_path):
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    for content in ('{"model_type": "bert"}', "[]", "not JSON"):
        (other / "config.json").write_text(content)
        with pytest.raises(SystemExit, match=rf"--output {other}: holds something else already"):
            export(checkpoint=str(checkpoint), format="pretrained", output=str(other))
        assert [path.name for path in other.iterdir()] == ["config.json"]
    with pytest.raises(SystemExit, match="holds something else already"):
        export(checkpoint=str(checkpoint), format="pretrained", output=str(other / "config.json"))
    (other / "config.json").unlink()
    export(checkpoint=str(checkpoint), format="pretrained", output=str(other))
    export(checkpoint=str(checkpoint), format="pretrained", output=str(other))
    assert {path.name for path in other.iterdir()} == FILES


def test_export_of_a_file_wants_no_folder(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match=rf"--output {tmp_path}: is a folder; name a file, such as {tmp_path}/"):
        export(checkpoint=str(checkpoint), output=str(tmp_path))


@pytest.mark.parametrize("name", ["x.torchscript", "x.pt", "x.pth", "x.engine", "x.v2", "x.ONNX.gz"])
def test_export_to_another_format_is_refused_at_once(tmp_path, name):
    with refused(rf"--output .*{name}: no \.\w+ file can be written, but by --format onnx NAME"):
        export(checkpoint="nothing.ckpt", output=str(tmp_path / name))
    for other in ("x.onnx", "x", "x.v2/x"):
        with pytest.raises(SystemExit, match=r"nothing\.ckpt: no such file"):
            export(checkpoint="nothing.ckpt", output=str(tmp_path / other))
    with pytest.raises(SystemExit, match=r"nothing\.ckpt: no such file"):
        export(checkpoint="nothing.ckpt", format="pretrained", output=str(tmp_path / name))
    with refused("--format pretrained writes a folder"):
        export(checkpoint="nothing.ckpt", format="pretrained", output=str(tmp_path / "x.onnx"))
    assert not list(tmp_path.iterdir())


def test_export_says_that_the_disk_is_full(checkpoint, tmp_path, monkeypatch):
    BREAK["write"](monkeypatch)
    with pytest.raises(SystemExit, match="No space left on device"):
        export(checkpoint=str(checkpoint), format="pretrained", output=str(tmp_path / "out"))


# ---- the network


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No name is resolved. The list of what was asked for, and of the sleeps before another try."""
    asked = []

    def refuse(host, *args, **options):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    def sleep(seconds):
        asked.append("it tries again")

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return asked


def test_a_folder_needs_no_network(saved, offline, monkeypatch):
    for name in ("hf_hub_download", "get_hf_file_metadata"):
        monkeypatch.setattr(hub, name, lambda *args, **options: pytest.fail("the hub is asked"))
    load_detector(saved)
    assert offline == []


@pytest.mark.parametrize("name", ["nobody/nothing-there", "runs/quikstart"])
def test_without_a_network_a_name_is_given_up_at_once(name, offline, tmp_path):
    with pytest.raises(
        ModelError, match=rf"^{name}: no such folder, and the hub cannot be reached: .*not known\)?$"
    ) as e:
        Detector.from_pretrained(name, cache_dir=tmp_path)
    assert "\n" not in str(e.value)
    assert set(offline) == {"huggingface.co"}
    with pytest.raises(ModelError, match="no such folder, and the hub has it not to give"):
        Detector.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["bad name/!", "a/b/c", "nothing here at all"])
def test_what_is_no_name_of_a_repository_is_refused_unasked(name, offline, tmp_path):
    with pytest.raises(ModelError, match=rf"^{name}: no such folder, and the hub"):
        Detector.from_pretrained(name, cache_dir=tmp_path)
    assert offline == []


def test_a_repository_that_was_fetched_is_there_offline(saved, offline, tmp_path, detector):
    """As the hub's client leaves it in its cache."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--me--cells" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    saved.rename(snapshot)
    assert_same(Detector.from_pretrained("me/cells", cache_dir=cache), detector)


# ---- damaged and hostile


def test_every_byte_of_the_weights_is_checked(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for place in (len(content) - 1, len(content) // 2, 200):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ModelError, match=r"model\.safetensors( beside it is damaged|: cannot be read)"):
            load_detector(saved)
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as weights \(cut off\?\)"):
            load_detector(saved)
    path.write_bytes(content)
    load_detector(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError, match=f"saved: not a folder of save_pretrained: it has no {name}"):
        load_detector(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", '"x"', "{}", "[" * 5000, "\x00", '{"detector": {}}'])
def test_a_config_that_is_none(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"config\.json: .*(not valid JSON|not UTF-8|not of a detector of this project)"
    ):
        load_detector(saved)


@pytest.mark.parametrize("field", ["detector", "crop", "categories", "batch_norm_eps", "weights_digest"])
def test_a_config_with_a_hole_or_a_wrong_type(saved, field):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({name: config[name] for name in config if name != field}))
    with pytest.raises(ModelError, match=rf"config\.json: .*it has no '{field}'"):
        load_detector(saved)
    for value in (None, 7, [], [7], {}, {"x": 7}, "x", [{}], [[]], True):
        change(saved / "config.json", **{field: value})
        with pytest.raises(ModelError, match=r"config\.json: (not of|model\.safetensors beside)") as error:
            load_detector(saved)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("name", "timm/hf-hub:evil/model", "it has no such model"),
        ("name", "timm/local-dir:/tmp", "it has no such model"),
        ("name", "timm/../../x", "it has no such model"),
        ("name", "fasterrcnn_resnet50_fpn", "in the file"),
        ("name", "timm/test_resnet", "in the file"),
        ("name", "maskrcnn_resnet50_fpn", "is missing in the file"),
        ("name", "retinanet_resnet50_fpn", "unknown"),
        ("name", None, "must be a name"),
        ("fpn_channels", 2**31 - 1, "detector of this project, or damaged"),
        ("fpn_channels", 10**6, r"is \[.*\] in the file, \[.*\] in the model"),
        ("box_head_size", 2**31 - 1, "detector of this project, or damaged"),
        ("box_head_size", -1, "must be a positive integer"),
        ("min_size", "64", "must be a positive integer"),
        ("anchor_sizes", [1], "must be 5 positive integers"),
        ("unheard_of", 1, "unexpected keyword argument 'unheard_of'"),
    ],
)
def test_settings_of_another_detector(saved, setting, value, reason):
    change(saved / "config.json", detector=asdict(SETTINGS) | {setting: value})
    with pytest.raises(ModelError, match=rf"config\.json: .*{reason}"):
        load_detector(saved)


NEW = {  # settings that earlier files lack
    "aspect_ratios": (0.3, 1.0, 3.0),
    "rpn_nms_threshold": 0.6,
    "rpn_fg_iou_threshold": 0.8,
    "rpn_bg_iou_threshold": 0.2,
    "box_nms_threshold": 0.3,
    "box_fg_iou_threshold": 0.6,
    "box_bg_iou_threshold": 0.4,
}


def test_files_without_the_newer_settings_are_read_as_before(saved, checkpoint, detector, tmp_path):
    old = {name: value for name, value in asdict(SETTINGS).items() if name not in NEW}
    change(saved / "config.json", detector=old)
    content = torch.load(checkpoint, weights_only=True)
    content[CHECKPOINT_KEY]["detector"] = old
    torch.save(content, tmp_path / "old.ckpt")
    for source in (saved, tmp_path / "old.ckpt"):
        loaded = load_detector(source)
        assert loaded.settings == SETTINGS
        for ours, theirs in zip(found_by(loaded).values(), found_by(detector).values(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_checkpoint_of_before_ids_and_names_were_together_is_read_as_before(checkpoint, detector, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    saved = content[CHECKPOINT_KEY]
    del saved["categories"]
    saved |= {"category_ids": IDS, "category_names": NAMES}
    torch.save(content, tmp_path / "old.ckpt")
    loaded = load_detector(tmp_path / "old.ckpt")
    assert_same(loaded, detector)
    assert (loaded.category_ids, loaded.category_names) == (IDS, NAMES)
    saved["category_ids"] = IDS[1:]
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(ModelError, match=r"old\.ckpt: not a checkpoint of tools/train\.py, or damaged: zip"):
        load_detector(tmp_path / "old.ckpt")


def test_all_settings_survive_being_saved(tmp_path):
    settings = replace(SETTINGS, **NEW)
    detector = load_detector(save_checkpoint(tmp_path / "other.ckpt", settings=settings))
    detector.save_pretrained(tmp_path / "saved")
    for loaded in (detector, load_detector(tmp_path / "saved")):
        assert loaded.settings == settings
        assert loaded.model.rpn.anchor_generator.aspect_ratios == (NEW["aspect_ratios"],) * 5
        assert loaded.model.roi_heads.nms_thresh == 0.3


@pytest.mark.parametrize("setting", ["fpn_channels", "box_head_size"])
def test_sizes_beyond_the_file_take_no_memory(saved, checkpoint, tmp_path, setting, monkeypatch):
    """Everything is built on the meta device until it is known to fit the file."""
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
        with pytest.raises(ModelError, match=r"other\.ckpt: not a checkpoint of tools/train\.py, or damaged"):
            load_checkpoint(tmp_path / "other.ckpt")
        change(saved / "config.json", detector=content[CHECKPOINT_KEY]["detector"])
        with pytest.raises(ModelError, match=r"config\.json: not of"):
            load_detector(saved)
    assert built
    assert all(parameter.is_meta for model in built for parameter in model.parameters())


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 1}],
        [{"id": 1, "name": 2}],
        [{"id": "1", "name": "a"}],
        [{"id": True, "name": "a"}],
        [{"id": 1.5, "name": "a"}],
    ],
)
def test_categories_without_id_or_name(saved, categories):
    change(saved / "config.json", categories=categories * 3)
    with pytest.raises(ModelError, match=r"config\.json: .*(category must have an id and a name|it has no 'name')"):
        load_detector(saved)


def test_another_number_of_categories(saved):
    config = json.loads((saved / "config.json").read_text())
    change(saved / "config.json", categories=config["categories"][:2])
    with pytest.raises(ModelError, match=r"cls_score.* is \[4, 16\] in the file, \[3, 16\] in the model"):
        load_detector(saved)


@pytest.mark.parametrize("eps", [-1, 2, "0", None, True, float("nan")])
def test_batch_norm_eps_of_no_network(saved, eps):
    names = json.loads((saved / "config.json").read_text())["batch_norm_eps"]
    change(saved / "config.json", batch_norm_eps=dict.fromkeys(names, eps))
    with pytest.raises(ModelError, match="batch_norm_eps must be numbers from 0 to 1"):
        load_detector(saved)
    change(saved / "config.json", batch_norm_eps={})
    with pytest.raises(ModelError, match="batch_norm_eps does not name the model's batch norms"):
        load_detector(saved)


def test_a_pickle_is_not_run(tmp_path, saved, checkpoint):
    harm = tmp_path / "harm"
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"] = Poison(harm)
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(content, tmp_path / "poison.ckpt", **options)
        with pytest.raises(ModelError, match=r"poison\.ckpt: cannot be read as weights"):
            load_checkpoint(tmp_path / "poison.ckpt")
        with pytest.raises(ModelError, match=r"poison\.ckpt: cannot be read as weights"):
            load_published("fasterrcnn_mobilenet_v3_large_320_fpn", str(tmp_path / "poison.ckpt"))
        (saved / "model.safetensors").write_bytes((tmp_path / "poison.ckpt").read_bytes())
        with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as weights"):
            load_detector(saved)
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"it has no model\.safetensors"):
        load_detector(saved)
    assert not harm.exists()
    with pytest.raises(FileNotFoundError):
        torch.load(tmp_path / "nothing")
    torch.load(tmp_path / "poison.ckpt", weights_only=False)
    assert harm.exists()  # it does run where it is let


def test_a_flipped_byte_in_a_checkpoint(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    value = torch.load(checkpoint, weights_only=True)["state_dict"]["model.roi_heads.box_head.fc6.weight"]
    place = content.index(value.numpy().tobytes()[:64]) + 5
    (tmp_path / "bad.ckpt").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ModelError, match=r"bad\.ckpt: cannot be read as weights .*checksum"):
        load_checkpoint(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {CHECKPOINT_KEY: None},
        {CHECKPOINT_KEY: {}, "state_dict": {}},
        {CHECKPOINT_KEY: {}, "state_dict": None},
        7,
    ],
)
def test_a_checkpoint_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(
        ModelError, match=r"other\.ckpt: (not a checkpoint of tools/train\.py, or damaged|must hold a dict)"
    ):
        load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize("value", [7, None, "x", [1.0], torch.zeros(4).to_sparse(), torch.zeros(3)])
def test_a_checkpoint_whose_weights_are_none(checkpoint, tmp_path, value):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.roi_heads.box_predictor.cls_score.bias"] = value
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ModelError, match=r"other\.ckpt: not a checkpoint of tools/train\.py, or damaged"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.ckpt: no such file$"):
        load_detector(tmp_path / "nothing.ckpt")


# ---- torchvision's own

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
    detector.save_pretrained(tmp_path / "saved")
    again = load_detector(tmp_path / "saved")
    assert again.category_ids == [None, None]
    assert_same(detector, again)
    again.crop_by("affine")
    assert again.crop == "affine"
    ours, theirs = found_by(detector), found_by(again)
    assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-4)


def test_91_classes_are_cocos(tmp_path):
    detector = load_published(SMALL, str(published(tmp_path / "weights.pth", classes=91)))
    assert len(detector.category_ids) == 90
    assert detector.category_names[0] == "person"
    assert detector.category_ids[:13] == [*range(1, 12), None, 13]  # 12 is none


def test_weights_of_another_detector(tmp_path, checkpoint):
    path = str(published(tmp_path / "weights.pth"))
    with pytest.raises(ModelError, match=r"weights\.pth: not the weights of fasterrcnn_resnet50_fpn: .* in the model"):
        load_published("fasterrcnn_resnet50_fpn", path)
    with pytest.raises(ModelError, match=r"weights\.pth: not the weights of retinanet_resnet50_fpn"):
        load_published("retinanet_resnet50_fpn", path)
    with pytest.raises(ModelError, match=r"last\.ckpt: not the weights of"):
        load_published(SMALL, str(checkpoint))
    with pytest.raises(ModelError, match=r"weights\.pth: not a checkpoint of tools/train\.py, or damaged"):
        load_detector(path)
    with pytest.raises(ModelError, match=r"'resnet50' is not one of torchvision's detectors"):
        load_published("resnet50", path)


def test_a_detector_without_a_second_stage_detects_and_is_neither_swapped_nor_saved(tmp_path):
    name = "ssdlite320_mobilenet_v3_large"
    detector = load_published(name, str(published(tmp_path / "weights.pth", name)))
    assert detector.crop is None
    assert detector.category_names == ["class 1", "class 2"]
    detector.detect(scene(), min_score=0)
    detector.detect(scene(2, 3000), min_score=0)  # resized to a square
    with pytest.raises(ModelError, match="crop affine: "):
        detector.crop_by("affine")
    with pytest.raises(ModelError, match="only detectors that"):
        detector.save_pretrained(tmp_path / "saved")


def test_a_digest_tells_names_types_shapes_and_values_apart():
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


def test_names_that_no_file_can_be_written_with(tmp_path):
    names = ["a\ud800", "b\nc", "</svg>$x$"]  # JSON may hold half a surrogate pair
    torch.save(tiny_checkpoint(names=names), tmp_path / "last.ckpt")
    detector = load_detector(tmp_path / "last.ckpt")
    detector.save_pretrained(tmp_path / "saved")
    assert load_detector(tmp_path / "saved").category_names == names
    found = detector.detect(scene(), min_score=0)
    assert len(found)
    repr(found).encode()
    found._repr_png_()


# ---- refinements


@pytest.fixture
def refining(checkpoint):
    detector = load_checkpoint(checkpoint)
    refined(detector.model, iterations=3, ascent_steps=4)
    return detector


def test_a_refinement_is_saved_and_loaded_and_can_be_switched_off(refining, detector, tmp_path):
    refining.save_pretrained(tmp_path)
    again = Detector.from_pretrained(tmp_path)
    assert_same(refining, again)
    assert again.refinement.config == refining.refinement.config
    assert again.refinement.enabled
    assert again.digest() != detector.digest()
    assert not torch.equal(found_by(again)["boxes"], found_by(detector)["boxes"])
    again.refinement.enabled = False
    assert torch.equal(found_by(again)["boxes"], found_by(detector)["boxes"])
    assert detector.refinement is None


def test_a_card_says_how_boxes_are_refined_and_how_that_is_switched_off(refining, detector, tmp_path):
    report = REPORT | {"about": REPORT["about"] | {"refinement": "off"}}
    refining.save_pretrained(tmp_path, model_card_kwargs={"report": report})
    card = (tmp_path / "README.md").read_text()
    assert "3 refinement iterations" in card
    assert "4 gradient ascent steps" in card
    assert "`detector.refinement.enabled = False`" in card
    assert "`2030-01-02`, without the refinement:" in card
    assert "refine" not in detector.generate_model_card().text


@pytest.mark.parametrize(
    ("change_to", "message"),
    [
        (lambda fields: [fields], r"refinement must be a dict of settings, got \["),
        (lambda fields: "on", "refinement must be a dict of settings, got 'on'"),
        (lambda fields: fields | {"iterations": "a"}, "refinement.iterations 'a'"),
        (lambda fields: fields | {"iterations": 10**9}, "refinement.iterations 1000000000"),
        (lambda fields: fields | {"iterations": 2.5}, "refinement.iterations 2.5"),
        (lambda fields: fields | {"ascent_steps": None}, "refinement.ascent_steps None"),
        (lambda fields: fields | {"iou_power": float("nan")}, "refinement.iou_power nan"),
        (lambda fields: fields | {"unknown": 1}, "refinement: .*unknown"),
        (lambda fields: fields | {"box_gradient": 3}, "refinement: "),
        (lambda fields: fields | {"box_gradient": fields["box_gradient"] | {"crop": "a"}}, "refinement: "),
        (lambda fields: {}, "refinement: it has no 'box_gradient'"),
    ],
)
def test_a_refinement_that_cannot_be_right_is_named(refining, tmp_path, change_to, message):
    refining.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())["refinement"]
    change(tmp_path / "config.json", refinement=change_to(fields))
    with pytest.raises(ModelError, match=rf"config\.json: .*{message}") as caught:
        Detector.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
