"""The choice of a sampler, and what is particular to the gather.

That both samplers give roi_align's values, and the right gradients, for any box is in test_crop and test_pooler.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crops import both_samplers, general_boxes, randn
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from support.tiny_models import batch, copies, tiny_rcnn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import MultiScaleRoIAlign, roi_align

import detector.crop.crop
import detector.crop.gather_sampler
from detector import AffineCrop, MultiScaleAffineCrop, affine_crop, restore_roi_align, swap_crop_head

NAMES = list(STRIDES)
SIZE = (120, 150)  # of the image of a pyramid
both_ratios = pytest.mark.parametrize("ratio", [-1, 2])
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def levels(channels=2, images=1, dtype=torch.float64):
    """A pyramid of four levels in channels_last, leaves that require a gradient, by name."""
    maps = pyramid(images, SIZE, channels, dtype)
    return {name: channels_last(source).requires_grad_() for name, source in maps.items()}


def pool(ratio=2, sampler="gather", **settings):
    return MultiScaleAffineCrop(NAMES, settings.pop("output_size", 3), ratio, **SMALL, sampler=sampler, **settings)


def stock_pool(ratio=2, output_size=3):
    return MultiScaleRoIAlign(NAMES, output_size, ratio, **SMALL)


def slopes(crop, corners, upstream, step=1e-6):
    """The gradient at boxes [K, 4] that finite differences of an operator give, of which RoI k is its result k."""
    sides = []
    for side in range(4):
        moved = torch.zeros(4, dtype=corners.dtype)
        moved[side] = step
        sides.append(((crop(corners + moved) - crop(corners - moved)) * upstream).sum((1, 2, 3)) / (2 * step))
    return torch.stack(sides, 1)


@pytest.fixture
def taken(monkeypatch):
    """The samplers that were called, in their order."""
    calls = []

    def record(name, original):
        def sampler(*args):
            calls.append(name)
            return original(*args)

        return sampler

    monkeypatch.setattr(detector.crop.crop, "crop_by_gather", record("gather", detector.crop.crop.crop_by_gather))
    monkeypatch.setattr(detector.crop.crop, "crop_by_grid", record("grid_sample", detector.crop.crop.crop_by_grid))
    return calls


@pytest.fixture
def bags(monkeypatch):
    """Every call of embedding_bag: its rows, weights, table, result's size, and whether it summed for a map."""
    calls = []
    original = F.embedding_bag

    def embedding_bag(input, weight, offsets=None, **kwargs):
        result = original(input, weight, offsets, **kwargs)
        weights = kwargs["per_sample_weights"].detach()
        calls.append(
            {"rows": input, "weights": weights, "table": weight, "result": result.numel(), "map": offsets is not None}
        )
        return result

    monkeypatch.setattr(F, "embedding_bag", embedding_bag)
    return calls


# --- What "auto" takes -----------------------------------------------------------------------------------------------


@both_ratios
@both_layouts
@pytest.mark.parametrize(("channels", "sampler"), [(3, "grid_sample"), (31, "grid_sample"), (32, "gather")])
def test_auto_goes_by_the_channels(taken, channels, sampler, layout, ratio):
    features = randn(1, channels, 8, 9).contiguous(memory_format=layout)
    result = affine_crop(features, [general_boxes(5, (8, 9))], 5, 1.0, ratio)
    assert taken == [sampler]
    torch.testing.assert_close(result, roi_align(features, [general_boxes(5, (8, 9))], 5, 1.0, ratio))


@pytest.mark.parametrize(
    ("output_size", "ratio", "sampler"),
    [
        ((2, 3), 1, "grid_sample"),
        ((5, 7), 1, "grid_sample"),  # 35 samples, and 72 pixels would be copied
        ((5, 7), -1, "grid_sample"),  # of adaptive samples only the bins are known
        ((6, 6), 1, "gather"),
        ((6, 6), -1, "gather"),
        ((3, 3), 2, "gather"),
    ],
)
def test_auto_copies_no_large_map_for_few_samples(taken, output_size, ratio, sampler):
    features, boxes = randn(1, 32, 8, 9), [general_boxes(1, (8, 9))]
    affine_crop(features, boxes, output_size, 1.0, ratio)
    affine_crop(channels_last(features), boxes, output_size, 1.0, ratio)  # would not be copied
    assert taken == [sampler, "gather"]


def test_auto_counts_the_pixels_of_every_image_and_the_samples_of_every_box(taken):
    features, box = randn(3, 32, 8, 9), general_boxes(1, (8, 9))
    affine_crop(features, [box], 6, 1.0, 1)
    affine_crop(features, [box] * 3, 6, 1.0, 1)
    assert taken == ["grid_sample", "gather"]


