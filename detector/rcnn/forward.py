"""The forward pass of a torchvision R-CNN, stage by stage."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_inference, maskrcnn_inference


@dataclass(frozen=True)
class Proposals:
    """The output of the first stage, in the frame of the resized images."""

    images: (
        ImageList  # tensors [N, 3, H, W], padded, and image_sizes, the (height, width) of each image without padding
    )
    features: dict[str, Tensor]  # [N, C, H_level, W_level] by the name of the level
    boxes: list[Tensor]  # [L, 4] per image, (x1, y1, x2, y2) in pixels of the resized image
    losses: dict[str, Tensor]  # of the RPN; empty in eval mode
    targets: list[dict[str, Tensor]] | None  # resized with the images

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return self.images.image_sizes


def propose(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Proposals:
    """Run the transform, the backbone and the RPN on images [3, H, W] in 0..1."""
    batch, targets = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    if isinstance(features, Tensor):
        features = {"0": features}
    boxes, losses = model.rpn(batch, features, targets)
    return Proposals(batch, features, boxes, losses, targets)


def detect_boxes(
    heads: RoIHeads, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Run the box head in eval mode. Returns ``boxes`` [L, 4], ``labels`` [L] and ``scores`` [L] per image."""
    crops = heads.box_roi_pool(features, proposals, image_sizes)
    logits, deltas = heads.box_predictor(heads.box_head(crops))
    found = heads.postprocess_detections(logits, deltas, proposals, image_sizes)
    return [{"boxes": b, "labels": la, "scores": s} for b, s, la in zip(*found, strict=True)]


def add_masks_and_keypoints(
    heads: RoIHeads,
    features: dict[str, Tensor],
    detections: list[dict[str, Tensor]],
    image_sizes: list[tuple[int, int]],
) -> None:
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
