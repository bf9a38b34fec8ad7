"""Detectors as ONNX, run by onnxruntime, and the crop through torch.export."""

import builtins
import io
import json

import pytest
import torch
from support.marks import slow
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from support.refined_models import refined
from support.tiny_models import CHANNELS, tiny_rcnn
from torch import nn
from torch.export import Dim
from torchvision.models.detection import keypointrcnn_resnet50_fpn, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align

import detector.crop.pyramid
from detector import AffineCrop, MultiScaleAffineCrop, swap_crop_head
from detector.pretrained.onnx_export import ExportError, _detect, compare_speed, export_onnx, left_out

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
FIELDS = ("boxes", "labels", "scores")
PARTS = {"box": (), "mask": ("masks",), "keypoint": ("keypoints", "keypoints_scores")}
# The example's, smaller, tall, wide, one of which resized is 63 pixels in float32, tiny, and larger than the model's.
SIZES = [(64, 64), (48, 40), (150, 31), (30, 100), (100, 100), (7, 9), (130, 141)]


def tiny(kind="box", *, swapped=True, **settings):
    model = tiny_rcnn(kind, **settings).eval()
    return swap_crop_head(model) if swapped else model


def noise(*size, batch=1, seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def export(tmp_path):
    """Export a model, and run it by onnxruntime: detections of each image, as PyTorch gives them."""

    def exported(model, **settings):
        path = tmp_path / "model.onnx"
        export_onnx(model, path, **settings)
        assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        has = {"mask": model.roi_heads.has_mask(), "keypoint": model.roi_heads.has_keypoint()}
        fields = FIELDS + sum((PARTS[kind] for kind in has if has[kind]), ())

        def run(images):
            names = [output.name for output in session.get_outputs()]
            outputs = dict(
                zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True)
            )
            suffixes = [""] if len(images) == 1 else [f"_{i}" for i in range(len(images))]
            assert names == [field + suffix for suffix in suffixes for field in fields]
            return [{field: outputs[field + suffix] for field in fields} for suffix in suffixes]

        run.path = path
        return run

    return exported


def detections(model, images):
    with torch.no_grad():
        return model(list(images))


def assert_detects_alike(run, model, images):
    """All detections, best first; two whose scores are the same but for rounding may change places.

    PyTorch's own float32 is up to 1e-5 from its float64 here.
    """
    counts = []
    for result, wanted in zip(run(images), detections(model, images), strict=True):
        count = len(wanted["scores"])
        assert [tuple(result[field].shape) for field in FIELDS] == [(count, 4), (count,), (count,)]
        assert [result[field].dtype for field in FIELDS] == [torch.float32, torch.int64, torch.float32]
        assert (result["scores"].diff() <= 0).all()
        boxes = (result["boxes"][:, None] - wanted["boxes"]).abs().amax(2) < 2e-3
        scores = (result["scores"][:, None] - wanted["scores"]).abs() < 5e-5
        same = boxes & scores & (result["labels"][:, None] == wanted["labels"])
        assert same.any(0).all()
        assert same.any(1).all()
        assert_parts_alike(result, wanted, same)
        counts.append(count)
    return counts


def assert_parts_alike(result, wanted, same):
    """Masks and keypoints of detections that are the same, but for a few that hang on a rounded number.

    Pasting rounds boxes to whole pixels; of two pixels of a heatmap that are as high either is the keypoint.
    """
    assert result.keys() == wanted.keys()
    for name in wanted.keys() - set(FIELDS):
        assert result[name].shape == wanted[name].shape
        assert result[name].dtype == wanted[name].dtype == torch.float32
        alike = same.clone()
        for i, j in same.nonzero().tolist():
            alike[i, j] = torch.allclose(result[name][i], wanted[name][j], rtol=0, atol=5e-3)
        assert alike.any(0).sum() >= 0.9 * len(same)


