"""tools/train.py and tools/eval.py from end to end, on a handful of digits."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import torchvision
from lightning.pytorch.plugins import HalfPrecision
from PIL import Image
from torchvision.transforms import v2

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import refused, score
from support.tiny_training import REPOSITORY, TINY

from detector import training
from detector.crop.pyramid import MultiScaleAffineCrop
from detector.data.batches import TrainingBatches
from detector.data.categories import match_categories
from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.data.folder import find_root
from detector.errors import DataError, ModelError
from detector.evaluation import SUMMARY, detect_with_losses
from detector.evaluation.metric import evaluate_types
from detector.evaluation.running import EvaluationOptions, run_detector
from detector.evaluation.truth import coco_of
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps
from detector.pretrained.loading import CHECKPOINT_KEY, load_checkpoint, load_published
from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.sampling import seed_sampling
from detector.run_folders import newest_folder, unused_folder
from detector.tools.browse import main as browse_training_images
from detector.tools.train import main as train
from detector.tools.training_cli import parse
from detector.training.data import CocoDataModule
from detector.training.failures import TrainingError
from detector.training.run import Run
from detector.training.task import DetectionTask


@pytest.fixture(autouse=True, scope="module")
def command_line():
    """In the repository's folder, and without pytest's own arguments, which LightningCLI would warn of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["train.py"])
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 8, "val": 4})
    return root


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train([*TINY, f"--data.root={digits}", f"--run_dir={folder}", "--trainer.max_epochs=2"])
    return folder


def test_a_run_leaves_everything_in_its_folder(trained):
    assert {path.name for path in trained.iterdir()} >= {
        "checkpoints",
        "config.yaml",
        "detections.json",
        "examples.png",
        "report.html",
        "report.json",
        "scores.json",
    }
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert any(path.name.startswith("events.out.tfevents") for path in trained.iterdir())
    scores = json.loads((trained / "scores.json").read_text())
    assert set(scores) == {*SUMMARY, "AP90"}
    found = json.loads((trained / "detections.json").read_text())
    assert found
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    with Image.open(trained / "examples.png") as picture:
        assert picture.size[0] > 300


def test_checkpoint_is_plain_and_builds_the_detector_again(trained):
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["epoch"] == 1
    detector = load_checkpoint(trained / "checkpoints" / "last.ckpt")
    assert detector.category_names == [str(digit) for digit in range(10)]
    assert not detector.model.training
    name, value = next(iter(detector.model.state_dict().items()))
    assert torch.equal(value, content["state_dict"][f"model.{name}"])


def test_eval_tool_gives_the_scores_of_the_run(trained, digits, tmp_path, capsys):
    output = tmp_path / "eval"
    score(checkpoint=str(trained / "checkpoints" / "last.ckpt"), root=str(digits), split="val", output=str(output))
    printed = capsys.readouterr().out
    assert printed.count("Average Precision") == 7
    assert str(output) in printed
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (trained, output))
    assert json.loads((trained / "scores.json").read_text()) == json.loads((output / "scores.json").read_text())
    for name in ("scores", "by_class", "by_size", "curves", "operating_points", "confusion", "images"):
        assert ours[name] == theirs[name], name
    assert ours["about"].keys() == theirs["about"].keys()
    for folder in (trained, output):
        assert "data:image/jpeg" in (folder / "report.html").read_text()
    stock = tmp_path / "stock"
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    score(checkpoint=checkpoint, crop="roi_align", root=str(digits), split="val", output=str(stock))
    ours, theirs = (json.loads((folder / "detections.json").read_text()) for folder in (output, stock))
    assert len(ours) == len(theirs) > 0
    assert [r["score"] for r in ours] == pytest.approx([r["score"] for r in theirs], abs=1e-4)


def test_eval_tool_scores_a_torchvision_detector(digits, tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    weights, output = tmp_path / "weights.pth", tmp_path / "out"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=11)
    torch.save(model.state_dict(), weights)
    score(model=name, weights=str(weights), crop="affine", root=str(digits), split="val", output=str(output))
    assert "AP" in json.loads((output / "scores.json").read_text())


def test_labels_of_published_weights_are_cocos_category_ids(digits, tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=91)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    detector = load_published(name, str(tmp_path / "weights.pth"))
    data = CocoDetection(digits / "val", digits / "annotations" / "instances_val.json")
    with pytest.raises(
        ModelError, match=r"no class of the detector \('person', 'bicycle', .*\) has the name of a category"
    ):
        match_categories(detector, data)
    data.category_ids, data.category_names = [0, 1, 2, 3], ["person", "stop sign", "N/A", "train"]
    found = match_categories(detector, data)
    assert len(found) == 90
    assert {label: i for label, i in enumerate(found, start=1) if i is not None} == {1: 0, 13: 1, 7: 3}


