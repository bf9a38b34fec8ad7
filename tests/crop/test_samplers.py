"""The choice of a sampler, and what each reads and writes. Values and gradients are checked in test_operators."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.crops import both_samplers, general_boxes, randn, slopes, with_index
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from support.tiny_models import tiny_rcnn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import MultiScaleRoIAlign, roi_align

import detector.crop.crop
import detector.crop.gather_sampler
import detector.crop.grid_sampler
from detector import AffineCrop, MultiScaleAffineCrop, affine_crop, swap_crop_head

NAMES = list(STRIDES)
SIZE = (120, 150)  # of the image of a pyramid
both_ratios = pytest.mark.parametrize("ratio", [-1, 2])
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def levels(channels=2, images=1):
    """A pyramid of four levels in channels_last, leaves that require a gradient, by name."""
    return {name: channels_last(m).requires_grad_() for name, m in pyramid(images, SIZE, channels).items()}


def pool(ratio=2, sampler="gather", output_size=3, **options):
    return MultiScaleAffineCrop(NAMES, output_size, ratio, **SMALL, sampler=sampler, **options)


def stock_pool(ratio=2, output_size=3):
    return MultiScaleRoIAlign(NAMES, output_size, ratio, **SMALL)


@pytest.fixture
def taken(monkeypatch):
    """The samplers that were called, in order."""
    calls = []

    def record(name, original):
        return lambda *args: calls.append(name) or original(*args)

    for name, function in {"gather": "crop_by_gather", "grid_sample": "crop_by_grid"}.items():
        monkeypatch.setattr(detector.crop.crop, function, record(name, getattr(detector.crop.crop, function)))
    return calls


@pytest.fixture
def bags(monkeypatch):
    """Every call of embedding_bag; "map" marks those that sum the gradient of a map."""
    calls, original = [], F.embedding_bag

    def embedding_bag(input, weight, offsets=None, **kwargs):
        result = original(input, weight, offsets, **kwargs)
        weights = kwargs["per_sample_weights"].detach()
        calls.append({"rows": input, "weights": weights, "table": weight, "map": offsets is not None})
        return result

    monkeypatch.setattr(F, "embedding_bag", embedding_bag)
    return calls


@pytest.fixture
def sampled(monkeypatch):
    """The map's shape, the grid and the size of the result of every call of grid_sample."""
    calls, original = [], F.grid_sample

    def grid_sample(input, grid, **kwargs):
        result = original(input, grid, **kwargs)
        calls.append({"map": input.shape, "grid": grid, "result": result.numel()})
        return result

    monkeypatch.setattr(F, "grid_sample", grid_sample)
    return calls


# --- What "auto" takes -----------------------------------------------------------------------------------------------


@both_ratios
@both_layouts
@pytest.mark.parametrize(("channels", "sampler"), [(3, "grid_sample"), (31, "grid_sample"), (32, "gather")])
def test_auto_depends_on_the_channels(taken, channels, sampler, layout, ratio):
    features = randn(1, channels, 8, 9).contiguous(memory_format=layout)
    affine_crop(features, [general_boxes(5, (8, 9))], 5, 1.0, ratio)
    assert taken == [sampler]


@pytest.mark.parametrize(
    ("images", "output_size", "ratio", "sampler"),
    [
        (1, (5, 7), 1, "grid_sample"),  # 35 samples, and 72 pixels to copy
        (1, (5, 7), -1, "grid_sample"),  # the number of adaptive samples is unknown; their bins count
        (1, (6, 6), 1, "gather"),
        (1, (6, 6), -1, "gather"),
        (1, (3, 3), 2, "gather"),
        (3, (6, 6), 1, "grid_sample"),
    ],
)
def test_auto_copies_no_large_map_for_few_samples(taken, images, output_size, ratio, sampler):
    features, boxes = randn(images, 32, 8, 9), [general_boxes(1, (8, 9))]
    affine_crop(features, boxes, output_size, 1.0, ratio)
    affine_crop(channels_last(features), boxes, output_size, 1.0, ratio)  # needs no copy
    assert taken == [sampler, "gather"]


@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("sampler", ["auto", "grid_sample", "gather"])
def test_the_named_sampler_is_taken(taken, sampler, duplicate):
    boxes = boxes_of_side(LEVEL_SIDES)
    for channels in (3, 64):
        features = channels_last(randn(1, channels, 8, 9))
        affine_crop(features, [boxes], 3, 0.125, 2, sampler=sampler)
        duplicate(AffineCrop(3, 0.125, 2, sampler=sampler))(features, [boxes])
        duplicate(pool(2, sampler))(levels(channels), [boxes], [SIZE])
    assert taken == (["grid_sample"] * 3 + ["gather"] * 3 if sampler == "auto" else [sampler] * 6)


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
def test_unknown_samplers_are_an_error(call):
    with pytest.raises(ValueError, match="sampler"):
        call("bilinear")


