"""Data loaders, whose workers leave signals to the main process."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detector.signals import ignore_signals


def collate(items: list[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    """Keep images of different sizes as a list; the detector pads them to one batch."""
    images, targets = zip(*items)
    return list(images), list(targets)


def make_loader(
    dataset: Dataset[Any], batches: Iterable[Any] | None, *, workers: int, collate_fn: Any = collate, **options: Any
) -> DataLoader[Any]:
    """Build a loader with ``workers`` processes. Without ``batches`` it yields single items."""
    if batches is None:
        options["batch_size"], collate_fn = None, None
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_fn,
        worker_init_fn=ignore_signals,
        **options,
    )