def test_batch_norm_eps_survives_a_checkpoint(trained, tmp_path):
    """torchvision sets it to 0 for its COCO_V1 weights, and no state_dict holds it."""
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    eps = content[CHECKPOINT_KEY]["batch_norm_eps"]
    assert eps
    content[CHECKPOINT_KEY]["batch_norm_eps"] = dict.fromkeys(eps, 0.25)
    torch.save(content, tmp_path / "other.ckpt")
    model = load_checkpoint(tmp_path / "other.ckpt").model
    assert {model.get_submodule(name).eps for name in eps} == {0.25}


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(digits, tmp_path, monkeypatch, capsys, ctrl_c):
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    arguments = [*TINY, f"--data.root={digits}", "--data.batch_size=2", "--trainer.max_epochs=2"]
    step = DetectionTask.training_step

    def ctrl_c(task, batch, number):
        if (task.current_epoch, number) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return step(task, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "training_step", ctrl_c)
        with pytest.raises(SystemExit) as stop:
            train([*arguments, f"--run_dir={folder}", "--ckpt_path", "last"])
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert "STARTING FROM THE BEGINNING" in said
    assert "Stopping after this step" in said
    assert re.search(rf"python train.py .*--run_dir={folder} --ckpt_path {last}$", said, flags=re.MULTILINE)
    assert "last --ckpt_path" not in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    first = torch.load(last, weights_only=True)
    assert (first["epoch"], first["global_step"]) == (1, 6)
    with pytest.raises(SystemExit, match=r"trained on 2 images a step, this run has 4: go on with the same devices x"):
        train([*arguments, f"--ckpt_path={last}", "--trainer.accumulate_grad_batches=2"])
    with pytest.raises(SystemExit, match="trained with images per batch 2, this run has 1: go on with the same data"):
        train([*arguments, f"--ckpt_path={last}", "--data.batch_size=1"])
    anew = r".*, or start a new run from its weights, with any settings: --model\.detector\.weights FILE"
    with pytest.raises(SystemExit, match=rf"optimizer\.lr 0\.001, this run has 0\.01: go on with the same{anew}"):
        train([*arguments, f"--ckpt_path={last}", "--model.optimizer.lr=0.01"])
    with pytest.raises(
        SystemExit, match=r"trained with box_gradient\.crop 1\.0, this run has 0\.0: go on with the same"
    ):
        train([*arguments, f"--ckpt_path={last}", "--model.box_gradient.crop=0"])
    old = tmp_path / "old" / "last.ckpt"
    old.parent.mkdir()
    content = torch.load(last, weights_only=True)
    for name in ("bound", "warmup_steps"):  # that earlier versions did not have
        del content[CHECKPOINT_KEY]["box_gradient"][name]
    torch.save(content, old)
    with pytest.raises(SystemExit, match=r"trained with box_gradient\.bound None, this run has 0\.1: go on with the"):
        train([*arguments, f"--ckpt_path={old}"])
    del content[CHECKPOINT_KEY]["box_gradient"]
    torch.save(content, old)
    with pytest.raises(SystemExit, match="of an earlier version of this project: it can be scored, not resumed"):
        train([*arguments, f"--ckpt_path={old}"])
    shutil.rmtree(old.parent)
    with pytest.raises(SystemExit, match=rf"trained with fpn_channels 16, this run has 32: go on with the same{anew}"):
        train([*arguments, f"--ckpt_path={last}", "--model.detector.fpn_channels=32"])
    with pytest.raises(SystemExit, match=f"schedule was made for 8 steps, this run has 12: go on{anew}"):
        train([*arguments, f"--ckpt_path={last}", "--trainer.max_epochs=3"])
    train([*arguments, f"--ckpt_path={last}"])
    second = torch.load(last, weights_only=True)
    assert (second["epoch"], second["global_step"]) == (1, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_ctrl_c_while_scoring_stops_at_once(digits, tmp_path, monkeypatch, capsys, ctrl_c):
    score = DetectionTask.validation_step
    scored = []

    def ctrl_c(task, batch, number):
        os.kill(os.getpid(), signal.SIGINT)
        scored.append(number)
        score(task, batch, number)

    monkeypatch.setattr(DetectionTask, "validation_step", ctrl_c)
    arguments = [*TINY, f"--data.root={digits}", "--data.batch_size=2", "--trainer.max_epochs=2"]
    with pytest.raises(SystemExit):
        train([*arguments, f"--run_dir={tmp_path / 'run'}"])
    assert scored == [0]
    assert "--ckpt_path" in capsys.readouterr().err
    # Of the step before the epoch's last one.
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_run_is_repeated_from_its_folder_alone(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTOR_DATA", raising=False)
    train([f"--config={trained / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}"])
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path / "again", trained)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (start,) = json.loads((trained / "environment.json").read_text())
    assert start["settings"]["seed"] == 0
    assert start["settings"]["detector"]["fpn_channels"] == 16
    assert "RandomShortestSize" in start["settings"]["transform"]
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    if commit.returncode == 0:
        assert start["git"]["commit"] == commit.stdout.strip()


@pytest.mark.slow
def test_going_on_from_a_finished_run_scores_the_same_weights(digits, tmp_path):
    arguments = [*TINY, f"--data.root={digits}", "--trainer.max_epochs=1", "--model.optimizer.ema=0.9"]
    folder = tmp_path / "run"
    train([*arguments, f"--run_dir={folder}"])
    found = (folder / "detections.json").read_text()
    (folder / "detections.json").unlink()
    train([*arguments, f"--run_dir={folder}", "--ckpt_path=last"])
    assert (folder / "detections.json").read_text() == found
    # From another checkpoint than the last one in a folder of its own, where nothing is written over.
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    train([*arguments, f"--run_dir={folder}", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"])
    assert (tmp_path / "run-2" / "scores.json").exists()
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.slow
def test_going_on_from_a_run_that_was_stopped_early_scores_the_same_weights(digits, tmp_path, capsys, caplog):
    folder = tmp_path / "run"
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={folder}", "--trainer.max_epochs=9"]
    flags += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/AP"]
    flags += ["--trainer.callbacks.mode=max", "--trainer.callbacks.patience=1"]
    train(flags)
    names = ("scores.json", "detections.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
    before = [(folder / name).read_bytes() for name in names]
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] < 8
    with caplog.at_level("INFO"):
        train([*flags, "--ckpt_path=last"])
    assert "--model.detector.weights" in caplog.text
    assert [(folder / name).read_bytes() for name in names] == before


def test_a_run_without_a_step_is_refused(digits, tmp_path):
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_time=00:00:00:00"]
    with pytest.raises(SystemExit, match=r"error: .*before its first step"):
        train([*flags, "--trainer.max_epochs=1"])
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_none_are_refused(trained, digits, tmp_path):
    arguments = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}"]
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(SystemExit, match=r"error: .*other\.ckpt: not a checkpoint of tools/train\.py"):
        train([*arguments, f"--ckpt_path={path}"])
    path.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes()[:9999])
    with pytest.raises(SystemExit, match=r"error: .*other\.ckpt: cannot be read as weights"):
        train([*arguments, f"--ckpt_path={path}"])


def test_folders_are_numbered(tmp_path):
    folder = tmp_path / "run"
    assert unused_folder(folder) == newest_folder(folder) == folder
    folder.mkdir()
    assert unused_folder(folder) == newest_folder(folder) == folder
    (folder / "scores.json").write_text("{}")
    assert unused_folder(folder) == tmp_path / "run-2"
    assert newest_folder(folder) == folder
    for name in ("run-2", "run-10", "run-x", "runs-11"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "run-12").write_text("a file")
    (tmp_path / "another-13").mkdir(mode=0)  # that nobody may look into
    assert unused_folder(folder) == tmp_path / "run-11"
    assert newest_folder(folder) == tmp_path / "run-10"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root=nowhere"], "nowhere/val: no such image folder|nowhere/annotations.*no such file"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt: no such file"),
        (["--model.detector.name=timm/nothing"], "timm cannot build 'nothing'"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, digits, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *arguments])
    assert str(stop.value.code).startswith("error: ")
    assert "\n" not in str(stop.value.code)
    assert re.search(message, str(stop.value.code))


