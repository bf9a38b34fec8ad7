"""torchvision's own detectors and their published weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights

from detector.data.keypoints import PERSON, KeypointLayout
from detector.errors import ModelError
from detector.models.config import TORCHVISION, DetectorConfig
from detector.models.weights import as_model_error, load_weights, read_weights

# Published files for which torchvision sets the eps of the batch norms to 0.
COCO_V1_FILES = [
    Path(torchvision.models.get_model_weights(f"{kind}_resnet50_fpn")["COCO_V1"].url).name
    for kind in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")
]


def torchvision_detectors() -> list[str]:
    """Return the names of torchvision's detectors: R-CNNs and others."""
    return torchvision.models.list_models(module=torchvision.models.detection)


def starts_from_own_weights(config: DetectorConfig) -> bool:
    """Return whether ``config.weights`` is a file, a folder or a hub repository, not a published name."""
    if config.weights is None or config.name not in torchvision_detectors():
        return config.weights is not None
    known = torchvision.models.get_model_weights(config.name)
    return config.weights.removeprefix(f"{known.__name__}.") not in {"DEFAULT", *known.__members__}


def load_torchvision_detector(name: str, weights: str) -> nn.Module:
    """Load a torchvision detector with weights, published ones ("DEFAULT", "COCO_V1") or a file, in eval mode.

    Raises:
        ModelError: the name is unknown, or the weights cannot be fetched or belong to another model.
    """
    if name not in torchvision_detectors():
        raise ModelError(f"{name!r} is not one of torchvision's detectors: {', '.join(torchvision_detectors())}")
    if weights in torchvision.models.get_model_weights(name).__members__ or weights == "DEFAULT":
        with fetching(name, "give a file of weights"):
            return torchvision.models.get_model(name, weights=weights).eval()
    state = read_weights(weights, legacy=True)  # the format of torchvision's first files
    with as_model_error(f"{weights}: not the weights of {name}"):
        state = with_new_names(state.get("model", state))  # as torchvision's training script saves it
        options = {"num_classes": number_of_classes(name, state)}
        bias = state.get("roi_heads.keypoint_predictor.kps_score_lowres.bias")
        if name.startswith("keypointrcnn") and isinstance(bias, Tensor) and bias.dim() == 1 and len(bias):
            options["num_keypoints"] = len(bias)
        model = load_weights(lambda: _without_weights(name, **options), state)
    if Path(weights).name in COCO_V1_FILES:
        set_batch_norm_eps(model, dict.fromkeys(batch_norm_eps(model), 0.0))
    return model.eval()


def with_new_names(state: dict[Any, Any]) -> dict[str, Any]:
    """Rename the keys of torchvision's first COCO weights to those of its current version."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", str(name))
        renamed[re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)] = value
    return renamed


def batch_norm_eps(model: nn.Module) -> dict[str, float]:
    """Return the eps of each batch norm, which a state_dict lacks."""
    modules: Any = model.named_modules()
    return {name: float(m.eps) for name, m in modules if isinstance(getattr(m, "running_var", None), Tensor)}


def set_batch_norm_eps(model: nn.Module, eps: dict[str, float]) -> None:
    """Set the eps of batch norms, as returned by :func:`batch_norm_eps`."""
    for name, value in eps.items():
        setattr(model.get_submodule(name), "eps", float(value))  # noqa: B010 (a Module's attributes are untyped)


@contextmanager
def fetching(name: str, instead: str) -> Iterator[None]:
    """Raise a :class:`ModelError` for weights that torchvision does not publish or that cannot be fetched."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"weights: torchvision publishes no {error} for {name}") from None
    except OSError as error:  # includes URLError
        what = f"the weights of {name} cannot be fetched ({error})"
        raise ModelError(f"{what}: they need a network once; without one, {instead}") from None


def number_of_classes(name: str, state: dict[str, Any]) -> int:
    """Return the number of classes, with the background, of a torchvision detector's state_dict.

    Raises:
        ModelError: the state_dict belongs to another detector.
    """
    with torch.device("meta"):
        two, three = (_without_weights(name, num_classes=classes).state_dict() for classes in (2, 3))
    predictor = next(key for key in two if two[key].shape != three[key].shape)
    rows_per_class = len(three[predictor]) - len(two[predictor])
    weight = state.get(predictor)
    if not isinstance(weight, Tensor) or weight.dim() != two[predictor].dim() or len(weight) < len(two[predictor]):
        raise ModelError(f"it has no {predictor} with the rows of a class")
    return (len(weight) - len(two[predictor])) // rows_per_class + 2


def published_keypoints(name: str, model: nn.Module) -> KeypointLayout | None:
    """Return the keypoints of a torchvision detector: a person's if the number matches, otherwise unnamed ones."""
    if not name.startswith("keypointrcnn"):
        return None
    heads: Any = model.roi_heads
    count = heads.keypoint_predictor.out_channels
    return PERSON if count == len(PERSON) else KeypointLayout.numbered(count)


def published_names(name: str = "fasterrcnn_resnet50_fpn") -> list[str]:
    """Return the class names of a published detector, background first: COCO's 91 by id, or a person."""
    if name.startswith("keypointrcnn"):
        return ["__background__", "person"]
    return list(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])


def settings_of(name: str, model: FasterRCNN) -> DetectorConfig:
    """Return the settings that rebuild a torchvision detector."""
    rpn = model.rpn
    return DetectorConfig(
        name=name,
        min_size=model.transform.min_size[-1],
        rpn_pre_nms_top_n=(rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]),
        rpn_post_nms_top_n=(rpn._post_nms_top_n["training"], rpn._post_nms_top_n["testing"]),
        anchor_sizes=tuple(dict.fromkeys(size for level in rpn.anchor_generator.sizes for size in level)),
        aspect_ratios=rpn.anchor_generator.aspect_ratios[0],
        **{field: attrgetter(attribute)(model) for field, (_, attribute) in TORCHVISION.items()},
    )


def _without_weights(name: str, **options: int) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