@pytest.mark.parametrize(("copied", "sampler"), [("0", "grid_sample"), ("123", "gather")])
def test_auto_counts_the_levels_that_would_be_copied(taken, copied, sampler):
    # 1,280 pixels on level 0, and 420 on the others together, for 432 samples.
    features = {name: f if name in copied else channels_last(f) for name, f in pyramid(1, SIZE, 32).items()}
    result = pool(2, "auto")(features, [boxes_of_side(LEVEL_SIDES + LEVEL_SIDES[:4])], [SIZE])
    assert result.shape[0] * 9 * 4 == 432
    assert taken == [sampler]


@pytest.mark.parametrize("sampler", ["auto", "grid_sample", "gather"])
def test_the_sampler_that_is_named_is_taken(taken, sampler):
    boxes = boxes_of_side(LEVEL_SIDES)
    for channels in (3, 64):
        features = channels_last(randn(1, channels, 8, 9))
        affine_crop(features, [boxes], 3, 0.125, 2, sampler=sampler)
        AffineCrop(3, 0.125, 2, sampler=sampler)(features, [boxes])
        pool(2, sampler)(levels(channels), [boxes], [SIZE])
    assert taken == (["grid_sample"] * 3 + ["gather"] * 3 if sampler == "auto" else [sampler] * 6)


def test_auto_can_be_exported_to_onnx(taken, monkeypatch):
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    affine_crop(channels_last(randn(1, 64, 8, 9)), [general_boxes(5, (8, 9))], 3, 1.0, 2)
    assert taken == ["grid_sample"]


@pytest.mark.parametrize(
    "call",
    [
        lambda sampler: affine_crop(torch.zeros(1, 1, 4, 4), [torch.zeros(1, 4)], 2, sampler=sampler),
        lambda sampler: AffineCrop(2, sampler=sampler),
        lambda sampler: MultiScaleAffineCrop(["0"], 2, 2, sampler=sampler),
        lambda sampler: swap_crop_head(tiny_rcnn(), sampler=sampler),
    ],
    ids=["affine_crop", "AffineCrop", "MultiScaleAffineCrop", "swap_crop_head"],
)
@pytest.mark.parametrize("sampler", ["bilinear", ""])
def test_another_name_is_an_error(call, sampler):
    with pytest.raises(ValueError, match=f"sampler must be one of auto, grid_sample, gather, got {sampler!r}"):
        call(sampler)


def test_a_swap_that_is_refused_changes_nothing():
    model = tiny_rcnn("mask")
    with pytest.raises(ValueError, match="sampler"):
        swap_crop_head(model, sampler="nearest")
    assert type(model.roi_heads.box_roi_pool) is type(model.roi_heads.mask_roi_pool) is MultiScaleRoIAlign


