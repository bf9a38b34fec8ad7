"""A call of a detector whose masks come as RLE: pasted into a large image, a hundred of them would fill the memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.data.annotation_types import AnnotationType
from detector.data.masks import encode_crops
from detector.rcnn.forward import propose

Found = dict[str, Any]  # of an image: torchvision's boxes, labels, scores, ...; and "segmentations", a list of RLE


def annotation_types_of(model: nn.Module) -> tuple[AnnotationType, ...]:
    """What a detector finds besides boxes."""
    heads: Any = getattr(model, "roi_heads", None)
    if not isinstance(model, GeneralizedRCNN) or heads is None:
        return ()
    has: dict[AnnotationType, bool] = {"masks": heads.has_mask(), "keypoints": heads.has_keypoint()}
    return tuple(part for part, found in has.items() if found)


def detect(model: Any, images: list[Tensor]) -> list[Found]:
    """What ``model(images)`` gives in eval mode, with ``segmentations``, RLE, in place of ``masks``."""
    if "masks" not in annotation_types_of(model):
        return model(images)
    proposed = propose(model, images)
    found, _ = model.roi_heads(proposed.features, proposed.boxes, proposed.image_sizes)
    return postprocessed(model, found, proposed.image_sizes, sizes_of(images))


def postprocessed(
    model: Any, found: list[Found], resized: list[tuple[int, int]], sizes: list[tuple[int, int]]
) -> list[Found]:
    """Detections of the RoI heads in pixels of the images that were given, with RLE in place of masks.

    Args:
        model: the detector.
        found: what its RoI heads return.
        resized: heights and widths that the images had there.
        sizes: those that they were given in.
    """
    crops = [one.pop("masks", None) for one in found]
    found = model.transform.postprocess(found, resized, sizes)
    for one, crop, size in zip(found, crops, sizes, strict=True):
        if crop is not None:
            one["segmentations"] = encode_crops(crop, one["boxes"], size)
    return found


def sizes_of(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The height and width of each image [3, H, W]."""
    return [(image.shape[-2], image.shape[-1]) for image in images]


def kept(found: Mapping[str, Any], which: Tensor) -> Found:
    """Some of an image's detections.

    Args:
        found: the detections.
        which: [L], bool.
    """
    places = which.nonzero().flatten().tolist()
    return {
        name: [values[place] for place in places] if isinstance(values, list) else values[which]
        for name, values in found.items()
    }
