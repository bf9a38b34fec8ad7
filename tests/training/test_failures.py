"""What goes wrong in training ends in one sentence, and the last good checkpoint stays."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.utils.data import DataLoader, get_worker_info

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import score
from support.marks import slow
from support.runs import STUB
from support.tiny_training import REPOSITORY, TINY

from detector import signals
from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.evaluation import running
from detector.signals import ignoring_signals
from detector.tools.train import main as train
from detector.tools.training_cli import parse
from detector.training import run
from detector.training.checkpoints import Checkpoints
from detector.training.data import CocoDataModule
from detector.training.failures import explain
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
    assert explain(RuntimeError("some bug"), 0, [], []) is None


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


# From another process, as a cluster sends it.
SIGTERM_TO_ALL = """(
    __import__("subprocess").run([sys.executable, "-c", "import os, signal; os.killpg(0, signal.SIGTERM)"])
)"""


@pytest.mark.slow
def test_sigterm_to_all_processes_of_the_group_does_not_kill_the_workers_first(digits, tmp_path):
    stub = STUB.format(
        setup="from detector.training.task import DetectionTask as owner\n"
        "name, when = 'training_step', lambda task, batch, number: task.current_epoch == 1 and number == 0",
    ).replace("os.kill(os.getpid(), signal.SIGKILL)", SIGTERM_TO_ALL)
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


def test_sigterm_after_the_last_step_is_not_forgotten(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(DetectionTask, "on_train_end", lambda task: os.kill(os.getpid(), signal.SIGTERM))
    flags = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
    with pytest.raises(SystemExit) as stop:
        train([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *flags])
    assert stop.value.code == 130
    assert not (tmp_path / "run" / "scores.json").exists()


def boom(*arguments, **options):
    raise ZeroDivisionError("boom")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (CocoDataModule, "setup"),
        (DetectionTask, "configure_model"),
        (DetectionTask, "configure_optimizers"),
        (CocoDetection, "__getitem__"),
        (DetectionTask, "training_step"),
        (torch.optim.AdamW, "step"),
        (LearningRateMonitor, "on_train_batch_start"),
        (DetectionTask, "on_save_checkpoint"),
        (DetectionTask, "validation_step"),
        (DetectionTask, "on_validation_epoch_end"),
        slow(Checkpoints, "on_train_epoch_end"),
        slow(run, "load_checkpoint"),
        (run, "evaluate_predictions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unforeseen_error_stays_what_it_is_and_leaves_no_process(owner, name, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(owner, name, boom)
    flags = ["--data.workers=1", "--trainer.max_epochs=1", "--trainer.enable_model_summary=false"]
    with pytest.raises(ZeroDivisionError, match="boom"):
        train([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *flags])
    assert not multiprocessing.active_children()


UNFORESEEN = """
import multiprocessing
import sys
from detector.tools.training_cli import parse
from detector.tools.train import main as train
from detector.training.data import CocoDataModule
from detector.training.task import DetectionTask

def boom(*arguments):
    raise ZeroDivisionError("boom")