# --- torch.compile and torch.export ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same_with_gradients(result, expected, inputs, tolerance):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    gradients, wanted = (torch.autograd.grad(crops, inputs, upstream) for crops in (result, expected))
    torch.testing.assert_close(gradients, wanted, rtol=tolerance, atol=tolerance)
    assert all(gradient.any() for gradient in wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@both_layouts
def test_auto_compiles_into_one_graph(layout):
    features = randn(2, 64, 8, 9).contiguous(memory_format=layout).requires_grad_()
    boxes = [general_boxes(n, (16, 18), seed=n).requires_grad_() for n in (2, 3)]
    compiled = torch.compile(affine_crop, fullgraph=True, backend="aot_eager")
    expected = affine_crop(features, boxes, (2, 3), 0.5, 2, sampler="gather")
    assert_same_with_gradients(compiled(features, boxes, (2, 3), 0.5, 2), expected, [features, *boxes], 1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_auto_compiles_a_pyramid_into_one_graph():
    features = levels(32)
    boxes = [boxes_of_side(LEVEL_SIDES).requires_grad_()]
    module = pool(2, "auto")
    expected = pool(2, "gather")(features, boxes, [SIZE])
    result = torch.compile(module, fullgraph=True, backend="aot_eager")(features, boxes, [SIZE])
    assert_same_with_gradients(result, expected, [*features.values(), *boxes], 1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_gather_runs_outside_of_the_graph(bags):
    features = channels_last(randn(2, 64, 8, 9)).requires_grad_()
    boxes = [general_boxes(n, (16, 18), seed=n).requires_grad_() for n in (2, 3)]
    expected = affine_crop(features, boxes, (2, 3), 0.5, 2, sampler="grid_sample")
    assert not bags
    result = torch.compile(affine_crop, backend="aot_eager")(features, boxes, (2, 3), 0.5, 2, sampler="gather")
    assert bags
    assert_same_with_gradients(result, expected, [features, *boxes], 1e-10)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(affine_crop, fullgraph=True, backend="aot_eager")(features, boxes, 2, 0.5, 2, sampler="gather")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@both_ratios
def test_gather_compiled_on_a_pyramid(bags, ratio):
    features, boxes = levels(32), [boxes_of_side(LEVEL_SIDES).requires_grad_()]
    expected = pool(ratio, "grid_sample")(features, boxes, [SIZE])
    assert not bags
    result = torch.compile(pool(ratio, "gather"), backend="aot_eager")(features, boxes, [SIZE])
    assert bags
    assert_same_with_gradients(result, expected, [*features.values(), *boxes], 1e-10)


@pytest.mark.usefixtures("fresh_compiler")
def test_gather_under_compile_a_bad_roi_is_nan_and_harms_no_other():
    features = channels_last(randn(1, 32, 8, 9)).requires_grad_()
    corners = general_boxes(5, (8, 9))
    expected = roi_align(features, [corners[[0, 2, 4]]], 2, 1.0, 2)
    corners[1, 0], corners[3, 2] = torch.nan, torch.inf
    corners.requires_grad_()
    result = torch.compile(affine_crop, backend="aot_eager")(features, [corners], 2, 1.0, 2, sampler="gather")
    assert result[[1, 3]].isnan().all()
    torch.testing.assert_close(result[[0, 2, 4]], expected, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(result[[0, 2, 4]].sum(), [features, corners])
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected.sum(), features)[0], rtol=0, atol=1e-10)
    assert torch.equal(gradients[1][[1, 3]], torch.zeros(2, 4, dtype=torch.float64))
    assert gradients[1].isfinite().all()


@pytest.mark.parametrize("form", ["list", "tensor"])
def test_auto_is_exported_as_grid_sample(form):
    features, corners = channels_last(randn(2, 64, 8, 9)), general_boxes(5, (16, 18))
    index = torch.tensor([0.0, 0, 1, 1, 1], dtype=torch.float64)[:, None]
    boxes = [corners[:2], corners[2:]] if form == "list" else torch.cat([index, corners], 1)
    program = torch.export.export(AffineCrop((2, 3), 0.5, 2), (features, boxes))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("grid_sampler" in name for name in operators)
    assert all(name.startswith("aten.") or "getitem" in name for name in operators), operators
    assert not any("embedding_bag" in name for name in operators)
    expected = roi_align(features, boxes, (2, 3), 0.5, 2)
    torch.testing.assert_close(program.module()(features, boxes), expected, rtol=0, atol=1e-10)


# --- The same to the last bit ----------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills what is allocated without a value with NaN
    yield
    torch.use_deterministic_algorithms(before)


def assert_runs_are_equal(device, channels, maps, ratio, sampler):
    wide = {name: source.detach().to(device).requires_grad_() for name, source in levels(channels, 2).items()}
    features = {name: wide[name] for name in NAMES[:maps]}
    # Boxes that overlap, so that many bins add to one pixel.
    boxes = [boxes_of_side(LEVEL_SIDES * 4, seed).to(device).requires_grad_() for seed in range(2)]
    crop = pool(ratio, sampler)
    inputs = [*features.values(), *boxes]
    upstream = randn(64, channels, 3, 3).to(device)
    runs = []
    for _ in range(2):
        result = crop(features, boxes, [SIZE] * 2)
        runs.append([result, *torch.autograd.grad(result, inputs, upstream)])
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all()
        assert first.any()
        assert torch.equal(first, second)


@pytest.mark.usefixtures("deterministic")
@both_ratios
@pytest.mark.parametrize("maps", [1, 4])
@pytest.mark.parametrize("channels", [3, 64])
def test_gather_is_deterministic(channels, maps, ratio):
    assert_runs_are_equal("cpu", channels, maps, ratio, "gather")


# --- What is read, and written ---------------------------------------------------------------------------------------


def test_a_map_in_channels_last_is_read_where_it_lies(bags):
    features, boxes = levels(32), [boxes_of_side(LEVEL_SIDES).requires_grad_()]
    result = pool()(features, boxes, [SIZE])
    own = {source.data_ptr() for source in features.values()}
    assert {call["table"].data_ptr() for call in bags} == own
    forward = len(bags)
    torch.autograd.grad(result.sum(), boxes)
    backward = [call for call in bags[forward:] if not call["map"]]  # for the boxes' gradient
    assert {call["table"].data_ptr() for call in backward} == own


def test_the_rows_of_an_nchw_map_are_contiguous(bags):
    # Of a single image they would be a view, which embedding_bag reads by a path that is many times slower.
    for images in (1, 2):
        affine_crop(randn(images, 32, 8, 9), [general_boxes(5, (8, 9))] * images, 3, 1.0, 2, sampler="gather")
    assert len(bags) == 2
    assert all(call["table"].is_contiguous() for call in bags)


class LargestResult(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 8 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize(("sampler", "all_samples"), [("gather", False), ("grid_sample", True)])
@pytest.mark.parametrize("ratio", [-1, 4])
def test_gather_writes_no_samples(ratio, sampler, all_samples):
    features = channels_last(randn(1, 64, 24, 24)).requires_grad_()
    # 15 pixels wide and high, in 4 x 4 bins: 16 samples each, also adaptively.
    corners = (torch.arange(20.0)[:, None] / 4 + torch.tensor([0.3, 0.6, 15.3, 15.6])).double().requires_grad_()
    with LargestResult() as largest:
        crops = affine_crop(features, [corners], 4, 1.0, ratio, sampler=sampler)
        torch.autograd.grad(crops.square().sum(), [features, corners])
    samples = 16 * crops.numel()
    assert (largest.numel >= samples) == all_samples
    if sampler == "gather":
        assert largest.numel <= 2 * max(crops.numel(), features.numel())


@both_ratios
def test_gather_reads_in_chunks(monkeypatch, bags, ratio):
    monkeypatch.setattr(detector.crop.gather_sampler, "MAX_PIXELS_READ_CPU", 2**12)
    monkeypatch.setattr(detector.crop.gather_sampler, "MAX_PIXELS_SORTED", 2**14)
    features = channels_last(randn(1, 64, 24, 24)).requires_grad_()
    corners = general_boxes(60, (24, 24)).requires_grad_()
    crops = affine_crop(features, [corners], 4, 1.0, ratio, sampler="gather")
    torch.autograd.grad(crops.sum(), [features, corners])
    reads, sorts = ([call for call in bags if call["map"] == of_map] for of_map in (False, True))
    assert 2**11 < max(call["rows"].numel() for call in reads) <= 2**12
    assert max(call["result"] for call in reads) < crops.numel() / 3
    assert 2**13 < max(call["rows"].numel() for call in sorts) <= 2**14


def run_in_chunks(bags, ratio, several):
    """Results and gradients, and the numbers of calls that read maps and that summed for them."""
    features = levels(3, 2)
    if not several:
        features = {"1": features["1"]}
    boxes = [boxes_of_side(sides, seed).requires_grad_() for seed, sides in enumerate([LEVEL_SIDES * 15, [20, 90]])]
    bags.clear()
    result = pool(ratio, output_size=(3, 2))(features, boxes, [SIZE] * 2)
    inputs = [*features.values(), *boxes]
    results = [result, *torch.autograd.grad(result, inputs, randn(*result.shape))]
    return results, sum(not call["map"] for call in bags), sum(call["map"] for call in bags)


@both_ratios
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("limit", [1, 50, 1000])
@pytest.mark.parametrize("name", ["MAX_PIXELS_READ_CPU", "MAX_PIXELS_SORTED"])
def test_chunks_change_nothing(monkeypatch, bags, name, limit, several, ratio):
    expected, reads, sums = run_in_chunks(bags, ratio, several)
    monkeypatch.setattr(detector.crop.gather_sampler, name, limit)
    results, more_reads, more_sums = run_in_chunks(bags, ratio, several)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-11)
    if name == "MAX_PIXELS_SORTED":
        assert more_reads == reads
        assert more_sums > sums
        if limit == 1:
            assert more_sums == 122  # an RoI each
    else:
        assert more_reads > reads
        assert more_sums == sums
        if limit == 1:
            assert more_reads == 2 * 122  # forward, and for the boxes' gradient


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 4])
def test_a_pixel_is_read_once_for_a_bin(bags, ratio, aligned):
    features, boxes = randn(1, 3, 40, 40), general_boxes(12, (20, 20)) + 4
    expected = roi_align(features, [boxes], 5, 1.0, ratio, aligned)
    result = affine_crop(features, [boxes], 5, 1.0, ratio, aligned, sampler="gather")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    for call in bags:
        for rows, weights in zip(call["rows"], call["weights"], strict=True):
            read = rows[weights != 0]
            assert len(read.unique()) == len(read)
    # Two taps a sample would be this many; adaptively a box has ceil(side / 5) samples in a bin.
    sides = boxes[:, 2:] - boxes[:, :2]
    samples = (sides / 5).ceil().clamp(min=1) if ratio < 0 else torch.full_like(sides, ratio)
    two_taps = 25 * (2 * samples).prod(1).sum()
    assert sum(call["rows"].numel() for call in bags) < 0.8 * two_taps