@pytest.mark.parametrize(
    ("swapped", "fpn", "batch"),
    [(True, True, 1), (True, True, 2), (True, False, 1), (True, False, 2), (False, True, 1)],
)
def test_detections_equal_pytorchs_for_any_size(export, swapped, fpn, batch):
    model = tiny(fpn=fpn, swapped=swapped)
    run = export(model, batch_size=batch)
    for size in SIZES:
        if swapped or min(size) >= 32:  # below, the graph of a stock model tells other strides, as the model would
            assert min(assert_detects_alike(run, model, noise(*size, batch=batch))) > 5


class Unresized(GeneralizedRCNNTransform):
    def resize(self, image, target=None):
        return image, target


def test_thin_images_have_the_strides_of_ordinary_ones(export):
    """Against the stock model, which tells its strides from the first image that it sees: here an ordinary one."""
    stock, model = tiny(swapped=False), tiny()
    for one in (stock, model):
        one.transform = Unresized(64, 64, [0.5] * 3, [0.25] * 3)
    detections(stock, noise(64, 64))
    run = export(model, example_size=(64, 96))
    found = [
        assert_detects_alike(run, stock, noise(*size))[0]
        for size in [(1, 1), (3, 70), (20, 128), (22, 22), (33, 45), (40, 600), (66, 66), (67, 5), (1333, 12), (90, 90)]
    ]
    assert min(found[2:]) > 5


@pytest.mark.parametrize(
    ("kind", "own"), [("box", set()), ("mask", {"Loop", "Resize"}), ("keypoint", {"Loop", "Resize", "ArgMax"})]
)
def test_standard_operators_only_grid_sample_among_them(export, kind, own):
    run = export(swap_crop_head(tiny(kind), sampler="gather"))
    graph = onnx.load(run.path)
    assert {opset.domain for opset in graph.opset_import} == {""}
    assert not graph.functions
    operators = set()

    def collect(nodes):
        for node in nodes:
            assert node.domain == ""
            operators.add(node.op_type)
            for attribute in node.attribute:
                collect(attribute.g.node)

    collect(graph.graph.node)
    assert {"GridSample", "NonMaxSuppression", "If"} | own <= operators
    assert "RoiAlign" not in operators


@pytest.mark.parametrize(
    ("canonical_scale", "used", "batch"), [(1, [2], 1), (10**6, [0], 2), (20, [0, 1], 1), (6, [0, 1, 2], 2)]
)
def test_levels_without_rois(export, monkeypatch, canonical_scale, used, batch):
    model = tiny()
    model.roi_heads.box_roi_pool.canonical_scale = canonical_scale
    run = export(model, batch_size=batch)
    levels = []

    class Spy(detector.crop.pyramid.LevelMapper):
        def __call__(self, boxlists):
            levels.append(super().__call__(boxlists))
            return levels[-1]

    monkeypatch.setattr(detector.crop.pyramid, "LevelMapper", Spy)
    assert min(assert_detects_alike(run, model, noise(60, 50, batch=batch))) > 5
    assert torch.cat(levels).unique().tolist() == used


@pytest.mark.parametrize("fpn", [True, False])
def test_no_detections(export, fpn):
    model = tiny(fpn=fpn, box_score_thresh=0.999)
    run = export(model)
    for size in SIZES[1:3]:
        assert assert_detects_alike(run, model, noise(*size)) == [0]


def test_one_image_of_two_without_detections(export):
    model = tiny()
    images = noise(52, 60, batch=2)
    first, second = (float(found["scores"].max()) for found in detections(model, images))
    model.roi_heads.score_thresh = (first + second) / 2
    run = export(model, batch_size=2)
    counts = assert_detects_alike(run, model, images)
    assert min(counts) == 0
    assert max(counts) > 0
    assert assert_detects_alike(run, model, images.flip(0)) == counts[::-1]


@pytest.mark.parametrize(("fpn", "batch"), [(True, 1), (False, 2)])
def test_no_proposals(export, fpn, batch):
    model = tiny(fpn=fpn)
    images = noise(52, 60, batch=batch)
    model.rpn.score_thresh = 1.1
    run = export(model, batch_size=batch)
    assert assert_detects_alike(run, model, images) == [0] * batch