# --- What is read and written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-1, 1, 2])
@pytest.mark.parametrize("counts", [[6], [5, 4, 0], [30, 1, 1]])
def test_grid_sample_copies_no_map_per_roi(sampled, counts, ratio):
    features = randn(len(counts), 2, 20, 20)
    boxes = [general_boxes(n, (20, 20), seed=i) for i, n in enumerate(counts)]
    affine_crop(features, boxes, 3, 1.0, ratio, sampler="grid_sample")
    assert {call["map"][0] for call in sampled} <= {1, len(counts)}  # images, never RoIs


def test_grid_sample_takes_a_batch_in_one_call_unless_padding_costs_more(sampled):
    # It uses one thread per image of the batch axis on a CPU.
    rois = with_index([0, 3, 1, 2, 0, 3, 1, 2, 0, 3, 1, 2, 2], general_boxes(13, (20, 20)))
    affine_crop(randn(4, 2, 20, 20), rois, 3, 1.0, 2, sampler="grid_sample")
    assert [call["map"][0] for call in sampled] == [4]
    sampled.clear()
    boxes = [torch.zeros(0, 4).double()] * 5 + [general_boxes(20, (20, 20))]
    affine_crop(randn(8, 2, 20, 20), boxes, 3, 1.0, 2, sampler="grid_sample")
    assert sum(call["grid"].numel() for call in sampled) == 20 * (3 * 2) ** 2 * 2


@both_ratios
def test_autocast_leaves_the_geometry_in_float32(sampled, bags, ratio):
    boxes = (general_boxes(4, (60, 80)) * 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for features in (torch.randn(1, 2, 60, 80), torch.randn(1, 2, 60, 80).bfloat16()):
            for sampler in ("grid_sample", "gather"):
                affine_crop(features, [boxes], 3, 0.125, ratio, sampler=sampler)
    assert {call["grid"].dtype for call in sampled} == {call["weights"].dtype for call in bags} == {torch.float32}


@both_ratios
@pytest.mark.parametrize("counts", [[9], [4, 5, 3], [12, 0, 1]])
@pytest.mark.parametrize(
    ("sampler", "name", "limit"),
    [
        ("grid_sample", "MAX_SAMPLED_ELEMENTS", 1),
        ("grid_sample", "MAX_SAMPLED_ELEMENTS", 100),
        ("gather", "MAX_PIXELS_READ_CPU", 400),
        ("gather", "MAX_PIXELS_SORTED", 400),
    ],
)
def test_chunks_change_nothing(monkeypatch, sampled, bags, sampler, name, limit, counts, ratio):
    features = randn(len(counts), 2, 12, 13).requires_grad_()
    boxes = [general_boxes(n, (12, 13), seed=i).requires_grad_() for i, n in enumerate(counts)]

    def run():
        sampled.clear(), bags.clear()
        result = affine_crop(features, boxes, (3, 2), 1.0, ratio, sampler=sampler)
        return [result, *torch.autograd.grad(result.square().sum(), [features, *boxes])]

    expected, calls = run(), len(sampled) + len(bags)
    module = "grid_sampler" if sampler == "grid_sample" else "gather_sampler"
    monkeypatch.setattr(getattr(detector.crop, module), name, limit)
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-11)
    assert len(sampled) + len(bags) > calls
    if sampler == "gather":
        read = [call["rows"].numel() for call in bags if call["map"] == (name == "MAX_PIXELS_SORTED")]
        assert limit / 8 < max(read) <= limit


@pytest.mark.parametrize("images", [1, 4])
def test_grid_sample_stays_within_its_limit(monkeypatch, sampled, images):
    """Also for a box of 70,000 x 70,000 samples, and for huge boxes in many images, which share a call."""
    monkeypatch.setattr(detector.crop.grid_sampler, "MAX_SAMPLED_ELEMENTS", 2**16)
    features = randn(images, 4, 40, 50, dtype=torch.float32)
    huge = torch.tensor([[-3e4, -2e4, 4e4, 5e4], [-300.3, -200.1, 400.2, 500.4]])
    boxes = [huge] if images == 1 else [huge[1:] / 4] * images
    result = affine_crop(features, boxes, 7, 1.0, -1, sampler="grid_sample")
    expected = roi_align(features, [b[-1:] for b in boxes], 7)
    torch.testing.assert_close(result[-1:], expected[-1:], rtol=0, atol=5e-4)
    affine_crop(features, [general_boxes(60, (40, 50), dtype=torch.float32)] * images, 7, 1.0, 2, sampler="grid_sample")
    assert max(call["result"] for call in sampled) <= 2**16