def test_data_without_a_box_and_other_categories_are_refused(digits, tmp_path):
    content = json.loads((digits / "annotations" / "instances_val.json").read_text())
    other = tmp_path / "other"
    (other / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (other / split).symlink_to(digits / "val")
    (other / "annotations" / "instances_val.json").write_text(json.dumps(content))
    (other / "annotations" / "instances_train.json").write_text(json.dumps({**content, "annotations": []}))
    splits = {"train_split": "train", "val_split": "val"}
    with pytest.raises(DataError, match=r"instances_train\.json: no box to train on"):
        CocoDataModule(str(other), **splits).setup("fit")
    for number, category in enumerate(content["categories"]):
        category["name"] = f"number {number}"
    (other / "annotations" / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"val: no category \('0', '1', .* has the name of one to train on \('number 0',"
    ):
        CocoDataModule(str(other), **splits).setup("fit")


def test_checkpoint_of_other_classes_is_refused(trained, digits, tmp_path):
    content = json.loads((digits / "annotations" / "instances_val.json").read_text())
    for category in content["categories"]:
        category["name"] = f"number {category['name']}"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    (tmp_path / "val").symlink_to(digits / "val")
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    with pytest.raises(SystemExit, match=r"no class of the detector \('0', .* has the name of .* \('number 0', "):
        score(checkpoint=checkpoint, root=str(tmp_path), split="val")
    with refused("give one of"):
        score(root=str(digits), split="val")
    (tmp_path / "cut.ckpt").write_bytes(Path(checkpoint).read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"cut\.ckpt: cannot be read"):
        score(checkpoint=str(tmp_path / "cut.ckpt"), root=str(digits), split="val")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match=r"other\.ckpt: not a checkpoint of tools/train\.py"):
        score(checkpoint=str(tmp_path / "other.ckpt"), root=str(digits), split="val")


