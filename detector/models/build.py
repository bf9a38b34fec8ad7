"""Building a Faster, Mask or Keypoint R-CNN from its settings."""

from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from detector.data.keypoints import PERSON
from detector.errors import ModelError, one_line
from detector.models.config import BUILDERS, DetectorConfig
from detector.models.published import fetching, starts_from_own_weights, torchvision_detectors
from detector.models.resizing import accept_narrow_images
from detector.models.timm_pyramid import TimmPyramid


def build_detector(
    config: DetectorConfig, num_categories: int, *, num_keypoints: int = len(PERSON), pretrained: bool = True
) -> FasterRCNN:
    """Build a Faster, Mask or Keypoint R-CNN with torchvision's crop, in channels_last.

    In training mode it keeps the size of its images, because the data's transforms resize them. Weights of a file, a
    folder or the hub are not loaded; :func:`~detector.pretrained.initial_weights.load_initial_weights` does that.

    Args:
        config: the settings.
        num_categories: number of classes without the background.
        num_keypoints: number of keypoints per object.
        pretrained: ``False`` skips the weights that ``config`` names.

    Raises:
        ModelError: a name is unknown, weights cannot be fetched, or a package is missing.
    """
    build = _build_timm if config.name.startswith("timm/") else _build_torchvision
    model = build(config, num_categories + 1, num_keypoints, pretrained)
    accept_narrow_images(model)
    return model.to(memory_format=torch.channels_last)  # the crop reads such maps faster


def _build_torchvision(config: DetectorConfig, classes: int, num_keypoints: int, pretrained: bool) -> FasterRCNN:
    names = [name for name in torchvision_detectors() if name.partition("_")[0] in BUILDERS]
    if config.name not in names:
        message = f"unknown; choose one of {', '.join(names)}, or timm/BACKBONE"
        raise ModelError(message, setting="detector.name", value=config.name)
    options = config.torchvision_options()
    own_weights = starts_from_own_weights(config)
    weights = config.weights if pretrained and not own_weights else None
    backbone = config.weights_backbone if pretrained and config.weights is None else None
    if weights or backbone:  # a randomly initialised backbone is trained entirely
        options["trainable_backbone_layers"] = config.trainable_layers
    if weights is None:
        options["num_classes"] = classes
        if "keypoints" in config.annotation_types:
            options["num_keypoints"] = num_keypoints
    try:
        with fetching(config.name, "set weights and weights_backbone to null"):
            model = torchvision.models.get_model(config.name, weights=weights, weights_backbone=backbone, **options)
        if own_weights:
            _freeze_as_pretrained(model, config)
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(one_line(error), setting="detector.trainable_layers", value=config.trainable_layers) from None
    # Only some builders take it as an argument. The number of anchors stays, so published weights fit.
    model.rpn.anchor_generator = config.anchor_generator(len(model.rpn.anchor_generator.sizes))
    _fit_predictors(model.roi_heads, classes, num_keypoints)
    return model


def _fit_predictors(heads: RoIHeads, classes: int, num_keypoints: int) -> None:
    """Replace predictors whose published weights have another number of classes or keypoints."""
    predictor = heads.box_predictor.cls_score
    if predictor.out_features != classes:
        heads.box_predictor = FastRCNNPredictor(predictor.in_features, classes)
    if heads.has_mask() and heads.mask_predictor.mask_fcn_logits.out_channels != classes:
        reduced = heads.mask_predictor.conv5_mask
        heads.mask_predictor = MaskRCNNPredictor(reduced.in_channels, reduced.out_channels, classes)
    if heads.has_keypoint():
        published = heads.keypoint_predictor
        heads.keypoint_predictor = KeypointPredictor(published.kps_score_lowres.in_channels, num_keypoints)
        if published.out_channels == num_keypoints:
            heads.keypoint_predictor.load_state_dict(published.state_dict())


class KeypointPredictor(KeypointRCNNPredictor):
    """torchvision's predictor, whose heatmaps are contiguous, as its loss needs, and float32 under autocast.

    In 16 bits many pixels of a heatmap would share the highest score.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [N, K, H, W] for features [N, C, H/4, W/4]."""
        return super().forward(x).float().contiguous()


def _freeze_as_pretrained(model: FasterRCNN, config: DetectorConfig) -> None:
    """Freeze the layers and batch norms that torchvision freezes when it fetches the weights itself."""
    trained = config.trainable_layers
    if config.name.endswith("_resnet50_fpn"):
        model.backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=trained)
    elif config.name.startswith("fasterrcnn_mobilenet_v3_large"):
        options = {"backbone_name": "mobilenet_v3_large", "weights": None, "fpn": True}
        model.backbone = mobilenet_backbone(**options, trainable_layers=trained)
    else:  # v2, which trains its batch norms
        if trained > 5:
            raise ValueError("must be at most 5")
        layers = ("layer4", "layer3", "layer2", "layer1", "")[:trained]  # every name starts with the last
        for name, parameter in model.backbone.body.named_parameters():
            parameter.requires_grad_(name.startswith(layers))


def _build_timm(config: DetectorConfig, classes: int, num_keypoints: int, pretrained: bool) -> FasterRCNN:
    channels = config.fpn_channels
    backbone = TimmPyramid(
        config.name.removeprefix("timm/"),
        channels,
        weights=config.weights_backbone,
        pretrained=pretrained and config.weights is None,
        frozen_batch_norm=config.frozen_batch_norm and (config.weights, config.weights_backbone) != (None, None),
    )
    options: dict[str, Any] = config.torchvision_options() | {
        "rpn_anchor_generator": config.anchor_generator(),
        "box_head": TwoMLPHead(channels * 7 * 7, config.box_head_size),
        "box_predictor": FastRCNNPredictor(config.box_head_size, classes),
        "image_mean": backbone.mean,
        "image_std": backbone.std,
    }
    # With 256 channels the heads are torchvision's own.
    if "masks" in config.annotation_types:
        options["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, 1)
        options["mask_predictor"] = MaskRCNNPredictor(channels, channels, classes)
        return MaskRCNN(backbone, **options)
    if "keypoints" in config.annotation_types:
        options["keypoint_head"] = KeypointRCNNHeads(channels, (2 * channels,) * 8)
        options["keypoint_predictor"] = KeypointPredictor(2 * channels, num_keypoints)
        return KeypointRCNN(backbone, **options)
    return FasterRCNN(backbone, **options)
