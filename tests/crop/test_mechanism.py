"""A gradient through the crop finds an object, and the box loss moves the proposals. Prints figures with pytest -s."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.transforms.v2.functional import gaussian_blur

from detector import BoxGradient, affine_crop, swap_crop_head


def textures(count, size):
    """Images of overlapping soft blobs, [count, 3, size, size]."""
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    images = torch.zeros(count, 3, size, size)
    for _ in range(150):
        x, y = torch.rand(2, count, 1, 1) * size
        radius = 2 + 4 * torch.rand(count, 1, 1)
        blob = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))
        images += torch.randn(count, 3, 1, 1) * blob[:, None]
    return images


def test_gradient_descent_on_a_box_finds_the_object():
    """8 images, 8 starts each, every side off by up to a third of the box's size: all end within half a pixel."""
    images, starts, steps = 8, 8, 120
    pictures = textures(images, 96)
    size = 26 + 10 * torch.rand(images, 1, 2)
    corner = 14 + torch.rand(images, 1, 2) * (96 - 28 - size)
    truth = torch.cat([corner, corner + size], dim=2)  # [images, 1, 4]

    def crop(boxes):
        return affine_crop(pictures, list(boxes), 24, sampling_ratio=1, aligned=True)

    wanted = crop(truth).repeat_interleave(starts, dim=0)
    offsets = (2 * torch.rand(images, starts, 4) - 1) / 3 * size.repeat(1, 1, 2)
    boxes = (truth + offsets).requires_grad_()
    optimizer = torch.optim.Adam([boxes], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        blur = max(4 * (1 - 1.5 * step / steps), 0.3)  # coarse to fine
        loss = gaussian_blur(crop(boxes) - wanted, [13, 13], [blur, blur]).square().mean(dim=(1, 2, 3)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    before, after = offsets.abs().amax(dim=2), (boxes.detach() - truth).abs().amax(dim=2)
    print(
        f"\n{(after < 0.5).sum()} of {after.numel()} boxes within half a pixel: worst side off by up to "
        f"{before.max():.1f} px (mean {before.mean():.1f}) before, {after.max():.3f} px (mean {after.mean():.4f}) after"
    )
    assert before.mean() > 5
    assert (after < 0.5).all()


def scenes(count):
    """Images of 64 pixels with two bright rectangles each, and their targets."""
    images, targets = [], []
    for _ in range(count):
        image = 0.2 * torch.rand(3, 64, 64)
        boxes = []
        for left in (2, 34):
            width, height = (12 + 14 * torch.rand(2)).round().int().tolist()
            x = left + int(torch.randint(29 - width, ()))
            y = 2 + int(torch.randint(61 - height, ()))
            image[:, y : y + height, x : x + width] += 0.3 + 0.5 * torch.rand(3, 1, 1)
            boxes.append([x, y, x + width, y + height])
        images.append(image)
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.ones(2, dtype=torch.int64)})
    return images, targets


def small_detector():
    def layer(channels, stride):
        return [nn.Conv2d(channels, 32, 3, stride, 1), nn.GroupNorm(4, 32), nn.ReLU()]

    backbone = nn.Sequential(*layer(3, 2), *layer(32, 2), *layer(32, 1), *layer(32, 1))
    backbone.out_channels = 32
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((12, 18, 26),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=TwoMLPHead(32 * 25, 64),
        box_predictor=FastRCNNPredictor(64, 2),
        min_size=64,
        max_size=64,
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=300,
        rpn_nms_thresh=0.95,
        box_batch_size_per_image=64,
    )


@torch.no_grad()
def proposal_iou(model, images, targets):
    """Return the mean IoU with the truth of the proposals of all anchors that overlap it by half or more."""
    batch, _ = model.transform(images)
    features = {"0": model.backbone(batch.tensors)}
    _, deltas = model.rpn.head(list(features.values()))
    anchors = model.rpn.anchor_generator(batch, list(features.values()))
    deltas = deltas[0].unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)
    proposals = model.rpn.box_coder.decode(deltas, anchors).view(len(images), -1, 4)
    found = []
    for image_anchors, image_proposals, target in zip(anchors, proposals, targets):
        overlap, truth = box_iou(image_anchors, target["boxes"]).max(dim=1)
        positive = overlap >= 0.5
        found.append(box_iou(image_proposals[positive], target["boxes"])[range(positive.sum()), truth[positive]])
    return torch.cat(found).mean().item()


def train(model, images, targets, *, lr, steps):
    """Train with all losses but the RPN's own box loss."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        batch = torch.randperm(len(images))[:8].tolist()
        losses = model([images[i] for i in batch], [dict(targets[i]) for i in batch])
        del losses["loss_rpn_box_reg"]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.fixture(scope="module")
def experiment():
    """A detector whose head refines anchors while its proposals are untrained; training and new scenes."""
    torch.manual_seed(0)
    training, new = scenes(64), scenes(16)
    model = swap_crop_head(small_detector(), BoxGradient(crop=0, coder=0)).train()
    train(model, *training, lr=1e-3, steps=300)
    return model, training, new


@pytest.mark.slow
@pytest.mark.parametrize("path", ["both", "off", "crop alone"])
def test_the_box_loss_moves_the_proposals(experiment, path):
    """Both paths move proposals to the truth; off, they stay; the crop path alone moves them away from it."""
    model, training, new = copy.deepcopy(experiment)
    settings = {
        "both": BoxGradient.exact(),
        "off": BoxGradient(crop=0, coder=0),
        "crop alone": BoxGradient(coder=0, bound=None),
    }
    swap_crop_head(model, settings[path])
    before = proposal_iou(model, *new)
    train(model, *training, lr=3e-4, steps=120)
    after = proposal_iou(model, *new)
    print(f"\nproposals' mean IoU with the truth on new images, {path}: {before:.3f} to {after:.3f}")
    if path == "both":
        assert after > before + 0.04
    elif path == "off":
        assert abs(after - before) < 0.01
    else:
        assert after < before - 0.1
