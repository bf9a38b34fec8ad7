"""tools/refine.py from end to end on a handful of digits, and a refinement that is trained beside its detector."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import lightning
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import refused, score
from support.runs import assert_equal
from support.tiny_detector import SETTINGS, tiny_checkpoint
from support.tiny_training import REPOSITORY, TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.errors import ModelError
from detector.models.build import build_detector
from detector.pretrained.initial_weights import load_initial_weights
from detector.pretrained.loading import load_checkpoint, load_detector
from detector.rcnn.box_gradient import BoxGradient
from detector.refinement import RefinementConfig, add_refinement
from detector.tools.predict import main as predict
from detector.tools.refine import main
from detector.tools.training import train
from detector.training.failures import Interrupted, TrainingError
from detector.training.refinement_data import RefinementData, RepeatedBatches
from detector.training.refinement_run import train_refinement
from detector.training.refinement_task import RefinementTask

DIGITS = [str(digit) for digit in range(10)]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True, scope="module")
def command_line():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(sys, "argv", ["refine.py"])
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 26, "val": 3})
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory, digits):
    """The checkpoint of a run, of which val's truth is what it detects, a little off: its AP is neither 0 nor 1."""
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(tiny_checkpoint(names=DIGITS, ids=list(range(1, 11))), folder / "last.ckpt")
    score(checkpoint=folder / "last.ckpt", root=digits, split="val", output=folder / "eval", workers=0)
    path = digits / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    best = {}
    for result in json.loads((folder / "eval" / "detections.json").read_text()):
        known = best.setdefault(result["image_id"], result)
        best[result["image_id"]] = max(known, result, key=lambda one: one["score"])
    content["annotations"] = [
        {"id": n, "image_id": r["image_id"], "category_id": r["category_id"], "bbox": [*r["bbox"][:2], w, r["bbox"][3]]}
        for n, r in enumerate(best.values(), start=1)
        for w in [0.9 * r["bbox"][2]]
    ]
    path.write_text(json.dumps(content))
    return folder / "last.ckpt"


def refine(base, digits, **flags):
    values = {"checkpoint": base, "root": digits, "train_split": "train", "split": "val", "device": "cpu"}
    values |= {"workers": 0, "max_steps": 3} | flags
    text = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]
    return main(text)


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def refined(base, digits):
    """The folder of a finished run, where it goes by default."""
    assert refine(base, digits) == 0
    return base.parents[1].with_name("tiny-refined")


def test_a_run_leaves_a_refined_detector_and_both_scores(refined, base, digits, tmp_path):
    names = {path.name for path in refined.iterdir()}
    assert names >= {"checkpoints", "scores.json", "detections.json", "report.json", "report.html"}
    after = json.loads((refined / "scores.json").read_text())
    score(checkpoint=base, root=digits, split="val", output=tmp_path / "base", workers=0)
    score(checkpoint=refined, root=digits, split="val", output=tmp_path / "refined", workers=0)
    before = json.loads((tmp_path / "base" / "scores.json").read_text())
    assert after == json.loads((tmp_path / "refined" / "scores.json").read_text())
    assert 0 < before["AP"] < 1
    report = json.loads((refined / "report.json").read_text())
    for when, scores in (("before", before), ("after", after)):
        assert report["refinement"][when]["scores"]["AP"] == scores["AP"]
    assert predict([str(digits / "val"), f"--checkpoint={refined}", f"--output={tmp_path / 'found'}"]) == 0
    load_detector(refined).save_pretrained(tmp_path / "saved")
    ours, theirs = load_detector(refined), load_detector(tmp_path / "saved")
    assert_equal(ours.model.state_dict(), theirs.model.state_dict())
    assert ours.refinement.config == theirs.refinement.config


def test_the_detector_stays_as_it_is(refined, base):
    ours, theirs = weights_of(refined / "checkpoints" / "last.ckpt"), weights_of(base)
    own = {name: value for name, value in ours.items() if ".refinement." not in name}
    assert_equal(own, theirs)
    learned = ours["model.roi_heads.refinement.head.deltas.weight"]
    assert learned.abs().max() > 0
    task = RefinementTask(load_checkpoint(base))
    trained = {name for name, value in task.model.named_parameters() if value.requires_grad}
    assert trained == {name for name, _ in task.model.named_parameters() if ".refinement." in name} != set()


def test_a_checkpoint_that_is_given_stays_as_it_is(refined, base, digits, tmp_path, capsys):
    """Also where there is nothing left to train."""
    mine = tmp_path / "mine.ckpt"
    shutil.copy(refined / "checkpoints" / "last.ckpt", mine)
    before = mine.read_bytes()
    assert refine(base, digits, run_dir=tmp_path / "run", ckpt_path=mine) == 0
    assert mine.read_bytes() == before
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"The refined detector is {last}," in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["about"]["model"] == str(last)
    assert_equal(weights_of(last), weights_of(mine))


