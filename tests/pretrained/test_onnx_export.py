"""Detectors as ONNX, run by onnxruntime, and the pooler through torch.export."""

import json
import sys
import warnings

import pytest
import torch
from support.marks import slow
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from support.refined_models import refined
from support.tiny_models import tiny_rcnn
from torch import nn
from torch.export import Dim
from torchvision.models.detection import keypointrcnn_resnet50_fpn, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.ops import MultiScaleRoIAlign

import detector.rcnn.pooler
from detector import MultiScaleAffineCrop, swap_crop_head
from detector.pretrained.onnx_export import ExportError, _detect, _same, compare_speed, export_onnx
from detector.refinement import add_refinement, roi_heads

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
FIELDS = ("boxes", "labels", "scores")
MORE_FIELDS = {"box": (), "mask": ("masks",), "keypoint": ("keypoints", "keypoints_scores")}
# Smaller than the example, tall, one whose resized side is 63 in float32, tiny, and larger than the example.
SIZES = [(48, 40), (150, 31), (100, 100), (7, 9), (130, 141)]


def tiny(kind="box", *, swapped=True, **settings):
    model = tiny_rcnn(kind, **settings).eval()
    return swap_crop_head(model) if swapped else model


def noise(*size, batch=1, seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


class Exported:
    """A model, and its exported graph. The export must leave the model as it is, and must not warn."""

    def __init__(self, model, path, **settings):
        self.model, self.path = model, path
        before = dict(model.roi_heads.__dict__), dict(model.named_modules()), type(model.transform)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.notes = export_onnx(model, path, **settings)
        assert (dict(model.roi_heads.__dict__), dict(model.named_modules()), type(model.transform)) == before
        assert not any(module.training for module in model.modules())
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        has = {"mask": model.roi_heads.has_mask(), "keypoint": model.roi_heads.has_keypoint()}
        self.fields = FIELDS + sum((MORE_FIELDS[kind] for kind in has if has[kind]), ())

    def __call__(self, images):
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, map(torch.from_numpy, self.session.run(None, {"images": images.numpy()}))))
        suffixes = [""] if len(images) == 1 else [f"_{i}" for i in range(len(images))]
        assert names == [field + suffix for suffix in suffixes for field in self.fields]
        return [{field: outputs[field + suffix] for field in self.fields} for suffix in suffixes]


@pytest.fixture
def export(tmp_path):
    return lambda model, **settings: Exported(model, tmp_path / "model.onnx", **settings)


def detections(model, images):
    with torch.no_grad():
        return model(list(images))


def assert_detects_alike(run, model, images):
    """Compare all detections. PyTorch's float32 differs from its float64 by up to 1e-5 here."""
    counts = []
    for result, wanted in zip(run(images), detections(model, images), strict=True):
        count = len(wanted["scores"])
        assert [tuple(result[field].shape) for field in FIELDS] == [(count, 4), (count,), (count,)]
        assert [result[field].dtype for field in FIELDS] == [torch.float32, torch.int64, torch.float32]
        assert (result["scores"].diff() <= 0).all()
        boxes = (result["boxes"][:, None] - wanted["boxes"]).abs().amax(2) < 2e-3
        scores = (result["scores"][:, None] - wanted["scores"]).abs() < 5e-5
        same = boxes & scores & (result["labels"][:, None] == wanted["labels"])  # equal scores may change places
        assert same.any(0).all()
        assert same.any(1).all()
        assert result.keys() == wanted.keys()
        for name in wanted.keys() - set(FIELDS):
            assert result[name].shape == wanted[name].shape
            assert result[name].dtype == torch.float32
            alike = same.clone()
            for i, j in same.nonzero().tolist():
                alike[i, j] = torch.allclose(result[name][i], wanted[name][j], rtol=0, atol=5e-3)
            assert alike.any(0).sum() >= 0.9 * len(same)  # boxes are rounded for pasting; heatmaps have ties
        counts.append(count)
    return counts


