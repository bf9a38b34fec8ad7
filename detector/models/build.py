"""Building a Faster, Mask or Keypoint R-CNN by its settings."""

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
from detector.models.narrow_images import take_narrow_images
from detector.models.published import fetching, starts_from_own_weights, torchvision_detectors
from detector.models.timm_pyramid import TimmPyramid

PERSON_KEYPOINTS = len(PERSON)


def build_detector(
    config: DetectorConfig, num_categories: int, *, num_keypoints: int = PERSON_KEYPOINTS, pretrained: bool = True
) -> FasterRCNN:
    """Build a Faster, Mask or Keypoint R-CNN, in channels_last, with torchvision's own parts. It is not swapped yet.

    Training images keep the size in which they come (the data's transforms resize them); test images are resized
    as ``config`` says.

    Args:
        config: what to build.
        num_categories: without the background.
        num_keypoints: of an object, where keypoints are found.
        pretrained: ``False``: leave out the weights that ``config`` names, to load others instead. Those of a file, a
            folder or the hub are never loaded here: :func:`~detector.pretrained.initial_weights.load_initial_weights`
            does that.

    Raises:
        ModelError: a name that is not known, weights that cannot be had, or a package that is missing.
    """
    if config.name.startswith("timm/"):
        model = _build_timm(config, num_categories, num_keypoints, pretrained)
    else:
        model = _build_torchvision(config, num_categories, num_keypoints, pretrained)
    take_narrow_images(model)
    # Convolutions hand on maps in this layout by themselves; the crop reads them three times faster.
    return model.to(memory_format=torch.channels_last)


def _build_torchvision(config: DetectorConfig, num_categories: int, num_keypoints: int, pretrained: bool) -> FasterRCNN:
    names = [name for name in torchvision_detectors() if name.partition("_")[0] in BUILDERS]
    if config.name not in names:
        raise ModelError(f"name: {config.name!r} is not known; choose one of {', '.join(names)}, or timm/BACKBONE")
    options = {**config.common_options(), "_skip_resize": True}
    own = starts_from_own_weights(config)
    weights = config.weights if pretrained and not own else None
    backbone = config.weights_backbone if pretrained and config.weights is None else None
    if weights or backbone:  # a random backbone is trained whole
        options["trainable_backbone_layers"] = config.trainable_layers
    if weights is None:
        options["num_classes"] = num_categories + 1
        if "keypoints" in config.annotation_types:
            options["num_keypoints"] = num_keypoints
    try:
        with fetching(config.name, "set weights and weights_backbone to null"):
            model = torchvision.models.get_model(config.name, weights=weights, weights_backbone=backbone, **options)
        if own:
            _hold_as_pretrained(model, config)
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"trainable_layers: {one_line(error)}") from None
    # Not by the builder's own argument, which only some of them take. As many anchors as before: the weights fit.
    model.rpn.anchor_generator = config.anchor_generator(len(model.rpn.anchor_generator.sizes))
    _fit_predictors(model.roi_heads, num_categories + 1, num_keypoints)
    return model


def _fit_predictors(heads: RoIHeads, classes: int, num_keypoints: int) -> None:
    """Begin the predictors anew, of published weights with other classes or keypoints than the data's."""
    predictor = heads.box_predictor.cls_score
    if predictor.out_features != classes:
        heads.box_predictor = FastRCNNPredictor(predictor.in_features, classes)
    if heads.has_mask() and heads.mask_predictor.mask_fcn_logits.out_channels != classes:
        reduced = heads.mask_predictor.conv5_mask
        heads.mask_predictor = MaskRCNNPredictor(reduced.in_channels, reduced.out_channels, classes)
    if heads.has_keypoint():
        given = heads.keypoint_predictor
        heads.keypoint_predictor = KeypointPredictor(given.kps_score_lowres.in_channels, num_keypoints)
        if given.out_channels == num_keypoints:
            heads.keypoint_predictor.load_state_dict(given.state_dict())


class KeypointPredictor(KeypointRCNNPredictor):
    """torchvision's, with scores that its loss can view, which it cannot in channels_last, and of 32 bits.

    Under autocast, in 16 bits, many places of a heatmap would share the highest score.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, K, H, W] of features [N, C, H/4, W/4]."""
        return super().forward(x).float().contiguous()


def _hold_as_pretrained(model: FasterRCNN, config: DetectorConfig) -> None:
    """Hold what torchvision holds in training where it fetches the weights itself: lower layers, batch norms."""
    trained = config.trainable_layers
    if config.name.endswith("_resnet50_fpn"):
        model.backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=trained)
    elif config.name.startswith("fasterrcnn_mobilenet_v3_large"):
        model.backbone = mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=trained
        )
    else:  # v2, which trains its batch norms
        if trained > 5:
            raise ValueError(f"there are 5 layers, got {trained}")
        layers = ("layer4", "layer3", "layer2", "layer1", "")[:trained]  # the last is all there is
        for name, parameter in model.backbone.body.named_parameters():
            parameter.requires_grad_(name.startswith(layers))


def _build_timm(config: DetectorConfig, num_categories: int, num_keypoints: int, pretrained: bool) -> FasterRCNN:
    channels, classes = config.fpn_channels, num_categories + 1
    backbone = TimmPyramid(
        config.name.removeprefix("timm/"),
        channels,
        weights=config.weights_backbone,
        pretrained=pretrained and config.weights is None,
        frozen_batch_norm=config.frozen_batch_norm and (config.weights, config.weights_backbone) != (None, None),
    )
    options: dict[str, Any] = {
        "rpn_anchor_generator": config.anchor_generator(),
        "box_head": TwoMLPHead(channels * 7 * 7, config.box_head_size),
        "box_predictor": FastRCNNPredictor(config.box_head_size, classes),
        "image_mean": backbone.mean,
        "image_std": backbone.std,
        "_skip_resize": True,
        **config.common_options(),
    }
    # Heads as wide as the pyramid, and twice as wide, which with 256 channels are torchvision's own.
    if "masks" in config.annotation_types:
        head = MaskRCNNHeads(channels, (channels,) * 4, 1)
        return MaskRCNN(
            backbone, mask_head=head, mask_predictor=MaskRCNNPredictor(channels, channels, classes), **options
        )
    if "keypoints" in config.annotation_types:
        wide = 2 * channels
        head = KeypointRCNNHeads(channels, (wide,) * 8)
        return KeypointRCNN(
            backbone, keypoint_head=head, keypoint_predictor=KeypointPredictor(wide, num_keypoints), **options
        )
    return FasterRCNN(backbone, **options)
