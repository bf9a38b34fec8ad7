"""tools/refine.py from end to end, and a refinement trained with its detector from the start."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import refused, score
from support.runs import assert_equal, run_alone
from support.tiny_detector import SETTINGS, tiny_checkpoint
from support.tiny_training import REPOSITORY, TINY, changed_copy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector import training
from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.errors import DataError, ModelError
from detector.models.build import build_detector
from detector.pretrained.initial_weights import load_initial_weights
from detector.pretrained.loading import load_checkpoint, load_detector
from detector.rcnn.box_gradient import BoxGradient
from detector.refinement import RefinementConfig, add_refinement
from detector.tools.refine import _run_dir, main
from detector.tools.training_cli import main as train
from detector.training.failures import Interrupted, TrainingError
from detector.training.refinement import RefinementData, RefinementTask, RepeatedBatches

DIGITS = [str(digit) for digit in range(10)]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
LEARNED = "model.roi_heads.refinement.head.deltas.weight"


@pytest.fixture(autouse=True, scope="module")
def command_line():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["refine.py"])
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 4, "val": 3})
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory, digits):
    """The checkpoint of a detector whose AP on val is neither 0 nor 1: the truth is almost what it detects."""
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(tiny_checkpoint(names=DIGITS, ids=list(range(1, 11))), folder / "last.ckpt")
    score(checkpoint=folder / "last.ckpt", root=digits, split="val", output=folder / "eval", workers=0)
    best = {}
    for result in json.loads((folder / "eval" / "detections.json").read_text()):
        known = best.setdefault(result["image_id"], result)
        best[result["image_id"]] = max(known, result, key=lambda one: one["score"])
    path = digits / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = []
    for number, result in enumerate(best.values(), start=1):
        x, y, width, height = result["bbox"]
        same = {key: result[key] for key in ("image_id", "category_id")}
        content["annotations"].append({"id": number, "bbox": [x, y, 0.9 * width, height], **same})
    path.write_text(json.dumps(content))
    return folder / "last.ckpt"


def refine(base, digits, **flags):
    """Run the tool."""
    values = {"checkpoint": base, "root": digits, "train_split": "train", "split": "val", "device": "cpu"}
    values |= {"workers": 0, "max_steps": 2} | flags
    text = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]
    return main(text)


def fit(base, digits, folder, *, steps=2, config=None, **options):
    """Train from Python."""
    task = RefinementTask(load_checkpoint(base), config or RefinementConfig(iterations=1))
    val = CocoDetection(digits / "val", digits / "annotations" / "instances_val.json")
    splits = {"root": str(digits), "train_split": "train", "val_split": "val"}
    data = RefinementData(val, steps=steps, workers=0, batch_size=2, **splits)
    return training.train(task, data, run_dir=folder, **(QUIET | options))


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def of_detector(weights):
    return {name: value for name, value in weights.items() if ".refinement." not in name}


@pytest.fixture(scope="module")
def refined(base, digits):
    """The folder of a finished run, at its default place."""
    assert refine(base, digits) == 0
    return base.parents[1].with_name("tiny-refined")


def test_a_run_leaves_a_refined_detector_and_its_scores(refined, base, digits, tmp_path):
    names = {path.name for path in refined.iterdir()}
    assert names >= {"checkpoints", "scores.json", "detections.json", "report.json", "report.html"}
    compared = json.loads((refined / "report.json").read_text())["refinement"]
    for when, checkpoint in (("before", base), ("after", refined)):
        score(checkpoint=checkpoint, root=digits, split="val", output=tmp_path / when, workers=0)
        scores = json.loads((tmp_path / when / "scores.json").read_text())
        assert compared[when]["scores"]["AP"] == scores["AP"]
        assert 0 < scores["AP"] < 1
    assert json.loads((refined / "scores.json").read_text()) == scores
    load_detector(refined).save(tmp_path / "saved")
    ours, theirs = load_detector(refined), load_detector(tmp_path / "saved")
    assert_equal(ours.model.state_dict(), theirs.model.state_dict())
    assert ours.refinement.config == theirs.refinement.config


def test_the_detector_stays_the_same(refined, base):
    ours = weights_of(refined / "checkpoints" / "last.ckpt")
    assert_equal(of_detector(ours), weights_of(base))
    assert ours[LEARNED].abs().max() > 0
    names = dict(RefinementTask(load_checkpoint(base)).model.named_parameters())
    assert {name for name, value in names.items() if value.requires_grad} == {n for n in names if ".refinement." in n}


@pytest.mark.slow
def test_a_given_checkpoint_is_not_changed_when_nothing_is_left_to_train(refined, base, digits, tmp_path):
    mine = shutil.copy(refined / "checkpoints" / "last.ckpt", tmp_path / "mine.ckpt")
    before = mine.read_bytes()
    assert refine(base, digits, run_dir=tmp_path / "run", ckpt_path=mine) == 0
    assert mine.read_bytes() == before
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["about"]["model"] == str(last)
    assert_equal(weights_of(last), weights_of(mine))


def test_batches_of_several_epochs():
    options = {"wide": [True] * 5, "batch_size": 2, "seed": 3, "number": 7}
    whole = RepeatedBatches(**options)
    assert len(list(whole)) == len(whole) == 7
    assert [[index for _, index in batch] for batch in whole] == whole.batches(0)
    assert [batch[0][0] for batch in whole] == [place // 2 for place in range(7)]
    assert list(RepeatedBatches(**options, start=1)) == list(whole)[1:]
    options["batch_size"] = 1
    one, other = (RepeatedBatches(**options, ranks=2, rank=rank) for rank in (0, 1))
    assert [a + b for a, b in zip(one, other, strict=True)] == list(whole)


def test_an_interrupted_run_goes_on_exactly_and_with_the_settings_of_training(base, digits, tmp_path, monkeypatch):
    fit(base, digits, tmp_path / "whole", steps=3)
    last, step = tmp_path / "run" / "checkpoints" / "last.ckpt", RefinementTask.training_step

    def interrupt(task, batch, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(task, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(RefinementTask, "training_step", interrupt)
        with pytest.raises(Interrupted) as stop:
            fit(base, digits, tmp_path / "run", steps=3, save_every=1)
    assert stop.value.checkpoint == last
    other = torch.load(base, weights_only=True)
    other["state_dict"]["model.roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(TrainingError, match="another detector"):
        fit(tmp_path / "other.ckpt", digits, tmp_path / "run", steps=3, ckpt_path="last")
    with pytest.raises(TrainingError, match=r"refinement\.train_iterations 3, this run has 2"):
        fit(base, digits, tmp_path / "run", steps=3, ckpt_path="last", config=RefinementConfig(train_iterations=2))
    config = RefinementConfig(iterations=3, ascent_steps=1, iou_power=0.0)  # of test time alone
    fit(base, digits, tmp_path / "run", steps=3, config=config, ckpt_path="last")
    assert_equal(weights_of(last), weights_of(tmp_path / "whole" / "checkpoints" / "last.ckpt"))
    assert load_checkpoint(last).refinement.config == config


@pytest.mark.slow
def test_mixed_precision_keeps_the_weights_in_32_bits(base, digits, tmp_path):
    fit(base, digits, tmp_path / "run", precision="bf16-mixed", deterministic=True)
    weights = weights_of(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert weights[LEARNED].abs().max() > 0


@pytest.mark.slow
def test_an_average_of_the_weights(base, digits, tmp_path):
    flags = {"ema": 0.9, "box_gradient": "off"}
    assert refine(base, digits, run_dir=tmp_path / "run", **flags) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert not torch.equal(content["state_dict"][LEARNED], content["current_model_state"][LEARNED])
    assert_equal(of_detector(content["state_dict"]), weights_of(base))
    assert load_checkpoint(last).refinement.config.box_gradient == BoxGradient(crop=0, coder=0)


@pytest.mark.slow
def test_one_image_with_another_class_is_enough(base, digits, tmp_path):
    def change(content):
        first = content["images"][0]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first["id"]]
        corner, whole = content["annotations"][:2]
        corner["bbox"], whole["bbox"] = [0, 0, 5, 7], [0, 0, first["width"], first["height"]]
        content["categories"] = [content["categories"][0] | {"name": "thing"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = content["categories"][0]["id"]

    fit(base, changed_copy(digits, tmp_path / "data", "train", change), tmp_path / "run")
    assert weights_of(tmp_path / "run" / "checkpoints" / "last.ckpt")[LEARNED].abs().max() > 0


def test_a_run_folder_is_found_from_inside_of_it(refined, monkeypatch):
    monkeypatch.chdir(refined)
    wanted = refined.with_name(f"{refined.name}-refined")
    for name in (".", "checkpoints/last.ckpt", "checkpoints/.."):
        assert _run_dir(name, None).resolve() == wanted


def test_shared_images_are_noted(digits):
    val = CocoDetection(digits / "val", digits / "annotations" / "instances_val.json")
    data = RefinementData(val, root=str(digits), train_split="val", val_split="val", workers=0)
    data.setup()
    assert [note for note in data.notes if "byte for byte" in note]


def test_mistakes(base, refined, digits, tmp_path):
    empty = changed_copy(digits, tmp_path / "empty", "train", lambda content: content["annotations"].clear())
    with pytest.raises(DataError, match=r"instances_train\.json"):
        fit(base, empty, tmp_path / "run")
    for words, code, flags in (
        (r"instances_nosuch\.json", 1, {"train_split": "nosuch"}),
        (r"instances_nosuch\.json", 1, {"split": "nosuch"}),
        ("checkpoint", 2, {"model": "fasterrcnn_resnet50_fpn"}),
        ("nosuch.ckpt", 1, {"checkpoint": "nosuch.ckpt"}),
        ("--checkpoint .*refinement", 1, {"checkpoint": refined}),
        ("lr", 2, {"lr": 0}),
        ("iterations", 1, {"iterations": 101}),
    ):
        with refused(words, code=code):
            refine(base, digits, **({"run_dir": tmp_path / "run"} | flags))
    assert not (tmp_path / "run").exists()
    detector = load_checkpoint(base)
    detector.settings = None
    with pytest.raises(ModelError):
        RefinementTask(detector)


@pytest.mark.slow
def test_a_detector_is_trained_with_its_refinement_from_the_start(digits, tmp_path):
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=2"]
    flags += ['--model.refinement={"iterations": 1, "train_iterations": 2}', "--save_every=1"]
    train(flags)
    detector = load_detector(tmp_path / "run")
    assert detector.refinement.config == RefinementConfig(iterations=1, train_iterations=2)
    assert detector.model.roi_heads.refinement.head.deltas.weight.abs().max() > 0
    for setting, value in (("refinement.train_iterations", 3), ("refinement", "null")):
        with refused(f"with {setting} ", code=1):
            train([*flags, "--ckpt_path=last", f"--model.{setting}={value}"])
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("loss_refinement_box", "loss_refinement_iou", "loss_classifier_again"):
        assert [event.step for event in log.Scalars(f"train/{name}")] == [0, 1]
        assert f"val/{name}" not in log.Tags()["scalars"]
    # A new run from its weights, without a refinement.
    begin = [*TINY, f"--data.root={digits}", f"--model.detector.weights={tmp_path / 'run'}", "--trainer.max_steps=1"]
    train([*begin, f"--run_dir={tmp_path / 'without'}", "--trainer.limit_val_batches=1"])
    assert load_detector(tmp_path / "without").refinement is None


@pytest.mark.parametrize("source", ["refined", "unrefined"])
def test_a_training_begins_with_the_refinement_of_its_weights_or_with_their_box_head(refined, base, source):
    weights = refined / "checkpoints" / "last.ckpt" if source == "refined" else base
    settings = replace(SETTINGS, weights=str(weights))
    torch.manual_seed(1)
    model = add_refinement(build_detector(settings, 10, pretrained=False), RefinementConfig())
    load_initial_weights(model, settings, DIGITS)
    if source == "refined":
        ours, theirs = model.roi_heads.state_dict(), load_detector(refined).model.roi_heads.state_dict()
        assert_equal(dict(ours), dict(theirs))
    else:
        assert_equal(model.roi_heads.refinement.head.trunk.state_dict(), model.roi_heads.box_head.state_dict())


@pytest.mark.slow
def test_two_processes(base, digits, tmp_path):
    command = [sys.executable, "tools/refine.py", f"--checkpoint={base}", f"--root={digits}", "--train_split=train"]
    command += ["--split=val", "--device=cpu", "--workers=0", "--max_steps=2", "--batch_size=2", "--devices=2"]
    command += [f"--run_dir={tmp_path / 'run'}"]
    done = run_alone(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("The run is in") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 4 in content["affine_crop_rcnn"]["resume"]["training"].values()  # images a step
    assert_equal(of_detector(content["state_dict"]), weights_of(base))
