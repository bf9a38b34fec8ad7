"""Errors that end a training."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from detector.errors import UserError, is_out_of_memory

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


def explain(error: BaseException, step: int, images: Sequence[int], upcoming: Sequence[int]) -> TrainingError | None:
    """Return a user error for one that settings can avert, or ``None``.

    Args:
        error: what was raised.
        step: the optimizer step under way.
        images: the ids of the images of the current batch.
        upcoming: the ids of the images that follow, if they are known.
    """
    text = str(error)
    if is_out_of_memory(error):
        ids = list(upcoming if "Original Traceback" in text else images)  # a worker reads ahead
        where = f"on images {ids}" if ids else "while scoring"
        smaller = tuple(f"lower {{{name}}}" for name in ("batch_size", "max_size", "workers", "rois_per_image"))
        more = "set {accumulate_grad_batches} to keep the images a step"
        return TrainingError(f"out of memory in step {step}, {where}", hints=(*smaller, more))
    if "DataLoader worker (pid" in text:
        reason = " ".join(str(error.__cause__ or error).splitlines()[0].split())
        following = f"the next images were {list(upcoming)}" if upcoming else "it was scoring"
        return TrainingError(
            f"a process that reads images died after step {step}, probably because memory or shared memory (/dev/shm) "
            f"ran out ({reason}); {following}",
            hints=("lower {workers}", "set {workers} to 0 to see the reason"),
        )
    return None


def flattened(name: str, settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass by dotted names such as "optimizer.lr"; tuples become lists."""
    if not is_dataclass(settings):
        return {name: _plain(settings)}
    values: dict[str, Any] = {}
    for field in fields(settings):
        values |= flattened(f"{name}.{field.name}", getattr(settings, field.name))
    return values


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], *, new_run: str = "start a new run") -> None:
    """Raise a :class:`TrainingError` if a setting of this run differs from the checkpoint's."""
    for name, value in now.items():
        if before.get(name) != value:
            raise TrainingError(
                f"the checkpoint was trained with {name} {before.get(name)}, this run has {value}",
                hints=("resume with the same settings", new_run),
            )
