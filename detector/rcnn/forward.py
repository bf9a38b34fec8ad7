"""The forward pass of a torchvision R-CNN, stage by stage."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_inference, maskrcnn_inference

Features = dict[str, Tensor]  # maps [N, C, H, W] by the name of the level
Sizes = list[tuple[int, int]]  # (height, width) of each resized image
Targets = list[dict[str, Tensor]] | None
Detections = list[dict[str, Tensor]]  # per image


@dataclass(frozen=True)
class Proposals:
    """The output of the first stage. Boxes are (x1, y1, x2, y2) in pixels of the resized images."""

    images: ImageList  # padded [N, 3, H, W], with the sizes without padding
    features: Features
    boxes: list[Tensor]  # [L, 4] per image
    losses: dict[str, Tensor]  # of the RPN; empty in eval mode
    targets: Targets  # resized with the images

    @property
    def image_sizes(self) -> Sizes:
        return self.images.image_sizes


def propose(model: Any, images: list[Tensor], targets: Targets = None) -> Proposals:
    """Run the transform, the backbone and the RPN on images [3, H, W] in 0..1."""
    batch, targets = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    if isinstance(features, Tensor):
        features = {"0": features}
    boxes, losses = model.rpn(batch, features, targets)
    return Proposals(batch, features, boxes, losses, targets)


def detect_boxes(heads: RoIHeads, features: Features, proposals: list[Tensor], image_sizes: Sizes) -> Detections:
    """Run the box head in eval mode. Returns ``boxes`` [L, 4], ``labels`` [L] and ``scores`` [L] per image."""
    crops = heads.box_roi_pool(features, proposals, image_sizes)
    logits, deltas = heads.box_predictor(heads.box_head(crops))
    found = heads.postprocess_detections(logits, deltas, proposals, image_sizes)
    return [{"boxes": b, "labels": la, "scores": s} for b, s, la in zip(*found, strict=True)]


def add_masks_and_keypoints(heads: RoIHeads, features: Features, detections: Detections, image_sizes: Sizes) -> None:
    """Run the mask and keypoint heads on the detected boxes in eval mode, and add their outputs in place."""
    boxes = [one["boxes"] for one in detections]
    if heads.has_mask():
        crops = heads.mask_roi_pool(features, boxes, image_sizes)
        masks = maskrcnn_inference(heads.mask_predictor(heads.mask_head(crops)), [one["labels"] for one in detections])
        for one, mask in zip(detections, masks, strict=True):
            one["masks"] = mask
    if heads.has_keypoint():
        crops = heads.keypoint_roi_pool(features, boxes, image_sizes)
        keypoints, scores = keypointrcnn_inference(heads.keypoint_predictor(heads.keypoint_head(crops)), boxes)
        for one, points, score in zip(detections, keypoints, scores, strict=True):
            one["keypoints"], one["keypoints_scores"] = points, score
