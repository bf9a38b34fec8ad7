"""The detector, the data and the device that a command line names."""

import os
from pathlib import Path

import torch

from detector.choices import Crop, Orientation
from detector.data.folder import DataFolder, find_root
from detector.errors import ModelError, UsageError
from detector.pretrained.detector import Detector
from detector.pretrained.loading import checkpoint_of, load_detector, load_published


def load_source(
    checkpoint: str | Path | None, model: str | None, weights: str | None, crop: Crop | None
) -> tuple[Detector, str]:
    """Return the detector and its name for reports. For a run folder, the name is the path of its last checkpoint."""
    if checkpoint is not None:
        if model is not None or weights is not None:
            raise UsageError("two detectors are given", hints=["give {checkpoint}", "{model} with {weights}"])
        name = checkpoint_of(checkpoint)
        detector = load_detector(name)
    elif model is None:
        raise UsageError("no detector is given", hints=["give {checkpoint}", "{model} with {weights}"])
    elif weights is None:
        raise UsageError(
            "needs weights", setting="model", value=model, hints=["give {weights} FILE", "{weights} DEFAULT"]
        )
    else:
        detector, name = load_published(model, weights), f"{model}, {weights}"
    if crop is not None:
        try:
            detector.crop_by(crop)
        except ModelError as error:
            raise UsageError(error.message, setting="crop", value=crop) from None
    return detector, name


def switch_refinement(detector: Detector, refine: str | None) -> None:
    """Switch the detector's refinement on or off; ``None`` leaves it as it is."""
    if refine is None:
        return
    if detector.refinement is None:
        hint = "train one with tools/refine.py"
        raise UsageError("the detector has no refinement", setting="refine", value=refine, hints=[hint])
    detector.refinement.enabled = refine != "off"


def pick_device(device: str | None) -> torch.device:
    """Return the named device; by default a GPU if there is one. Under torchrun, each process gets its own GPU."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(str(error).splitlines()[0], setting="device", value=device) from None
    return place


def data_folder(
    root: str | Path | None, dataset: str | None, annotations: str | None, images: str, orientation: Orientation
) -> DataFolder:
    """Return the folder of a data set."""
    return DataFolder(find_root(root, dataset), annotations or DataFolder.annotations, images, orientation)
