"""The command line of ``tools/train.py``; its flags are those of the task, the data and Lightning's trainer."""

from detector.tools.arguments import first_look

DESCRIPTION = """Train an affine-crop R-CNN and score it; configs/ has complete settings, which flags change.

  python tools/train.py --config configs/quickstart.yaml --trainer.max_epochs 2
  python tools/train.py --config configs/coco_r50_fpn_1x.yaml --data.root FOLDER --data.batch_size 4

The run's own options come first, then those of the data, the model and its optimizer, and last Lightning's trainer."""


def main(arguments: list[str] | None = None) -> int:
    """Train as a command line says. Returns the exit code."""
    first_look(DESCRIPTION, arguments)
    from detector.tools.training import train

    return train(arguments, DESCRIPTION)
