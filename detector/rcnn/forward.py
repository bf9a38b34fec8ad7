"""The stages of a torchvision R-CNN, and the types that they exchange."""

from typing import Any, NamedTuple

from torch import Tensor

Boxes = list[Tensor]  # [L, 4] per image, (x1, y1, x2, y2) in pixels of the resized images
Features = dict[str, Tensor]  # maps [N, C, H, W] by the name of the level
Sizes = list[tuple[int, int]]  # (height, width) of each resized image
Targets = list[dict[str, Tensor]] | None
Losses = dict[str, Tensor]
Found = tuple[Boxes, list[Tensor], list[Tensor]]  # boxes, scores [L] and labels [L] per image, highest score first
HeadOutput = tuple[list[dict[str, Tensor]], Losses]


class Proposals(NamedTuple):
    """The output of the first stage."""

    features: Features
    boxes: Boxes
    image_sizes: Sizes
    losses: Losses  # of the RPN; empty in eval mode
    targets: Targets  # resized with the images


def propose(model: Any, images: list[Tensor], targets: Targets = None) -> Proposals:
    """Run the transform, the backbone and the RPN on images [3, H, W] in 0..1."""
    batch, targets = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    if isinstance(features, Tensor):
        features = {"0": features}
    boxes, losses = model.rpn(batch, features, targets)
    return Proposals(features, boxes, batch.image_sizes, losses, targets)


def detect_boxes(heads: Any, features: Features, proposals: Boxes, image_sizes: Sizes) -> Found:
    """Run the box head of RoI heads in eval mode, without a refinement."""
    crops = heads.box_roi_pool(features, proposals, image_sizes)
    return heads.postprocess_detections(*heads.box_predictor(heads.box_head(crops)), proposals, image_sizes)
