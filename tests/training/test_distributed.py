"""Two processes (gloo, on the CPU) train and score as one does."""

import json
import signal
import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.runs import run_alone
from support.tiny_training import REPOSITORY, TINY

from detector.data.digits import write_digits
from detector.tools.training_cli import main as train

# Scores a checkpoint, then trains an epoch; writes what every rank saw.
SCRIPT = """
import json, sys
import lightning
from lightning.pytorch.callbacks import Callback
from detector.tools.training_cli import parse, training_parser
from detector.training.task import DetectionTask

class Record(Callback):
    def __init__(self):
        self.losses, self.images = [], []
    def on_train_batch_end(self, trainer, task, outputs, batch, number):
        self.losses.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("train/")})
        self.images.append(task.image_ids)

checkpoint, output, *flags = sys.argv[1:]
cli = parse(training_parser(), flags)
record = Record()
cli.trainer.callbacks.append(record)
(scores,) = cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
results = cli.model.results
task = DetectionTask(cli.model.detector, cli.model.box_gradient, optimizer=cli.model.optimizer)
cli.run.train(cli.trainer, task, cli.datamodule)
lr = cli.trainer.optimizers[0].param_groups[0]["initial_lr"]
with open(f"{output}-{cli.trainer.global_rank}.json", "w") as file:
    json.dump({"scores": scores, "results": results, "losses": record.losses, "images": record.images, "lr": lr}, file)
"""
DDP = ["--trainer.strategy=ddp", "--trainer.devices=2"]


def run(command):
    done = run_alone(command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 9, "val": 5})
    # Of one size: padding, which depends on what else is in the batch, changes features near an image's edge.
    resize = "[{class_path: Resize, init_args: {size: [96, 128]}}, RandomPhotometricDistort]"
    return [
        *TINY,
        f"--data.root={root}",
        f"--data.augmentation={resize}",
        "--data.min_size=null",
        "--model.detector.name=timm/tf_efficientnet_lite0",
        "--model.detector.weights_backbone=packaged",  # frozen batch norm, else statistics would be those of a rank
        "--save_every=1",
    ]


@pytest.fixture(scope="module")
def checkpoint(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        train([*flags, f"--run_dir={folder}", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"])
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.slow
def test_two_processes_score_and_train_as_one(flags, checkpoint, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    more = [*flags, "--trainer.max_epochs=1", "--model.optimizer.ema=0.9"]
    arguments = [str(script), str(checkpoint), str(tmp_path / "one"), *more, f"--run_dir={tmp_path / 'run'}"]
    run([sys.executable, *arguments, "--data.batch_size=4"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments[2] = str(tmp_path / "two")
    run([*launcher, *arguments, "--data.batch_size=2", *DDP])

    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one-0", "two-0", "two-1"))
    for name in ("val/AP", "val/AP50", "val/AR100"):
        assert first["scores"][name] == second["scores"][name] == one["scores"][name]
    assert second["results"] == []  # gathered on rank 0
    in_order = [
        sorted(found["results"], key=lambda r: (r["image_id"], -r["score"], r["bbox"])) for found in (one, first)
    ]
    assert in_order[0] == in_order[1]  # no image is counted twice

    assert first["lr"] == second["lr"] == one["lr"]
    assert [a + b for a, b in zip(first["images"], second["images"])] == one["images"]
    assert len(one["losses"]) == 2
    for whole, *halves in zip(one["losses"], first["losses"], second["losses"]):
        for name in whole:
            # Seen: differences of 1e-7. The draws of anchors and RoIs, by image, are the same.
            assert sum(half[name] for half in halves) / 2 == pytest.approx(whole[name], rel=1e-5), name
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("run-2", "run")
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


FAILS_ON_RANK_1 = """
import os, sys
from detector.tools.training_cli import main as train
from detector.training.task import DetectionTask
original = DetectionTask.validation_step
def step(*arguments):
    if os.environ.get("LOCAL_RANK") == "1":
        raise ZeroDivisionError("boom")
    return original(*arguments)
DetectionTask.validation_step = step
train(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_unforeseen_error_in_one_process_ends_both(flags, tmp_path):
    stub = tmp_path / "stub.py"
    stub.write_text(FAILS_ON_RANK_1)
    command = [*flags, "--trainer.max_epochs=1", "--data.batch_size=2", "--data.workers=1", *DDP]
    done = run_alone([sys.executable, str(stub), *command, f"--run_dir={tmp_path / 'run'}"])
    assert done.returncode in (1, -signal.SIGKILL)  # Lightning's observer may end the first process before its error
    assert "ZeroDivisionError: boom" in done.stderr
