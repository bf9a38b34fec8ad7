"""A three-stage Cascade R-CNN of torchvision's heads, for the comparison of comparison.py.

Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection" (2018), as detectron2 implements it:
the boxes that a stage decodes are the RoIs of the next one, detached and not sampled again; regressors are
class-agnostic; the features get a third of each stage's gradient; a detection has the boxes of the last stage, and the
mean of the stages' scores. The box loss is torchvision's (detectron2's has a beta of 0).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import box_iou, clip_boxes_to_image

from detector.rcnn.box_gradient import scale_gradient
from detector.rcnn.forward import Boxes, Features, Found, HeadOutput, Sizes, Targets

IOUS = (0.5, 0.6, 0.7)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


class Stage(nn.Module):
    """One stage: a box head and a predictor whose four deltas serve every class."""

    def __init__(self, heads: RoIHeads, iou: float, weights: tuple[float, ...]) -> None:
        super().__init__()
        self.head = copy.deepcopy(heads.box_head)
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        scores = heads.box_predictor.cls_score
        self.predictor = FastRCNNPredictor(scores.in_features, scores.out_features)
        self.predictor.bbox_pred = nn.Linear(scores.in_features, 4)
        self.matcher, self.coder = Matcher(iou, iou, allow_low_quality_matches=False), BoxCoder(weights)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Return class scores [K, classes] and deltas [K, 4]."""
        scores, deltas = self.predictor(self.head(scale_gradient(crops, 1 / len(IOUS))))
        return scores, deltas

    def decoded(self, deltas: Tensor, boxes: Boxes, sizes: Sizes) -> Boxes:
        moved = self.coder.decode(deltas.detach(), boxes)[:, 0].split([len(b) for b in boxes])
        return [clip_boxes_to_image(b, size) for b, size in zip(moved, sizes, strict=True)]


class CascadeRoIHeads(RoIHeads):
    """torchvision's RoI heads, whose box head and predictor are three stages."""

    stages: nn.ModuleList

    def forward(self, features: Features, proposals: Boxes, image_shapes: Sizes, targets: Targets = None) -> HeadOutput:
        boxes, losses = proposals, {}
        if self.training:
            boxes, matched, labels, _ = self.select_training_samples(proposals, targets)
        outputs = []
        for number, stage in enumerate(self.stages):
            if self.training and number:
                matched, labels = self._match(stage, boxes, targets)
            scores, deltas = stage(self.box_roi_pool(features, boxes, image_shapes))
            if self.training:
                losses |= self._losses(number, stage, scores, deltas, boxes, matched, labels, targets)
            outputs.append((scores.softmax(1), deltas, boxes))
            boxes = stage.decoded(deltas, boxes, image_shapes)
        return ([], losses) if self.training else (self._detections(outputs, image_shapes), {})

    @staticmethod
    def _match(stage: Any, boxes: Boxes, targets: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return the ground truth of each box and its label, 0 below the IoU of the stage."""
        matched, labels = [], []
        for own, target in zip(boxes, targets, strict=True):
            if len(target["boxes"]) == 0:
                match = torch.full((len(own),), Matcher.BELOW_LOW_THRESHOLD, device=own.device)
                label = torch.zeros_like(match)
            else:
                match = stage.matcher(box_iou(target["boxes"], own))
                label = target["labels"][match.clamp(min=0)] * (match >= 0)
            matched.append(match.clamp(min=0))
            labels.append(label)
        return matched, labels

    @staticmethod
    def _losses(
        number: int, stage: Any, scores: Tensor, deltas: Tensor, boxes: Boxes, matched: Any, labels: Any, targets: Any
    ) -> dict[str, Tensor]:
        truth = [
            target["boxes"][match] if len(target["boxes"]) else torch.ones_like(own)
            for own, match, target in zip(boxes, matched, targets, strict=True)
        ]
        encoded = stage.coder.encode(truth, boxes)
        shared = deltas.repeat(1, scores.shape[1])  # torchvision's loss takes the four deltas of the label
        classification, box = fastrcnn_loss(scores, shared, labels, encoded)
        return {f"loss_classifier_{number}": classification, f"loss_box_reg_{number}": box}

    def _detections(self, outputs: list[tuple[Tensor, Tensor, Boxes]], sizes: Sizes) -> list[dict[str, Tensor]]:
        scores = torch.stack([scores for scores, _, _ in outputs]).mean(0)
        _, deltas, boxes = outputs[-1]
        self.box_coder = self.stages[-1].coder
        found: Found = self.postprocess_detections(scores.log(), deltas.repeat(1, scores.shape[1]), boxes, sizes)
        return [dict(zip(("boxes", "scores", "labels"), one)) for one in zip(*found)]


def make_cascade(model: Any) -> Any:
    """Turn the box head of a Faster R-CNN into a cascade with random weights, in place."""
    heads = model.roi_heads
    heads.__class__ = CascadeRoIHeads
    heads.stages = nn.ModuleList(Stage(heads, *settings) for settings in zip(IOUS, WEIGHTS))
    del heads.box_head, heads.box_predictor
    heads.box_head = heads.box_predictor = None
    return model.to(memory_format=torch.channels_last)
