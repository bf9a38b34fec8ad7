"""Images so narrow that torchvision's transforms would leave no pixel of them."""

import pickle

import pytest
import torch
from support.tiny_detector import SETTINGS
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from detector.models.build import build_detector
from detector.models.resizing import DetectorTransform, RandomShortestSize
from detector.pretrained.detector import Detector
from detector.rcnn.swap import swap_crop_head

STOCK = GeneralizedRCNNTransform(64, 128, [0.0] * 3, [1.0] * 3).eval()


@pytest.fixture
def transform():
    transform = GeneralizedRCNNTransform(64, 128, [0.0] * 3, [1.0] * 3).eval()
    transform.__class__ = DetectorTransform
    return transform


@pytest.mark.parametrize(("height", "width"), [(2, 3000), (3000, 2), (1, 129), (7, 7 * 128 + 1)])
def test_a_narrow_image_keeps_a_pixel_of_its_shorter_side(transform, height, width):
    target = {"boxes": torch.tensor([[0.0, 0, width, height]]), "masks": torch.ones(1, height, width).byte()}
    resized, target = transform.resize(torch.rand(3, height, width), target)
    assert resized.shape[1:] == ((1, 128) if width > height else (128, 1))
    assert target["boxes"].tolist() == [[0, 0, *resized.shape[:0:-1]]]
    assert target["masks"].shape[1:] == resized.shape[1:]


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (1, 1), (2, 256), (1, 128), (3, 383), (500, 700)])
def test_other_images_are_resized_as_by_torchvision(transform, size):
    image = torch.rand(3, *size)
    assert torch.equal(transform.resize(image)[0], STOCK.resize(image)[0])


def test_training_images_are_resized_likewise():
    image = tv_tensors.Image(torch.rand(3, 2, 3000))
    box = tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0, 3000, 2]]), format="XYXY", canvas_size=(2, 3000))
    resized, boxes = RandomShortestSize([64], 128, antialias=False)(image, box)
    assert resized.shape == (3, 1, 128)
    assert boxes.tolist() == [[0, 0, 128, 1]]
    usual = tv_tensors.Image(torch.rand(3, 40, 60))
    torch.manual_seed(0)
    expected = v2.RandomShortestSize([32, 64, 96], 128, antialias=False)(usual)
    torch.manual_seed(0)
    assert torch.equal(RandomShortestSize([32, 64, 96], 128, antialias=False)(usual), expected)


def test_built_and_loaded_detectors_accept_them():
    pytest.importorskip("timm")
    stock = build_detector(SETTINGS, 2, pretrained=False)
    stock.transform.__class__ = GeneralizedRCNNTransform
    for model in (build_detector(SETTINGS, 2, pretrained=False), Detector(stock, [1], ["cat"]).model):
        model = pickle.loads(pickle.dumps(swap_crop_head(model))).eval()
        images = [torch.rand(3, 2, 3000), torch.rand(3, 64, 48), torch.rand(3, 3000, 1)]
        with torch.no_grad():
            found = model(images)
        for image, one in zip(images, found, strict=True):
            assert (one["boxes"] <= torch.tensor([*image.shape[:0:-1]] * 2)).all()
        target = {"boxes": torch.tensor([[0.0, 0, 30, 2]]), "labels": torch.tensor([1])}
        assert all(loss.isfinite() for loss in model.train()(images[:2], [target] * 2).values())
