"""The training losses of images that a detector is scored on, beside its detections."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.data.masks import MaskLayers
from detector.models.rle_detections import DetectionDict, postprocess, sizes_of
from detector.overriding import overridden
from detector.refinement.attach import refinement_of


@torch.no_grad()
def detect_with_losses(
    model: nn.Module, images: list[Tensor], targets: Sequence[Mapping[str, Any]]
) -> tuple[list[DetectionDict], dict[str, Tensor]]:
    """Detections and the training losses of the same images; of an R-CNN by one pass of backbone and RPN.

    The model is in eval mode, but for the flags by which its parts choose what to return: dropout drops nothing, and no
    statistic of batch norm changes. The losses of an R-CNN are those of the proposals of testing, which are fewer than
    in training. Those of a refinement are not among them: they are of boxes drawn by chance.

    Args:
        model: a torchvision detector; put in eval mode for the call.
        images: [3, H, W] in 0..1.
        targets: of each image, as in training: boxes, labels, and the masks or keypoints that the model finds; masks
            of large images better as :class:`~detector.data.masks.MaskLayers`, which are resized before they are many.

    Returns:
        What :func:`~detector.models.rle_detections.detect` returns, and the losses by torchvision's names.
    """
    training = model.training
    model.eval()
    try:
        if not isinstance(model, GeneralizedRCNN):
            detections = model(images)
            with overridden(model, training=True):
                return detections, model(images, targets)
        given = [dict(target) for target in targets]
        layers = [one.pop("masks") if isinstance(one.get("masks"), MaskLayers) else None for one in given]
        batch, resized = model.transform(images, given)
        for target, laid, size in zip(resized, layers, batch.image_sizes, strict=True):
            if laid is not None:
                target["masks"] = laid.resized(size)
        features = model.backbone(batch.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        rpn, heads = model.rpn, model.roi_heads
        pre_nms, post_nms = rpn.pre_nms_top_n(), rpn.post_nms_top_n()
        # In training mode it returns its losses; its proposals are still those of testing.
        with overridden(rpn, training=True, pre_nms_top_n=lambda: pre_nms, post_nms_top_n=lambda: post_nms):
            proposals, losses = rpn(batch, features, resized)
        refinement = refinement_of(model)
        plain = nullcontext() if refinement is None else overridden(refinement, enabled=False)
        with overridden(heads, training=True), plain:
            losses = losses | heads(features, proposals, batch.image_sizes, resized)[1]
        detections, _ = heads(features, proposals, batch.image_sizes)
        return postprocess(model, detections, batch.image_sizes, sizes_of(images)), losses
    finally:
        model.train(training)