def between_images(model, images):
    """A score between the best scores of two images."""
    return sum(float(found["scores"].max()) for found in detections(model, images)) / 2


def moved_by(model, images):
    """Return the distance of each refined detection to the nearest unrefined one, in pixels."""
    after = detections(model, images)
    model.roi_heads.refinement.enabled = False
    before = detections(model, images)
    model.roi_heads.refinement.enabled = True
    distances = [torch.cdist(a["boxes"], b["boxes"], p=torch.inf) for a, b in zip(after, before, strict=True)]
    return torch.cat([one.amin(1) for one in distances])


# ---- the same detections


@pytest.fixture(scope="module")
def keypoint_detector(tmp_path_factory):
    classes = [("red", 7), ("ÿ", None)]
    return Exported(tiny("keypoint"), tmp_path_factory.mktemp("run") / "model.onnx", opset=16, classes=classes)


def test_detections_equal_pytorchs_for_any_size(keypoint_detector):
    for size in SIZES:
        assert min(assert_detects_alike(keypoint_detector, keypoint_detector.model, noise(*size))) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "swapped", "fpn", "batch"),
    [
        ("box", True, False, 2),
        ("box", True, True, 1),
        ("box", False, True, 1),
        ("mask", False, True, 1),
        ("mask", True, True, 1),
        ("mask", True, True, 2),
        ("keypoint", False, True, 2),
        ("keypoint", True, True, 2),
    ],
)
def test_detections_equal_pytorchs_for_more_models(export, kind, swapped, fpn, batch):
    model = tiny(kind, fpn=fpn, swapped=swapped)
    run = export(model, batch_size=batch, opset=20)
    for size in SIZES:
        if swapped or min(size) >= 32:  # on tiny images a stock model derives other strides
            images = noise(*size, batch=batch)
            assert min(assert_detects_alike(run, model, images)) > 5
    masks = detections(model, images)[0].get("masks")
    assert masks is None or 0.1 < (masks > 0.5).sum() / (masks > 0).sum() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("canonical_scale", "used", "batch"), [(20, [0, 1], 1), (1, [2], 1), (10**6, [0], 2), (6, [0, 1, 2], 2)]
)
def test_levels_without_rois(export, monkeypatch, canonical_scale, used, batch):
    model = tiny()
    model.roi_heads.box_roi_pool.canonical_scale = canonical_scale
    run = export(model, batch_size=batch)
    levels = []

    class Spy(detector.rcnn.pooler.LevelMapper):
        def __call__(self, boxlists):
            levels.append(super().__call__(boxlists))
            return levels[-1]

    monkeypatch.setattr(detector.rcnn.pooler, "LevelMapper", Spy)
    assert min(assert_detects_alike(run, model, noise(60, 50, batch=batch))) > 5
    assert torch.cat(levels).unique().tolist() == used


