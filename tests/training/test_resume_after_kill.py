"""A run that is killed at any moment, and goes on by the same command, ends as one that was never killed."""

import json
import random
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from support.runs import KILL_WITHIN, STUB, assert_equal

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.tiny_training import REPOSITORY, TINY

from detector.data.digits import write_digits
from detector.tools.train import main as train


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 13, "val": 6})
    return [
        *TINY,
        f"--data.root={root}",
        "--data.workers=1",
        "--data.augmentation=[RandomHorizontalFlip, RandomPhotometricDistort]",
        "--data.batch_size=2",
        "--trainer.max_epochs=3",
        "--trainer.accumulate_grad_batches=2",
        "--model.optimizer.ema=0.99",
        "--model.box_gradient.warmup_steps=4",
        "--save_every=2",
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that was never killed: 3 epochs of 6 batches, two of which make a step."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        train([*flags, f"--run_dir={folder}"])
    return folder


def assert_same_end(folder, whole):
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (folder, whole))
        assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"])
        # The averaged weights, those that were trained, and all that decides on the next step.
        for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            assert_equal(ours[part], theirs[part])
    assert json.loads((folder / "scores.json").read_text()) == json.loads((whole / "scores.json").read_text())


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_one_never_killed(flags, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    command = [*flags, f"--run_dir={folder}"]
    steps = []
    for where, setup in KILL_WITHIN.items():
        stub = STUB.format(setup="\n".join(line.strip() for line in setup.splitlines()))
        done = subprocess.run([sys.executable, "-c", stub, *command], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (where, done.stderr)
        steps.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
        command = [*flags, f"--run_dir={folder}", "--ckpt_path=last"]
    # In the third step; writing that of the fourth; scoring after the sixth, with one written a step before.
    assert steps == [2, 3, 5]
    monkeypatch.chdir(REPOSITORY)
    train(command)
    assert_same_end(folder, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert [bool(start["ckpt_path"]) for start in starts(folder)] == [False, True, True, True]


@pytest.mark.exhaustive
def test_a_run_killed_ten_times_at_random_moments_ends_as_one_never_killed(flags, tmp_path):
    flags = [*flags, "--trainer.max_epochs=6"]
    folder = tmp_path / "run"
    command = [sys.executable, "tools/train.py", *flags]
    quiet = {"cwd": REPOSITORY, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, f"--run_dir={tmp_path / 'whole'}"], check=True, **quiet)
    command += [f"--run_dir={folder}"]
    generator = random.Random(0)
    progress = []
    while len(progress) < 10:
        process = subprocess.Popen(command, **quiet)
        while len(starts(folder)) <= len(progress):  # it is still being imported
            with suppress(subprocess.TimeoutExpired):
                assert process.wait(timeout=0.1) == 0, "it failed, or ended before it was killed ten times"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=generator.uniform(0, 4))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        last = folder / "checkpoints" / "last.ckpt"
        progress.append(torch.load(last, weights_only=True)["global_step"] if last.exists() else None)
        command = [*command[: len(flags) + 3], "--ckpt_path=last"]
    print(f"at the ten kills the last checkpoint was of step {progress}")
    subprocess.run(command, check=True, **quiet)
    assert_same_end(folder, tmp_path / "whole")


def starts(folder):
    path = folder / "environment.json"
    return json.loads(path.read_text()) if path.exists() else []
