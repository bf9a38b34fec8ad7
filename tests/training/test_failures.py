"""Errors and signals in a training: what is said, and that the last good checkpoint stays."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import refused
from support.marks import slow
from support.tiny_training import REPOSITORY, TINY, last_checkpoint, tiny_run

from detector.data.dataset import CocoDetection
from detector.evaluation import running
from detector.signals import ignore_signals
from detector.tools.training_cli import parse, training_parser
from detector.training.failures import explain
from detector.training.task import DetectionTask

TASK = SimpleNamespace(training=False, image_ids=[7], global_step=2)
DATA = SimpleNamespace(skip_broken=False, workers=0)


@pytest.fixture
def stopped(digits, tmp_path):
    """Train two epochs of two steps; return the message that it ends with, and the step of the last checkpoint."""

    def stop(*flags):
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        with pytest.raises(SystemExit) as error:
            tiny_run(digits, tmp_path / "run", "--trainer.max_epochs=2", *flags)
        message = str(error.value.code)
        assert message.startswith("error: ")
        assert "\n" not in message
        if not last.exists():
            return message, None
        assert str(last) in message
        assert not list(last.parent.glob(".*"))
        return message, last_checkpoint(tmp_path / "run")["global_step"]

    return stop


def in_second_epoch(monkeypatch, act):
    """Let the training step call ``act`` with its loss in the second epoch."""
    original = DetectionTask.training_step

    def step(task, batch, number):
        loss = original(task, batch, number)
        return act(loss) if task.current_epoch == 1 else loss

    monkeypatch.setattr(DetectionTask, "training_step", step)


def test_too_little_memory(stopped, monkeypatch):
    def out_of_memory(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    in_second_epoch(monkeypatch, out_of_memory)
    message, step = stopped()
    assert re.search(r"out of memory in step 2, on images \[(\d+, ){3}\d+\].*--data\.batch_size", message)
    assert step == 2


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()], ids=repr)
def test_too_little_memory_of_the_cpu(error):
    known = explain(error, TASK, DATA, None)
    assert "[7]" in known.message
    assert "lower {batch_size}" in known.hints


def test_an_unknown_error_is_not_explained():
    assert explain(RuntimeError("some bug"), TASK, DATA, Path("last.ckpt")) is None


def test_a_loss_that_is_not_finite(stopped, monkeypatch):
    losses = DetectionTask.losses
    monkeypatch.setattr(DetectionTask, "losses", lambda *given: losses(*given) | {"loss": torch.tensor(torch.inf)})
    message, step = stopped()
    assert re.search(r"not finite in step 0, on images \[.*--model\.optimizer\.lr, or .*gradient_clip_val", message)
    assert step is None


def test_weights_that_are_not_finite_are_not_saved(stopped, monkeypatch):
    def spoil(task, *arguments):
        if task.current_epoch == 1:
            next(task.model.roi_heads.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(DetectionTask, "on_train_epoch_end", spoil)
    message, step = stopped()
    assert "no longer finite after step 4" in message
    assert step == 3


def test_a_full_disk(stopped, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    in_second_epoch(monkeypatch, lambda loss: monkeypatch.setattr(os, "fsync", full) or loss)
    message, step = stopped()
    assert re.search(r"last\.ckpt: the checkpoint of step 3 .*No space left on device", message)
    assert step == 2


def test_a_worker_that_dies(stopped, monkeypatch):
    original = CocoDetection.__getitem__

    def die(data, index):
        if get_worker_info() is not None and isinstance(index, tuple) and index[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(data, index)

    monkeypatch.setattr(CocoDetection, "__getitem__", die)
    message, step = stopped("--data.workers=1")
    assert re.search(r"after step 2, .*DataLoader worker \(pid.*--data\.workers", message)
    assert len(set(re.search(r"next images were \[(.+?)\]", message).group(1).split(", "))) == 8
    assert step == 2


def test_an_augmentation_that_fails_names_the_image(stopped):
    message, step = stopped("--data.augmentation=[{class_path: RandomCrop, init_args: {size: 4000}}]")
    assert re.search(r"\d+\.png: .*Required crop size", message)
    assert step is None


def test_a_broken_image_is_named(digits, tmp_path):
    root = shutil.copytree(digits, tmp_path / "digits")
    path = min((root / "train").iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    with refused(f"{path}: ", code=1):
        tiny_run(root, tmp_path / "run")


def test_sigterm_ends_the_step_saves_and_stops(digits, tmp_path, monkeypatch, capsys):
    sent = []

    def terminate(loss):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return loss

    in_second_epoch(monkeypatch, terminate)
    flags = ("--data.batch_size=2", "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=2")
    with pytest.raises(SystemExit) as stop:
        tiny_run(digits, tmp_path / "run", *flags)
    assert stop.value.code == 130
    assert f"--ckpt_path {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "run")["global_step"] == 3  # the signal came in the first of its two batches
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_after_the_last_step_stops_before_scoring(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(DetectionTask, "on_train_end", lambda task: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        tiny_run(digits, tmp_path / "run", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0")
    assert stop.value.code == 130
    assert not (tmp_path / "run" / "scores.json").exists()


def terminating(function, calls):
    """Return the function, whose first call begins with a SIGTERM."""

    def terminated(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    return terminated


def test_sigterm_while_validating_stops_at_the_next_batch(digits, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(DetectionTask, "validation_step", terminating(DetectionTask.validation_step, scored))
    with pytest.raises(SystemExit) as stop:
        tiny_run(digits, tmp_path / "run", "--data.workers=1", "--data.batch_size=2", "--trainer.max_epochs=1")
    assert stop.value.code == 130
    assert len(scored) == 1
    assert last_checkpoint(tmp_path / "run")["global_step"] == 3
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_sigterm_while_scoring_at_the_end(digits, tmp_path, monkeypatch):
    flags = ("--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--data.workers=1")
    scored = []
    monkeypatch.setattr(running, "to_results", terminating(running.to_results, scored))
    with pytest.raises(SystemExit) as stop:
        tiny_run(digits, tmp_path / "run", *flags)
    assert stop.value.code == 130
    assert len(scored) == 1
    assert not (tmp_path / "run" / "scores.json").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not multiprocessing.active_children()


def boom(*arguments, **options):
    raise ZeroDivisionError("boom")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (CocoDetection, "__getitem__"),
        (DetectionTask, "training_step"),
        slow(DetectionTask, "on_save_checkpoint"),
        slow(DetectionTask, "validation_step"),
        (DetectionTask, "evaluate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unforeseen_error_stays_what_it_is_and_leaves_no_process(owner, name, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, name, boom)
    with pytest.raises(ZeroDivisionError, match="boom"):
        tiny_run(digits, tmp_path / "run", "--data.workers=1", "--trainer.max_epochs=1")
    assert not multiprocessing.active_children()


UNFORESEEN = """
import sys
from detector.tools.training_cli import main
from detector.training.data import CocoDataModule
from detector.training.task import DetectionTask

