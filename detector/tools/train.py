"""The tool that trains a detector: ``tools/train.py``. Its flags are in :mod:`detector.tools.training_cli`."""

import sys
from collections.abc import Sequence

from detector.errors import exit_on_user_error
from detector.tools.cli import FlagNames, check_arguments

DESCRIPTION = """Train a detector with the affine crop, and score it. configs/ has complete settings.

Examples:
    python tools/train.py --config configs/quickstart.yaml --trainer.max_epochs 2
    python tools/train.py --config configs/coco_r50_fpn_1x.yaml --data.root FOLDER --data.batch_size 4

Exit codes:
    0: done.
    1: wrong input.
    2: wrong command line.
    130: interrupted. --ckpt_path last resumes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tools/train.py`` and return its exit code."""
    flags = FlagNames()
    with exit_on_user_error(flags):
        check_arguments(DESCRIPTION, sys.argv[1:] if arguments is None else arguments, files=("config", "ckpt_path"))
        from detector.tools.training_cli import parse

        cli = parse(arguments, DESCRIPTION, flags=flags)
        cli.train()
    return 0
