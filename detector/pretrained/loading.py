"""A trained detector from wherever it is: a checkpoint, a folder, a name on the hub, torchvision's."""

from pathlib import Path
from typing import Any

from torchvision.models.detection import FasterRCNN

from detector.errors import ModelError
from detector.models.config import BUILDERS
from detector.models.published import (
    load_torchvision_detector,
    number_of_classes,
    published_keypoints,
    published_names,
    settings_of,
)
from detector.models.weights import read_weights, refusing
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector
from detector.pretrained.hub import CONFIG, is_hub_name

CHECKPOINT_KEY = "affine_crop_rcnn"  # of the description in a training checkpoint


def load_detector(source: str | Path) -> Detector:
    """A trained detector from wherever it is. Nothing is unpickled.

    Args:
        source: a checkpoint of ``tools/train.py`` or the folder of its run (the last one is taken), a folder of
            :meth:`Detector.save_pretrained`, or the name of a repository of Hugging Face's hub, "owner/name".

    Raises:
        ModelError: it is not there, damaged, or another program's; says which.
    """
    path = Path(checkpoint_of(source))
    if path.is_dir() and not (path / CONFIG).exists():
        raise ModelError(
            f"{path}: not a folder of save_pretrained: it has no {CONFIG}; nor of a training run: it has no "
            "checkpoints/last.ckpt"
        )
    if path.is_dir() or is_hub_name(path):
        return Detector.from_pretrained(source)
    return load_checkpoint(path)


def checkpoint_of(source: str | Path) -> str:
    """The last checkpoint of a run, if ``source`` is a run's folder; else ``source``."""
    last = Path(source) / "checkpoints" / "last.ckpt"
    return str(last) if last.is_file() and not (Path(source) / CONFIG).exists() else str(source)


def load_checkpoint(path: str | Path) -> Detector:
    """Build the detector of a checkpoint of ``tools/train.py`` and load its weights. Nothing is unpickled.

    Raises:
        ModelError: the file is missing, broken, or not such a checkpoint.
    """
    return detector_of(read_weights(path), path)


def detector_of(checkpoint: dict[str, Any], path: str | Path) -> Detector:
    """The detector of a checkpoint that was read already, see :func:`load_checkpoint`; ``path`` is for messages."""
    with refusing(f"{path}: not a checkpoint of tools/train.py, or damaged"):
        description = DetectorDescription.from_dict(checkpoint[CHECKPOINT_KEY])
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        return Detector.described_by(description, weights)


def load_published(name: str, weights: str) -> Detector:
    """A torchvision detector by name, with weights.

    Args:
        name: one of :func:`~detector.models.published.torchvision_detectors`.
        weights: a file of its state_dict, or a name that torchvision publishes ("DEFAULT"; fetched).

    Returns:
        The detector. With 91 classes its categories are COCO's, with one and keypoints a person; of others nothing is
        known but their number: then the ids are ``None`` and the names "class 1", "class 2", ...

    Raises:
        ModelError: the name is not known, or the weights cannot be had or are another model's.
    """
    model = load_torchvision_detector(name, weights)
    classes = number_of_classes(name, model.state_dict())
    buildable = isinstance(model, FasterRCNN) and name.partition("_")[0] in BUILDERS
    settings = settings_of(name, model) if buildable else None
    keypoints = published_keypoints(name, model)
    published = published_names(name)
    if classes == len(published):
        ids = [i if known != "N/A" else None for i, known in enumerate(published)][1:]
        return Detector(model, ids, published[1:], settings=settings, keypoints=keypoints)
    names = [f"class {label}" for label in range(1, classes)]
    return Detector(model, [None] * (classes - 1), names, settings=settings, keypoints=keypoints)
