"""Building a Faster R-CNN by its settings."""

import torch
import torchvision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from detector.errors import ModelError, sentence
from detector.models.config import DetectorConfig
from detector.models.published import fetching, starts_from_own_weights, torchvision_detectors
from detector.models.timm_pyramid import TimmPyramid


def build_detector(config: DetectorConfig, num_categories: int, *, pretrained: bool = True) -> FasterRCNN:
    """Build a Faster R-CNN, in channels_last, with torchvision's own parts. It is not swapped yet.

    Training images keep the size in which they come (the data's transforms resize them); test images are resized
    as ``config`` says.

    Args:
        config: what to build.
        num_categories: without the background.
        pretrained: ``False``: leave out the weights that ``config`` names, to load others instead. Those of a file, a
            folder or the hub are never loaded here: :func:`~detector.pretrained.initial_weights.load_initial_weights`
            does that.

    Raises:
        ModelError: a name that is not known, weights that cannot be had, or a package that is missing.
    """
    if config.name.startswith("timm/"):
        model = _build_timm(config, num_categories, pretrained)
    else:
        model = _build_torchvision(config, num_categories, pretrained)
    # Convolutions hand on maps in this layout by themselves; the crop reads them three times faster.
    return model.to(memory_format=torch.channels_last)


def _build_torchvision(config: DetectorConfig, num_categories: int, pretrained: bool) -> FasterRCNN:
    names = [name for name in torchvision_detectors() if name.startswith("fasterrcnn")]
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
    try:
        with fetching(config.name, "set weights and weights_backbone to null"):
            model = torchvision.models.get_model(config.name, weights=weights, weights_backbone=backbone, **options)
        if own:
            _hold_as_pretrained(model, config)
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"trainable_layers: {sentence(error)}") from None
    # Not by the builder's own argument, which only some of them take. As many anchors as before: the weights fit.
    model.rpn.anchor_generator = config.anchor_generator(len(model.rpn.anchor_generator.sizes))
    predictor = model.roi_heads.box_predictor
    if predictor.cls_score.out_features != num_categories + 1:
        model.roi_heads.box_predictor = FastRCNNPredictor(predictor.cls_score.in_features, num_categories + 1)
    return model


def _hold_as_pretrained(model: FasterRCNN, config: DetectorConfig) -> None:
    """Hold what torchvision holds in training where it fetches the weights itself: lower layers, batch norms."""
    trained = config.trainable_layers
    if config.name == "fasterrcnn_resnet50_fpn":
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


def _build_timm(config: DetectorConfig, num_categories: int, pretrained: bool) -> FasterRCNN:
    backbone = TimmPyramid(
        config.name.removeprefix("timm/"),
        config.fpn_channels,
        weights=config.weights_backbone,
        pretrained=pretrained and config.weights is None,
        frozen_batch_norm=config.frozen_batch_norm and (config.weights, config.weights_backbone) != (None, None),
    )
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=config.anchor_generator(),
        box_head=TwoMLPHead(config.fpn_channels * 7 * 7, config.box_head_size),
        box_predictor=FastRCNNPredictor(config.box_head_size, num_categories + 1),
        image_mean=backbone.mean,
        image_std=backbone.std,
        _skip_resize=True,
        **config.common_options(),
    )