@pytest.mark.slow
def test_a_finished_run_is_trained_longer_from_its_weights(trained, digits, tmp_path, monkeypatch, caplog):
    """It goes on where the first one ended, and needs it no more once there is a checkpoint."""
    old, last = tmp_path / "old", tmp_path / "old" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    eps = content[CHECKPOINT_KEY]["batch_norm_eps"]
    content[CHECKPOINT_KEY]["batch_norm_eps"] = dict.fromkeys(eps, 0.01)  # which is in no state_dict
    torch.save(content, last)
    before = load_checkpoint(last).model
    flags = [*TINY, f"--data.root={digits}", f"--model.detector.weights={old}", "--trainer.max_epochs=3"]
    flags += ["--model.optimizer.schedule=cosine", "--model.optimizer.ema=0.5", "--save_every=1"]
    step, compared = DetectionTask.training_step, []

    def compare(task, batch, number):
        if not compared:
            images, targets = batch
            seed_sampling(before, [1] * len(images))
            seed_sampling(task.model, [1] * len(images))
            for model in (before, task.model):
                compared.append(detect_with_losses(model, images, [dict(target) for target in targets])[1])
        return step(task, batch, number)

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(DetectionTask, "training_step", compare)
        train([*flags, f"--run_dir={tmp_path / 'whole'}"])
    assert f"weights of {old}: 270 of 270 tensors; its classes are the data's" in caplog.text
    assert {name: loss.item() for name, loss in compared[1].items()} == pytest.approx(
        {name: loss.item() for name, loss in compared[0].items()}, rel=1e-4
    )

    def stop(task, batch, number):
        if task.global_step == 3:
            raise KeyboardInterrupt
        return step(task, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "training_step", stop)
        with pytest.raises(SystemExit):
            train([*flags, f"--run_dir={tmp_path / 'run'}"])
    shutil.rmtree(old)
    train([*flags, f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"])
    whole, run = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "run")
    )
    assert run["global_step"] == 6
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, run[part][name]) for name, value in whole[part].items())
    detector = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert set(batch_norm_eps(detector.model).values()) == {0.01}
    split = CocoDetection(digits / "val", digits / "annotations" / "instances_val.json")
    results = run_detector(detector, split, split.category_ids, EvaluationOptions(workers=0)).results
    assert results == json.loads((tmp_path / "whole" / "detections.json").read_text())


def test_val_categories_are_matched_by_name(trained, digits, tmp_path, caplog):
    """Other ids, another order, one fewer: labels, losses and scores are those of the same names."""
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    used = {annotation["category_id"] for annotation in content["annotations"]}
    unused = next(i for i in (category["id"] for category in content["categories"]) if i not in used)
    new = {category["id"]: 100 - category["id"] for category in content["categories"]}
    content["categories"] = [
        {"id": new[category["id"]], "name": category["name"]}
        for category in content["categories"]
        if category["id"] != unused
    ]
    for annotation in content["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    path.write_text(json.dumps(content))
    with caplog.at_level("INFO"):
        train([*TINY, f"--data.root={root}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=2"])
    note = "val: categories are matched by name: '0', '1', "
    assert note in caplog.text
    ours, theirs = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (tmp_path / "run", trained))
    assert ours[CHECKPOINT_KEY]["categories"] == theirs[CHECKPOINT_KEY]["categories"]  # those of training
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    found, wanted = (json.loads((f / "detections.json").read_text()) for f in (tmp_path / "run", trained))
    wanted = [r | {"category_id": new[r["category_id"]]} for r in wanted if r["category_id"] != unused]
    assert found == wanted
    one, two = (json.loads((f / "report.json").read_text()) for f in (tmp_path / "run", trained))
    assert one["scores"] == two["scores"]
    assert one["notes"][0].startswith(note)
    assert logged(tmp_path / "run", "val/loss") == logged(trained, "val/loss")


def logged(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder))
    log.Reload()
    return [event.value for event in log.Scalars(name)]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_images_have_the_precision_of_the_model(digits, precision):
    data = CocoDataModule(str(digits), train_split="train", val_split="val", workers=0)
    data.trainer = lightning.Trainer(accelerator="cpu", precision=precision, logger=False)
    data.setup("fit")
    sent = next(iter(data.train_dataloader()))
    images, _ = data.on_after_batch_transfer(sent, 0)
    assert {image.dtype for image in images} == {torch.float64 if precision == "64-true" else torch.bfloat16}


HALF = ["16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"]


@pytest.mark.parametrize("precision", HALF)
def test_weights_of_16_bits_are_refused_before_anything_is_read(precision, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(CocoDataModule, "setup", lambda *arguments: pytest.fail("it reads"))
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", f"--trainer.precision={precision}"]
    with pytest.raises(SystemExit, match=rf"^error: --trainer\.precision is {precision}: .*bf16-mixed"):
        train(flags)
    data = CocoDataModule(str(digits), train_split="train", val_split="val")
    with pytest.raises(TrainingError, match="bf16-mixed"):
        training.train(DetectionTask(), data, run_dir=tmp_path / "run", precision=precision)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", HALF[:2])
def test_weights_of_16_bits_by_a_plugin_are_refused(precision, digits, tmp_path):
    data = CocoDataModule(str(digits), train_split="train", val_split="val")
    options = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "plugins": [HalfPrecision(precision)]}
    with pytest.raises(TrainingError, match=rf"{precision}.*bf16-mixed"):
        training.train(DetectionTask(), data, run_dir=tmp_path / "run", **options)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "32-true", "16-mixed", "bf16-mixed"])
def test_other_precisions_are_trained_in_and_gone_on_with(precision, digits, tmp_path):
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", f"--trainer.precision={precision}"]
    flags += ["--data.batch_size=2", "--trainer.max_steps=3", "--trainer.max_epochs=null"]
    train(flags)
    scores = (tmp_path / "run" / "scores.json").read_text()
    train([*flags, "--ckpt_path=last"])
    assert (tmp_path / "run" / "scores.json").read_text() == scores


