"""Seconds a training step with the loader, and without it: on the same batches, kept in memory.

DETECTOR_DATA=FOLDER python .github/assets/loader.py --config configs/bccd.yaml --data.workers 2
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import torch

from detector.data.dataset import as_float
from detector.tools.training_cli import parse, training_parser

STEPS, WARM_UP, ROUNDS = 20, 3, 3


def seconds(cli: Any, batches: Iterable[Any]) -> float:
    """The mean of some steps."""
    model, (optimizer, *_) = cli.model.model, cli.trainer.optimizers
    device = next(model.parameters()).device
    began = 0.0
    for number, (images, targets) in enumerate(itertools.islice(batches, STEPS + WARM_UP)):
        if number == WARM_UP:
            began = time.perf_counter()
        images = [as_float(image.to(device)) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    flags = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    flags += ["--trainer.limit_val_batches=0", f"--run_dir={tempfile.mkdtemp()}"]
    cli = parse(training_parser(), [*sys.argv[1:], *flags])
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.model.model.train()
    with_loader, without = [], []
    for _ in range(ROUNDS):
        loader = cli.datamodule.train_dataloader()
        with_loader.append(seconds(cli, itertools.chain.from_iterable(itertools.repeat(loader))))
        batches = list(itertools.islice(loader, STEPS + WARM_UP))
        del loader  # and its workers
        without.append(seconds(cli, itertools.cycle(batches)))
    for name, times in (("with the loader", with_loader), ("the same batches, in memory", without)):
        print(f"{name}: {statistics.median(times):.3f} s a step ({min(times):.3f} to {max(times):.3f})")


if __name__ == "__main__":
    main()