@pytest.mark.parametrize(("kind", "batch"), [slow("mask", 1), slow("keypoint", 2), ("box", 1)])
def test_no_detections(export, kind, batch):
    model = tiny(kind, fpn=False, box_score_thresh=0.999)
    run = export(model, batch_size=batch)
    assert assert_detects_alike(run, model, noise(48, 40, batch=batch)) == [0] * batch
    shapes = {"masks": (0, 1, 48, 40), "keypoints": (0, 2, 3), "keypoints_scores": (0, 2)}
    for found in run(noise(48, 40, batch=batch)):
        assert all(tuple(found[name].shape) == shapes[name] for name in MORE_FIELDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keypoint", "mask"])
def test_one_image_of_two_without_detections(export, kind):
    model = tiny(kind, fpn=False)
    images = noise(52, 60, batch=2)
    model.roi_heads.score_thresh = between_images(model, images)
    run = export(model, batch_size=2)
    counts = assert_detects_alike(run, model, images)
    assert min(counts) == 0 < max(counts)
    assert assert_detects_alike(run, model, images.flip(0)) == counts[::-1]


@pytest.mark.parametrize(("fpn", "batch"), [(False, 1), slow(True, 2)])
def test_no_proposals(export, capfd, fpn, batch):
    model = tiny(fpn=fpn)
    images = noise(52, 60, batch=batch)
    model.rpn.score_thresh = 1.1
    run = export(model, batch_size=batch)
    assert assert_detects_alike(run, model, images) == [0] * batch
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("builder", "swapped"),
    [
        pytest.param(maskrcnn_resnet50_fpn, True, marks=pytest.mark.slow),
        pytest.param(keypointrcnn_resnet50_fpn, False, marks=pytest.mark.slow),
        pytest.param(maskrcnn_resnet50_fpn, False, marks=pytest.mark.exhaustive),
        pytest.param(keypointrcnn_resnet50_fpn, True, marks=pytest.mark.exhaustive),
    ],
)
def test_torchvisions_own_mask_and_keypoint_rcnn(tmp_path, builder, swapped):
    torch.manual_seed(0)
    few = {"min_size": 128, "max_size": 192, "box_score_thresh": 0.0, "box_detections_per_img": 30}
    model = builder(weights=None, weights_backbone=None, **few).eval()
    run = Exported(swap_crop_head(model) if swapped else model, tmp_path / "model.onnx")  # compares them
    images = noise(140, 210)
    (wanted,), (found,) = detections(model, images), run(images)
    assert _same(wanted, found, 0.05).any(0).sum() >= 27


# ---- the file


def test_the_graph_has_standard_operators_only(keypoint_detector):
    graph = onnx.load(keypoint_detector.path)
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", 16)]
    assert not graph.functions
    used = set()

    def collect(nodes):
        for node in nodes:
            assert node.domain == ""
            used.add(node.op_type)
            for attribute in node.attribute:
                collect(attribute.g.node)

    collect(graph.graph.node)
    assert {"GridSample", "NonMaxSuppression", "If", "Loop", "Resize", "ArgMax"} <= used
    assert "RoiAlign" not in used


def test_metadata_and_axes(keypoint_detector):
    metadata = {p.key: json.loads(p.value) for p in onnx.load(keypoint_detector.path).metadata_props}
    assert list(metadata["outputs"]) == list(keypoint_detector.fields) == [*FIELDS, *MORE_FIELDS["keypoint"]]
    assert (metadata["input"]["colors"], metadata["input"]["range"]) == ("RGB", [0, 1])
    assert metadata["classes"] == [
        {"label": 1, "name": "red", "category_id": 7},
        {"label": 2, "name": "ÿ", "category_id": None},
    ]
    session = keypoint_detector.session
    axes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert axes["images"] == [1, 3, "height", "width"]
    assert axes["keypoints"][0] == axes["boxes"][0] == "detections"


def test_speed(keypoint_detector):
    side, *seconds = compare_speed(keypoint_detector.model, keypoint_detector.path, 2)
    assert side == 64
    assert min(seconds) > 0


# ---- refinements


def test_the_refinement_is_in_the_graph(export):
    """The number of boxes is not the example's; the gradient ascent is left out."""
    model = tiny(fpn=False)
    images = noise(52, 60)
    before = detections(model, images)
    refined(model, ascent_steps=5, iou_power=2.0)
    run = export(model)
    assert "ascent" in run.notes[1]
    assert model.roi_heads.refinement.config.ascent_steps == 5
    refined(model, iou_power=2.0)
    for size in (*SIZES[:2], (52, 60)):
        assert_detects_alike(run, model, noise(*size))
    assert not torch.isin(before[0]["scores"], detections(model, images)[0]["scores"]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "swapped", "fpn", "batch", "iterations"),
    [
        ("box", True, False, 1, 3),
        ("box", False, True, 1, 2),
        ("mask", True, True, 2, 2),
        ("keypoint", True, True, 1, 2),
    ],
)
def test_refinement_iterations_of_more_models(export, kind, swapped, fpn, batch, iterations):
    model = refined(tiny(kind, fpn=fpn, swapped=swapped), iterations=iterations)
    run = export(model, batch_size=batch)
    assert len(run.notes) == 1
    for size in SIZES:
        if swapped or min(size) >= 32:
            images = noise(*size, batch=batch)
            assert min(assert_detects_alike(run, model, images)) > 5
            assert (moved_by(model, images) > 0.05).any()


