"""Put the affine crop into an existing torchvision R-CNN, and take it out again."""

from typing import Any, TypeVar

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from detector.crop.arguments import check_choice
from detector.crop.crop import Sampler
from detector.rcnn.box_gradient import BoxGradient
from detector.rcnn.pooler import MultiScaleAffineCrop
from detector.rcnn.roi_heads import AttachedRoIHeads
from detector.rcnn.rpn import AttachedRPN

Model = TypeVar("Model", bound=nn.Module)


def swap_crop_head(model: Model, box_gradient: BoxGradient = BoxGradient(), *, sampler: Sampler | None = None) -> Model:
    """Replace RoIAlign in a torchvision R-CNN by :class:`~detector.MultiScaleAffineCrop`, in place.

    Boxes stay (x1, y1, x2, y2) in pixels, and detections stay those of the stock model up to rounding. In training,
    proposals get the gradients that ``box_gradient`` describes. Only the classes of the RPN, the RoI heads and their
    pools change, so weights load before or after. A second call changes the settings. A swapped model can be pickled,
    unless its RPN or RoI heads are a user's own subclasses: save the ``state_dict`` of such a model.

    Args:
        model: A Faster, Mask or Keypoint R-CNN of ``torchvision.models.detection``.
        box_gradient: Which losses move the proposals, and how far.
        sampler: How the pools, including a refinement's, read the feature maps; see :func:`~detector.affine_crop`.
            ``None`` keeps the current sampler, which is "auto" in a stock model.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: The model has no RoI pooler (RetinaNet, SSD, FCOS), a module's class cannot be swapped, or
            ``box_gradient`` is not a :class:`~detector.BoxGradient`.
        ValueError: ``sampler`` is unknown.
    """
    if not isinstance(box_gradient, BoxGradient):
        raise TypeError(f"box_gradient must be a BoxGradient, got {box_gradient!r}")
    if sampler is not None:
        check_choice("sampler", sampler, Sampler)
    rpn, heads, pools = parts_of(model)
    refuse_own_forward(rpn, heads, *pools)
    for pool in pools:
        pool.__class__ = MultiScaleAffineCrop
        # A user's own transform may pad to sizes that only the maps show.
        pool.size_divisible = getattr(model.transform, "size_divisible", None)
    if sampler is not None:
        for pool in heads.modules():  # includes the pool of a refinement
            if isinstance(pool, MultiScaleAffineCrop):
                pool.sampler = sampler
    set_mixin(rpn, AttachedRPN)
    set_mixin(heads, AttachedRoIHeads)
    rpn.box_gradient = heads.box_gradient = box_gradient
    return model


def restore_roi_align(model: Model) -> Model:
    """Undo :func:`swap_crop_head`, in place, and return ``model``. Weights do not change. A stock model stays as it is.

    Raises:
        TypeError: The model has no RoI pooler, or a pool of another class.
        ValueError: A pool has ``aligned=True``, which torchvision's pooler does not support.
    """
    rpn, heads, pools = parts_of(model)
    pools = [pool for pool in pools if isinstance(pool, MultiScaleAffineCrop)]
    if any(pool.aligned for pool in pools):
        raise ValueError("an RoI pool has aligned=True, which torchvision's MultiScaleRoIAlign does not support")
    for pool in pools:
        pool.__class__ = MultiScaleRoIAlign
        for name in ("aligned", "sampler", "size_divisible"):
            pool.__dict__.pop(name, None)
    for part, mixin in ((rpn, AttachedRPN), (heads, AttachedRoIHeads)):
        set_mixin(part, mixin, present=False)
        part.__dict__.pop("box_gradient", None)
    return model


def parts_of(model: nn.Module) -> tuple[RegionProposalNetwork, RoIHeads, list[MultiScaleRoIAlign]]:
    """Return the RPN, the RoI heads and the pools of a torchvision R-CNN. Raises TypeError for other models."""
    name = type(model).__name__
    if not isinstance(model, GeneralizedRCNN) or not isinstance(getattr(model, "roi_heads", None), RoIHeads):
        hint = "unwrapped from DataParallel, DistributedDataParallel and torch.compile"
        raise TypeError(f"{name} has no RoI pooler: it must be a torchvision Faster, Mask or Keypoint R-CNN, {hint}")
    heads = model.roi_heads
    pools = dict.fromkeys((heads.box_roi_pool, heads.mask_roi_pool, heads.keypoint_roi_pool, None))
    del pools[None]
    for pool in pools:
        if type(pool) not in (MultiScaleRoIAlign, MultiScaleAffineCrop):
            raise TypeError(f"an RoI pool of {name} is a {type(pool).__name__}, not torchvision's MultiScaleRoIAlign")
    return model.rpn, heads, list(pools)


def set_mixin(module: nn.Module, mixin: Any, *, present: bool = True) -> None:
    """Put a mix-in in front of the module's class, or take it out. The highest ``mixin_order`` is the outermost."""
    if isinstance(module, mixin) == present:
        return
    classes = type(module).__mro__
    cls: Any = next(c for c in classes if not hasattr(c, "mixin_order"))  # torchvision's, or a user's subclass
    mixins = {mixin, *(c for c in classes if "mixin_order" in vars(c))}
    for one in sorted(mixins if present else mixins - {mixin}, key=lambda c: c.mixin_order):
        name = f"{one.__name__.removesuffix(one.__base__.__name__)}{cls.__name__}"
        # Pickle finds a class that is defined in a module, such as AttachedRefinedRoIHeads.
        defined = (c for c in one.__subclasses__() if c.__name__ == name and c.__bases__ == (one, cls))
        cls = one if cls is one.__base__ else next(defined, None) or type(name, (one, cls), {})
    module.__class__ = cls


def refuse_own_forward(*modules: nn.Module) -> None:
    """Raise TypeError for a module with a user-defined forward, which would bypass a mix-in."""
    for module in modules:
        package = type(module).forward.__module__.partition(".")[0]
        if package not in ("torchvision", "detector") or "forward" in vars(module):
            raise TypeError(f"{type(module).__name__} has its own forward, so it cannot be swapped")
