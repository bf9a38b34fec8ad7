"""Several processes, the ranks, that score parts of one split."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as distributed

from detector.evaluation.running import Predictions


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Within, the rank of this process and how many ranks there are: (0, 1) unless torchrun started it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1
        return
    distributed.init_process_group("gloo")  # what is gathered are lists, on no device
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def gathered(part: Predictions) -> Predictions | None:
    """The predictions of all ranks, in the order of a single process, on rank 0; ``None`` on the others."""
    if not distributed.is_initialized():
        return part
    first = distributed.get_rank() == 0
    parts: list[Predictions] | None = [part] * distributed.get_world_size() if first else None
    distributed.gather_object(part, parts)
    if parts is None:
        return None
    whole, *others = parts
    for other in others:
        whole.add(other)
    whole.results.sort(key=lambda result: result["image_id"])
    return whole