def test_gather_sums_a_small_map_in_batches(bags):
    """The crops' gradient is copied for it, and must not take many times the map's memory."""
    features = channels_last(randn(1, 32, 6, 7)).requires_grad_()
    crops = affine_crop(features, [general_boxes(40, (6, 7))], 3, 1.0, 2, sampler="gather")
    torch.autograd.grad(crops.sum(), features)
    tables = [len(call["table"]) for call in bags if call["map"]]
    assert max(tables) <= 6 * 7
    assert sum(tables) == 40 * 9


def test_gather_reads_maps_in_place_or_copies_them_into_rows(bags):
    features, boxes = levels(32), [boxes_of_side(LEVEL_SIDES).requires_grad_()]
    result = pool()(features, boxes, [SIZE])
    torch.autograd.grad(result.sum(), boxes)
    assert {call["table"].data_ptr() for call in bags if not call["map"]} == {
        source.data_ptr() for source in features.values()
    }
    bags.clear()
    # The rows of a single NCHW image would be a view, which embedding_bag reads many times slower.
    for images in (1, 2):
        affine_crop(randn(images, 32, 8, 9), [general_boxes(5, (8, 9))] * images, 3, 1.0, 2, sampler="gather")
    assert all(call["table"].is_contiguous() for call in bags)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 4])
def test_gather_reads_each_pixel_of_a_bin_once(bags, ratio, aligned):
    features, boxes = randn(1, 3, 40, 40), general_boxes(12, (20, 20)) + 4
    affine_crop(features, [boxes], 5, 1.0, ratio, aligned, sampler="gather")
    for call in bags:
        for rows, weights in zip(call["rows"], call["weights"], strict=True):
            read = rows[weights != 0]
            assert len(read.unique()) == len(read)
    # Two taps per sample would be this many.
    sides = boxes[:, 2:] - boxes[:, :2]
    samples = (sides / 5).ceil().clamp(min=1) if ratio < 0 else torch.full_like(sides, ratio)
    assert sum(call["rows"].numel() for call in bags) < 0.8 * 25 * (2 * samples).prod(1).sum()


class LargestResult(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 8 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("ratio", [-1, 4])
def test_gather_writes_no_samples(ratio):
    features = channels_last(randn(1, 64, 24, 24)).requires_grad_()
    # 15 pixels wide and high, in 4 x 4 bins: 16 samples each, also adaptively.
    corners = (torch.arange(20.0)[:, None] / 4 + torch.tensor([0.3, 0.6, 15.3, 15.6])).double().requires_grad_()
    sizes = {}
    for sampler in ("gather", "grid_sample"):
        with LargestResult() as largest:
            crops = affine_crop(features, [corners], 4, 1.0, ratio, sampler=sampler)
            torch.autograd.grad(crops.square().sum(), [features, corners])
        sizes[sampler] = largest.numel
    assert sizes["gather"] <= 2 * max(crops.numel(), features.numel())
    assert sizes["grid_sample"] >= 16 * crops.numel()


def test_gather_keeps_maps_of_half_precision_as_they_are():
    features = channels_last(torch.randn(1, 32, 20, 22)).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        affine_crop(features, [general_boxes(4, (20, 22), dtype=torch.float32)], 3, 1.0, 2, sampler="gather")
    assert not any(t.shape == features.shape and t.dtype == torch.float32 for t in kept)


# --- Gradients of the gather -----------------------------------------------------------------------------------------


@both_samplers
@both_ratios
@pytest.mark.parametrize("frozen", [["1"], NAMES, ["boxes"], [*NAMES, "boxes"]], ids=str)
def test_only_the_gradients_that_are_needed(bags, frozen, ratio, sampler):
    features, boxes = levels(), boxes_of_side(LEVEL_SIDES).requires_grad_("boxes" not in frozen)
    for name in set(frozen) - {"boxes"}:
        features[name] = features[name].detach()
    others = [source for source in features.values() if source.requires_grad]
    result, expected = (crop(features, [boxes], [SIZE]) for crop in (pool(ratio, sampler), stock_pool(ratio)))
    assert result.requires_grad == bool(others or boxes.requires_grad)
    if not result.requires_grad:
        return
    bags.clear()
    upstream = randn(*result.shape)
    gradients = torch.autograd.grad(result, [*others, *([boxes] if boxes.requires_grad else [])], upstream)
    if others:
        wanted = torch.autograd.grad(expected, others, upstream)
        torch.testing.assert_close(gradients[: len(others)], wanted, rtol=0, atol=1e-10)
    if boxes.requires_grad:  # of those on a frozen level as well
        moved = slopes(lambda corners: stock_pool(ratio)(features, [corners], [SIZE]), boxes.detach(), upstream)
        torch.testing.assert_close(gradients[-1], moved, rtol=1e-6, atol=1e-6)
    if sampler == "gather":
        assert sum(call["map"] for call in bags) == len(others)
        assert any(not call["map"] for call in bags) == boxes.requires_grad


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
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-9)