def test_a_run_that_goes_on_from_its_end_has_a_checkpoint_of_its_own(base, digits, tmp_path):
    fit(base, digits, tmp_path / "run", steps=2)
    mine = (tmp_path / "run" / "checkpoints" / "last.ckpt").rename(tmp_path / "mine.ckpt")
    before = mine.read_bytes()
    fit(base, digits, tmp_path / "other", steps=2, ckpt_path=mine)
    assert mine.read_bytes() == before
    assert_equal(weights_of(tmp_path / "other" / "checkpoints" / "last.ckpt"), weights_of(mine))


def test_weights_of_16_bits_are_refused(base, digits, tmp_path):
    with pytest.raises(TrainingError, match=r"precision is bf16-true: .*bf16-mixed"):
        fit(base, digits, tmp_path / "run", precision="bf16-true")
    assert not (tmp_path / "run").exists()


class StopAfterTwo(lightning.Callback):
    def on_train_batch_end(self, trainer, *arguments):
        trainer.should_stop = trainer.global_step == 2


def test_a_run_that_a_callback_ended_is_not_trained_further(base, digits, tmp_path):
    folder = tmp_path / "run"
    first = fit(base, digits, folder, steps=9, callbacks=[StopAfterTwo()])
    last = folder / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert fit(base, digits, folder, steps=9, ckpt_path="last") == first
    assert last.read_bytes() == before