def test_images_are_sent_as_bytes_and_trained_on_as_floats(digits):
    """A worker sends a fourth; the values are those of the data set."""
    data = CocoDataModule(str(digits), train_split="train", val_split="val", workers=0, batch_size=2)
    data.setup("fit")
    for loader, split in ((data.train_dataloader(), data.train_set), (data.val_dataloader(), data.val_set)):
        sent, targets = next(iter(loader))
        assert {image.dtype for image in sent} == {torch.uint8}
        received, _ = data.on_after_batch_transfer((sent, targets), 0)
        for image, target in zip(received, targets, strict=True):
            expected, _ = split[0, split.image_ids.index(int(target["image_id"]))]
            assert torch.equal(image, expected)
    normalised = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    data = CocoDataModule(str(digits), train_split="train", val_split="val", augmentation=normalised, workers=0)
    data.setup("fit")
    sent, targets = next(iter(data.train_dataloader()))
    assert data.on_after_batch_transfer((sent, targets), 0)[0][0].min() < 0  # floats of a transform stay


def test_objects_of_classes_that_are_not_trained_on_are_missed(digits, tmp_path, caplog):
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"] = [category for category in content["categories"] if category["name"] != "9"]
    known = {category["id"] for category in content["categories"]}
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]
    path.write_text(json.dumps(content))
    data = CocoDataModule(str(root), train_split="train", val_split="val")
    with caplog.at_level("INFO"):
        data.setup("fit")
    nines = [a for a in coco_of(data.val_set.annotations).anns.values() if a["category_id"] not in known]
    assert f"val: objects of classes that are not trained on ('9') count as missed: {len(nines)}" in caplog.text
    assert len(nines) > 0
    assert len(data.val_set.category_ids) == 9
    assert data.val_set.counts().sum() == len(data.val_set.annotations.ids) - len(nines)
    assert max(data.val_set.label_counts()) <= 9


def damaged(digits, root):
    """A copy with images that are cut off, missing and of another size than annotated; of each split their names."""
    shutil.copytree(digits, root)
    train, val = (sorted((root / split).iterdir()) for split in ("train", "val"))
    for path in (train[2], val[1]):
        path.write_bytes(path.read_bytes()[:2000])
    train[4].unlink()
    Image.new("RGB", (7, 5)).save(val[3])
    return [train[2].name, train[4].name], [val[1].name, val[3].name]


def test_broken_images_are_told_before_the_first_step(digits, tmp_path, monkeypatch):
    _, val = damaged(digits, tmp_path / "digits")
    shutil.copytree(digits / "train", tmp_path / "digits" / "train", dirs_exist_ok=True)
    monkeypatch.setattr(DetectionTask, "training_step", lambda *arguments: pytest.fail("it trains"))
    flags = [*TINY, f"--data.root={tmp_path / 'digits'}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=1"]
    with pytest.raises(SystemExit) as stop:
        train(flags)
    assert re.fullmatch(
        rf"error: \S+{val[0]}: cannot be read as an image \(broken or cut off\): .* \(and 1 more image\): python "
        r"tools/check\.py \S+instances_val\.json --images \S+/val shows all; --data\.skip_broken true trains without "
        "them",
        str(stop.value.code),
    )


@pytest.mark.slow
def test_broken_images_are_left_out_of_a_training(digits, tmp_path, capsys, caplog, monkeypatch):
    train_names, val_names = damaged(digits, tmp_path / "digits")
    scored = []

    def noting(truth, results, image_ids, **options):
        scored.append(sorted(truth.imgs[image_id]["file_name"] for image_id in image_ids))
        return evaluate_types(truth, results, image_ids, **options)

    monkeypatch.setattr("detector.training.task.evaluate_types", noting)
    flags = [*TINY, f"--data.root={tmp_path / 'digits'}", "--data.skip_broken=true", "--trainer.max_epochs=1"]
    with caplog.at_level("INFO"):
        train([*flags, f"--run_dir={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for said in (printed, caplog.text, "\n".join(report["notes"])):
        assert re.search(
            rf"train: 2 of 8 images cannot be read and .* objects \(\d+\): {', '.join(train_names)} \(", said
        )
        assert re.search(rf"val: 2 of 4 images cannot be read and .* objects \(\d+\): {', '.join(val_names)} \(", said)
    assert report["about"]["images"] == 2
    assert scored == [sorted({path.name for path in (digits / "val").iterdir()} - set(val_names))]
    # As if they were not in the annotations.
    for split, names in (("train", train_names), ("val", val_names)):
        path = tmp_path / "digits" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["images"] = [image for image in content["images"] if image["file_name"] not in names]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        path.write_text(json.dumps(content))
    train([*flags, f"--run_dir={tmp_path / 'without'}"])
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "without"))
    assert two["notes"] == []
    assert one["scores"] == two["scores"]
    assert one["about"]["objects"] == two["about"]["objects"]
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "without")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_many_images_are_not_opened_unasked(digits, tmp_path, monkeypatch, caplog):
    damaged(digits, tmp_path / "digits")
    options = {"train_split": "val", "val_split": "val"}
    monkeypatch.setattr("detector.training.data.OPENED_PIXELS", 1000)
    with caplog.at_level("INFO"):
        CocoDataModule(str(tmp_path / "digits"), **options).setup("fit")
    assert "The images are not opened before training" in caplog.text
    assert f"python tools/check.py {tmp_path}/digits/annotations/instances_val.json --images {tmp_path}" in caplog.text
    data = CocoDataModule(str(tmp_path / "digits"), skip_broken=True, **options)
    data.setup("fit")
    assert len(data.train_set) == len(data.val_set) == 2