def test_another_number_of_proposals_than_the_examples(export, monkeypatch):
    model = tiny(fpn=False, rpn_score_thresh=0.5)
    run = export(model)
    counts = set()
    pooled = type(model.roi_heads.box_roi_pool).forward

    def counting(pool, x, boxes, image_shapes):
        counts.add(len(boxes[0]))
        return pooled(pool, x, boxes, image_shapes)

    monkeypatch.setattr(MultiScaleAffineCrop, "forward", counting)
    for size in [(64, 64), (48, 40), (64, 12), (30, 64)]:
        assert_detects_alike(run, model, noise(*size))
    assert len(counts) > 1


@pytest.mark.parametrize("opset", [16, 20])
def test_opsets(export, opset):
    model = tiny()
    run = export(model, opset=opset)
    assert onnx.load(run.path).opset_import[0].version == opset
    assert_detects_alike(run, model, noise(48, 40))


def test_the_example_leaves_no_trace(export):
    """Of its size, its RoIs on levels, or that none of them was left."""
    model = tiny()
    run = export(model, example_size=(9, 90))
    for size in SIZES[::2]:
        assert_detects_alike(run, model, noise(*size))


def test_the_model_is_left_as_it_is(export):
    model = tiny()
    before, parts = dict(model.roi_heads.__dict__), dict(model.named_modules())
    export(model, batch_size=2)
    assert dict(model.roi_heads.__dict__) == before
    assert dict(model.named_modules()) == parts
    assert type(model.transform).__name__ == "GeneralizedRCNNTransform"
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("kind", PARTS)
def test_metadata_tells_what_the_outputs_are(export, kind):
    graph = onnx.load(export(tiny(kind)).path)
    (outputs,) = (json.loads(p.value) for p in graph.metadata_props if p.key == "outputs")
    assert list(outputs) == [output.name for output in graph.graph.output] == [*FIELDS, *PARTS[kind]]
    assert all(outputs.values())


def test_metadata(export):
    run = export(tiny(), class_names=["red", "ÿ"], category_ids=[7, 3])
    metadata = {p.key: json.loads(p.value) for p in onnx.load(run.path).metadata_props}
    assert metadata["classes"] == [
        {"label": 1, "name": "red", "category_id": 7},
        {"label": 2, "name": "ÿ", "category_id": 3},
    ]
    assert metadata["input"]["colors"] == "RGB"
    assert metadata["input"]["range"] == [0, 1]


def test_nothing_is_printed(export, capfd, recwarn):
    export(tiny())
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_speed(export):
    model = tiny()
    run = export(model)
    times = compare_speed(model, run.path, (40, 50), repeats=2)
    assert times["ratio"] == times["onnxruntime"] / times["pytorch"]
    assert times["pytorch"] > 0


# --- Masks and keypoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("swapped", [True, slow(False)])
@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_masks_and_key_points_equal_pytorchs_for_any_size(export, kind, swapped, batch):
    model = tiny(kind, swapped=swapped)
    run = export(model, batch_size=batch)
    for size in SIZES:
        if swapped or min(size) >= 32:
            images = noise(*size, batch=batch)
            assert min(assert_detects_alike(run, model, images)) > 5
    masks = detections(model, images)[0].get("masks")
    assert masks is None or 0.1 < (masks > 0.5).sum() / (masks > 0).sum() < 0.9  # in boxes some is object, some is not


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("swapped", [True, slow(False)])
@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_masks_and_key_points_of_no_detections(export, kind, swapped, batch):
    model = tiny(kind, swapped=swapped, box_score_thresh=0.999)
    run = export(model, batch_size=batch)
    assert assert_detects_alike(run, model, noise(48, 40, batch=batch)) == [0] * batch
    for found in run(noise(48, 40, batch=batch)):
        shapes = {"masks": (0, 1, 48, 40), "keypoints": (0, 2, 3), "keypoints_scores": (0, 2)}
        assert {name: tuple(found[name].shape) for name in PARTS[kind]} == {name: shapes[name] for name in PARTS[kind]}


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_masks_and_key_points_of_one_image_of_two(export, kind):
    model = tiny(kind)
    images = noise(52, 60, batch=2)
    first, second = (float(found["scores"].max()) for found in detections(model, images))
    model.roi_heads.score_thresh = (first + second) / 2
    run = export(model, batch_size=2)
    counts = assert_detects_alike(run, model, images)
    assert min(counts) == 0 < max(counts)
    assert assert_detects_alike(run, model, images.flip(0)) == counts[::-1]