@pytest.mark.parametrize(("count", "epochs"), [(7, 1), (1, 1), (None, 3)])
def test_batches_of_several_epochs_are_one(count, epochs):
    options = {"wide": [True] * 5, "batch_size": 2, "seed": 3}
    whole = RepeatedBatches(count=count, epochs=epochs, **options)
    assert len(list(whole)) == len(whole) == (count or 6)
    assert [[index for _, index in batch] for batch in whole] == whole.batches(0)
    assert [batch[0][0] for batch in whole] == [number // 2 for number in range(len(whole))]
    rest = RepeatedBatches(count=count, epochs=epochs, **options, start=1)
    assert list(rest) == list(whole)[1:]
    one, other = (
        RepeatedBatches(count=count, epochs=epochs * 2, **(options | {"batch_size": 1}), ranks=2, rank=r)
        for r in (0, 1)
    )
    assert [a + b for a, b in zip(one, other, strict=True)][: len(whole)] == list(whole)


def fit(base, digits, folder, *, steps=4, config=None, data=None, **options):
    """A run without the settings being told, from Python."""
    task = RefinementTask(load_checkpoint(base), config or RefinementConfig(iterations=1))
    data = RefinementData(root=str(digits), train_split="train", steps=steps, workers=0, batch_size=2, **(data or {}))
    val = CocoDetection(digits / "val", digits / "annotations" / "instances_val.json")
    return train_refinement(task, data, val, split="val", run_dir=folder, **(QUIET | options))


def stopped_at(monkeypatch, step):
    step_of = RefinementTask.training_step

    def training_step(self, batch, number):
        if number == step:
            raise KeyboardInterrupt
        return step_of(self, batch, number)

    monkeypatch.setattr(RefinementTask, "training_step", training_step)


def test_a_run_that_stops_and_goes_on_ends_as_one_never_stopped(base, digits, tmp_path):
    fit(base, digits, tmp_path / "whole", save_every=2)
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 3)
        with pytest.raises(Interrupted, match="ckpt_path"):
            fit(base, digits, tmp_path / "parts", save_every=2)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3  # a step before the end
    scores = fit(base, digits, tmp_path / "parts", save_every=2, ckpt_path="last")
    assert_equal(weights_of(last), weights_of(tmp_path / "whole" / "checkpoints" / "last.ckpt"))
    assert scores["after"] == json.loads((tmp_path / "whole" / "scores.json").read_text())
    # Another detector, or training.
    other = torch.load(base, weights_only=True)
    other["state_dict"]["model.roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(TrainingError, match="refines another detector"):
        fit(tmp_path / "other.ckpt", digits, tmp_path / "parts", ckpt_path="last")
    with pytest.raises(TrainingError, match=r"refinement\.train_iterations 3, this run has 2"):
        fit(base, digits, tmp_path / "parts", ckpt_path="last", config=RefinementConfig(train_iterations=2))


@pytest.mark.parametrize(
    "changed",
    [
        {"iterations": 3, "ascent_steps": 1},
        {"boxes_per_image": 7, "iou_power": 0.0},
    ],
)
def test_what_is_of_testing_alone_may_be_another_when_a_run_goes_on(changed, base, digits, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, 1)
        with pytest.raises(Interrupted, match="ckpt_path"):
            fit(base, digits, tmp_path / "run", steps=2)
    config = replace(RefinementConfig(iterations=1), **changed)
    fit(base, digits, tmp_path / "run", steps=2, config=config, ckpt_path="last")
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").refinement.config == config


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"deterministic": True}])
def test_precision_and_determinism(base, digits, tmp_path, options):
    fit(base, digits, tmp_path / "run", steps=2, **options)
    weights = weights_of(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert weights["model.roi_heads.refinement.head.deltas.weight"].abs().max() > 0


def test_an_average_of_the_weights(base, digits, tmp_path):
    assert refine(base, digits, ema=0.9, run_dir=tmp_path / "run", max_steps=2) == 0
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    name = "model.roi_heads.refinement.head.deltas.weight"
    assert not torch.equal(content["state_dict"][name], content["current_model_state"][name])
    assert_equal({k: v for k, v in content["state_dict"].items() if ".refinement." not in k}, weights_of(base))


def with_annotations(digits, root, change):
    """The same data with another annotation file of train."""
    root.mkdir()
    for name in ("train", "val"):
        (root / name).symlink_to(digits / name)
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val.json").write_bytes(
        (digits / "annotations" / "instances_val.json").read_bytes()
    )
    content = json.loads((digits / "annotations" / "instances_train.json").read_text())
    change(content)
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def test_one_image_is_enough_and_those_without_objects_are_left_out(base, digits, tmp_path):
    def change(content):
        first = content["images"][0]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first["id"]]
        # At the border, and over all of the image.
        corner, whole = content["annotations"][:2]
        corner["bbox"], whole["bbox"] = [0, 0, 5, 7], [0, 0, first["width"], first["height"]]
        content["categories"] = [{"id": category["id"], "name": "thing"} for category in content["categories"][:1]]
        for annotation in content["annotations"]:
            annotation["category_id"] = content["categories"][0]["id"]

    root = with_annotations(digits, tmp_path / "data", change)
    assert refine(base, root, run_dir=tmp_path / "run", batch_size=1) == 0
    ours = weights_of(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert ours["model.roi_heads.refinement.head.deltas.weight"].abs().max() > 0


def test_no_detections_do_not_hinder_it(base, digits, tmp_path):
    content = torch.load(base, weights_only=True)
    content["affine_crop_rcnn"]["detector"]["score_threshold"] = 1.0
    torch.save(content, tmp_path / "silent.ckpt")
    scores = fit(tmp_path / "silent.ckpt", digits, tmp_path / "run", steps=2)
    assert scores["before"]["AP"] == scores["after"]["AP"] == 0


def test_mistakes_are_said_in_a_sentence(base, digits, tmp_path):
    def without_boxes(content):
        content["annotations"] = []

    empty = with_annotations(digits, tmp_path / "empty", without_boxes)
    for words, code, flags in (
        ("instances_train.json: no box to train on", 1, {"root": empty}),
        (r"instances_nosuch\.json", 1, {"train_split": "nosuch"}),
        (r"instances_nosuch\.json", 1, {"split": "nosuch"}),
        ("not both", 2, {"model": "fasterrcnn_resnet50_fpn"}),
        ("nosuch.ckpt: no such file", 1, {"checkpoint": "nosuch.ckpt"}),
        ("--lr must be above 0", 2, {"lr": 0}),
        ("iterations", 1, {"iterations": 101}),
    ):
        with refused(words, code=code):
            refine(base, digits, **({"run_dir": tmp_path / "run"} | flags))
    assert not (tmp_path / "run").exists()
    with refused("give one of --checkpoint", code=2):
        main([f"--root={digits}", "--split=val"])
    detector = load_checkpoint(base)
    detector.settings = None
    with pytest.raises(ModelError, match=r"that tools/train\.py can build"):
        RefinementTask(detector)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("exact", BoxGradient.exact()), ("bound", BoxGradient()), ("off", BoxGradient(crop=0, coder=0))],
)
def test_the_box_gradient_between_the_looks_is_a_flag(flag, expected, base, digits, tmp_path):
    assert refine(base, digits, run_dir=tmp_path / "run", box_gradient=flag, max_steps=1) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").refinement.config.box_gradient == expected