def test_a_broken_image_that_was_not_opened_first_names_the_way_on_without_it(digits, tmp_path, monkeypatch):
    shutil.copytree(digits, tmp_path / "digits")
    path = min((tmp_path / "digits" / "train").iterdir())
    path.write_bytes(path.read_bytes()[:2000])
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr("detector.training.data.OPENED_PIXELS", 1000)
    flags = [*TINY, f"--data.root={tmp_path / 'digits'}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=1"]
    with pytest.raises(SystemExit, match=r"\.png: .*begin a new run: --data\.skip_broken true"):
        train(flags)


def test_other_braces_in_the_pattern_of_a_file(tmp_path):
    data = CocoDataModule(str(tmp_path), annotations="{a}/{split}.json", images="{split}{")
    assert data.folder.image_folder("val") == tmp_path / "val{"
    assert data.folder.annotation_file("val") == tmp_path / "{a}" / "val.json"


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(tmp_path):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    run = Run(tmp_path / "run", tmp_path / "run")
    assert run.checkpoint == last
    assert run.folder == tmp_path / "run"


def test_one_process_opens_the_images_for_all(digits, tmp_path, monkeypatch):
    damaged(digits, tmp_path / "digits")
    sent = []

    def broadcast(found):
        sent.append(found)
        return sent[0]

    for rank in (0, 1):
        data = CocoDataModule(str(tmp_path / "digits"), train_split="train", val_split="val", skip_broken=True)
        strategy = SimpleNamespace(broadcast=broadcast)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy, lightning_module=None)
        data.setup("fit")
        assert (len(data.train_set), len(data.val_set)) == (6, 2)
        monkeypatch.setattr("detector.training.data.open_images", None)  # the second looks at none
    assert sent[1] == []


def test_broken_image_is_named_in_one_sentence(trained, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    broken = sorted((tmp_path / "digits" / "val").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:2000])
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    with pytest.raises(SystemExit) as stop:  # the image is read in another process
        score(
            checkpoint=checkpoint, root=str(tmp_path / "digits"), split="val", output=str(tmp_path / "out"), workers=1
        )
    assert re.fullmatch(
        rf"error: .*{broken.name}: cannot be read as an image .*: --skip_broken true goes .*", str(stop.value.code)
    )
    assert not multiprocessing.active_children()  # at exit Python would wait for them
    report = json.loads((tmp_path / "out" / "report.json").read_text())  # what was found before is not lost
    assert report["about"]["images"] == 2
    assert f"{broken.name}: cannot be read as an image" in report["notes"][0]
    assert "the first 2 of 4 images" in report["notes"][0]


def test_full_disk_leaves_the_scores_that_were_there(trained, digits, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "scores.json").write_text("before")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        score(
            checkpoint=str(trained / "checkpoints" / "last.ckpt"),
            root=str(digits),
            split="val",
            output=str(output),
            workers=0,
        )
    assert (output / "scores.json").read_text() == "before"


def test_loss_that_is_not_finite_stops_with_the_images(digits, tmp_path):
    with pytest.raises(SystemExit, match=r"not finite in step .* on images \["):
        train(
            [
                *TINY,
                f"--data.root={digits}",
                f"--run_dir={tmp_path / 'run'}",
                "--trainer.max_epochs=20",
                "--model.optimizer.lr=1e12",
                "--trainer.gradient_clip_val=null",
            ]
        )


def test_data_is_found_by_the_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTOR_DATA", str(tmp_path))
    assert find_root(None, "bccd") == tmp_path / "bccd"
    assert find_root("here", "bccd") == Path("here")
    monkeypatch.delenv("DETECTOR_DATA")
    with pytest.raises(DataError, match="DETECTOR_DATA"):
        find_root(None, "bccd")
    with pytest.raises(DataError, match="root"):
        find_root(None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (
            "train.py",
            "--model.box_gradient.crop --model.optimizer.lr_rule --data.root --data.augmentation --run_dir --ckpt_path "
            "--save_every scale of the crop path",
        ),
        ("browse.py", "--data.augmentation --output --count --epochs"),
        ("check.py", "--images --quick exit code"),
        ("eval.py", "--checkpoint --crop --split"),
    ],
)
def test_help_teaches(tool, words):
    done = subprocess.run(
        [sys.executable, f"tools/{tool}", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for word in words.split():
        assert word in done.stdout, word
    if tool in ("train.py", "browse.py"):
        assert done.stdout.split("\noptions:")[0].count(f"\n  python tools/{tool} --config configs/") == 2
        # Lightning's trainer, with the most of them, comes last.
        ours = [
            done.stdout.index(f"\n  --{name}") for name in ("run_dir", "data.root", "model.crop", "trainer.devices")
        ]
        assert ours == sorted(ours)


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_parse_and_say_how_to_run_them(config):
    done = subprocess.run(
        [sys.executable, "tools/train.py", "--config", str(config), "--print_config"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "DETECTOR_DATA": "/nowhere"},
    )
    assert done.returncode == 0, done.stderr
    assert config.read_text().startswith("# ")
    assert f"python tools/train.py --config configs/{config.name}" in config.read_text().split("\nrun_dir")[0]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], BoxGradient()),
        (["--model.box_gradient.bound=null"], BoxGradient.exact()),
        (
            ["--model.box_gradient.bound=0.5", "--model.box_gradient.warmup_steps=7"],
            BoxGradient(bound=0.5, warmup_steps=7),
        ),
    ],
    ids=["default", "exact", "both"],
)
def test_the_box_gradient_by_flags(digits, tmp_path, flags, settings):
    cli = parse([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *flags], "")
    assert cli.model.box_gradient == settings


