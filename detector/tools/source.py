"""Which detector a command line names, and where it runs."""

import os

import torch

from detector.data.dataset import CocoDetection
from detector.data.folder import DataFolder
from detector.errors import MissingAnnotationsError, ModelError, UsageError
from detector.models.rle_detections import annotation_types_of
from detector.pretrained.description import Crop
from detector.pretrained.detector import Detector
from detector.pretrained.loading import checkpoint_of, load_detector, load_published


def load_source(
    checkpoint: str | None, model: str | None, weights: str | None, crop: Crop | None
) -> tuple[Detector, str]:
    """The detector that a command line names, and what to call it; of a run's folder, the checkpoint that was taken."""
    if checkpoint is not None:
        if model is not None or weights is not None:
            raise UsageError("give --checkpoint, or --model with --weights, not both")
        called = checkpoint_of(checkpoint)
        detector = load_detector(called)
    elif model is None:
        raise UsageError("give one of --checkpoint FILE, or --model NAME --weights FILE")
    elif weights is None:
        raise UsageError("--model needs --weights: a state_dict file, or DEFAULT for the published ones")
    else:
        detector, called = load_published(model, weights), f"{model}, {weights}"
    if crop is not None:
        try:
            detector.crop_by(crop)
        except ModelError as error:
            raise UsageError(f"--{error}") from None
    return detector, called


def switch_refinement(detector: Detector, refine: str | None) -> None:
    """Switch the refinement of a detector as ``--refine`` says: off, or else on. ``None``: as it is."""
    if refine is None:
        return
    if detector.refinement is None:
        raise UsageError(f"--refine {refine}: the detector has no refinement (tools/refine.py trains one)")
    detector.refinement.enabled = refine != "off"


def pick_device(device: str | None) -> torch.device:
    """The device of a name; by default a GPU if there is one. Of several processes each gets a GPU of its own."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return place


def split_for(detector: Detector, folder: DataFolder, split: str, *, skip_missing: bool = False) -> CocoDetection:
    """The split with what the detector finds besides boxes, if it has any of that."""
    try:
        return folder.dataset(split, annotation_types=annotation_types_of(detector.model), skip_missing=skip_missing)
    except MissingAnnotationsError:  # the report says so
        return folder.dataset(split, skip_missing=skip_missing)