def test_nms_follows_the_refinement(export, monkeypatch):
    monkeypatch.setattr(roi_heads, "NMS_THRESHOLD", 0.5)
    model = refined(tiny(fpn=False), iterations=3)
    run, images = export(model), noise(130, 141)
    (kept,) = assert_detects_alike(run, model, images)
    model.roi_heads.refinement.enabled = False
    assert kept < len(detections(model, images)[0]["scores"])


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "batch"), [(0, 1), (1, 2), (3, 1)])
def test_few_or_no_detections_to_refine(export, limit, batch):
    model = tiny(fpn=False, box_score_thresh=0.0 if limit else 0.999, box_detections_per_img=max(limit, 1))
    refined(model, iou_power=2.0)
    run = export(model, batch_size=batch)
    for size in SIZES[1:3]:
        assert assert_detects_alike(run, model, noise(*size, batch=batch)) == [limit] * batch


@pytest.mark.slow
def test_a_refinement_that_is_switched_off_is_not_in_the_graph(export):
    model = refined(tiny(fpn=False), ascent_steps=5)
    model.roi_heads.refinement.enabled = False
    run = export(model)
    assert len(run.notes) == 1
    assert_detects_alike(run, tiny(fpn=False), noise(48, 40))


# ---- wrong graphs


class TracedAsAnother(nn.Module):
    """A module whose graph does something else."""

    def __init__(self, module, other):
        super().__init__()
        self.module, self.other = module, other

    def forward(self, x):
        return self.other(self.module(x)) if torch.jit.is_tracing() else self.module(x)


class Baked(nn.Module):
    """A box head with a value that tracing makes constant."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, crops):
        return self.head(crops) * float(crops.mean()) * 10


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        slow("mask", lambda logits: logits.roll(2, 3)),
        slow("mask", lambda logits: logits * 0 - 9),
        slow("mask", lambda logits: -logits),
        slow("mask", lambda logits: logits.flip(1) + 0.5),
        ("keypoint", lambda heatmaps: heatmaps.flip(1)),
        slow("keypoint", lambda heatmaps: heatmaps - 0.1),
        slow("keypoint", lambda heatmaps: heatmaps.flip(3)),
    ],
)
def test_a_graph_with_other_masks_or_keypoints_is_not_written(tmp_path, kind, other):
    model = tiny(kind, fpn=kind == "mask")
    name = f"{kind}_predictor"
    setattr(model.roi_heads, name, TracedAsAnother(getattr(model.roi_heads, name), other))
    with pytest.raises(ExportError, match="PyTorch"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("of_refinement", [False, slow(True)])
def test_a_graph_with_other_boxes_is_not_written(tmp_path, of_refinement):
    model = tiny(fpn=False)
    if of_refinement:
        head = refined(model).roi_heads.refinement.head
        head.trunk = Baked(head.trunk)
    else:
        model.roi_heads.box_head = Baked(model.roi_heads.box_head)
    (tmp_path / "model.onnx").write_bytes(b"before")
    with pytest.raises(ExportError, match="PyTorch"):
        export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_every_image_is_compared_by_several_detections():
    """A trained detector may have one score far above all others."""

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = [torch.tensor([0.99, *torch.linspace(0.05, 0.01, 40)]), torch.linspace(0.3, 0.02, 15)]
            self.roi_heads = nn.Module()
            self.roi_heads.score_thresh = 0.5

        def forward(self, images):
            kept = [scores[scores > self.roi_heads.score_thresh] for scores in self.scores]
            return [{"boxes": torch.zeros(len(s), 4), "labels": torch.ones(len(s)).long(), "scores": s} for s in kept]

    model = Trained()
    found, threshold = _detect(model, torch.zeros(2, 3, 4, 4))
    assert all(len(image["scores"]) >= 10 for image in found)
    assert 0 < threshold < 0.05


# ---- refusals


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not compared" in export_onnx(tiny(fpn=False), tmp_path / "model.onnx")[0]
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match="package onnx"):
        export_onnx(tiny(), tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def adaptive(kind, name=None):
    """A model with a pool, or the refinement's, whose number of samples depends on the box."""
    model = tiny(kind)
    pool = MultiScaleAffineCrop(["0", "1", "2"], 4, 0)
    if name is None:
        setattr(model.roi_heads, f"{kind}_roi_pool", pool)
    else:
        add_refinement(model).roi_heads.refinement.pool = pool
    return model