@pytest.mark.slow
def test_losses_in_bfloat16_are_float32s(digits, monkeypatch):
    """On a fixed batch within 3 %, each loss within 10 %: a proposal or two on the other side of an IoU of 0.5.

    All RoIs are taken: another order of the proposals would be another draw.
    """
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        cli = parse(
            [
                *TINY,
                f"--data.root={digits}",
                "--model.detector.weights_backbone=packaged",
                "--model.detector.rois_per_image=100000",
                "--trainer.max_steps=1",
                f"--trainer.precision={precision}",
                f"--run_dir={digits.parent / precision}",
            ],
            "",
        )
        boxes = []
        with monkeypatch.context() as patch:
            patch.setattr(MultiScaleAffineCrop, "forward", noting(MultiScaleAffineCrop.forward, boxes))
            cli.run.train(cli.trainer, cli.model, cli.datamodule)
        losses[precision] = {
            name: value.item() for name, value in cli.trainer.callback_metrics.items() if name.startswith("train/")
        }
        assert boxes
        assert {box.dtype for box in boxes} == {torch.float32}
        assert {p.dtype for p in cli.model.parameters()} == {torch.float32}
    assert losses["32-true"] != losses["bf16-mixed"]
    assert losses["bf16-mixed"]["train/loss"] == pytest.approx(losses["32-true"]["train/loss"], rel=0.03)
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.1)


def noting(forward, boxes):
    def noted(pooler, features, proposals, shapes):
        boxes.extend(proposals)
        return forward(pooler, features, proposals, shapes)

    return noted


def test_browsing_draws_what_training_sees(digits, tmp_path, capsys):
    output = tmp_path / "sheets" / "sheet.png"
    browse_training_images([*TINY, f"--data.root={digits}", "--count=3", "--epochs=2", f"--output={output}"])
    assert str(output) in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.size[0] > 3 * 192
    with pytest.raises(SystemExit, match=r"error: .*nowhere/annotations.*no such file"):
        browse_training_images([*TINY, "--data.root=nowhere"])


def test_scores_of_the_run_include_the_losses(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(trained))
    log.Reload()
    names = set(log.Tags()["scalars"])
    assert {"val/AP", "val/loss", "val/loss_box_reg", "train/loss", "lr-AdamW/pg1", "lr-AdamW/pg2"} <= names
    assert {"box_gradient/ratio", "box_gradient/passed", "box_gradient/iou"} <= names
    assert len(log.Scalars("val/loss")) == 2


def trained_by(images, batch_size, ranks, accumulate, wide=()):
    """A task that is about to train on so many images, and the images of each of its steps in an epoch."""
    orders = [
        TrainingBatches([i in wide for i in range(images)], batch_size, ranks=ranks, rank=rank).batches(0)
        for rank in range(ranks)
    ]
    together = [{image for batch in batches for image in batch} for batches in zip(*orders, strict=True)]
    steps = [set().union(*together[i : i + accumulate]) for i in range(0, len(together), accumulate)]
    task, data = DetectionTask(), SimpleNamespace(batch_size=batch_size, train_set=range(images))
    task.trainer = SimpleNamespace(
        world_size=ranks,
        accumulate_grad_batches=accumulate,
        num_training_batches=len(together),
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        datamodule=data,
    )
    return task, steps


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
@pytest.mark.parametrize("images", [1, 6, 9])
def test_the_images_a_step_are_those_that_it_sees(images, batch_size, ranks, accumulate):
    task, steps = trained_by(images, batch_size, ranks, accumulate, wide=(0, 3, 4))
    assert task.images_per_step == max(map(len, steps)) <= images


def test_a_run_goes_on_with_the_images_a_step_that_it_saw_or_in_earlier_versions_asked_for():
    task, _ = trained_by(6, 64, 1, 1)
    for before, goes_on in ((6, True), (64, True), (32, False)):
        task._resumed = {"optimizer": asdict(task.optimizer), "images_per_step": before, "steps": 10}
        with nullcontext() if goes_on else pytest.raises(TrainingError, match="32 images a step, this run has 6"):
            task._check_resumed(task.images_per_step, 10)


def test_the_learning_rate_is_that_of_the_images_there_are(digits, tmp_path, caplog):
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=1"]
    with caplog.at_level("INFO"):
        train([*flags, "--data.batch_size=64", "--model.optimizer.lr=0.004", "--model.optimizer.lr_batch=16"])
    assert re.search(r"8 images a step .*64, more than train gives.*peak learning rate 0\.002 ", caplog.text)
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last[CHECKPOINT_KEY]["images_per_step"] == 8
    assert {group["max_lr"] for group in last["optimizer_states"][0]["param_groups"]} == {0.002}