def test_the_axes_of_masks_are_those_of_the_images(export):
    session = onnxruntime.InferenceSession(export(tiny("mask")).path, providers=["CPUExecutionProvider"])
    axes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert axes["images"] == [1, 3, "height", "width"]
    assert axes["masks"][0] == axes["boxes"][0] == "detections"
    assert axes["masks"][2:] == ["height", "width"]


@pytest.mark.parametrize("batch", [slow(1), 2])
@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_masks_and_key_points_of_refined_boxes(export, kind, batch):
    model = refined(tiny(kind), iterations=2)
    run = export(model, batch_size=batch)
    for size in SIZES[1::2]:
        images = noise(*size, batch=batch)
        assert min(assert_detects_alike(run, model, images)) > 5
        assert (moved_by(model, images) > 0.05).any()


class TracedAsAnother(nn.Module):
    """A module whose graph does something else."""

    def __init__(self, module, other):
        super().__init__()
        self.module, self.other = module, other

    def forward(self, x):
        return self.other(self.module(x)) if torch.jit.is_tracing() else self.module(x)


OTHER_MASKS = {
    "none": lambda logits: logits * 0 - 9,
    "the opposite": lambda logits: -logits,
    "moved": lambda logits: logits.roll(2, 3),
    "another class's": lambda logits: logits.flip(1) + 0.5,
}


