"""Training runs that are stopped, killed and compared."""

import os
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]

# A SIGKILL to oneself, at one place.
KILL_WITHIN = {
    "an epoch": """
        from detector.training.task import DetectionTask as owner
        name, when = "training_step", lambda task, batch, number: number == 5
    """,
    "a checkpoint write": """
        import os as owner
        from itertools import count
        calls = count()
        name, when = "replace", lambda source, path: path.name == "last.ckpt" and next(calls) == 1
    """,
    "an evaluation": """
        from detector.training.task import DetectionTask as owner
        name, when = "validation_step", lambda task, batch, number: task.current_epoch == 1 and number == 1
    """,
}
STUB = """
import os, signal, sys
{setup}
original = getattr(owner, name)
def step(*arguments):
    if when(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, name, step)
from detector.tools.training_cli import main as train
train(sys.argv[1:])
"""


def run_alone(command):
    """Run a command in the repository, without another run's variables. One thread, so that sums have one order."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PL_GLOBAL_SEED")
    environment = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def assert_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_equal(one, other)
    else:
        assert ours == theirs