@pytest.mark.slow
def test_training_from_python(digits, tmp_path):
    """What the command line does is callable."""
    data = CocoDataModule(str(digits), train_split="train", val_split="val", min_size=96, max_size=256, workers=0)
    detector = DetectorConfig(
        name="fasterrcnn_mobilenet_v3_large_320_fpn", min_size=96, max_size=256, rois_per_image=16
    )
    options = {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "logger": False}
    scores = training.train(DetectionTask(detector), data, run_dir=tmp_path / "run", **options)
    assert scores == json.loads((tmp_path / "run" / "scores.json").read_text())
    again = training.train(DetectionTask(detector), data, run_dir=tmp_path / "run", ckpt_path="last", **options)
    assert again == scores
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_start_of_a_training_says_what_is_wrong_with_its_data(digits, tmp_path, caplog):
    """Images of val that are in train, and anchors that most objects lie outside of."""
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    train_file, val_file = (root / "annotations" / f"instances_{split}.json" for split in ("train", "val"))
    content = json.loads(val_file.read_text())
    content["images"][3] |= json.loads(train_file.read_text())["images"][5] | {"id": content["images"][3]["id"]}
    val_file.write_text(json.dumps(content))
    name = content["images"][3]["file_name"]
    shutil.copy(root / "train" / name, root / "val" / name)
    flags = [*TINY, f"--data.root={root}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=1"]
    with caplog.at_level("INFO"):
        train([*flags, "--model.detector.anchor_sizes=[300, 310, 320, 330, 340]"])
    said = [record.message for record in caplog.records]
    assert (
        said.count(
            "val: 1 of 4 images are byte for byte in train, too, and score too high; tools/check.py --other names them"
        )
        == 1
    )
    (advice,) = [message for message in said if "with any anchor" in message]
    assert re.match(r"train: 100% of \d+ objects", advice)
    assert '--model.detector.anchor_sizes "[' in advice


def test_splits_that_are_large_or_apart_are_not_compared_aloud(digits, monkeypatch, caplog):
    data = CocoDataModule(str(digits), train_split="train", val_split="val")
    with caplog.at_level("INFO"):
        data.setup("fit")
        assert "byte for byte" not in caplog.text
        same = CocoDataModule(str(digits), train_split="val", val_split="val")
        monkeypatch.setattr("detector.training.data.MOST_COMPARED", 7)
        same.setup("fit")
        assert "byte for byte" not in caplog.text
        monkeypatch.setattr("detector.training.data.MOST_COMPARED", 8)
        same.setup("fit")
        assert "val: 4 of 4 images are byte for byte in val, too" in caplog.text


def test_going_on_from_a_checkpoint_of_before_a_setting_was_there():
    """It had the default: this run may have it, and nothing else."""
    names = [
        f"{part}_threshold" for part in ("rpn_nms", "rpn_fg_iou", "rpn_bg_iou", "box_nms", "box_fg_iou", "box_bg_iou")
    ]
    names.append("aspect_ratios")
    data = SimpleNamespace(val_set=SimpleNamespace(category_names=["a"], keypoints=None))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), datamodule=data)

    def go_on(saved, now):
        task = DetectionTask(now)
        task.trainer = trainer
        content = {"detector": saved, "crop": "affine", "categories": [{"id": 1, "name": "a"}], "batch_norm_eps": {}}
        content["box_gradient"] = asdict(BoxGradient())
        task.on_load_checkpoint({CHECKPOINT_KEY: content})

    for settings in (DetectorConfig(name="timm/resnet18", anchor_sizes=(1, 2, 3, 4, 5)), DetectorConfig()):
        whole = asdict(settings)
        old = {name: value for name, value in whole.items() if name not in names}
        go_on(whole, settings)
        go_on(old, settings)
        for name in names:
            value = (1.0, 2.0, 3.0) if name == "aspect_ratios" else 0.25 if "bg" in name else 0.8
            other = replace(settings, **{name: value})
            go_on(asdict(other), other)
            for saved in (whole, old):
                with pytest.raises(TrainingError, match=rf"was trained with {name} .*, this run has "):
                    go_on(saved, other)
    # torchvision's builders took no anchor sizes then: whatever it says, they were the default.
    ignored = replace(DetectorConfig(), anchor_sizes=(1, 2, 3, 4, 5))
    old = {name: value for name, value in asdict(ignored).items() if name not in names}
    go_on(old, DetectorConfig())
    # Where the weights that it began from lay, or are called now, does not matter; that it had some does.
    begun = asdict(DetectorConfig(weights="/somewhere/run"))
    go_on(begun, DetectorConfig(weights="run"))
    for other in (None, "DEFAULT"):
        with pytest.raises(TrainingError, match="was trained with weights one's own, this run has"):
            go_on(begun, DetectorConfig(weights=other))
    with pytest.raises(TrainingError, match=r"was trained with anchor_sizes \(32, 64, 128, 256, 512\), this run has"):
        go_on(old, ignored)


def test_going_on_from_a_checkpoint_with_holes_is_a_sentence():
    task = DetectionTask()
    task.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    saved = {"detector": asdict(DetectorConfig()), "crop": "affine", "category_ids": [1], "category_names": ["a"]}
    message = "^the checkpoint is of an earlier version of this project, or damaged: it has no 'batch_norm_eps'$"
    with pytest.raises(ModelError, match=message):
        task.on_load_checkpoint({CHECKPOINT_KEY: saved})


def test_settings_that_are_not_utf_8_are_refused_in_a_sentence(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_bytes("run_dir: runs/größe\n".encode("cp1252"))
    for flags in (["--config", str(path)], [f"--config={path}"]):
        with pytest.raises(SystemExit, match=r"settings\.yaml: not UTF-8.*save it as UTF-8"):
            train(flags)
