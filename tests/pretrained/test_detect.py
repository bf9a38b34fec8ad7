"""Detector.detect: images of any kind in, named detections out."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

pytest.importorskip("timm")

from support.annotation_files import dataset
from support.tiny_detector import IDS, NAMES, SETTINGS, scene, tiny_checkpoint

from detector import BoxGradient, swap_crop_head
from detector.errors import DataError, ModelError
from detector.models.build import build_detector
from detector.pretrained.detections import Detections
from detector.pretrained.detector import Detector
from detector.pretrained.image_tensors import image_tensor
from detector.pretrained.loading import load_checkpoint

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save(tiny_checkpoint(), path)
    return load_checkpoint(path)


def test_a_detector_in_another_precision_is_refused(detector):
    """It detects again in float32, and under autocast."""
    cast = copy.deepcopy(detector)
    cast.model.roi_heads.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"roi_heads\..*bfloat16"):
        cast.detect(scene())
    assert cast.float().detect(scene(), min_score=0).boxes.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cast.detect(scene(), min_score=0).boxes.dtype == torch.float32


def as_pil(pixels):
    return v2.functional.to_pil_image(pixels)


def as_array(pixels):
    return pixels.permute(1, 2, 0).numpy()


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def opened(image, form, **options):
    """As it comes from a file: not yet read."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def path_of(tmp_path, pixels):
    path = tmp_path / "image.png"
    as_pil(pixels).save(path)
    return path