@pytest.mark.parametrize("ratio", [1, 2])
def test_samples_far_apart_have_two_taps_each(bags, ratio):
    features = randn(1, 3, 60, 60)
    boxes = torch.tensor([[2.3, 3.1, 55.2, 51.7], [1.2, 9.8, 50.6, 57.1]], dtype=torch.float64)
    result = affine_crop(features, [boxes], 3, 1.0, ratio, sampler="gather")
    torch.testing.assert_close(result, roi_align(features, [boxes], 3, 1.0, ratio), rtol=0, atol=1e-10)
    assert sum(call["rows"].numel() for call in bags) == 2 * 9 * (2 * ratio) ** 2


# --- Layout ----------------------------------------------------------------------------------------------------------


@both_samplers
@both_layouts
@both_ratios
@pytest.mark.parametrize("several", [False, True])
def test_crops_are_contiguous(several, ratio, layout, sampler):
    maps = pyramid(2, SIZE, 32).items()
    features = {name: f.contiguous(memory_format=layout) for name, f in maps if several or name == "1"}
    boxes = [boxes_of_side(LEVEL_SIDES, seed) for seed in range(2)]
    result = pool(ratio, sampler)(features, boxes, [SIZE] * 2)
    assert result.is_contiguous()
    assert result.view(16, -1).shape == (16, 32 * 9)


