"""The training losses of images that a detector is scored on, beside its detections."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detector.models.detecting import Found, postprocessed, sizes_of
from detector.overriding import overridden
from detector.refinement.attach import refinement_of


@torch.no_grad()
def detect_with_losses(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[list[Found], dict[str, Tensor]]:
    """Detections and the training losses of the same images; of an R-CNN by one pass of backbone and RPN.

    The model is in eval mode, but for the flags by which its parts choose what to return: dropout drops nothing, and no
    statistic of batch norm changes. The losses of an R-CNN are those of the proposals of testing, which are fewer than
    in training. Those of a refinement are not among them: they are of boxes drawn by chance.

    Args:
        model: a torchvision detector; put in eval mode for the call.
        images: [3, H, W] in 0..1.
        targets: of each image, as in training: boxes, labels, and the masks or key points that the model finds.

    Returns:
        What :func:`~detector.models.detecting.detect` returns, and the losses by torchvision's names.
    """
    training = model.training
    model.eval()
    try:
        if not isinstance(model, GeneralizedRCNN):
            detections = model(images)
            with overridden(model, training=True):
                return detections, model(images, targets)
        batch, resized = model.transform(images, targets)
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
        return postprocessed(model, detections, batch.image_sizes, sizes_of(images)), losses
    finally:
        model.train(training)
