"""Add a refinement to a torchvision R-CNN that exists already, train it alone, and take it out again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import resize_boxes

from detector.rcnn.classes import mix_in, refuse_own_forward, take_out
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.rcnn.swap import parts_of
from detector.refinement.config import RefinementConfig
from detector.refinement.head import Refinement
from detector.refinement.losses import boxes_to_learn_from, check_truth, unrolled_losses
from detector.refinement.roi_heads import RefinedRoIHeads
from detector.refinement.seen import FeatureCache, batched, look_at

Model = TypeVar("Model", bound=nn.Module)
DEFAULT = RefinementConfig()


def add_refinement(model: Model, config: RefinementConfig = DEFAULT) -> Model:
    """Let a torchvision R-CNN refine its detections, in place.

    Until it is trained their boxes stay where they are, and the fit, which weights their scores, is a half for all.

    The detector's own parameters, buffers and ``state_dict`` keys stay; those of the refinement lie under
    ``roi_heads.refinement.`` They are trained alone by :func:`refinement_losses`, which takes minutes, or beside the
    detector's own by its usual call. ``model.roi_heads.refinement.enabled = False`` is the detector as it was.

    Args:
        model: a ``torchvision.models.detection`` Faster, Mask or Keypoint R-CNN, stock or swapped, from a builder or
            built by hand.
        config: the settings. Those of a refinement that is there already are changed, and its weights kept, unless
            the number of stages is another one.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model has no RoI pooler, or RoI heads that cannot be refined.
    """
    if not isinstance(config, RefinementConfig):
        raise TypeError(f"config must be a RefinementConfig, got {config!r}")
    _, heads, _ = parts_of(model)
    refuse_own_forward(heads, RoIHeads)
    if not isinstance(getattr(heads.box_predictor, "cls_score", None), nn.Linear):
        raise TypeError(f"{type(heads.box_predictor).__name__} has no linear cls_score, whose input could be read")
    known = getattr(heads, "refinement", None)
    if known is None or len(known.stages) != config.stages:
        refinement = Refinement(heads, config, size_divisible=getattr(model.transform, "size_divisible", None))
        heads.refinement = refinement.to(heads.box_predictor.cls_score.weight).train(model.training)
    heads.refinement.configure(config)
    with _without_swap(heads):
        mix_in(heads, RefinedRoIHeads, RoIHeads)
    return model


def remove_refinement(model: Model) -> Model:
    """Undo :func:`add_refinement`, in place; a model without a refinement is left as it is."""
    _, heads, _ = parts_of(model)
    if isinstance(heads, RefinedRoIHeads):
        with _without_swap(heads):
            take_out(heads, RefinedRoIHeads)
        del heads.refinement
    return model


def refinement_of(model: nn.Module) -> Refinement | None:
    """The refinement of a model, or ``None``."""
    return getattr(getattr(model, "roi_heads", None), "refinement", None)


def freeze_detector(model: nn.Module) -> list[nn.Parameter]:
    """Let nothing be trained but the refinement; returns its parameters."""
    model.requires_grad_(False)
    refinement = refinement_of(model)
    assert refinement is not None
    refinement.requires_grad_(True)
    return list(refinement.parameters())


def refinement_losses(
    model: Any, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], *, cache: FeatureCache | None = None
) -> dict[str, Tensor]:
    """The losses of the refinement alone, on the features and the detections of the detector as it is.

    The detector runs in eval mode and without a graph, whatever mode it is in, image by image as it will at test time;
    it learns nothing.

    Args:
        model: a detector with a refinement.
        images: [3, H, W] each, in 0..1, of any sizes.
        targets: for each image ``boxes`` [L, 4] (x1, y1, x2, y2) in pixels. Their labels are not looked at: the
            refinement is the same for all classes.
        cache: keeps what the detector makes of an image, for the next time.

    Returns:
        ``loss_refinement_box`` and ``loss_refinement_fit``.

    Raises:
        TypeError: the model has no refinement, or boxes are no tensor of float32, float64 or integers.
        ValueError: there is not a target for each image, or not [L, 4] boxes in each; or a box is not finite, has no
            width or height, or lies outside its image. One that reaches outside is clipped.
    """
    refinement = refinement_of(model)
    if refinement is None:
        raise TypeError(f"{type(model).__name__} has no refinement: call add_refinement first")
    check_truth(images, targets)
    with _frozen(model, refinement):
        seen = [look_at(model, image) if cache is None else cache(model, image) for image in images]
    sizes = [one.size for one in seen]
    truth = [
        resize_boxes(target["boxes"], (image.shape[-2], image.shape[-1]), size)
        for image, target, size in zip(images, targets, sizes, strict=True)
    ]
    boxes, matched = boxes_to_learn_from([one.boxes for one in seen], truth, sizes, refinement)
    return unrolled_losses(refinement, batched(seen), boxes, matched, sizes)


@contextmanager
def _frozen(model: Any, refinement: Refinement) -> Iterator[None]:
    """The detector without its refinement, in eval mode; then each module has the mode that it had."""
    modes, enabled = [(module, module.training) for module in model.modules()], refinement.enabled
    model.eval()
    refinement.enabled = False
    try:
        yield
    finally:
        refinement.enabled = enabled
        for module, mode in modes:
            module.training = mode


@contextmanager
def _without_swap(heads: RoIHeads) -> Iterator[None]:
    """The swap's mix-in is always the outermost, so that each can be taken out by itself."""
    swapped = isinstance(heads, AttachedRoIHeads)
    if swapped:
        take_out(heads, AttachedRoIHeads)
    try:
        yield
    finally:
        if swapped:
            mix_in(heads, AttachedRoIHeads, RoIHeads)