multiprocessing.set_start_method(sys.argv.pop())
data = CocoDataModule(sys.argv[1], train_split="train", val_split="val", workers=1)  # that nobody ends
data.setup("fit")
readers = iter(data.train_dataloader())
next(readers)
DetectionTask.validation_step = boom
flags, sys.argv[1:] = sys.argv[2:], []
train(flags)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "forkserver"])  # the latter is Python 3.14's default
def test_an_unforeseen_error_ends_the_process_whatever_it_has_running(start, digits, tmp_path):
    flags = [*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--data.workers=2"]
    done = subprocess.run(
        [sys.executable, "-c", UNFORESEEN, str(digits), *flags, "--trainer.max_epochs=1", start],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,  # it would wait for its workers for ever
    )
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: boom\n")


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_worker_reads_on_though_its_group_is_signalled(start):
    loader = DataLoader(range(4), num_workers=1, worker_init_fn=ignoring_signals(), multiprocessing_context=start)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    assert [next(batches).item() for _ in range(3)] == [1, 2, 3]
    del batches
    worker.join(60)
    assert worker.exitcode == 0


def wait_for_sigterm(obey, ready):
    signal.signal(signal.SIGTERM, (lambda *_: os._exit(7)) if obey else signal.SIG_IGN)
    ready.set()
    while True:
        signal.pause()


@pytest.mark.slow
def test_at_the_end_only_what_ignores_sigterm_is_killed():
    fork = multiprocessing.get_context("fork")
    children = []
    for obey in (True, False):
        ready = fork.Event()
        children.append(fork.Process(target=wait_for_sigterm, args=(obey, ready), daemon=True))
        children[-1].start()
        assert ready.wait(60)
    signals._end_workers()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [7, -signal.SIGKILL]


def terminating(function, calls, at=1):
    """The function; its call of that number begins with a SIGTERM."""

    def terminated(*arguments, **options):
        calls.append(arguments)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    return terminated


@pytest.mark.parametrize("readers", [0, 1])
def test_sigterm_while_validating_stops_at_the_next_batch(readers, digits, tmp_path, monkeypatch, capsys):
    scored = []
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(DetectionTask, "validation_step", terminating(DetectionTask.validation_step, scored))
    flags = [f"--data.workers={readers}", "--data.batch_size=2", "--trainer.max_epochs=1"]
    with pytest.raises(SystemExit) as stop:
        train([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *flags])
    assert stop.value.code == 130
    assert len(scored) == 1
    assert f"--ckpt_path {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}" in capsys.readouterr().err
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_sigterm_is_obeyed_in_the_scoring_at_the_end_and_in_eval(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    flags = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--data.workers=1"]
    scored = []
    to_results = running.to_results
    monkeypatch.setattr(running, "to_results", terminating(to_results, scored))
    with pytest.raises(SystemExit) as stop:
        train([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", *flags])
    assert stop.value.code == 130
    assert len(scored) == 1
    assert f"--ckpt_path {last}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "scores.json").exists()
    monkeypatch.setattr(running, "to_results", terminating(to_results, scored, at=3))
    with pytest.raises(SystemExit) as stop:
        score(checkpoint=str(last), root=str(digits), split="val", output=str(tmp_path / "out"), workers=1)
    assert stop.value.code == 130
    report = json.loads((tmp_path / "out" / "report.json").read_text())  # of what was seen until then
    assert report["about"]["images"] == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr(running, "to_results", boom)
    with pytest.raises(ZeroDivisionError):
        score(checkpoint=str(last), root=str(digits), split="val", output=str(tmp_path / "out"), workers=1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.batch_size=0"], r"--data\.batch_size 0"),
        (["--data.val_batch_size=-2"], r"--data\.val_batch_size -2"),
        (["--data.workers=-1"], r"--data\.workers -1"),
        (["--save_every=0"], "--save_every 0"),
        (["--trainer.logger=CometLogger"], "a setting cannot be used: .*(?i:comet)"),
        (["--trainer.max_epochs=0"], "the schedule needs an end"),
        (["--trainer.devices=-3"], "a setting cannot be used: `devices` .* should be an int > 0"),
        (["--trainer.accelerator=abacus"], "a setting cannot be used: .*abacus"),
        (["--data.val_split=nowhere"], "instances_nowhere.json: no such file"),
        (["--model.detector.name=nothing"], r"--model\.detector\.name 'nothing'"),
        (["--data.val_split=other"], "no category .* has the name of one to train on"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_a_mistake_ends_in_one_sentence_and_leaves_no_folder(flags, message, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    if flags == ["--trainer.logger=CometLogger"] and find_spec("comet_ml"):
        pytest.skip("comet_ml is installed")
    annotations = digits / "annotations"
    content = json.loads((annotations / "instances_val.json").read_text())
    for category in content["categories"]:
        category["name"] = f"other {category['name']}"
    (annotations / "instances_other.json").write_text(json.dumps(content))
    with suppress(FileExistsError):
        (digits / "other").symlink_to(digits / "val")
    with pytest.raises(SystemExit) as stop:
        train([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=1", *flags])
    assert re.match(f"error: .*{message}", str(stop.value.code))
    assert "\n" not in stop.value.code
    assert list(tmp_path.iterdir()) == []


def test_what_a_failed_start_did_not_make_stays(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    folder = tmp_path / "run"
    command = [*TINY, f"--data.root={digits}", f"--run_dir={folder}", "--trainer.max_epochs=1"]
    folder.mkdir()  # there before, if empty
    with pytest.raises(SystemExit):
        train([*command, "--data.val_split=nowhere"])
    assert folder.is_dir()

    def another_run(task):
        (tmp_path / "run-2" / "events.out.tfevents.1.other.machine").touch()  # in the folder of the same name
        raise ZeroDivisionError

    monkeypatch.setattr(DetectionTask, "configure_model", another_run)
    with pytest.raises(ZeroDivisionError):
        train(command)
    assert (tmp_path / "run-2" / "config.yaml").exists()

    monkeypatch.undo()
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(DetectionTask, "on_validation_epoch_end", boom)
    with pytest.raises(ZeroDivisionError):  # after two steps
        train(command)
    assert (tmp_path / "run-3" / "checkpoints" / "last.ckpt").exists()


def test_lightning_does_not_advertise(digits, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    parse([*TINY, f"--data.root={digits}", f"--run_dir={tmp_path / 'run'}"], "")
    said = caplog.text + "".join(capsys.readouterr())
    assert "GPU available" in said  # what else it has to say stays
    assert "litlogger" not in said.lower()


@pytest.mark.parametrize("tool", ["train", "browse", "eval", "export"])
def test_obvious_mistakes_are_seen_before_torch_is_imported(tool, tmp_path):
    """With a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise SystemError('imported')")

    def said(*arguments):
        command = [sys.executable, f"tools/{tool}.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, usage = said()
    assert code == 2
    assert f"python tools/{tool}.py --" in usage
    flag = "--checkpoint" if tool in ("eval", "export") else "--config"
    missing = tmp_path / ("last.ckpt" if flag == "--checkpoint" else "my.yaml")
    assert said(flag, str(missing)) == said(f"{flag}={missing}") == (1, f"error: {flag} {missing}: no such file\n")
    missing.touch()
    for argument in (str(missing), "https://example.org/last.ckpt", "owner/name"):
        assert "SystemError: imported" in said(flag, argument)[1], argument
