"""Trainings from end to end: what they write, how they resume, and what they read."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from PIL import Image
from torchvision.transforms import v2

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import refused, score
from support.runs import assert_equal
from support.tiny_training import REPOSITORY, TINY, changed_copy, last_checkpoint, tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector import training
from detector.data.batches import TrainingBatches
from detector.data.folder import find_root
from detector.errors import DataError, ModelError
from detector.evaluation import SUMMARY
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps
from detector.pretrained.loading import CHECKPOINT_KEY, load_checkpoint
from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.pooler import MultiScaleAffineCrop
from detector.run_folders import newest_folder, unused_folder
from detector.tools.browse import main as browse
from detector.tools.training_cli import main as train
from detector.training.data import CocoDataModule
from detector.training.failures import TrainingError
from detector.training.run import Run
from detector.training.task import DetectionTask

SPLITS = {"train_split": "train", "val_split": "val"}


def read(path):
    return json.loads(path.read_text())


def set_up(root, **options):
    data = CocoDataModule(str(root), **(SPLITS | {"workers": 0} | options))
    data.setup("fit")
    return data


# What a run writes


def test_a_run_leaves_everything_in_its_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"checkpoints", "config.yaml", "detections.json", "examples.png", "report.html", "report.json"}
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert set(read(trained / "scores.json")) == {*SUMMARY, "AP90"}
    assert set(read(trained / "detections.json")[0]) == {"image_id", "category_id", "bbox", "score"}
    log = EventAccumulator(str(trained)).Reload()
    names = set(log.Tags()["scalars"])
    assert names >= {"val/AP", "val/loss", "val/loss_box_reg", "train/loss", "lr-AdamW/pg1"}
    assert len(log.Scalars("val/loss")) == 2
    (start,) = read(trained / "environment.json")
    assert (start["seed"], start["device"], start["devices"]) == (0, "cpu", 1)
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    if commit.returncode == 0:
        assert start["git"]["commit"] == commit.stdout.strip()


def test_a_checkpoint_holds_plain_values_and_builds_the_detector(trained, tmp_path):
    content = last_checkpoint(trained)
    assert content["epoch"] == 1
    detector = load_checkpoint(trained / "checkpoints" / "last.ckpt")
    assert detector.category_names == [str(digit) for digit in range(10)]
    assert not detector.model.training
    assert_equal({f"model.{name}": value for name, value in detector.model.state_dict().items()}, content["state_dict"])
    # torchvision sets the eps of batch norms for some weights; no state_dict has it.
    eps = content[CHECKPOINT_KEY]["batch_norm_eps"]
    content[CHECKPOINT_KEY]["batch_norm_eps"] = dict.fromkeys(eps, 0.25)
    torch.save(content, tmp_path / "other.ckpt")
    assert set(batch_norm_eps(load_checkpoint(tmp_path / "other.ckpt").model).values()) == {0.25}


def test_the_eval_tool_gives_the_scores_of_the_run(trained, digits, tmp_path):
    options = {"checkpoint": trained, "root": digits, "split": "val", "workers": 0}
    score(**options, output=tmp_path / "affine")
    score(**options, output=tmp_path / "stock", crop="roi_align")
    ours, theirs = (read(folder / "report.json") for folder in (trained, tmp_path / "affine"))
    for name in ("scores", "by_class", "by_size", "images"):
        assert ours[name] == theirs[name], name
    assert read(trained / "scores.json") == read(tmp_path / "affine" / "scores.json")
    ours, theirs = (read(tmp_path / name / "detections.json") for name in ("affine", "stock"))
    assert [r["score"] for r in ours] == pytest.approx([r["score"] for r in theirs], abs=1e-4)


@pytest.mark.slow
def test_a_run_is_repeated_from_its_folder_alone(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTOR_DATA", raising=False)
    train([f"--config={trained / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}"])
    assert_equal(last_checkpoint(tmp_path / "again")["state_dict"], last_checkpoint(trained)["state_dict"])


def test_folders_are_numbered(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    assert unused_folder(folder) == newest_folder(folder) == folder  # an empty one counts as unused
    (folder / "scores.json").write_text("{}")
    assert (unused_folder(folder), newest_folder(folder)) == (tmp_path / "run-2", folder)
    for name in ("run-2", "run-10", "run-x", "runs-11"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "run-12").write_text("a file")
    monkeypatch.chdir(tmp_path / "run-2")
    assert unused_folder(Path(".")) == unused_folder(Path("checkpoints", "..")).resolve() == tmp_path / "run-2-2"
    assert (unused_folder(folder), newest_folder(folder)) == (tmp_path / "run-11", tmp_path / "run-10")


def test_a_second_run_says_where_it_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        Run(".")
        Run("runs/new")
    assert "holds a run" not in caplog.text
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.json").write_text("{}")
    with caplog.at_level("INFO"):
        assert Run("run").folder == Path("run-2")
    assert caplog.text.count("run-2") == 1


# Stopping and resuming


def test_ctrl_c_ends_the_step_and_the_run_resumes_with_the_same_settings_alone(
    digits, tmp_path, monkeypatch, capsys, ctrl_c
):
    folder, step = tmp_path / "run", DetectionTask.training_step
    flags = ["--data.batch_size=2", "--trainer.max_epochs=2"]

    def interrupt(task, batch, number):
        if (task.current_epoch, number) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return step(task, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "training_step", interrupt)
        with pytest.raises(SystemExit) as stop, pytest.warns(match="STARTING FROM THE BEGINNING"):
            tiny_run(digits, folder, *flags, "--ckpt_path", "last")
    assert stop.value.code == 130
    last = folder / "checkpoints" / "last.ckpt"
    assert f"--ckpt_path {last}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (last_checkpoint(folder)["epoch"], last_checkpoint(folder)["global_step"]) == (1, 6)
    for words, flag in (
        ("images a step .* 2, .* 4", "--trainer.accumulate_grad_batches=2"),
        ("images per batch 2, .* 1", "--data.batch_size=1"),
        ("fpn_channels 16, .* 32.*weights", "--model.detector.fpn_channels=32"),
        ("steps 8, .* 12", "--trainer.max_epochs=3"),
        ("seed 0, .* 1", "--data.seed=1"),
    ):
        with refused(words, code=1):
            tiny_run(digits, folder, *flags, f"--ckpt_path={last}", flag)
    tiny_run(digits, folder, *flags, f"--ckpt_path={last}")
    assert (last_checkpoint(folder)["epoch"], last_checkpoint(folder)["global_step"]) == (1, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_browse_shows_the_augmentation_of_the_seed(digits, tmp_path):
    sheets, settings = [], [*TINY, f"--data.root={digits}", "--data.min_size=[64, 80, 96]"]
    for seed in (0, 0, 1):
        output = tmp_path / f"{len(sheets)}.png"
        assert browse([*settings, f"--output={output}", f"--seed_everything={seed}"]) == 0
        sheets.append(output.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    with refused("--output 'sheet'"):
        browse([*settings, "--output=sheet"])


@pytest.mark.parametrize("setting", [{"min_size": 0}, {"min_size": [64, -5]}, {"max_size": 10_001}])
def test_sizes_out_of_range_are_refused(digits, setting):
    with pytest.raises(DataError) as error:
        CocoDataModule(str(digits), **setting)
    assert error.value.setting == next(iter(setting))


def test_folders_and_splits_that_do_not_exist_are_named(digits, tmp_path):
    with pytest.raises(DataError) as error:
        set_up(tmp_path / "none")
    assert (error.value.setting, error.value.value) == ("root", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"val2017.* instances_train.json, instances_val.json"):
        set_up(digits, val_split="val2017")


def test_ctrl_c_while_scoring_stops_at_once(digits, tmp_path, monkeypatch, ctrl_c):
    original, scored = DetectionTask.validation_step, []

    def interrupt(task, batch, number):
        os.kill(os.getpid(), signal.SIGINT)
        scored.append(number)
        original(task, batch, number)

    monkeypatch.setattr(DetectionTask, "validation_step", interrupt)
    with pytest.raises(SystemExit):
        tiny_run(digits, tmp_path / "run", "--data.batch_size=2", "--trainer.max_epochs=1")
    assert scored == [0]
    assert last_checkpoint(tmp_path / "run")["global_step"] == 3  # a step before the validation


@pytest.mark.slow
def test_a_finished_run_is_only_scored_again(digits, tmp_path):
    folder, flags = tmp_path / "run", ("--trainer.max_epochs=1", "--model.optimizer.ema=0.9")
    tiny_run(digits, folder, *flags)
    found = (folder / "detections.json").read_text()
    (folder / "detections.json").unlink()
    tiny_run(digits, folder, *flags, "--ckpt_path=last")
    assert (folder / "detections.json").read_text() == found
    # From another checkpoint than the last one, in a folder of its own.
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    tiny_run(digits, folder, *flags, f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}")
    assert (tmp_path / "run-2" / "scores.json").exists()
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_run_without_a_step_is_refused(digits, tmp_path):
    with refused("first step.*max_time", code=1):
        tiny_run(digits, tmp_path / "run", "--trainer.max_time=00:00:00:00")
    with refused("--trainer.limit_train_batches", code=1):
        tiny_run(digits, tmp_path / "run", "--trainer.limit_train_batches=0")
    assert not (tmp_path / "run").exists()


def test_the_ids_of_images_stay_on_the_host():
    """Each step reads them. On a GPU that would wait for the step before it."""
    target = {"boxes": torch.zeros(1, 4), "image_id": torch.tensor(7)}
    images, (moved,) = CocoDataModule("folder").transfer_batch_to_device(
        ([torch.rand(3, 8, 8)], [target]), torch.device("meta"), 0
    )
    assert images[0].is_meta
    assert moved["boxes"].is_meta
    assert int(moved["image_id"]) == 7


def test_other_files_are_refused_as_checkpoints(trained, digits, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, path)
    for _ in range(2):
        with refused(r"other\.ckpt", code=1):
            tiny_run(digits, tmp_path / "run", f"--ckpt_path={path}")
        path.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes()[:9999])
    task = DetectionTask()
    saved = {"detector": last_checkpoint(trained)[CHECKPOINT_KEY]["detector"], "crop": "affine", "categories": []}
    with pytest.raises(ModelError, match="batch_norm_eps"):
        task.on_load_checkpoint({CHECKPOINT_KEY: saved})


@pytest.mark.parametrize(
    ("before", "now", "setting"),
    [
        ({}, {"detector": DetectorConfig(box_nms_threshold=0.8)}, "detector.box_nms_threshold"),
        ({"crop": "roi_align"}, {"crop": "roi_align", "box_gradient": BoxGradient(bound=0.5)}, None),
        ({}, {"box_gradient": BoxGradient(bound=0.5)}, "box_gradient.bound"),
        ({"detector": DetectorConfig(weights="/a/run")}, {"detector": DetectorConfig(weights="run")}, None),
        ({"detector": DetectorConfig(weights="/a/run")}, {}, "detector.weights"),
    ],
)
def test_settings_that_must_not_change_on_resuming(before, now, setting):
    split = SimpleNamespace(category_ids=[1], category_names=["a"], keypoints=None)
    ours, theirs = DetectionTask(**before), DetectionTask(**now)
    for task in (ours, theirs):
        task.trainer, task.model = SimpleNamespace(datamodule=SimpleNamespace(train_set=split)), torch.nn.Identity()
    if setting is None:
        assert ours._model_settings() == theirs._model_settings()
    else:
        with pytest.raises(TrainingError, match=rf"with {setting} "):
            training.failures.refuse_changes(ours._model_settings(), theirs._model_settings())


@pytest.mark.slow
def test_a_finished_run_is_trained_longer_from_its_weights(trained, digits, tmp_path, monkeypatch):
    """It begins where the first one ended, and no longer needs it once there is a checkpoint."""
    old, last = tmp_path / "old", tmp_path / "old" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    content = last_checkpoint(trained)
    content[CHECKPOINT_KEY]["batch_norm_eps"] = dict.fromkeys(content[CHECKPOINT_KEY]["batch_norm_eps"], 0.01)
    torch.save(content, last)
    before, step, first = load_checkpoint(last).model.state_dict(), DetectionTask.training_step, {}
    flags = [f"--model.detector.weights={old}", "--trainer.max_epochs=2", "--model.optimizer.ema=0.5", "--save_every=1"]

    def stop(task, batch, number):
        if task.global_step == 2:
            raise KeyboardInterrupt
        for name, value in task.model.named_parameters():
            first.setdefault(name, value.detach().clone())
        return step(task, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "training_step", stop)
        with pytest.raises(SystemExit):
            tiny_run(digits, tmp_path / "run", *flags)
    assert_equal(first, {name: before[name] for name in first})
    shutil.rmtree(old)
    run = tiny_run(digits, tmp_path / "run", *flags, "--ckpt_path=last")
    assert last_checkpoint(run)["global_step"] == 4
    assert set(batch_norm_eps(load_checkpoint(run / "checkpoints" / "last.ckpt").model).values()) == {0.01}


# Data


def test_val_categories_are_matched_by_name(digits, tmp_path):
    """They have other ids, in another order."""

    def change(content):
        content["categories"] = [one | {"id": 100 - one["id"]} for one in content["categories"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = 100 - annotation["category_id"]

    ours, theirs = set_up(changed_copy(digits, tmp_path / "digits", "val", change)), set_up(digits)
    assert ours.val_set.category_ids == [100 - category for category in theirs.val_set.category_ids]
    assert ours.val_set.category_names == theirs.val_set.category_names
    for (_, one), (_, other) in zip(ours.val_set, theirs.val_set, strict=True):
        assert torch.equal(one["labels"], other["labels"])


def test_objects_of_classes_that_are_not_trained_on_are_missed(digits, tmp_path):
    def without_nines(content):
        (nine,) = (category["id"] for category in content["categories"] if category["name"] == "9")
        content["categories"] = [one for one in content["categories"] if one["id"] != nine]
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] != nine]

    data = set_up(changed_copy(digits, tmp_path / "digits", "train", without_nines))
    nines = sum(i not in data.val_set.category_ids for i in data.val_set.annotations.category_ids.tolist())
    assert nines > 0
    assert any("'9'" in note and str(nines) in note for note in data.notes)
    assert data.val_set.counts().sum() == len(data.val_set.annotations.ids) - nines


def test_data_without_a_box_or_a_common_category_is_refused(digits, tmp_path):
    def rename(content):
        for category in content["categories"]:
            category["name"] = f"number {category['name']}"

    empty = changed_copy(digits, tmp_path / "empty", "train", lambda content: content["annotations"].clear())
    with pytest.raises(DataError, match=r"instances_train\.json"):
        set_up(empty)
    empty = changed_copy(digits, tmp_path / "no-val", "val", lambda content: content["annotations"].clear())
    with pytest.raises(DataError, match=r"instances_val\.json"):
        set_up(empty)
    with pytest.raises(DataError, match=r"val: .*number 0"):
        set_up(changed_copy(digits, tmp_path / "other", "train", rename))


def test_images_are_sent_as_bytes_and_trained_on_as_floats(digits):
    data = set_up(digits, batch_size=2)
    for loader, split in ((data.train_dataloader(), data.train_set), (data.val_dataloader(), data.val_set)):
        sent, targets = next(iter(loader))
        assert {image.dtype for image in sent} == {torch.uint8}
        received, _ = data.on_after_batch_transfer((sent, targets), 0)
        for image, target in zip(received, targets, strict=True):
            expected, _ = split[0, split.image_ids.index(int(target["image_id"]))]
            assert torch.equal(image, expected)
    data = set_up(digits, augmentation=[v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    batch = next(iter(data.train_dataloader()))
    assert data.on_after_batch_transfer(batch, 0)[0][0].min() < 0  # floats of a transform stay


@pytest.fixture
def damaged(digits, tmp_path):
    """A copy with images that are cut off, missing and of another size, and their names, by split."""
    root = shutil.copytree(digits, tmp_path / "damaged")
    names, val = (sorted((root / split).iterdir()) for split in ("train", "val"))
    for path in (names[2], val[1]):
        path.write_bytes(path.read_bytes()[:2000])
    names[4].unlink()
    Image.new("RGB", (7, 5)).save(val[3])
    return root, {"train": {names[2].name, names[4].name}, "val": {val[1].name, val[3].name}}


def test_broken_images_end_a_run_before_its_first_step(damaged, digits, tmp_path, monkeypatch):
    root, names = damaged
    shutil.copytree(digits / "train", root / "train", dirs_exist_ok=True)
    monkeypatch.setattr(DetectionTask, "training_step", lambda *arguments: pytest.fail("it trains"))
    with refused(rf"{min(names['val'])}: .*1 more image.*tools/check\.py \S+instances_val\.json.*skip_broken", code=1):
        tiny_run(root, tmp_path / "run", "--trainer.max_epochs=1")


@pytest.mark.slow
def test_broken_images_are_left_out_of_a_training(damaged, tmp_path):
    run = tiny_run(damaged[0], tmp_path / "run", "--data.skip_broken=true", "--trainer.max_epochs=1")
    report = read(run / "report.json")
    assert (report["about"]["images"], len(report["notes"])) == (2, 2)


def test_many_images_are_opened_only_on_request(damaged, tmp_path, monkeypatch, caplog):
    root, _ = damaged
    monkeypatch.setattr("detector.training.data.MAX_OPENED_PIXELS", 1000)
    with caplog.at_level("INFO"):
        set_up(root, train_split="val")
    assert f"tools/check.py {root}/annotations/instances_val.json --images {root}/val" in caplog.text
    assert len(set_up(root, train_split="val", skip_broken=True).train_set) == 2
    with refused("skip_broken true", code=1):  # when it is read
        tiny_run(root, tmp_path / "run", "--data.train_split=val", "--trainer.max_epochs=1")


def test_one_process_opens_the_images_for_all(damaged, monkeypatch):
    sent = []

    def broadcast(found):
        sent.append(found)
        return sent[0]

    for rank in (0, 1):
        data = CocoDataModule(str(damaged[0]), **SPLITS, skip_broken=True)
        strategy = SimpleNamespace(broadcast=broadcast)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy, lightning_module=None)
        data.setup("fit")
        assert (len(data.train_set), len(data.val_set)) == (6, 2)
        monkeypatch.setattr("detector.data.split_checks.open_images", None)  # the second process opens none
    assert sent[1] == []


def test_shared_images_and_unsuitable_anchors_are_reported(digits, tmp_path, monkeypatch, caplog):
    flags = ("--data.train_split=val", "--trainer.max_steps=1", "--trainer.limit_val_batches=1")
    with caplog.at_level("INFO"):
        tiny_run(digits, tmp_path / "run", *flags, "--model.detector.anchor_sizes=[300, 310, 320, 330, 340]")
    assert caplog.text.count("val: 4 of 4 images are byte for byte") == 1
    assert re.search(r"val: 100% of \d+ objects .*anchors", caplog.text)
    caplog.clear()
    monkeypatch.setattr("detector.data.split_checks.MAX_COMPARED_IMAGES", 7)
    with caplog.at_level("INFO"):
        set_up(digits, train_split="val")
    assert "byte for byte" not in caplog.text


def test_the_root_is_found_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTOR_DATA", str(tmp_path))
    assert find_root(None, "bccd") == tmp_path / "bccd"
    assert str(find_root("here", "bccd")) == "here"
    monkeypatch.delenv("DETECTOR_DATA")
    for dataset in ("bccd", None):
        with pytest.raises(DataError):
            find_root(None, dataset)


# Settings


@pytest.mark.parametrize(
    ("images", "batch_size", "ranks", "accumulate"),
    [(1, 2, 1, 1), (6, 2, 1, 2), (6, 4, 2, 1), (9, 2, 2, 2), (9, 4, 1, 4), (9, 64, 1, 4), (9, 1, 2, 4)],
)
def test_the_images_a_step_are_those_that_it_sees(images, batch_size, ranks, accumulate):
    wide = [index in (0, 3, 4) for index in range(images)]
    orders = [TrainingBatches(wide, batch_size, ranks=ranks, rank=rank).batches(0) for rank in range(ranks)]
    together = [{image for batch in batches for image in batch} for batches in zip(*orders, strict=True)]
    steps = [set().union(*together[i : i + accumulate]) for i in range(0, len(together), accumulate)]
    task = DetectionTask()
    task.trainer = SimpleNamespace(
        limit_train_batches=1.0,
        world_size=ranks,
        accumulate_grad_batches=accumulate,
        num_training_batches=len(together),
        max_epochs=1,
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        datamodule=SimpleNamespace(batch_size=batch_size, train_set=range(images)),
    )
    assert task.plan() == (max(map(len, steps)), len(steps), len(steps))


@pytest.mark.parametrize("given", ["option", "plugin"])
def test_weights_of_16_bits_are_refused_before_anything_is_read(given, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(CocoDataModule, "setup", lambda *arguments: pytest.fail("it reads"))
    option = {"precision": "16-true"} if given == "option" else {"plugins": [HalfPrecision("16-true")]}
    with pytest.raises(TrainingError) as refusal:
        training.train(DetectionTask(), CocoDataModule(str(digits)), run_dir=tmp_path / "run", logger=False, **option)
    assert (refusal.value.setting, refusal.value.value) == ("precision", "16-true")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "16-mixed", "bf16-mixed"])
def test_other_precisions(precision, digits, tmp_path, monkeypatch):
    forward, dtypes = MultiScaleAffineCrop.forward, set()

    def note(pooler, features, boxes, sizes):
        dtypes.update(one.dtype for one in boxes)
        return forward(pooler, features, boxes, sizes)

    monkeypatch.setattr(MultiScaleAffineCrop, "forward", note)
    tiny_run(digits, tmp_path / "run", f"--trainer.precision={precision}", "--trainer.max_steps=2")
    full = torch.float64 if precision == "64-true" else torch.float32
    assert full in dtypes
    assert dtypes <= {full, torch.float32}  # scored in 32 bits
    weights = last_checkpoint(tmp_path / "run")["state_dict"].values()
    assert {value.dtype for value in weights if value.is_floating_point()} == {full}


def test_training_from_python(digits, tmp_path):
    data = CocoDataModule(str(digits), **SPLITS, min_size=64, max_size=128, workers=0)
    tiny = {"min_size": 64, "max_size": 128, "fpn_channels": 8, "box_head_size": 16}
    task = DetectionTask(DetectorConfig(name="timm/test_efficientnet", weights_backbone=None, **tiny))
    options = {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "logger": False}
    scores = training.train(task, data, run_dir=tmp_path / "run", **options)
    assert scores == read(tmp_path / "run" / "scores.json")


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_parse(config, monkeypatch, capsys):
    monkeypatch.setenv("DETECTOR_DATA", "/nowhere")
    with pytest.raises(SystemExit) as stop:
        train(["--config", str(config), "--print_config"])
    assert stop.value.code == 0
    settings = capsys.readouterr().out
    assert "box_gradient" in settings
    # Settings of a refinement that is trained with the detector.
    assert ("train_iterations" in settings) == (config.stem in ("quickstart", "bccd", "coco_r50_fpn_1x_refined"))
    assert f"python tools/train.py --config configs/{config.name}" in config.read_text().split("\nrun_dir")[0]
