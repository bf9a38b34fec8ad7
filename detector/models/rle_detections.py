"""Detections with masks as RLE, because a hundred pasted masks of a large image would fill the memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.data.annotation_types import AnnotationType
from detector.data.masks import encode_crops
from detector.rcnn.forward import propose

DetectionDict = dict[str, Any]  # torchvision's of one image, with "segmentations", a list of RLE, in place of "masks"


def annotation_types_of(model: nn.Module) -> tuple[AnnotationType, ...]:
    """Return the annotation types that a detector finds besides boxes."""
    heads: Any = getattr(model, "roi_heads", None)
    if not isinstance(model, GeneralizedRCNN) or heads is None:
        return ()
    return ("masks",) * heads.has_mask() + ("keypoints",) * heads.has_keypoint()


def detect(model: Any, images: list[Tensor]) -> list[DetectionDict]:
    """Call a detector in eval mode on images [3, H, W] in 0..1."""
    if "masks" not in annotation_types_of(model):
        return model(images)
    proposals = propose(model, images)
    detections, _ = model.roi_heads(proposals.features, proposals.boxes, proposals.image_sizes)
    return postprocess(model, detections, proposals.image_sizes, sizes_of(images))


def postprocess(
    model: Any, detections: list[DetectionDict], resized: list[tuple[int, int]], sizes: list[tuple[int, int]]
) -> list[DetectionDict]:
    """Scale the output of the RoI heads to the original images, and encode its masks.

    Args:
        model: the detector.
        detections: the output of its RoI heads.
        resized: (height, width) of each resized image.
        sizes: (height, width) of each original image.
    """
    crops = [one.pop("masks", None) for one in detections]
    detections = model.transform.postprocess(detections, resized, sizes)
    for one, crop, size in zip(detections, crops, sizes, strict=True):
        if crop is not None:
            one["segmentations"] = encode_crops(crop, one["boxes"], size)
    return detections


def sizes_of(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the (height, width) of each image [3, H, W]."""
    return [(image.shape[-2], image.shape[-1]) for image in images]


def select(detections: Mapping[str, Any], mask: Tensor) -> DetectionDict:
    """Return the detections of an image where ``mask`` [L] is true."""
    places = mask.nonzero().flatten().tolist()
    return {
        name: [values[place] for place in places] if isinstance(values, list) else values[mask]
        for name, values in detections.items()
    }