@both_layouts
@both_ratios
@pytest.mark.parametrize("leaf", [False, True])
def test_a_maps_gradient_is_in_its_layout(leaf, ratio, layout):
    features = randn(2, 32, 8, 9).contiguous(memory_format=layout).requires_grad_()
    source = features if leaf else features * 2
    assert source.is_contiguous(memory_format=layout)
    boxes = [general_boxes(3, (8, 9), seed) for seed in range(2)]
    crops = affine_crop(source, boxes, 3, 1.0, ratio, sampler="gather")
    (gradient,) = torch.autograd.grad(crops.sum(), source)
    assert gradient.is_contiguous(memory_format=layout)


# --- Only the gradients that are needed ------------------------------------------------------------------------------


def refuse(*args):
    raise AssertionError("not needed")


@both_ratios
def test_no_gradient_of_maps_that_need_none(monkeypatch, bags, ratio):
    monkeypatch.setattr(detector.crop.gather_sampler, "_rows_gradient", refuse)
    features = {name: source.detach() for name, source in levels().items()}
    boxes = boxes_of_side(LEVEL_SIDES).requires_grad_()
    result = pool(ratio)(features, [boxes], [SIZE])
    upstream = randn(*result.shape)
    (gradient,) = torch.autograd.grad(result, boxes, upstream)
    expected = slopes(lambda corners: stock_pool(ratio)(features, [corners], [SIZE]), boxes.detach(), upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    assert not any(call["map"] for call in bags)


@both_ratios
def test_no_gradient_of_boxes_that_need_none(monkeypatch, bags, ratio):
    monkeypatch.setattr(detector.crop.gather_sampler, "_weight_gradients", refuse)
    features, boxes = levels(), [boxes_of_side(LEVEL_SIDES)]
    results = [crop(features, boxes, [SIZE]) for crop in (pool(ratio), stock_pool(ratio))]
    reads = len(bags)
    upstream = randn(*results[0].shape)
    gradients, expected = (torch.autograd.grad(result, list(features.values()), upstream) for result in results)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-10)
    assert len(bags) == reads + 4
    assert all(call["map"] for call in bags[reads:])


def test_nothing_needs_a_gradient():
    features = {name: source.detach() for name, source in levels().items()}
    assert not pool()(features, [boxes_of_side(LEVEL_SIDES)], [SIZE]).requires_grad


@both_samplers
@both_ratios
@pytest.mark.parametrize("frozen", NAMES)
def test_a_level_that_needs_no_gradient(bags, frozen, ratio, sampler):
    features, boxes = levels(), boxes_of_side(LEVEL_SIDES).requires_grad_()
    features[frozen] = features[frozen].detach()
    results = [crop(features, [boxes], [SIZE]) for crop in (pool(ratio, sampler), stock_pool(ratio))]
    others = [source for name, source in features.items() if name != frozen]
    upstream = randn(*results[0].shape)
    *gradients, box_gradient = torch.autograd.grad(results[0], [*others, boxes], upstream)
    expected = torch.autograd.grad(results[1], others, upstream)
    torch.testing.assert_close(tuple(gradients), expected, rtol=0, atol=1e-10)
    moved = slopes(lambda corners: stock_pool(ratio)(features, [corners], [SIZE]), boxes.detach(), upstream)
    torch.testing.assert_close(box_gradient, moved, rtol=1e-6, atol=1e-6)  # those on the frozen level as well
    assert sum(call["map"] for call in bags) == (3 if sampler == "gather" else 0)


@both_samplers
@both_ratios
def test_a_level_without_rois_has_a_gradient_of_zero(ratio, sampler):
    features, boxes = levels(32), [boxes_of_side([18, 80, 22]).requires_grad_()]
    result = pool(ratio, sampler)(features, boxes, [SIZE])
    gradients = torch.autograd.grad(result.sum(), list(features.values()))
    for gradient, (name, source) in zip(gradients, features.items(), strict=True):
        assert gradient.shape == source.shape
        assert gradient.dtype == source.dtype
        assert bool(gradient.any()) == (name in ("0", "2"))


# --- Second derivatives ----------------------------------------------------------------------------------------------


