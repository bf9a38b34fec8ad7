"""What goes wrong in a training run, in one sentence: what happened, on which images, and what to change."""

from collections.abc import Sequence
from dataclasses import dataclass

from detector.errors import UserError, is_out_of_memory


@dataclass(frozen=True)
class Advice:
    """What a user can change, by the flags of the tool that trains: here those of ``tools/train.py``.

    Args:
        memory: what to lower where memory runs out.
        workers: how many processes read images.
        rate: what to lower where the training diverges.
        images: what makes up the images of a step,
        length: and the length of the training.
        anew: how a refusal to go on from a checkpoint with other settings ends.
        skip_broken: what leaves broken images out.
    """

    memory: str = (
        "--data.batch_size (and set --trainer.accumulate_grad_batches to keep the images a step), --data.max_size, "
        "--data.workers, or --model.detector.rois_per_image"
    )
    workers: str = "--data.workers"
    rate: str = "--model.optimizer.lr"
    clip: str = ", or with --trainer.gradient_clip_val"
    images: str = "--data.batch_size x --trainer.accumulate_grad_batches"
    length: str = "--trainer.max_epochs"
    anew: str = ", or start a new run from its weights, with any settings: --model.detector.weights FILE"
    skip_broken: str | None = "--data.skip_broken true"


TRAIN = Advice()
REFINE = Advice(
    memory="--batch_size or --workers",
    workers="--workers",
    rate="--lr",
    clip="",
    images="--batch_size",
    length="--max_steps or --epochs",
    anew=", or start a new run",
    skip_broken=None,
)


class TrainingError(UserError, RuntimeError):
    """Why training cannot go on."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; says how to go on."""


def explained(
    error: BaseException, step: int, images: Sequence[int], upcoming: Sequence[int], advice: Advice = TRAIN
) -> TrainingError | None:
    """The error of a training run in one sentence, or ``None`` for one that is not known: a bug, perhaps.

    Args:
        error: what was raised.
        step: the optimizer step under way.
        images: the ids of the images under way,
        upcoming: and of those that were to come next, if they are known.
        advice: the flags to change.
    """
    text = str(error)
    if is_out_of_memory(error):
        ids = list(upcoming if "Original Traceback" in text else images)  # reading ahead, or computing
        where = f"on images {ids}" if ids else "while scoring"
        return TrainingError(f"out of memory in step {step}, {where}: lower {advice.memory}")
    if "DataLoader worker (pid" in text:
        reason = " ".join(str(error.__cause__ or error).splitlines()[0].split())
        following = f"The next images were {list(upcoming)}." if upcoming else "It was scoring."
        return TrainingError(
            f"a process that reads images died after step {step}, probably of too little memory or shared memory "
            f"(/dev/shm): {reason} {following} Lower {advice.workers}, or set it to 0 to "
            "see the reason"
        )
    return None
