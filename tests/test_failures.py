"""What goes wrong in training ends in one sentence, and the last good checkpoint stays."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import get_worker_info

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from test_resume import STUB
from tiny_training import REPOSITORY, TINY

from detector.coco import CocoDetection
from detector.digits import write_digits
from detector.training.command_line import train
from detector.training.failures import explained
from detector.training.task import DetectionTask


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 8, "val": 2})
    return root


@pytest.fixture
def stopped(digits, tmp_path, monkeypatch):
    """Train two epochs of two steps; the sentence that it ends with, and the step of the checkpoint that is left."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def stop(*flags):
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        with pytest.raises(SystemExit) as error:
            train([*TINY, f"--data.root={digits}", f"--run_dir={last.parent.parent}", "--trainer.max_epochs=2", *flags])
        message = str(error.value.code)
        assert message.startswith("error: ")
        assert "\n" not in message
        if not last.exists():
            return message, None
        assert str(last) in message
        assert [path.name for path in last.parent.iterdir() if path.name.startswith(".")] == []
        return message, torch.load(last, weights_only=True)["global_step"]

    return stop


def in_step_three(raises):
    """A training step that raises what it is given in the second epoch."""
    original = DetectionTask.training_step

    def step(task, batch, number):
        loss = original(task, batch, number)
        return raises(loss) if task.current_epoch == 1 else loss

    return step


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_too_little_memory(error, stopped, monkeypatch):
    def out_of_memory(loss):
        raise error

    monkeypatch.setattr(DetectionTask, "training_step", in_step_three(out_of_memory))
    message, step = stopped()
    assert re.search(r"out of memory in step 2, on images \[(\d+, ){3}\d+\]: lower --data\.batch_size", message)
    assert step == 2


def test_loss_that_is_not_finite(stopped):
    message, _ = stopped("--model.optimizer.lr=1e12", "--trainer.gradient_clip_val=null", "--trainer.max_epochs=9")
    assert re.search(r"not finite in step \d+, on images \[.*--model\.optimizer\.lr|weights are no longer", message)


def test_weights_that_are_not_finite_are_not_saved(stopped, monkeypatch):
    def spoil(task, *arguments):
        if task.current_epoch == 1:
            next(task.model.roi_heads.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(DetectionTask, "on_train_epoch_end", spoil)
    message, step = stopped()
    assert "weights are no longer finite after step 4" in message
    assert step == 3


def test_full_disk(stopped, monkeypatch):
    original = DetectionTask.on_train_epoch_start

    def fill(task):
        if task.current_epoch == 1:
            monkeypatch.setattr(os, "fsync", full)
        original(task)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DetectionTask, "on_train_epoch_start", fill)
    message, step = stopped()
    assert re.search(r"last\.ckpt: the checkpoint of step 3 cannot be written: No space left on device", message)
    assert step == 2


def test_a_worker_that_dies(stopped, monkeypatch):
    original = CocoDetection.__getitem__

    def die(data, index):
        if get_worker_info() is not None and isinstance(index, tuple) and index[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(data, index)

    monkeypatch.setattr(CocoDetection, "__getitem__", die)
    message, step = stopped("--data.workers=1")
    assert "a process that reads images died after step 2" in message
    assert re.search(r"DataLoader worker \(pid.* (is killed by signal|exited unexpectedly)", message)
    ids = re.search(r"The next images were \[(.+?)\]", message).group(1).split(", ")
    assert len(set(ids)) == 8
    assert "Lower --data.workers" in message
    assert step == 2


def test_a_broken_image_is_named(stopped, digits):
    path = sorted((digits / "train").iterdir())[0]
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    try:
        message, step = stopped("--data.workers=1")
    finally:
        path.write_bytes(content)
    assert f"{path}: cannot be read as an image" in message
    assert step is None


def test_an_augmentation_that_fails_is_named(stopped):
    message, step = stopped("--data.augmentation=[{class_path: RandomCrop, init_args: {size: 4000}}]")
    assert re.search(r"\d+\.png: the augmentation fails on this image: Required crop size .*4000", message)
    assert step is None


def test_an_error_that_is_not_known_stays_what_it_is():
    assert explained(RuntimeError("some bug"), 0, [], []) is None


def test_sigterm_ends_the_step_under_way_saves_and_stops(digits, tmp_path, monkeypatch, capsys):
    def terminate(loss):
        if not told:
            told.append(os.kill(os.getpid(), signal.SIGTERM))
        return loss

    told = []
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(DetectionTask, "training_step", in_step_three(terminate))
    flags = ["--data.batch_size=2", "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=2"]
    with pytest.raises(SystemExit) as stop:
        train([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *flags])
    assert stop.value.code == 130
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"--ckpt_path {last}" in capsys.readouterr().err
    assert torch.load(last, weights_only=True)["global_step"] == 3  # told in the first of its two batches
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_to_all_processes_of_the_group_does_not_kill_the_workers_first(digits, tmp_path):
    stub = STUB.format(
        setup="from detector.training.task import DetectionTask as owner\n"
        "name, when = 'training_step', lambda task, batch, number: task.current_epoch == 1 and number == 0",
    ).replace("os.kill(os.getpid(), signal.SIGKILL)", "os.killpg(0, signal.SIGTERM)")
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=3"]
    done = subprocess.run(
        [sys.executable, "-c", stub, *flags, "--data.workers=2", "--data.batch_size=2"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 130, done.stderr
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"--ckpt_path {last}" in done.stderr
    assert torch.load(last, weights_only=True)["global_step"] == 5