@pytest.mark.parametrize("other", OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_a_graph_with_other_masks_is_not_written(tmp_path, other):
    model = tiny("mask")
    model.roi_heads.mask_predictor = TracedAsAnother(model.roi_heads.mask_predictor, other)
    with pytest.raises(ExportError, match="onnxruntime does not detect what PyTorch does"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


OTHER_KEYPOINTS = {
    "lower": lambda heatmaps: heatmaps - 0.1,
    "swapped": lambda heatmaps: heatmaps.flip(1),
    "mirrored": lambda heatmaps: heatmaps.flip(3),
}


@pytest.mark.parametrize("other", OTHER_KEYPOINTS.values(), ids=OTHER_KEYPOINTS)
def test_a_graph_with_other_key_points_is_not_written(tmp_path, other):
    model = tiny("keypoint")
    model.roi_heads.keypoint_predictor = TracedAsAnother(model.roi_heads.keypoint_predictor, other)
    with pytest.raises(ExportError, match="onnxruntime does not detect what PyTorch does"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("builder", [maskrcnn_resnet50_fpn, keypointrcnn_resnet50_fpn])
def test_torchvisions_own_mask_and_keypoint_rcnn(tmp_path, builder, swapped):
    torch.manual_seed(0)
    few = {"min_size": 128, "max_size": 192, "box_score_thresh": 0.0, "box_detections_per_img": 30}
    model = builder(weights=None, weights_backbone=None, **few).eval()
    if swapped:
        swap_crop_head(model)
    path = tmp_path / "model.onnx"
    assert export_onnx(model, path).compared
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = noise(140, 210)
    (wanted,) = detections(model, images)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))
    assert found.keys() == wanted.keys()
    same = (found["boxes"][:, None] - wanted["boxes"]).abs().amax(2) < 0.05
    same &= found["labels"][:, None] == wanted["labels"]
    assert len(same) == 30
    assert same.any(0).sum() >= 27
    pairs = same.nonzero().tolist()
    if "masks" in wanted:
        one, other = ((result["masks"] > 0.5).flatten(1) for result in (found, wanted))
        unions = [int((one[i] | other[j]).sum()) for i, j in pairs]
        common = [int((one[i] & other[j]).sum()) for i, j in pairs]
        assert sum(unions) > 100
        assert sum(common) > 0.95 * sum(unions)
    else:
        apart = torch.cat([(found["keypoints"][i] - wanted["keypoints"][j]).abs().amax(1) for i, j in pairs])
        assert len(apart) >= 27 * 17
        assert (apart < 0.05).float().mean() > 0.95


# --- Refinements ---------------------------------------------------------------------------------------------------


def moved_by(model, images):
    """How far the refinement moves each detection, in pixels."""
    after = detections(model, images)
    model.roi_heads.refinement.enabled = False
    before = detections(model, images)
    model.roi_heads.refinement.enabled = True
    return torch.cat([(a["boxes"] - b["boxes"]).abs().amax(1) for a, b in zip(after, before, strict=True)])


@pytest.mark.parametrize(
    ("swapped", "fpn", "batch", "iterations"),
    [slow(True, True, 1, 2), (True, True, 2, 1), (True, False, 1, 3), (False, True, 1, 2)],
)
def test_refinement_iterations_are_in_the_graph(export, swapped, fpn, batch, iterations):
    model = refined(tiny(fpn=fpn, swapped=swapped), iterations=iterations)
    run = export(model, batch_size=batch)
    for size in SIZES:
        if swapped or min(size) >= 32:
            images = noise(*size, batch=batch)
            assert min(assert_detects_alike(run, model, images)) > 5
            assert (moved_by(model, images) > 0.05).any()


def test_only_detections_that_matter_are_refined_whatever_the_examples(export):
    """Those above a score, and so many of them: neither number is the example's."""
    model = tiny()
    images = noise(52, 60, batch=2)
    scores = [found["scores"] for found in detections(model, images)]
    threshold = float(scores[0][4] + scores[0][5]) / 2
    refined(model, score_threshold=threshold, boxes_per_image=7)
    moved = moved_by(model, images[:1]) > 0
    assert moved[:5].any()  # not all: where the expected fit falls, a box stays
    assert not moved[5:].any()
    run = export(model, batch_size=2)
    assert_detects_alike(run, model, images)
    refined(model, boxes_per_image=3)
    run = export(model, batch_size=2)
    assert_detects_alike(run, model, images)


@pytest.mark.parametrize(("limit", "batch"), [(0, 1), slow(1, 1), (1, 2), slow(3, 1)])
def test_few_detections_or_none_to_look_at_again(export, limit, batch):
    model = refined(tiny(box_score_thresh=0.0 if limit else 0.999, box_detections_per_img=max(limit, 1)))
    run = export(model, batch_size=batch)
    for size in SIZES[1:3]:
        assert assert_detects_alike(run, model, noise(*size, batch=batch)) == [limit] * batch


@pytest.mark.parametrize(("limit", "batch"), [slow(20, 1), (20, 2), slow(1, 1), (0, 1)])
def test_scores_weighted_by_the_fit_are_in_the_graph_and_in_order(export, limit, batch):
    model = tiny(box_score_thresh=0.0 if limit else 0.999, box_detections_per_img=max(limit, 1))
    images = noise(52, 60, batch=batch)
    before = detections(model, images)
    refined(model, iou_power=2.0, boxes_per_image=7)
    run = export(model, batch_size=batch)
    assert assert_detects_alike(run, model, images) == [limit] * batch
    after = run(images)
    for one, other in zip(before, after):
        moved = (one["scores"] != other["scores"]).sum()
        assert moved >= min(limit, 7)


def test_as_many_scores_are_weighted_as_are_high_enough(export):
    model = tiny()
    images = noise(52, 60)
    (before,) = detections(model, images)
    refined(model, iou_power=2.0, score_threshold=float(before["scores"][4] + before["scores"][5]) / 2)
    (after,) = detections(model, images)
    kept = torch.isin(before["scores"], after["scores"])
    assert not kept[:5].any()
    assert kept[5:].all()
    run = export(model)
    for size in SIZES:
        assert_detects_alike(run, model, noise(*size))
    assert_detects_alike(run, model, images)


def test_one_image_of_two_without_detections_to_look_at_again(export):
    model = tiny()
    images = noise(52, 60, batch=2)
    first, second = (float(found["scores"].max()) for found in detections(model, images))
    refined(model, score_threshold=(first + second) / 2)
    run = export(model, batch_size=2)
    assert_detects_alike(run, model, images)
    assert_detects_alike(run, model, images.flip(0))


def test_gradient_ascent_is_left_out(export):
    model = refined(tiny(), ascent_steps=5)
    config = model.roi_heads.refinement.config
    assert left_out(model)
    assert left_out(refined(tiny())) is None
    run = export(model)
    assert model.roi_heads.refinement.config is config
    assert_detects_alike(run, refined(tiny()), noise(48, 40))


def test_a_refinement_that_is_switched_off_is_not_in_the_graph(export):
    model = refined(tiny(), ascent_steps=5)
    model.roi_heads.refinement.enabled = False
    run = export(model)
    assert_detects_alike(run, tiny(), noise(48, 40))
    assert {i.name for i in onnx.load(run.path).graph.initializer} & {"score_threshold", "refinement_threshold"} == {
        "score_threshold"
    }


def test_a_refinement_whose_graph_does_something_else_is_not_written(tmp_path):
    """Though noise has no detection with the score from which on they are looked at again."""
    model = refined(tiny(), score_threshold=1.0)
    head = model.roi_heads.refinement.head
    head.trunk = Baked(head.trunk)
    with pytest.raises(ExportError, match="onnxruntime does not detect what PyTorch does"):
        export_onnx(model, tmp_path / "model.onnx")


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["onnx"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExportError, match=rf'package {missing} .*pip install "affine-crop-rcnn\[export\]"'):
        export_onnx(tiny(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def with_pool(kind, **settings):
    """A model that crops for its masks or keypoints in another way than for its boxes."""
    model = tiny(kind)
    setattr(model.roi_heads, f"{kind}_roi_pool", MultiScaleAffineCrop(["0", "1", "2"], 4, **settings))
    return model


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (lambda: nn.Linear(2, 2).eval(), {}, ExportError, "Linear cannot be exported: it must be one of torchvision's"),
        (
            lambda: retinanet_resnet50_fpn(weights=None, weights_backbone=None).eval(),
            {},
            ExportError,
            "RetinaNet cannot be exported",
        ),
        (lambda: tiny().train(), {}, ExportError, r"model\.eval\(\)"),
        (lambda: tiny().double(), {}, ExportError, "float64 on cpu"),
        (
            lambda: tiny(box_roi_pool=MultiScaleAffineCrop(["0", "1", "2"], 3, 0)),
            {},
            ExportError,
            "^the RoI pool takes .*sampling_ratio 0 or less",
        ),
        (
            lambda: with_pool("keypoint", sampling_ratio=0),
            {},
            ExportError,
            "^the keypoints' RoI pool takes .*sampling_ratio 0 or less",
        ),
        (tiny, {"batch_size": 0}, ValueError, "batch_size"),
        (tiny, {"opset": 15}, ValueError, "opset must be 16 to 20, got 15"),
        (tiny, {"class_names": ["one"]}, ValueError, "class_names must be 2"),
        (tiny, {"category_ids": [1, 2, 3]}, ValueError, "category_ids must be 2"),
    ],
    ids=[
        "module",
        "retinanet",
        "training",
        "double",
        "adaptive",
        "adaptive points",
        "batch",
        "opset",
        "names",
        "ids",
    ],
)
def test_refusals(tmp_path, model, settings, error, message):
    with pytest.raises(error, match=message):
        export_onnx(model(), tmp_path / "model.onnx", **settings)
    assert not list(tmp_path.iterdir())


class Baked(nn.Module):
    """A box head that makes a constant of a value, as tracing does unnoticed."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, crops):
        return self.head(crops) * float(crops.mean()) * 10


def test_a_graph_that_detects_something_else_is_not_written(tmp_path):
    model = tiny()
    model.roi_heads.box_head = Baked(model.roi_heads.box_head)
    (tmp_path / "model.onnx").write_bytes(b"before")
    with pytest.raises(ExportError, match="onnxruntime does not detect what PyTorch does: for an image of 52 x 67, "):
        export_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_model_that_cannot_be_traced(tmp_path):
    model = tiny()
    model.roi_heads.box_head = nn.Sequential(model.roi_heads.box_head, Untraceable())
    with pytest.raises(ExportError, match=r"FasterRCNN cannot be exported to ONNX: .*lgamma"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Untraceable(nn.Module):
    def forward(self, features):
        return torch.lgamma(features)


# --- torch.export ----------------------------------------------------------------------------------------------------


def saved(program):
    content = io.BytesIO()
    torch.export.save(program, content)
    content.seek(0)
    return torch.export.load(content).module()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_torch_export_of_the_crop(form):
    def inputs(size, counts, seed):
        maps = torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(seed))
        boxes = [boxes_of_side([10.0] * n, seed + i, torch.float32) for i, n in enumerate(counts)]
        if form == "list":
            return maps, boxes
        index = torch.cat([torch.full((n, 1), float(i)) for i, n in enumerate(counts)])
        return maps, torch.cat([index, torch.cat(boxes)], 1)

    dynamic = [{0: Dim.DYNAMIC}] * 2 if form == "list" else {0: Dim.DYNAMIC}
    shapes = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, dynamic)
    module = saved(torch.export.export(AffineCrop((2, 3), 0.5, 2), inputs((20, 30), (3, 5), 0), dynamic_shapes=shapes))
    for size, counts in [((20, 30), (3, 5)), ((33, 9), (7, 2)), ((40, 41), (0, 4)), ((8, 8), (1, 0)), ((9, 9), (0, 0))]:
        arguments = inputs(size, counts, 1)
        expected = roi_align(*arguments, (2, 3), 0.5, 2)
        torch.testing.assert_close(module(*arguments), expected, rtol=0, atol=1e-4)
        assert len(expected) == sum(counts)


class PoolOfImages(nn.Module):
    """The pool with the sizes of its images out of a tensor, so that they are not constants."""

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
    module = saved(torch.export.export(pooler, example, dynamic_shapes=shapes))
    for size, sides in [
        ((128, 160), (LEVEL_SIDES, LEVEL_SIDES[:3])),
        ((192, 96), ([20.0] * 4, LEVEL_SIDES)),  # no image has a RoI on every level
        ((96, 224), ([18.0], [18.0, 20.0])),  # all on the finest level
        ((160, 160), ([], [80.0])),
    ]:
        arguments = inputs(size, sides)
        expected = PoolOfImages(MultiScaleRoIAlign(list(STRIDES), 3, 2, **SMALL))(*arguments)
        torch.testing.assert_close(module(*arguments), expected, rtol=0, atol=1e-4)


def test_every_image_is_compared_by_several_detections():
    """Of a trained detector one score may stand far above the others: a gap that is no place for a threshold."""

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
    found, thresholds = _detect(model, torch.zeros(2, 3, 4, 4))
    assert all(len(image["scores"]) >= 10 for image in found)
    assert model.roi_heads.score_thresh == 0.5
    assert 0 < thresholds["score_threshold"] < 0.05


def test_without_onnxruntime_nothing_is_compared_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export_onnx(tiny(), tmp_path / "model.onnx").compared is False
    monkeypatch.undo()
    assert export_onnx(tiny(), tmp_path / "model.onnx").compared is True
