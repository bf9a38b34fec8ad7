"""What goes wrong in a training run, in one sentence: what happened, on which images, and what to change."""

from collections.abc import Sequence

from detector.errors import UserError, is_out_of_memory

# How a refusal to go on from a checkpoint with other settings ends.
ANEW = ", or start a new run from its weights, with any settings: --model.detector.weights FILE"


class TrainingError(UserError, RuntimeError):
    """Why training cannot go on."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; says how to go on."""


def explained(error: BaseException, step: int, images: Sequence[int], upcoming: Sequence[int]) -> TrainingError | None:
    """The error of a training run in one sentence, or ``None`` for one that is not known: a bug, perhaps.

    Args:
        error: what was raised.
        step: the optimizer step under way.
        images: the ids of the images under way,
        upcoming: and of those that were to come next, if they are known.
    """
    text = str(error)
    if is_out_of_memory(error):
        ids = list(upcoming if "Original Traceback" in text else images)  # reading ahead, or computing
        where = f"on images {ids}" if ids else "while scoring"
        return TrainingError(
            f"out of memory in step {step}, {where}: lower --data.batch_size (and set "
            "--trainer.accumulate_grad_batches to keep the images a step), --data.max_size, --data.workers, or "
            "--model.detector.rois_per_image"
        )
    if "DataLoader worker (pid" in text:
        reason = " ".join(str(error.__cause__ or error).splitlines()[0].split())
        following = f"The next images were {list(upcoming)}." if upcoming else "It was scoring."
        return TrainingError(
            f"a process that reads images died after step {step}, probably of too little memory or shared memory "
            f"(/dev/shm): {reason} {following} Lower --data.workers, or set it to 0 to "
            "see the reason"
        )
    return None