def test_an_roi_on_no_level_reads_nothing():
    features = {name: source.detach() for name, source in levels(32).items()}
    features["0"][:] = torch.nan
    boxes = boxes_of_side(LEVEL_SIDES)[[1, 2, 3]]
    boxes[1] = boxes[1, [2, 1, 0, 3]]  # a negative area
    result = pool()(features, [boxes.requires_grad_()], [SIZE])
    assert not result[1].any()
    (gradient,) = torch.autograd.grad(result.sum(), boxes)
    assert gradient.any(1).tolist() == [True, False, True]
    assert gradient.isfinite().all()


# --- Deterministic, and without synchronisation ----------------------------------------------------------------------


@pytest.mark.usefixtures("deterministic")
@both_ratios
@pytest.mark.parametrize("maps", [1, 4])
@pytest.mark.parametrize("channels", [3, 64])
def test_gather_is_deterministic(taken, device, channels, maps, ratio):
    """On a GPU "auto" takes it, as the backward of grid_sample would raise."""
    features = {name: m.detach().to(device).requires_grad_() for name, m in levels(channels, 2).items()}
    features = {name: features[name] for name in NAMES[:maps]}
    # Boxes that overlap, so that many bins add to one pixel.
    boxes = [boxes_of_side(LEVEL_SIDES * 4, seed).to(device).requires_grad_() for seed in range(2)]
    crop = pool(ratio, "gather" if device.type == "cpu" else "auto")
    upstream = randn(64, channels, 3, 3).to(device)
    runs = []
    for _ in range(2):
        result = crop(features, boxes, [SIZE] * 2)
        runs.append([result, *torch.autograd.grad(result, [*features.values(), *boxes], upstream)])
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all()
        assert first.any()
        assert torch.equal(first, second)
    assert set(taken) == {"gather"}


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
    expected = pool(ratio)(features, boxes, [SIZE] * 3)
    upstream = randn(*expected.shape)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    bags.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cpu", False)
        result = pool(ratio)(features, boxes, [SIZE] * 3)
        assert {len(call["table"]) for call in bags} == {sum(source[:, 0].numel() for source in features.values())}
        gradients = torch.autograd.grad(result, inputs, upstream)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-10)


def on_fake_cuda(channels, names, sampler, ratio=2):
    """A forward on tensors without values, as if on a GPU."""
    with FakeTensorMode():
        maps = {n: torch.empty(2, channels, 128 // s, 160 // s, device="cuda") for n, s in STRIDES.items()}
        boxes = [torch.empty(1, 4, device="cuda") for _ in range(2)]
        return pool(ratio, sampler)({name: maps[name] for name in names}, boxes, [SIZE] * 2)


@pytest.mark.parametrize("names", [["1"], NAMES])
def test_gather_reads_no_values_on_a_gpu(names):
    assert on_fake_cuda(64, names, "gather").shape == (2, 64, 3, 3)
    # The test notices where values are read: levels, and adaptive counts.
    if len(names) > 1:
        with pytest.raises(DynamicOutputShapeException):
            on_fake_cuda(64, names, "grid_sample")
    with pytest.raises(DynamicOutputShapeException):
        on_fake_cuda(64, names, "gather", ratio=-1)


def test_auto_on_a_gpu_depends_on_the_channels_and_the_deterministic_mode(taken, request):
    on_fake_cuda(3, ["1"], "auto")
    on_fake_cuda(64, ["1"], "auto")  # one RoI and not channels_last: on a CPU, grid_sample
    request.getfixturevalue("deterministic")
    on_fake_cuda(3, ["1"], "auto")
    affine_crop(randn(1, 3, 8, 9), [general_boxes(5, (8, 9))], 3)  # on a CPU grid_sample is deterministic
    assert taken == ["grid_sample", "gather", "gather", "grid_sample"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("sampler", "names", "ratio"),
    [
        ("grid_sample", ["1"], 2),
        ("gather", ["1"], 2),
        ("gather", NAMES, 2),
        ("triton", NAMES, 2),
        ("triton", NAMES, -1),
    ],
)
@both_layouts
def test_a_call_does_not_synchronise(layout, sampler, names, ratio):
    features = {name: levels(8, 2)[name].detach().contiguous(memory_format=layout) for name in names}
    features = {name: source.cuda().requires_grad_() for name, source in features.items()}
    boxes = [boxes_of_side(LEVEL_SIDES, seed).cuda().requires_grad_() for seed in range(2)]
    upstream, crop = randn(16, 8, 3, 3).cuda(), pool(ratio, sampler)
    for mode in ("default", "error"):  # the first call warms up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            result = crop(features, boxes, [SIZE] * 2)
            torch.autograd.grad(result, [*features.values(), *boxes], upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