def boom(*arguments):
    raise ZeroDivisionError("boom")

data = CocoDataModule(sys.argv[1], train_split="train", val_split="val", workers=1)
data.setup("fit")
readers = iter(data.train_dataloader())  # that nobody ends
next(readers)
DetectionTask.validation_step = boom
flags, sys.argv[1:] = sys.argv[2:], []
main(flags)
"""


@pytest.mark.slow
def test_an_unforeseen_error_ends_the_process_whatever_it_has_running(digits, tmp_path):
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--data.workers=2"]
    done = subprocess.run(
        [sys.executable, "-c", UNFORESEEN, str(digits), *flags, "--trainer.max_epochs=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,  # or it would wait for its workers forever
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: boom\n")


def test_a_worker_reads_on_when_its_group_is_signalled():
    loader = DataLoader(range(4), num_workers=1, worker_init_fn=ignore_signals)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    assert [next(batches).item() for _ in range(3)] == [1, 2, 3]
    del batches
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.batch_size=0", r"--data\.batch_size"),
        ("--save_every=0", "--save_every"),
        ("--trainer.logger=CometLogger", "(?i:comet)"),
        ("--trainer.max_epochs=0", r"--trainer\.max_epochs"),
        ("--trainer.accelerator=abacus", "abacus"),
        ("--data.root=nowhere", "nowhere"),
        ("--data.val_split=nowhere", r"instances_nowhere\.json"),
        ("--model.optimizer.ema=2", r"--model\.optimizer\.ema"),
        ("--trainer.precision=bf16-true", r"--trainer\.precision"),
        ("--ckpt_path=nowhere.ckpt", r"--ckpt_path.*nowhere\.ckpt"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_mistakes_name_their_setting_and_leave_no_folder(flag, message, digits, tmp_path):
    if "Comet" in flag and find_spec("comet_ml"):
        pytest.skip("comet_ml is installed")
    with pytest.raises(SystemExit) as stop:
        tiny_run(digits, tmp_path / "run", "--trainer.max_epochs=1", flag)
    assert re.match(f"error: .*{message}", str(stop.value.code))
    assert "\n" not in stop.value.code
    assert list(tmp_path.iterdir()) == []


def test_a_failed_start_removes_only_its_own_folder(digits, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()  # there before, if empty
    with pytest.raises(SystemExit):
        tiny_run(digits, folder, "--data.val_split=nowhere")
    assert folder.is_dir()

    def another_run(task):
        (tmp_path / "run-2" / "events.out.tfevents.1.other.machine").touch()  # in the folder of the same name
        raise ZeroDivisionError

    monkeypatch.setattr(DetectionTask, "configure_model", another_run)
    with pytest.raises(ZeroDivisionError):
        tiny_run(digits, folder)
    assert (tmp_path / "run-2" / "config.yaml").exists()


def test_lightning_does_not_advertise(digits, tmp_path, caplog, capsys):
    parse(training_parser(), [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}"])
    said = caplog.text + "".join(capsys.readouterr())
    assert "GPU available" in said  # its other messages stay
    assert "litlogger" not in said.lower()
