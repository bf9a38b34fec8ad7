"""Errors that end a training."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from detector.errors import ImageError, UserError, is_out_of_memory, one_line

START_AGAIN = ("start again with a lower {lr}", "start again with {gradient_clip_val}")


class TrainingError(UserError, RuntimeError):
    """Training cannot start or resume."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped the training.

    Args:
        checkpoint: the file to resume from; ``None`` if there is none yet.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__("there is no checkpoint yet" if checkpoint is None else f"resume from {checkpoint}")
        self.checkpoint = checkpoint


def explain(error: BaseException, task: Any, data: Any, last: Path | None) -> TrainingError | None:
    """Return a user error that names the last good checkpoint; ``None`` if there is nothing to add to ``error``.

    Args:
        error: the error that ended the training.
        task: a :class:`~detector.training.task.DetectionTask`.
        data: its :class:`~detector.training.data.CocoDataModule`.
        last: the last checkpoint, if there is one.
    """
    text, upcoming = str(error), []
    of_worker, is_image = "Original Traceback" in text, isinstance(error, ImageError) and not data.skip_broken
    if task.training:
        with suppress(Exception):  # the run may have failed earlier
            upcoming = data.upcoming(2 * max(data.workers, 1))
    known: UserError
    if is_out_of_memory(error):
        ids = upcoming if of_worker else task.image_ids  # a worker prefetches
        where = f"on images {ids}" if ids else "while scoring"
        smaller = [f"lower {{{name}}}" for name in ("batch_size", "max_size", "cache_gb", "workers", "rois_per_image")]
        more = "set {accumulate_grad_batches} to keep the number of images per step"
        known = TrainingError(f"out of memory in step {task.global_step}, {where}", hints=[*smaller, more])
    elif "DataLoader worker (pid" in text:
        reason = " ".join(str(error.__cause__ or error).splitlines()[0].split())
        following = f"the next images were {upcoming}" if upcoming else "it was scoring"
        known = TrainingError(
            f"a process that reads images died after step {task.global_step}, probably because memory or shared memory "
            f"(/dev/shm) ran out ({reason}); {following}",
            hints=["lower {workers}", "set {workers} to 0 to see the reason"],
        )
    elif isinstance(error, (UserError, OSError)) and (last is not None or is_image):
        known = error if isinstance(error, UserError) and not of_worker else TrainingError(one_line(error))
    else:
        return None
    message, hints = known.message, [*known.hints]
    if is_image:
        weights = "" if last is None else f" {{weights}} {last}"
        hints.append(f"leave such images out in a new run: {{skip_broken}} true{weights}")
    if last is not None:
        message += f" (the last good checkpoint is {last})"
    return TrainingError(message, setting=known.setting, value=known.value, hints=hints)


def flattened(name: str, settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass by dotted names such as "optimizer.lr"; tuples become lists."""
    if not is_dataclass(settings):
        return {name: json.loads(json.dumps(settings))}
    values: dict[str, Any] = {}
    for field in fields(settings):
        values |= flattened(f"{name}.{field.name}", getattr(settings, field.name))
    return values


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], *, new_run: str = "start a new run") -> None:
    """Raise a :class:`TrainingError` if a setting of this run differs from the checkpoint's."""
    for name, value in now.items():
        if before.get(name) != value:
            raise TrainingError(
                f"the checkpoint was trained with {name} {before.get(name)}, this run has {value}",
                hints=("resume with the same settings", new_run),
            )