def test_a_detector_is_trained_with_its_refinement_from_the_start(digits, base, tmp_path):
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=2"]
    flags += ["--data.val_split=val", '--model.refinement={"iterations": 1, "train_iterations": 2}', "--save_every=1"]
    train(flags)
    detector = load_detector(tmp_path / "run")
    assert detector.refinement.config == RefinementConfig(iterations=1, train_iterations=2)
    assert detector.refinement.head.deltas.weight.abs().max() > 0
    with refused("with refinement.train_iterations 2, this run has 3", code=1):
        train([*flags, "--ckpt_path=last", "--model.refinement.train_iterations=3"])
    with refused("with refinement True, this run has None", code=1):
        train([*flags, "--ckpt_path=last", "--model.refinement=null"])
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("train/loss_refinement_box", "train/loss_refinement_iou"):
        assert [event.step for event in log.Scalars(name)] == [0, 1]
    assert "val/loss_refinement_box" not in log.Tags()["scalars"]  # of boxes drawn by chance
    # A new run from it, without a refinement.
    begin = [flag for flag in flags if not flag.startswith(("--model.refinement", "--trainer.max", "--run_dir"))]
    begin += [f"--model.detector.weights={tmp_path / 'run'}", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    train([*begin, f"--run_dir={tmp_path / 'without'}"])
    assert load_detector(tmp_path / "without").refinement is None


def test_a_loss_that_is_not_finite_names_the_flags_of_this_tool(base, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(RefinementTask, "losses", lambda *arguments: {"loss": torch.tensor(torch.nan)})
    with pytest.raises(TrainingError, match=r"not finite in step 0, .*Start again with a lower --lr$"):
        fit(base, digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_named_before_the_first_step(base, digits, tmp_path):
    root = with_annotations(digits, tmp_path / "data", lambda content: None)
    (root / "train").unlink()
    shutil.copytree(digits / "train", root / "train")
    broken = sorted((root / "train").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:50])
    with refused(rf"{broken.name}.*tools/check\.py .* shows all$", code=1):
        refine(base, root, run_dir=tmp_path / "run")


@pytest.mark.parametrize("other", ["refined", "unrefined"])
def test_a_training_begins_with_the_refinement_of_its_weights_or_with_their_box_head(refined, base, other):
    weights = refined / "checkpoints" / "last.ckpt" if other == "refined" else base
    settings = replace(SETTINGS, weights=str(weights))
    torch.manual_seed(1)
    model = add_refinement(build_detector(settings, 10, pretrained=False), RefinementConfig())
    load_initial_weights(model, settings, DIGITS)
    if other == "refined":
        ours, theirs = model.roi_heads.state_dict(), load_detector(refined).model.roi_heads.state_dict()
        assert_equal(dict(ours), dict(theirs))
    else:
        head, trunk = model.roi_heads.box_head, model.roi_heads.refinement.head.trunk
        assert_equal(trunk.state_dict(), head.state_dict())
        assert_equal(head.state_dict(), load_detector(base).model.roi_heads.box_head.state_dict())


def run(command, **variables):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PL_GLOBAL_SEED")
    environment = {k: v for k, v in os.environ.items() if k not in names} | variables
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["by the tool", "by torchrun"])
def test_two_processes(launched, base, digits, tmp_path):
    flags = ["tools/refine.py", f"--checkpoint={base}", f"--root={digits}", "--train_split=train", "--split=val"]
    flags += ["--device=cpu", "--workers=0", "--max_steps=2", "--batch_size=2", f"--run_dir={tmp_path / 'run'}"]
    if launched == "by torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *flags]
    else:
        command = [sys.executable, *flags, "--devices=2"]
    done = run(command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("before  after  difference") == 1
    assert (tmp_path / "run" / "scores.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["affine_crop_rcnn"]["images_per_step"] == 4
    assert_equal({k: v for k, v in weights_of(last).items() if ".refinement." not in k}, weights_of(base))


KILLED = """
import os, signal, sys
from detector.training.refinement_task import RefinementTask
step = RefinementTask.training_step
def killed(self, *arguments):
    if arguments[1] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
RefinementTask.training_step = killed
from detector.tools.refine import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_never_killed(refined, base, digits, tmp_path):
    flags = [f"--checkpoint={base}", f"--root={digits}", "--train_split=train", "--split=val", "--device=cpu"]
    flags += ["--workers=0", "--max_steps=3", "--save_every=1", f"--run_dir={tmp_path / 'run'}"]
    done = run([sys.executable, "-c", KILLED, *flags])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main([*flags, "--ckpt_path=last"]) == 0
    ours, theirs = tmp_path / "run", refined
    assert_equal(*(weights_of(folder / "checkpoints" / "last.ckpt") for folder in (ours, theirs)))
    assert json.loads((ours / "scores.json").read_text()) == json.loads((theirs / "scores.json").read_text())