IMAGES = {
    "tensor": lambda x: x,
    "tensor, float": lambda x: x / 255,
    "tensor, double": lambda x: x.double() / 255,
    "tensor, with a gradient": lambda x: (x / 255).requires_grad_(),
    "array": as_array,
    "array, float": lambda x: as_array(x) / np.float32(255),
    "array, big endian": lambda x: (as_array(x) / 255).astype(">f4"),
    "array, long double": lambda x: as_array(x).astype(np.longdouble) / 255,
    "array, backwards": lambda x: as_array(x)[::-1].copy()[::-1],
    "array, read-only": lambda x: read_only(as_array(x)),
    "array, with alpha": lambda x: np.concatenate([as_array(x), np.full((*x.shape[1:], 1), 7, np.uint8)], 2),
    "PIL, RGB": as_pil,
    "PIL, RGBA": lambda x: Image.merge("RGBA", [*as_pil(x).split(), Image.new("L", as_pil(x).size, 9)]),
    "PIL, not yet read": lambda x: opened(as_pil(x), "PNG"),
}
GREY = {
    "tensor": lambda x: x,
    "array": lambda x: x[0].numpy(),
    "array, float": lambda x: x[0].numpy() / 255,
    "array, a channel": lambda x: x[0].numpy()[..., None],
    "PIL, LA": lambda x: Image.merge("LA", [as_pil(x), Image.new("L", as_pil(x).size, 9)]),
    "PIL, P": lambda x: as_pil(x).convert("P"),
    "PIL, I;16": lambda x: Image.fromarray(x[0].numpy().astype(np.uint16) * 257),
    "PIL, I of 10 bits": lambda x: Image.fromarray(x[0].numpy().astype(np.int32) * 4),
    "PIL, F in 0 to 1": lambda x: Image.fromarray(x[0].numpy().astype(np.float32) / 255),
    "PIL, CMYK": lambda x: Image.merge("CMYK", [as_pil(255 - x)] * 3 + [Image.new("L", as_pil(x).size, 0)]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [*IMAGES.values()], ids=IMAGES)
def test_images_of_any_kind(make):
    image = make(scene())
    before = image.copy() if isinstance(image, np.ndarray) else image
    assert torch.equal(image_tensor(image), scene())
    assert not isinstance(image, np.ndarray) or np.array_equal(image, before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [*GREY.values()], ids=GREY)
def test_grey_images(make):
    grey = scene()[:1]
    assert torch.equal(image_tensor(make(grey)), grey.expand(3, -1, -1))


def test_a_photograph_is_turned_upright_from_a_path_and_from_pil(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "turned.png"
    as_pil(scene()).save(path, exif=exif)
    upright = torch.rot90(scene(), -1, (1, 2))
    assert torch.equal(image_tensor(path), upright)
    with Image.open(path) as image:
        assert torch.equal(image_tensor(image), upright)
        assert image.size == (64, 48)  # the caller's is as it was


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (torch.zeros(8, 8), r"\[8, 8\]"),
        (torch.zeros(4, 8, 8), r"\[4, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8), r"list\(batch\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((3, 8, 8), 255.0), "255"),
        (torch.full((3, 8, 8), -0.01), "-0.01"),
        (torch.full((3, 8, 8), torch.nan), "nan"),
        (torch.zeros(3, 0, 8), "8 x 0"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\]"),
        (np.zeros(8, np.uint8), r"\[8\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"list\(batch\)"),
        (np.zeros((8, 8, 3), np.uint16), "uint16"),
        (Image.new("F", (8, 8), -1), "-1"),
        (Image.new("I", (8, 8), 70000), "70000"),
        (Image.new("RGB", (0, 8)), "0 x 8"),
        ("nothing.png", r"nothing\.png"),
        ((path for path in "ab"), "generator"),
        ([[0, 1]], "list"),
    ],
)
def test_other_values_are_refused(detector, image, reason):
    with pytest.raises(DataError, match=reason) as error:
        detector.detect(image)
    assert "\n" not in str(error.value)


def test_a_pil_image_that_is_cut_off(detector):
    file = io.BytesIO()
    as_pil(scene(200, 200)).save(file, "JPEG")
    with pytest.raises(DataError):
        detector.detect(Image.open(io.BytesIO(file.getvalue()[:900])))


def test_detections(detector):
    found = detector.detect(scene(), min_score=0)
    assert isinstance(found, Detections)
    assert found.names == [NAMES[label - 1] for label in found.labels.tolist()]
    assert len(found) == len(found.boxes) == len(list(found)) == 10
    assert len(set(found.names)) > 1
    first = next(iter(found))
    assert first == {
        "name": found.names[0],
        "label": found.labels[0].item(),
        "score": found.scores[0].item(),
        "box": found.boxes[0].tolist(),
    }
    assert (found.scores.diff() <= 0).all()
    lines = repr(found).splitlines()
    assert len(lines) == 11
    assert first["name"] in lines[1]
    assert found == found  # by identity: == of tensors has no truth value
    assert found != detector.detect(scene(), min_score=0)


def test_keypoints():
    points = torch.tensor([[[3.0, 4, 1], [5, 6, 1]]])
    one = (torch.zeros(3, 20, 30, dtype=torch.uint8), torch.rand(1, 4), torch.tensor([1]), torch.tensor([0.5]), ["a"])
    (scored,) = Detections(*one, keypoints=points, keypoints_scores=torch.tensor([[7.0, 8]]))
    assert scored["keypoints"] == {"1": [3, 4, 7], "2": [5, 6, 8]}


def test_a_notebook_draws_them(detector):
    found = detector.detect(scene(), min_score=0)
    with Image.open(io.BytesIO(found._repr_png_())) as picture:
        assert picture.format == "PNG"
        assert picture.size == (64 * 7, 48 * 7)  # enlarged, so that captions can be read
        drawn = picture.convert("RGB")
    plain = found.draw(min_score=1.1)
    assert plain.size == drawn.size
    assert np.array(plain).tobytes() != np.array(drawn).tobytes()
    assert np.array(found.draw()).tobytes() == np.array(drawn).tobytes()


def test_min_score(detector):
    every = detector.detect(scene(), min_score=0)
    least = every.scores[4].item()
    found = detector.detect(scene(), min_score=least)
    assert torch.equal(found.scores, every.scores[every.scores >= least])
    assert 5 <= len(found) < 10
    assert 0 < len(detector.detect(scene())) < 10
    assert torch.equal(detector.detect(scene()).scores, every.scores[every.scores >= 0.5])
    nothing = detector.detect(scene(), min_score=1)
    assert (len(nothing), nothing.names, list(nothing)) == (0, [], [])
    assert repr(nothing).startswith("0 detections in an image of 64 x 48")
    nothing._repr_png_()
    for score in (-0.1, 50, float("nan")):
        with pytest.raises(ValueError, match="min_score"):
            detector.detect(scene(), min_score=score)


def test_every_module_keeps_its_mode():
    detector = Detector(build_detector(SETTINGS, 3), IDS, NAMES, settings=SETTINGS)
    assert not any(part.training for part in detector.modules())  # a new one is in eval mode
    expected = detector.detect(scene(), min_score=0).scores
    detector.train()
    detector.model.backbone.eval()  # as one that is frozen
    detector.model.rpn.train()
    modes = [part.training for part in detector.modules()]
    assert torch.equal(detector.detect(scene(), min_score=0).scores, expected)
    assert [part.training for part in detector.modules()] == modes
    detector.model.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        detector.detect(scene())
    assert [part.training for part in detector.modules()] == modes


def test_no_gradient_is_kept_and_training_can_continue():
    model = swap_crop_head(build_detector(SETTINGS, 3), BoxGradient())
    detector = Detector(model, IDS, NAMES, settings=SETTINGS)
    found = detector.detect(scene(), min_score=0)
    assert not found.boxes.requires_grad
    assert not found.scores.requires_grad
    scale = nn.Parameter(torch.ones(()))
    (found.boxes * scale).sum().backward()
    assert scale.grad is not None
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert any(parameter.requires_grad for parameter in detector.parameters())
    detector.train()
    losses = detector.model(
        [scene() / 255], [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    )
    sum(losses.values()).backward()


# ---- a list of images


def batches_of(monkeypatch):
    batches, detect_batch = [], Detector.detect_batch
    monkeypatch.setattr(
        Detector,
        "detect_batch",
        lambda self, images: batches.append(len(images)) or detect_batch(self, images),
    )
    return batches


def test_a_list_is_each_of_its_images(detector, tmp_path, monkeypatch):
    sizes = [(48, 64)] * 10 + [(64, 48), (48, 64), (64, 48), (64, 48)]
    pixels = [scene(*size, seed=seed) for seed, size in enumerate(sizes)]
    images = [pixels[0], as_pil(pixels[1]), as_array(pixels[2]), path_of(tmp_path, pixels[3]), *pixels[4:]]
    expected = [detector.detect(image, min_score=0.6) for image in pixels]
    batches = batches_of(monkeypatch)
    for given in (images, tuple(images)):
        found = detector.detect(given, min_score=0.6)
        assert type(found) is list
        assert [torch.equal(one.image, image) for one, image in zip(found, pixels, strict=True)] == [True] * 14
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.labels, other.labels)
            assert torch.allclose(one.scores, other.scores, atol=1e-5)
            assert torch.allclose(one.boxes, other.boxes, atol=1e-3)
            assert one.category_names == NAMES
    assert batches == [8, 2, 1, 1, 2] * 2
    assert detector.detect([]) == []
    assert len({len(one) for one in expected}) > 1  # or min_score would not be seen


@pytest.mark.parametrize(
    ("images", "named"),
    [([scene(), [scene()]], 1), ([None], 0), ([scene(), "nothing.png"], 1), ([scene(), scene() / 255 + 1], 1)],
)
def test_the_broken_image_of_a_list_is_named(detector, images, named, monkeypatch):
    batches = batches_of(monkeypatch)
    with pytest.raises(DataError, match=rf"^images\[{named}\]"):
        detector.detect(images)
    assert batches == []


def test_detect_limits_the_pixels(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = path_of(tmp_path, scene())
    for image in (path, [path]):
        for options in ({}, {"max_pixels": 3071}):
            with pytest.raises(DataError, match="max_pixels"):
                detector.detect(image, **options)
        detector.detect(image, max_pixels=3072)


# ---- evaluate


def test_evaluate_scores_the_detector_on_a_split(detector, tmp_path):
    content = dataset(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").rename(tmp_path / "val")
    content["categories"] = [{"id": 7, "name": NAMES[0]}, {"id": 3, "name": NAMES[1]}]
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    evaluation = detector.evaluate(tmp_path, "val", output=tmp_path / "out", workers=0, limit=1)
    assert evaluation.report.about["weights"] == detector.digest()
    assert evaluation.report.about["images"] == 1
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == evaluation.scores
    assert (tmp_path / "out" / "report.html").exists()
