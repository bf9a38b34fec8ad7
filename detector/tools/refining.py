"""What ``tools/refine.py`` does."""

import argparse
import os
import sys
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from detector.data.categories import match_categories
from detector.data.folder import DataFolder, find_root
from detector.errors import exit_on_user_error
from detector.rcnn.box_gradient import BoxGradient
from detector.refinement.config import RefinementConfig
from detector.run_folders import run_folder
from detector.tools.source import load_source, pick_device, split_for
from detector.tools.training import resuming_command
from detector.training.failures import Interrupted
from detector.training.optimization import OptimizerConfig
from detector.training.refinement import RefinementData, RefinementTask
from detector.training.run import train

BOX_GRADIENTS = {
    "exact": BoxGradient.exact(),
    "bound": BoxGradient(),
    "off": BoxGradient(crop=0, coder=0),
}


def refine(flags: argparse.Namespace) -> int:
    """Train a refinement as the flags of ``tools/refine.py`` say, and score it. Returns the exit code."""
    with exit_on_user_error(MisconfigurationException):
        device = pick_device(flags.device)
        folder = DataFolder(
            find_root(flags.root, flags.dataset),
            flags.annotations or DataFolder.annotations,
            flags.images,
            flags.orientation,
        )
        detector, called = load_source(flags.checkpoint, flags.model, flags.weights, flags.crop)
        score_on = split_for(detector, folder, flags.split)
        match_categories(detector, score_on)  # now, not after the training
        config = RefinementConfig(
            iterations=flags.iterations,
            train_iterations=flags.train_iterations,
            ascent_steps=flags.ascent_steps,
            box_gradient=BOX_GRADIENTS[flags.box_gradient],
        )
        task = RefinementTask(
            detector,
            config,
            OptimizerConfig(lr=flags.lr, lr_rule="constant", weight_decay=flags.weight_decay, ema=flags.ema),
            cache_bytes=int(max(flags.cache_gb, 0) * 1e9),
        )
        data = RefinementData(
            score_on,
            root=str(folder.root),
            train_split=flags.train_split,
            val_split=flags.split,
            annotations=folder.annotations,
            images=folder.images,
            orientation=folder.orientation,
            steps=flags.max_steps,
            epochs=flags.epochs,
            flip=flags.flip,
            batch_size=flags.batch_size,
            workers=flags.workers,
            seed=flags.seed,
        )
        devices = flags.devices or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        try:
            train(
                task,
                data,
                run_dir=flags.run_dir or _run_dir(flags, called),
                ckpt_path=flags.ckpt_path,
                save_every=flags.save_every,
                accelerator=device.type,
                devices=[device.index] if devices == 1 and device.index is not None else devices,
                precision=flags.precision,
                deterministic=flags.deterministic,
            )
        except Interrupted as stop:
            rank_zero_only(print)(f"Stopped. {resuming_command(None, stop.checkpoint)}", file=sys.stderr)
            sys.exit(130)
    return 0


def _run_dir(flags: argparse.Namespace, called: str) -> Path:
    if flags.checkpoint is None:
        return Path("runs") / f"refined-{flags.model}"
    source = Path(called)
    if not source.exists():  # on the hub
        return Path("runs") / f"refined-{source.name}"
    run = run_folder(source) if source.is_file() else source
    return run.with_name(f"{run.name}-refined")
