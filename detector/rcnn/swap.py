"""Put the affine crop into a torchvision R-CNN that exists already, and take it out again."""

from typing import TypeVar

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from detector.crop.crop import Sampler, check_sampler
from detector.crop.pyramid import MultiScaleAffineCrop
from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.classes import mix_in, refuse_own_forward, take_out
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.rcnn.rpn import AttachedRPN

Model = TypeVar("Model", bound=nn.Module)


def swap_crop_head(model: Model, box_gradient: BoxGradient = BoxGradient(), *, sampler: Sampler | None = None) -> Model:
    """Make a torchvision R-CNN crop with :class:`~detector.MultiScaleAffineCrop`, in place.

    Its detections stay those of the stock model to float rounding; in training its proposals get gradients. Box,
    mask and keypoint pools, the RPN and the RoI heads of this one instance change their class; no module is
    added, no parameter, buffer, hook or state_dict key changes, and weights load before or after. A second call
    changes the settings.

    Parts of a user's own subclass get a class made on the spot, which pickle does not find: save the ``state_dict``
    of such a model, or restore it first.

    Args:
        model: a ``torchvision.models.detection`` Faster, Mask or Keypoint R-CNN, or one built by hand.
        box_gradient: which losses move the proposals, and how far.
        sampler: how the pools read the features, that of a refinement among them, see :func:`~detector.affine_crop`;
            ``None`` leaves it as it is, which in a stock model is "auto".

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model has no RoI pooler (RetinaNet, SSD, FCOS), or parts of a class that cannot be swapped.
        ValueError: ``sampler`` is not one of its values.
    """
    if not isinstance(box_gradient, BoxGradient):
        raise TypeError(f"box_gradient must be a BoxGradient, got {box_gradient!r}")
    if sampler is not None:
        check_sampler(sampler)
    rpn, heads, pools = parts_of(model)
    stocks = (RegionProposalNetwork, RoIHeads, *[MultiScaleRoIAlign] * len(pools))
    for part, stock in zip((rpn, heads, *pools), stocks):
        refuse_own_forward(part, stock)
    for pool in pools:
        if type(pool) is MultiScaleRoIAlign:
            pool.__class__ = MultiScaleAffineCrop
        # A transform of the user's own may pad in a way that only the maps tell.
        pool.size_divisible = getattr(model.transform, "size_divisible", None)
    if sampler is not None:
        for pool in heads.modules():  # also those that lie deeper, such as a refinement's
            if isinstance(pool, MultiScaleAffineCrop):
                pool.sampler = sampler
    mix_in(rpn, AttachedRPN, RegionProposalNetwork)
    mix_in(heads, AttachedRoIHeads, RoIHeads)
    rpn.box_gradient = heads.box_gradient = box_gradient
    return model


def restore_roi_align(model: Model) -> Model:
    """Undo :func:`swap_crop_head`, in place: the stock model, with the weights it has now.

    Args:
        model: a swapped R-CNN; a stock one is left as it is.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: as :func:`swap_crop_head`.
        ValueError: a pool was built with ``aligned=True``, which torchvision's pooler cannot do.
    """
    rpn, heads, pools = parts_of(model)
    pools = [pool for pool in pools if isinstance(pool, MultiScaleAffineCrop)]
    if any(pool.aligned for pool in pools):
        raise ValueError("a RoI pool has aligned=True, which torchvision's MultiScaleRoIAlign cannot do")
    for pool in pools:
        pool.__class__ = MultiScaleRoIAlign
        for name in ("aligned", "sampler", "size_divisible"):
            pool.__dict__.pop(name, None)
    for part, attached in ((rpn, AttachedRPN), (heads, AttachedRoIHeads)):
        if isinstance(part, attached):
            take_out(part, attached)
            for name in ("box_gradient", "_drawn"):
                part.__dict__.pop(name, None)
    return model


def parts_of(model: nn.Module) -> tuple[RegionProposalNetwork, RoIHeads, list[MultiScaleRoIAlign]]:
    """The RPN, the RoI heads and the pools of a torchvision R-CNN.

    Raises:
        TypeError: the model is none, or a pool is of another class.
    """
    if not isinstance(model, GeneralizedRCNN) or not isinstance(getattr(model, "roi_heads", None), RoIHeads):
        raise TypeError(
            f"{type(model).__name__} has no RoI pooler to swap: the model must be a torchvision Faster, Mask or "
            "Keypoint R-CNN (unwrapped from DataParallel, DistributedDataParallel or torch.compile)"
        )
    heads = model.roi_heads
    pools = [heads.box_roi_pool, heads.mask_roi_pool, heads.keypoint_roi_pool]
    pools = [pool for pool in dict.fromkeys(pools) if pool is not None]
    for pool in pools:
        if type(pool) not in (MultiScaleRoIAlign, MultiScaleAffineCrop):
            raise TypeError(
                f"a RoI pool of {type(model).__name__} is a {type(pool).__name__}; only torchvision's "
                "MultiScaleRoIAlign can be swapped"
            )
    return model.rpn, heads, pools