@both_ratios
@pytest.mark.parametrize("inputs", ["both", "maps", "boxes"])
def test_second_derivatives_through_a_pyramid(inputs, ratio):
    features = {name: source.requires_grad_(inputs != "boxes") for name, source in levels(32).items()}
    boxes = boxes_of_side(LEVEL_SIDES).requires_grad_(inputs != "maps")
    moved = [tensor for tensor in (*features.values(), boxes) if tensor.requires_grad]
    second = []
    for sampler in ("gather", "grid_sample"):
        crops = pool(ratio, sampler)(features, [boxes], [SIZE])
        first = torch.autograd.grad(crops.pow(3).sum(), moved, create_graph=True)
        total = sum((gradient * randn(*gradient.shape, seed=1)).sum() for gradient in first)
        second.append([*first, *torch.autograd.grad(total, moved)])
    assert len(second[0]) == 2 * len(moved)
    for result, expected in zip(*second, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
        assert expected.any()


# --- Mixed precision -------------------------------------------------------------------------------------------------


@both_ratios
def test_autocast_leaves_the_geometry_in_float32(monkeypatch, ratio):
    dtypes = []
    taps = detector.crop.gather_sampler.point_taps

    def record(position, *args):
        result = taps(position, *args)
        dtypes.extend([position.dtype, result.weight.dtype])
        return result

    monkeypatch.setattr(detector.crop.gather_sampler, "point_taps", record)
    conv = torch.nn.Conv2d(3, 32, 1)
    features = {name: source.detach().float() for name, source in levels(3).items()}
    boxes = [boxes_of_side(LEVEL_SIDES, dtype=torch.float32).requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = {name: conv(source) for name, source in features.items()}
        result = pool(ratio)(low, boxes, [SIZE])
        gradient, *_ = torch.autograd.grad(result.float().square().sum(), [boxes[0], *conv.parameters()])
    assert {source.dtype for source in low.values()} == {result.dtype} == {torch.bfloat16}
    assert set(dtypes) == {torch.float32}
    wide = {name: source.detach().float() for name, source in low.items()}
    expected = stock_pool(ratio)(wide, [boxes[0].detach()], [SIZE])
    torch.testing.assert_close(result.float(), expected, rtol=1e-2, atol=1e-4)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


# --- Modules ---------------------------------------------------------------------------------------------------------


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_a_copied_module_keeps_its_sampler(taken, duplicate):
    for sampler in ("gather", "grid_sample"):  # of which "auto" is one for 64 channels, and the other for 3
        for channels in (3, 64):
            crop, pyramid_crop = duplicate(AffineCrop(3, sampler=sampler)), duplicate(pool(2, sampler))
            assert crop.sampler == pyramid_crop.sampler == sampler
            crop(channels_last(randn(1, channels, 8, 9)), [general_boxes(5, (8, 9))])
            pyramid_crop(levels(channels), [boxes_of_side(LEVEL_SIDES)], [SIZE])
    assert taken == ["gather"] * 4 + ["grid_sample"] * 4


def pools(model):
    heads = model.roi_heads
    return [p for p in (heads.box_roi_pool, heads.mask_roi_pool, heads.keypoint_roi_pool) if p is not None]


@pytest.mark.parametrize(("kind", "number"), [("box", 1), ("mask", 2), ("keypoint", 2)])
def test_swap_sets_the_sampler_of_every_pool(kind, number):
    model = tiny_rcnn(kind)
    swap_crop_head(model, sampler="gather")
    assert [p.sampler for p in pools(model)] == ["gather"] * number
    swap_crop_head(model, sampler="grid_sample")
    assert [p.sampler for p in pools(model)] == ["grid_sample"] * number
    swap_crop_head(model)  # which says nothing of it
    assert [p.sampler for p in pools(model)] == ["grid_sample"] * number
    restore_roi_align(model)
    assert not any(hasattr(p, "sampler") or hasattr(p, "aligned") for p in pools(model))
    swap_crop_head(model)
    assert [p.sampler for p in pools(model)] == ["auto"] * number


def test_swap_keeps_the_sampler_that_a_pool_was_built_with():
    model = tiny_rcnn(box_roi_pool=MultiScaleAffineCrop(["0", "1", "2"], 3, 2, sampler="gather"))
    assert swap_crop_head(model).roi_heads.box_roi_pool.sampler == "gather"


def test_maps_must_be_alike():
    maps = levels(4, 2)
    maps["2"] = maps["2"][:1]
    for sampler in ("gather", "grid_sample"):
        with pytest.raises(ValueError, match=r"maps must have the same N and C .*\[1, 4, 8, 10\]"):
            pool(2, sampler)(maps, [boxes_of_side(LEVEL_SIDES)], [SIZE])


@pytest.mark.parametrize("channels", [3, 64])
def test_vmap_over_maps(channels):
    # Of 64 channels "auto" takes the gather, whose operators have no batching rules.
    maps, boxes = randn(3, 1, channels, 8, 9), [general_boxes(4, (8, 9))]
    result = torch.vmap(lambda source: affine_crop(source, boxes, 7, 1.0, 2))(maps)
    for source, crops in zip(maps, result, strict=True):
        torch.testing.assert_close(crops, roi_align(source, boxes, 7, 1.0, 2), rtol=0, atol=1e-10)


def test_an_roi_on_no_level_reads_nothing():
    features = {name: source.detach() for name, source in levels(32).items()}
    features["0"][:] = torch.nan
    boxes = boxes_of_side(LEVEL_SIDES)[[1, 2, 3]]
    boxes[1] = boxes[1, [2, 1, 0, 3]]  # a negative area
    result = pool()(features, [boxes.requires_grad_()], [SIZE])
    assert torch.equal(result[1], torch.zeros_like(result[1]))
    assert result.isfinite().all()
    (gradient,) = torch.autograd.grad(result.sum(), boxes)
    assert torch.equal(gradient[1], torch.zeros(4, dtype=torch.float64))
    assert gradient.isfinite().all()


def test_half_precision_maps_are_kept_as_they_are_for_the_backward():
    features = channels_last(torch.randn(1, 32, 20, 22)).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        affine_crop(features, [general_boxes(4, (20, 22), dtype=torch.float32)], 3, 1.0, 2, sampler="gather")
    assert not any(t.shape == features.shape and t.dtype == torch.float32 for t in kept)


def test_a_small_map_is_summed_for_in_batches(bags):
    """The crops' gradient is copied into rows for it, and must not take many times the map's memory."""
    features = channels_last(randn(1, 32, 6, 7)).requires_grad_()
    crops = affine_crop(features, [general_boxes(40, (6, 7))], 3, 1.0, 2, sampler="gather")
    (gradient,) = torch.autograd.grad(crops.sum(), features)
    tables = [len(call["table"]) for call in bags if call["map"]]
    assert max(tables) <= 6 * 7
    assert sum(tables) == 40 * 9
    (expected,) = torch.autograd.grad(roi_align(features, [general_boxes(40, (6, 7))], 3, 1.0, 2).sum(), features)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_detectors_train_alike_with_either_sampler(taken, kind):
    images, targets = batch()
    steps, chosen = [], []
    for sampler in ("gather", "grid_sample"):
        model = swap_crop_head(tiny_rcnn(kind), sampler=sampler).train()
        torch.manual_seed(1)
        losses = model(images, copies(targets))
        sum(losses.values()).backward()
        steps.append((losses, {name: p.grad for name, p in model.named_parameters()}))
        chosen.append(set(taken))
        taken.clear()
    assert chosen == [{"gather"}, {"grid_sample"}]
    (losses, gradients), (expected, wanted) = steps
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss > 0
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        # A bias before a softmax over all places has a gradient of 0, and of rounding errors.
        assert (gradient - wanted[name]).norm() <= 1e-3 * wanted[name].norm() + 1e-6, name


# --- The two against one another -------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """A pyramid of any levels and layout, boxes, and the other arguments of a pool."""
    images = draw(st.integers(1, 3))
    size = draw(st.tuples(st.integers(33, 160), st.integers(33, 160)))
    # Neighbouring levels, as a pooler has them.
    first = draw(st.integers(0, 3))
    names = NAMES[first : draw(st.integers(first + 1, 4))]
    seed = draw(st.integers(0, 1000))
    maps = pyramid(images, size, draw(st.sampled_from([1, 3, 33])))
    features = {name: maps[name] for name in names}
    for name in names:
        if draw(st.booleans()):
            features[name] = channels_last(features[name])
    generator = torch.Generator().manual_seed(seed)
    counts = [draw(st.integers(0, 6)) for _ in range(images)]
    sides = [(4.0 + 300 * torch.rand(count, generator=generator) ** 2).tolist() for count in counts]
    boxes = [boxes_of_side(s, seed + i) for i, s in enumerate(sides)]
    crop = {
        "output_size": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "ratio": draw(st.sampled_from([-1, 1, 2, 4])),
        "aligned": draw(st.booleans()),
    }
    return features, boxes, [size] * images, crop


@settings(deadline=None, derandomize=True, max_examples=100)
@given(calls())
def test_gather_equals_grid_sample(call):
    features, boxes, sizes, crop = call
    inputs = [tensor.requires_grad_() for tensor in (*features.values(), *boxes)]
    result, expected = (pool(sampler=sampler, **crop)(features, boxes, sizes) for sampler in ("gather", "grid_sample"))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    upstream = randn(*expected.shape, seed=1)
    gradients, wanted = (torch.autograd.grad(crops, inputs, upstream) for crops in (result, expected))
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-9)


# --- As on a GPU, without one ----------------------------------------------------------------------------------------


@both_ratios
@pytest.mark.parametrize("frozen", [None, "1"])
def test_one_table_of_all_levels(monkeypatch, bags, frozen, ratio):
    """On a GPU all maps are copied into one table, where the right map, image and row must be read."""
    features = levels(5, 3)
    if frozen:
        features[frozen] = features[frozen].detach()
    # Several on a level and image, none in one image, and boxes of negative area, which are on no level.
    boxes = [boxes_of_side([*LEVEL_SIDES, 33], seed) for seed in range(3)]
    boxes[1] = boxes[1][:0]
    boxes[2][4] = boxes[2][4, [2, 1, 0, 3]]
    boxes = [b.requires_grad_() for b in boxes]
    inputs = [tensor for tensor in (*features.values(), *boxes) if tensor.requires_grad]
    expected = stock_pool(ratio)(features, [b.detach() for b in boxes], [SIZE] * 3)
    upstream = randn(*expected.shape)
    wanted = torch.autograd.grad(pool(ratio)(features, boxes, [SIZE] * 3), inputs, upstream)
    bags.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cpu", False)
        result = pool(ratio)(features, boxes, [SIZE] * 3)
        assert {len(call["table"]) for call in bags} == {sum(source[:, 0].numel() for source in features.values())}
        gradients = torch.autograd.grad(result, inputs, upstream)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-10)


