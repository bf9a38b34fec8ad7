"""Loading trained detectors: from checkpoints, run folders, saved folders, the hub, and torchvision."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torchvision.models.detection import FasterRCNN

from detector.errors import ModelError
from detector.files import read_json
from detector.models.config import BUILDERS
from detector.models.published import (
    load_torchvision_detector,
    number_of_classes,
    published_keypoints,
    published_names,
    settings_of,
)
from detector.models.weights import as_model_error, read_weights
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector, digest_of
from detector.pretrained.hub import CONFIG, WEIGHTS, fetch, is_hub_name
from detector.text import short

CHECKPOINT_KEY = "affine_crop_rcnn"  # the key of the description in a training checkpoint


def load_detector(source: str | Path, *, map_location: str | torch.device = "cpu", **hub_options: Any) -> Detector:
    """Load a trained detector. Nothing is unpickled.

    Args:
        source: a checkpoint of ``tools/train.py``, a run folder (its last checkpoint is taken), a folder written by
            :meth:`Detector.save`, or the name of a repository on Hugging Face's hub, "owner/name".
        map_location: the device to load to.
        hub_options: see ``huggingface_hub.hf_hub_download``, such as ``revision``, ``token`` and ``cache_dir``.

    Raises:
        ModelError: the source is missing, damaged, or not a detector of this project.
    """
    path = Path(checkpoint_of(source))
    if is_hub_name(path):
        path = fetch(str(source), **hub_options)
    return (_load_saved(path) if path.is_dir() else load_checkpoint(path)).to(map_location)


def _load_saved(folder: Path) -> Detector:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: neither a saved detector (no {name}) nor a run (no checkpoints/last.ckpt)")
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder / WEIGHTS}: cannot be read (cut off?): {short(str(error), 300)}") from None
    with as_model_error(f"{folder / CONFIG}: not a detector of this project, or damaged"):
        config = read_json(folder / CONFIG)
        description = DetectorDescription.from_dict(config)
        if config["weights_digest"] != digest_of(weights):
            raise ModelError(f"{WEIGHTS} beside it is damaged, or another detector's")
        return Detector.from_description(description, weights)


def checkpoint_of(source: str | Path) -> str:
    """Return the last checkpoint if ``source`` is a run folder, else ``source`` itself."""
    last = Path(source) / "checkpoints" / "last.ckpt"
    return str(last if last.is_file() and not (Path(source) / CONFIG).exists() else source)


def load_checkpoint(path: str | Path) -> Detector:
    """Load the detector of a checkpoint of ``tools/train.py``. Nothing is unpickled.

    Raises:
        ModelError: the file is missing, damaged, or not such a checkpoint.
    """
    return detector_of(read_weights(path), path)


def detector_of(checkpoint: dict[str, Any], path: str | Path) -> Detector:
    """Build the detector of a checkpoint's content; ``path`` is for messages."""
    with as_model_error(f"{path}: not a checkpoint of tools/train.py, or damaged"):
        description = DetectorDescription.from_dict(checkpoint[CHECKPOINT_KEY])
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        return Detector.from_description(description, weights)


def load_published(name: str, weights: str) -> Detector:
    """Load a torchvision detector by name.

    Args:
        name: one of :func:`~detector.models.published.torchvision_detectors`.
        weights: a file of its state_dict, or the name of published weights ("DEFAULT"; fetched).

    Returns:
        The detector. Its categories are COCO's for 91 classes, and a person for a published Keypoint R-CNN; otherwise
        the ids are ``None`` and the names "class 1", "class 2", ...

    Raises:
        ModelError: the name is unknown, or the weights are unavailable or do not fit.
    """
    model = load_torchvision_detector(name, weights)
    classes, published = number_of_classes(name, model.state_dict()), published_names(name)
    buildable = isinstance(model, FasterRCNN) and name.partition("_")[0] in BUILDERS
    ids: list[int | None] = [None] * (classes - 1)
    names = [f"class {label}" for label in range(1, classes)]
    if classes == len(published):
        ids, names = [i if known != "N/A" else None for i, known in enumerate(published)][1:], published[1:]
    settings = settings_of(name, model) if buildable else None
    return Detector(model, ids, names, settings=settings, keypoints=published_keypoints(name, model))
