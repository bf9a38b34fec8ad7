"""The box gradient on data that it wrecks: one large digit an image, in a plain loop around a swapped model.

All positives of an image err together there, and tens of times as strongly as the RPN's own box loss.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

pytest.importorskip("sklearn")

from detector import BoxGradient, swap_crop_head
from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits

SIZE = 96
OFF = BoxGradient(crop=0, coder=0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root, splits={"train": 64, "val": 16}, count=(1, 1), height=(90, 150))
    images, targets = [], []
    for image, target in CocoDetection(root / "train", root / "annotations" / "instances_train.json"):
        scale = torch.tensor([SIZE / image.shape[2], SIZE / image.shape[1]]).repeat(2)
        images.append(F.interpolate(image[None].float() / 255, (SIZE, SIZE), mode="bilinear", antialias=True)[0])
        targets.append({"boxes": target["boxes"].as_subclass(torch.Tensor) * scale, "labels": target["labels"]})
    return images, targets


def detector():
    def layers(into, *strides):
        return nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(into if k == 0 else 32, 32, 3, s, 1), nn.GroupNorm(4, 32), nn.ReLU())
                for k, s in enumerate(strides)
            )
        )

    body = nn.Sequential()
    for name, part in {"a": layers(3, 2, 2), "b": layers(32, 2), "c": layers(32, 2)}.items():
        body.add_module(name, part)
    return FasterRCNN(
        BackboneWithFPN(body, {"a": "0", "b": "1", "c": "2"}, [32] * 3, 32),
        rpn_anchor_generator=AnchorGenerator(((16,), (24,), (32,), (48,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        box_head=TwoMLPHead(32 * 49, 128),
        box_predictor=FastRCNNPredictor(128, 11),
        min_size=SIZE,
        max_size=SIZE,
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=200,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=64,
    )


def rpn_loss(digits, settings, *, steps=120, lr=2e-3, batch=4, seed=0):
    """The RPN's own box loss over the last third of a training."""
    images, targets = digits
    torch.manual_seed(seed)
    model = swap_crop_head(detector(), settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    seen = []
    for _ in range(steps):
        drawn = torch.randperm(len(images))[:batch].tolist()
        losses = model([images[i] for i in drawn], [dict(targets[i]) for i in drawn])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        seen.append(losses["loss_rpn_box_reg"].item())
    return sum(seen[-steps // 3 :]) / (steps // 3)


@pytest.fixture(scope="module")
def off(digits):
    return rpn_loss(digits, OFF)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [(BoxGradient(), 0, 1.3), (BoxGradient.exact(), 3, 20)],
    ids=["default", "exact"],
)
def test_the_default_leaves_the_rpn_as_it_is_and_the_exact_derivative_does_not(digits, off, settings, least, most):
    share = rpn_loss(digits, settings) / off
    print(f"\nthe RPN's own box loss over that with the gradient off, {settings}: {share:.2f}")
    assert least < share < most