def on_fake_cuda(channels, several, sampler, ratio=2):
    """A forward with tensors that have no values, of which none can be looked at, as if they were on a GPU."""
    with FakeTensorMode():
        maps = {n: torch.empty(2, channels, 128 // s, 160 // s, device="cuda") for n, s in STRIDES.items()}
        boxes = [torch.empty(1, 4, device="cuda") for _ in range(2)]
        return pool(ratio, sampler)(maps if several else {"1": maps["1"]}, boxes, [SIZE] * 2)


@pytest.mark.parametrize("several", [False, True])
def test_gather_looks_at_no_value_on_a_gpu(several):
    result = on_fake_cuda(64, several, "gather")
    assert result.shape == (2, 64, 3, 3)
    assert result.device.type == "cuda"
    # The test can see a look: which RoIs are on which level, and adaptive counts.
    if several:
        with pytest.raises(DynamicOutputShapeException):
            on_fake_cuda(64, several, "grid_sample")
    with pytest.raises(DynamicOutputShapeException):
        on_fake_cuda(64, several, "gather", ratio=-1)


def test_auto_on_a_gpu_goes_by_the_channels_only(taken):
    on_fake_cuda(3, False, "auto")
    on_fake_cuda(64, False, "auto")  # one RoI and not in channels_last: on a CPU, grid_sample
    assert taken == ["grid_sample", "gather"]


@pytest.mark.usefixtures("deterministic")
def test_auto_on_a_gpu_is_deterministic_where_that_is_asked_for(taken):
    on_fake_cuda(3, False, "auto")
    assert taken == ["gather"]
    affine_crop(randn(1, 3, 8, 9), [general_boxes(5, (8, 9))], 3)  # on a CPU grid_sample is, as well
    assert taken == ["gather", "grid_sample"]


# --- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.usefixtures("deterministic")
@both_ratios
@pytest.mark.parametrize("maps", [1, 4])
@pytest.mark.parametrize("channels", [3, 64])
def test_gpu_auto_is_deterministic_where_that_is_asked_for(taken, channels, maps, ratio):
    # The backward of grid_sample would raise.
    assert_runs_are_equal("cuda", channels, maps, ratio, "auto")
    assert set(taken) == {"gather"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gpu_gather_on_a_pyramid_does_not_synchronise(layout):
    on_cpu = {name: f.detach().contiguous(memory_format=layout) for name, f in levels(8, 2).items()}
    features = {name: f.cuda().requires_grad_() for name, f in on_cpu.items()}
    boxes = [boxes_of_side(LEVEL_SIDES, seed) for seed in range(2)]
    corners = [b.cuda().requires_grad_() for b in boxes]
    inputs, crop = [*features.values(), *corners], pool(2, "gather")
    upstream = randn(16, 8, 3, 3)
    on_gpu = upstream.cuda()
    torch.autograd.grad(crop(features, corners, [SIZE] * 2), inputs, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = crop(features, corners, [SIZE] * 2)
        gradients = torch.autograd.grad(result, inputs, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    inputs = [tensor.requires_grad_() for tensor in (*on_cpu.values(), *boxes)]
    expected = crop(on_cpu, boxes, [SIZE] * 2)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-10)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient.cpu(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@both_samplers
@both_ratios
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 0, 5e-4), (torch.bfloat16, 1e-2, 1e-2)])
def test_gpu_values_equal_multi_scale_roi_align(dtype, rtol, atol, channels, ratio, sampler):
    features = {name: f.detach().to("cuda", dtype).requires_grad_() for name, f in levels(channels, 2).items()}
    # torchvision's operator rounds the boxes to the features' dtype; compare with its float32.
    wide = {name: f.detach().float().requires_grad_() for name, f in features.items()}
    boxes = [boxes_of_side(LEVEL_SIDES, seed, torch.float32).cuda().requires_grad_() for seed in range(2)]
    result = pool(ratio, sampler)(features, boxes, [SIZE] * 2)
    expected = stock_pool(ratio)(wide, [b.detach() for b in boxes], [SIZE] * 2)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=rtol, atol=atol)
    upstream = torch.randn_like(expected).to(dtype)
    *gradients, first, second = torch.autograd.grad(result, [*features.values(), *boxes], upstream)
    wanted = torch.autograd.grad(expected, list(wide.values()), upstream.float())
    for gradient, of_stock in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.float() - of_stock).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-4) * of_stock.norm()
    for box_gradient in (first, second):
        assert box_gradient.isfinite().all()
        assert (box_gradient.abs().sum(1) > 0).all()
