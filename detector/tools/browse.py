"""The command line of ``tools/browse.py``, which takes the flags of ``tools/train.py``."""

from detector.tools.arguments import first_look

DESCRIPTION = """Draw training images as the model sees them; takes all flags of tools/train.py.

  python tools/browse.py --config configs/bccd.yaml --data.root FOLDER --output sheet.png
  python tools/browse.py --config configs/bccd.yaml --data.augmentation+ RandomPhotometricDistort"""


def main(arguments: list[str] | None = None) -> int:
    """Draw training images as a command line says. Returns the exit code."""
    first_look(DESCRIPTION, arguments)
    from detector.tools.browsing import browse_training_images

    return browse_training_images(arguments, DESCRIPTION)
