"""A run that is killed at any moment, and resumed by the same command, ends as one that was never killed."""

import json
import signal
import subprocess
import sys

import pytest
from support.runs import KILL_WITHIN, STUB, assert_equal

pytest.importorskip("sklearn")
pytest.importorskip("timm")

import torch
from support.tiny_training import REPOSITORY, TINY, last_checkpoint, tiny_run

from detector.data.digits import write_digits


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_one_never_killed(tmp_path):
    root, folder = tmp_path / "digits", tmp_path / "run"
    write_digits(root, splits={"train": 13, "val": 6})  # 3 epochs of 6 batches, two of which make a step
    flags = ["--data.workers=1", "--data.augmentation=[RandomHorizontalFlip, RandomPhotometricDistort]"]
    flags += ["--data.batch_size=2", "--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=2"]
    flags += ["--model.optimizer.ema=0.99", "--save_every=2"]
    whole = tiny_run(root, tmp_path / "whole", *flags)
    command, steps = [*TINY, f"--data.root={root}", f"--run_dir={folder}", *flags], []
    for where, setup in KILL_WITHIN.items():
        stub = STUB.format(setup="\n".join(line.strip() for line in setup.splitlines()))
        done = subprocess.run([sys.executable, "-c", stub, *command], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (where, done.stderr)
        steps.append(last_checkpoint(folder)["global_step"])
        flags = [*flags, "--ckpt_path=last"] if not steps[1:] else flags
        command = [*TINY, f"--data.root={root}", f"--run_dir={folder}", *flags]
    # In the third step; writing the checkpoint of the fourth; in the validation after the sixth.
    assert steps == [2, 3, 5]
    tiny_run(root, folder, *flags)
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (folder, whole))
        # The averaged weights, the trained ones, and all that the next step depends on.
        parts = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
        for part in ("epoch", "global_step", *parts):
            assert_equal(ours[part], theirs[part])
    assert (folder / "scores.json").read_text() == (whole / "scores.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "run", "whole"]
    starts = json.loads((folder / "environment.json").read_text())
    assert [bool(start["ckpt_path"]) for start in starts] == [False, True, True, True]
