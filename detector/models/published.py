"""torchvision's own detectors: their names, their published weights, what no state_dict holds."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights

from detector.data.keypoints import PERSON, KeypointLayout
from detector.errors import ModelError
from detector.models.config import DetectorConfig
from detector.models.weights import load_weights, read_weights, refusing

# The published files whose batch norms torchvision runs with an eps of 0 when it fetches them itself.
COCO_V1_FILES = (
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
)


def starts_from_own_weights(config: DetectorConfig) -> bool:
    """Whether ``config.weights`` is a file, a folder or a name on the hub, not one that torchvision publishes."""
    if config.weights is None or config.name not in torchvision_detectors():
        return config.weights is not None
    known = torchvision.models.get_model_weights(config.name)
    return config.weights.removeprefix(f"{known.__name__}.") not in {"DEFAULT", *known.__members__}


def load_torchvision_detector(name: str, weights: str) -> nn.Module:
    """A stock torchvision detector with weights, in eval mode.

    Args:
        name: one of :func:`torchvision_detectors`: an R-CNN, or one without a second stage.
        weights: a file of its state_dict, or a name that torchvision publishes ("DEFAULT", "COCO_V1"; fetched).

    Raises:
        ModelError: the name is not known, or the weights cannot be had or are another model's.
    """
    if name not in torchvision_detectors():
        raise ModelError(f"{name!r} is not one of torchvision's detectors: {', '.join(torchvision_detectors())}")
    if weights in torchvision.models.get_model_weights(name).__members__ or weights == "DEFAULT":
        with fetching(name, "give a file of weights"):
            return torchvision.models.get_model(name, weights=weights).eval()
    state = read_weights(weights, legacy=True)  # as torchvision's own older files are
    with refusing(f"{weights}: not the weights of {name}"):
        state = with_new_names(state.get("model", state))  # torchvision's own training script saves it so
        classes, options = number_of_classes(name, state), _keypoints_in(name, state)
        model = load_weights(lambda: _without_weights(name, classes, **options), state)
    if Path(weights).name in COCO_V1_FILES:
        set_batch_norm_eps(model, dict.fromkeys(batch_norm_eps(model), 0.0))
    return model.eval()


def with_new_names(state: dict[Any, Any]) -> dict[str, Any]:
    """A Faster R-CNN's state_dict by the names of today's torchvision, whose first COCO weights have older ones."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", str(name))
        renamed[re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)] = value
    return renamed


def batch_norm_eps(model: nn.Module) -> dict[str, float]:
    """The eps of each batch norm, which no state_dict holds: torchvision sets 0 for its first COCO weights."""
    eps = {}
    for name, module in model.named_modules():
        part: Any = module
        if isinstance(getattr(part, "running_var", None), Tensor):  # timm has classes of its own for frozen ones
            eps[name] = float(part.eps)
    return eps


def set_batch_norm_eps(model: nn.Module, eps: dict[str, float]) -> None:
    """Undo that a model built without its weights has torchvision's usual eps, by :func:`batch_norm_eps`."""
    for name, value in eps.items():
        setattr(model.get_submodule(name), "eps", float(value))  # noqa: B010 (a Module's attributes are untyped)


@contextmanager
def fetching(name: str, instead: str) -> Iterator[None]:
    """Weights that torchvision does not publish, or that cannot be fetched, as a :class:`ModelError`."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"weights: torchvision publishes no {error} for {name}") from None
    except OSError as error:  # URLError is one
        raise ModelError(
            f"the weights of {name} cannot be fetched ({error}): they need a network once; without one, {instead}"
        ) from None


def number_of_classes(name: str, state: dict[str, Any]) -> int:
    """The classes, with the background, of a torchvision detector's state_dict.

    Raises:
        ModelError: it is not one of that detector, or of no class.
    """
    with torch.device("meta"):
        two, three = (_without_weights(name, classes).state_dict() for classes in (2, 3))
    grows = next(key for key in two if two[key].shape != three[key].shape)
    a_class = len(three[grows]) - len(two[grows])  # the rows of the layer that each class adds
    weight = state.get(grows)
    if not isinstance(weight, Tensor) or weight.dim() != two[grows].dim() or len(weight) < len(two[grows]):
        raise ModelError(f"it has no {grows} with the rows of a class")
    return (len(weight) - len(two[grows])) // a_class + 2


def published_keypoints(name: str, model: nn.Module) -> KeypointLayout | None:
    """The layout of a torchvision detector's keypoints: a person's, if there are as many, else numbers.

    Args:
        name: one of :func:`torchvision_detectors`.
        model: the detector.
    """
    if not name.startswith("keypointrcnn"):
        return None
    heads: Any = model.roi_heads
    count = heads.keypoint_predictor.out_channels
    return PERSON if count == len(PERSON) else KeypointLayout.numbered(count)


def published_names(name: str = "fasterrcnn_resnet50_fpn") -> list[str]:
    """The names of a published detector's classes, the background first: COCO's 91 by id, with gaps, or a person."""
    if name.startswith("keypointrcnn"):
        return ["__background__", "person"]
    return list(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])


def settings_of(name: str, model: FasterRCNN) -> DetectorConfig:
    """The settings that build a torchvision detector as its builder's own defaults did."""
    rpn, heads, transform = model.rpn, model.roi_heads, model.transform
    return DetectorConfig(
        name=name,
        min_size=transform.min_size[-1],
        max_size=transform.max_size,
        rpn_pre_nms_top_n=(rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]),
        rpn_post_nms_top_n=(rpn._post_nms_top_n["training"], rpn._post_nms_top_n["testing"]),
        anchor_sizes=tuple(dict.fromkeys(size for level in rpn.anchor_generator.sizes for size in level)),
        aspect_ratios=rpn.anchor_generator.aspect_ratios[0],
        rpn_nms_threshold=rpn.nms_thresh,
        rpn_fg_iou_threshold=rpn.proposal_matcher.high_threshold,
        rpn_bg_iou_threshold=rpn.proposal_matcher.low_threshold,
        box_nms_threshold=heads.nms_thresh,
        box_fg_iou_threshold=heads.proposal_matcher.high_threshold,
        box_bg_iou_threshold=heads.proposal_matcher.low_threshold,
        rois_per_image=heads.fg_bg_sampler.batch_size_per_image,
        detections_per_image=heads.detections_per_img,
        score_threshold=heads.score_thresh,
    )


def _without_weights(name: str, classes: int, **options: int) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes, **options)


def _keypoints_in(name: str, state: dict[str, Any]) -> dict[str, int]:
    """The number of keypoints that a Keypoint R-CNN's state_dict has, as its builder's option."""
    bias = state.get("roi_heads.keypoint_predictor.kps_score_lowres.bias")
    if not name.startswith("keypointrcnn") or not isinstance(bias, Tensor) or bias.dim() != 1 or not len(bias):
        return {}  # load_weights says what is missing
    return {"num_keypoints": len(bias)}


def torchvision_detectors() -> list[str]:
    """The names of torchvision's detectors, with an RoI pooler (R-CNN) or without."""
    return torchvision.models.list_models(module=torchvision.models.detection)
