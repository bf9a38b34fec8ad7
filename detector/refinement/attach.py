"""Add a refinement to a torchvision R-CNN, train it alone, and remove it."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes

from detector.overriding import eval_mode
from detector.rcnn.swap import parts_of, refuse_own_forward, set_mixin
from detector.refinement.config import RefinementConfig
from detector.refinement.feature_cache import FeatureCache, batch_features, extract_features
from detector.refinement.head import Refinement
from detector.refinement.losses import check_truth, sample_training_boxes, unrolled_losses
from detector.refinement.roi_heads import RefinedRoIHeads

Model = TypeVar("Model", bound=nn.Module)


def add_refinement(model: Model, config: RefinementConfig = RefinementConfig()) -> Model:
    """Add a refinement to a torchvision R-CNN, in place.

    Boxes are (x1, y1, x2, y2) in pixels. The detector's own parameters, buffers and ``state_dict`` keys do not change;
    those of the refinement begin with ``roi_heads.refinement.``. The box head scores each detection a second time, at
    its last crop, and NMS removes detections that have moved onto a better one. An untrained refinement moves no box
    and predicts an IoU of 0.5. Train it alone with :func:`refinement_losses`, or together with the detector by calling
    the model in training mode: then the box head also learns to classify the boxes that it decodes, in
    ``loss_classifier_again``. ``model.roi_heads.refinement.enabled = False`` switches it off.

    Args:
        model: A Faster, Mask or Keypoint R-CNN of ``torchvision.models.detection``, stock or swapped.
        config: The settings. If the model already has a refinement, its weights stay.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: The model has no RoI pooler, its RoI heads cannot be refined, or ``config`` has the wrong type.
    """
    if not isinstance(config, RefinementConfig):
        raise TypeError(f"config must be a RefinementConfig, got {config!r}")
    _, heads, _ = parts_of(model)
    refuse_own_forward(heads)
    if not isinstance(getattr(heads.box_predictor, "cls_score", None), nn.Linear):
        raise TypeError(f"{type(heads.box_predictor).__name__} has no linear layer cls_score to take the size from")
    if refinement_of(model) is None:
        refinement = Refinement(heads, config, getattr(model.transform, "size_divisible", None))
        heads.refinement = refinement.to(heads.box_predictor.cls_score.weight).train(model.training)
    heads.refinement.config = config
    set_mixin(heads, RefinedRoIHeads)
    return model


def remove_refinement(model: Model) -> Model:
    """Undo :func:`add_refinement`, in place. A model without a refinement stays as it is."""
    _, heads, _ = parts_of(model)
    if isinstance(heads, RefinedRoIHeads):
        set_mixin(heads, RefinedRoIHeads, present=False)
        del heads.refinement
    return model


def refinement_of(model: nn.Module) -> Refinement | None:
    """Return the refinement of a model, or ``None``."""
    return getattr(getattr(model, "roi_heads", None), "refinement", None)


def refinement_losses(
    model: Any, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], *, cache: FeatureCache | None = None
) -> dict[str, Tensor]:
    """Return the losses of the refinement alone. The detector runs in eval mode and gets no gradient.

    Args:
        model: A detector with a refinement, in any mode.
        images: [3, H, W] in 0..1, of any sizes.
        targets: ``boxes`` [L, 4] per image, (x1, y1, x2, y2) in pixels. Labels are ignored.
        cache: Stores the detector's features by image. ``None`` computes them in every call.

    Returns:
        The scalars ``loss_refinement_box`` and ``loss_refinement_iou``.

    Raises:
        TypeError: The model has no refinement, or boxes are not a tensor of float32, float64 or integers.
        ValueError: Images and targets do not match, or a box is not finite, is empty or lies outside its image.
    """
    refinement = refinement_of(model)
    if refinement is None:
        raise TypeError(f"{type(model).__name__} has no refinement: call add_refinement first")
    check_truth(images, targets)
    with eval_mode(model):
        extracted = [(cache or extract_features)(model, image) for image in images]
    features, detected, sizes = map(list, zip(*extracted))
    originals = [(image.shape[-2], image.shape[-1]) for image in images]
    truth = [resize_boxes(target["boxes"], *two) for target, *two in zip(targets, originals, sizes)]
    boxes, matched = sample_training_boxes(detected, truth, sizes)
    return unrolled_losses(refinement, batch_features(features), boxes, matched, sizes)