@pytest.mark.parametrize(
    ("model", "settings", "error", "named"),
    [
        (lambda: nn.Linear(2, 2).eval(), {}, ExportError, "Linear"),
        (lambda: retinanet_resnet50_fpn(weights=None, weights_backbone=None).eval(), {}, ExportError, "RetinaNet"),
        (lambda: tiny().train(), {}, ExportError, "eval"),
        (lambda: tiny().double(), {}, ExportError, "float32"),
        (lambda: adaptive("box"), {}, ExportError, "box.*sampling_ratio"),
        (lambda: adaptive("keypoint"), {}, ExportError, "keypoint.*sampling_ratio"),
        (lambda: adaptive("box", "refinement"), {}, ExportError, "refinement.*sampling_ratio"),
        (tiny, {"batch_size": 0}, ExportError, "batch_size"),
        (tiny, {"opset": 15}, ExportError, "opset"),
        (tiny, {"opset": 21}, ExportError, "opset"),
    ],
)
def test_refusals(tmp_path, model, settings, error, named):
    with pytest.raises(error, match=named):
        export_onnx(model(), tmp_path / "model.onnx", **settings)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced(tmp_path):
    class Untraceable(nn.Module):
        def forward(self, features):
            return torch.lgamma(features)

    model = tiny(fpn=False)
    model.roi_heads.box_head = nn.Sequential(model.roi_heads.box_head, Untraceable())
    with pytest.raises(ExportError, match="lgamma"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# ---- torch.export


class PoolOfImages(nn.Module):
    """A pool that takes the sizes of its images from a tensor, so that they are not constants."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, features, boxes, images):
        return self.pool(features, boxes, [tuple(images.shape[-2:])] * len(boxes))


@pytest.mark.slow
def test_torch_export_of_the_pooler():
    def inputs(size, sides):
        features = pyramid(2, size, dtype=torch.float32)
        boxes = [boxes_of_side(s, i, torch.float32).reshape(-1, 4) for i, s in enumerate(sides)]
        return features, boxes, torch.zeros(2, 3, *size)

    both = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    pooler = PoolOfImages(MultiScaleAffineCrop(list(STRIDES), 3, 2, **SMALL))
    example = inputs((128, 160), (LEVEL_SIDES, LEVEL_SIDES[:3]))
    shapes = (dict.fromkeys(STRIDES, both), [{0: Dim.DYNAMIC}] * 2, both)
    module = torch.export.export(pooler, example, dynamic_shapes=shapes).module()
    for size, sides in [
        ((128, 160), (LEVEL_SIDES, LEVEL_SIDES[:3])),
        ((192, 96), ([20.0] * 4, LEVEL_SIDES)),  # no image has a RoI on every level
        ((96, 224), ([18.0], [18.0, 20.0])),  # all on the finest level
        ((160, 160), ([], [80.0])),
    ]:
        arguments = inputs(size, sides)
        expected = PoolOfImages(MultiScaleRoIAlign(list(STRIDES), 3, 2, **SMALL))(*arguments)
        torch.testing.assert_close(module(*arguments), expected, rtol=0, atol=1e-4)
