import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align

import detector.crop.pyramid
from detector import MultiScaleAffineCrop

both_samplers = pytest.mark.parametrize("sampler", ["grid_sample", "gather"])


def both(*args, sampler="auto", **kwargs):
    """Ours and torchvision's, which tells its scales once, from the first image that it sees: here an ordinary one."""
    stock = MultiScaleRoIAlign(*args, **kwargs)
    stock(pyramid(1, (512, 512)), [torch.zeros(0, 4, dtype=torch.float64)], [(512, 512)])
    return MultiScaleAffineCrop(*args, **kwargs, sampler=sampler), stock


@both_samplers
@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=3),
    counts=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    names=st.sampled_from([["0", "1", "2", "3"], ["0", "1"], ["1", "2", "3"], ["2"]]),
    output_size=st.sampled_from([3, [2, 4], (3, 2)]),
    ratio=st.sampled_from([-1, 0, 1, 2]),
    canonical=st.sampled_from([{}, SMALL, {"canonical_scale": 100, "canonical_level": 3}]),
    seed=st.integers(0, 1000),
)
def test_values_equal_multi_scale_roi_align(sampler, sizes, counts, names, output_size, ratio, canonical, seed):
    features = pyramid(len(sizes), tuple(max(side) for side in zip(*sizes, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    sides = [(4.0 + 300 * torch.rand(n, generator=generator) ** 2).tolist() for n in counts]
    boxes = [boxes_of_side(s, seed + i) for i, s in enumerate(sides[: len(sizes)])]
    ours, theirs = both(names, output_size, ratio, **canonical, sampler=sampler)
    result, expected = ours(features, boxes, sizes), theirs(features, boxes, sizes)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
def test_float32_values_and_feature_gradients_equal_multi_scale_roi_align(sampler, ratio):
    features = {name: f.requires_grad_() for name, f in pyramid(2, (120, 150), dtype=torch.float32).items()}
    boxes = [boxes_of_side(LEVEL_SIDES, i, torch.float32) for i in range(2)]
    outputs = [
        pool(features, boxes, [(120, 150), (100, 130)])
        for pool in both(list(STRIDES), 3, ratio, **SMALL, sampler=sampler)
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)
    upstream = torch.randn_like(outputs[0])
    for ours, theirs in zip(*(torch.autograd.grad(o, list(features.values()), upstream) for o in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert theirs.abs().sum() > 0  # every level was used


@both_samplers
@pytest.mark.parametrize("side", LEVEL_SIDES[:4])
def test_levels_without_rois(sampler, side):
    features = {name: f.requires_grad_() for name, f in pyramid(1, (120, 150)).items()}
    boxes = [boxes_of_side([side] * 3).requires_grad_()]
    ours, theirs = both(list(STRIDES), 3, 2, **SMALL, sampler=sampler)
    result = ours(features, boxes, [(120, 150)])
    torch.testing.assert_close(result, theirs(features, boxes, [(120, 150)]), rtol=0, atol=1e-10)
    result.sum().backward()
    assert sum(bool(f.grad.any()) for f in features.values()) == 1
    assert (boxes[0].grad.abs().sum(1) > 0).all()


@both_samplers
@pytest.mark.parametrize("names", [["0", "1", "2", "3"], ["1"]])
@pytest.mark.parametrize("images", [1, 2])
def test_no_rois_at_all(sampler, names, images):
    features = {name: f.requires_grad_() for name, f in pyramid(images, (120, 150), dtype=torch.float32).items()}
    boxes = [torch.zeros(0, 4, requires_grad=True) for _ in range(images)]
    result = MultiScaleAffineCrop(names, (3, 2), 2, sampler=sampler)(features, boxes, [(120, 150)] * images)
    assert result.shape == (0, 2, 3, 2)
    result.sum().backward()  # a step whose images are all empty does not raise


@both_samplers
def test_images_without_rois(sampler):
    features = pyramid(3, (120, 150))
    boxes = [boxes_of_side([]).reshape(0, 4), boxes_of_side(LEVEL_SIDES), boxes_of_side([]).reshape(0, 4)]
    ours, theirs = both(list(STRIDES), 3, 2, **SMALL, sampler=sampler)
    sizes = [(120, 150)] * 3
    torch.testing.assert_close(ours(features, boxes, sizes), theirs(features, boxes, sizes), rtol=0, atol=1e-10)


@both_samplers
@pytest.mark.parametrize("names", [["0", "1", "2", "3"], ["1"]])
def test_degenerate_boxes(sampler, names):
    """Negative area: on no level, and zero, where there are several; whatever roi_align gives where there is one."""
    features = pyramid(1, (120, 150))
    boxes = torch.tensor(
        [
            [50.3, 10.1, 20.2, 60.4],  # x inverted
            [10.2, 60.3, 50.1, 20.4],  # y inverted
            [90.3, 80.1, 20.2, 30.4],  # both: a positive area
            [30.3, 20.1, 30.3, 60.4],  # zero
            [10.3, 20.1, 80.9, 90.4],  # a usual one
        ],
        dtype=torch.float64,
        requires_grad=True,
    )
    ours, theirs = both(names, 3, 2, **SMALL, sampler=sampler)
    result = ours(features, [boxes], [(120, 150)])
    torch.testing.assert_close(result, theirs(features, [boxes.detach()], [(120, 150)]), rtol=0, atol=1e-10)
    if len(names) > 1:
        assert torch.equal(result[:2], torch.zeros_like(result[:2]))
    result.sum().backward()
    assert boxes.grad.isfinite().all()


@both_samplers
@pytest.mark.parametrize("sides", [LEVEL_SIDES, [30, 20]])
@pytest.mark.parametrize(("names", "ratio"), [(["0", "1", "2", "3"], 2), (["0", "1", "2", "3"], -1), (["1"], 2)])
def test_box_gradients_through_every_level(sampler, names, ratio, sides):
    """Against finite differences of torchvision's own pooler."""
    features = pyramid(2, (120, 150), channels=3)
    ours, theirs = both(names, (3, 2), ratio, **SMALL, sampler=sampler)
    boxes = [boxes_of_side(sides, seed).requires_grad_() for seed in (3, 4)]
    sizes = [(120, 150), (110, 90)]
    result = ours(features, boxes, sizes)
    upstream = torch.randn_like(result)
    gradients = torch.autograd.grad(result, boxes, upstream)

    step = 1e-6
    rows = torch.arange(len(sides))
    for image, gradient in enumerate(gradients):
        for side in range(4):
            values = []
            for sign in (1, -1):
                moved = [b.detach().clone() for b in boxes]
                moved[image][:, side] += sign * step
                values.append((theirs(features, moved, sizes) * upstream).sum((1, 2, 3)))
            expected = ((values[0] - values[1]) / (2 * step))[rows + image * len(sides)]
            torch.testing.assert_close(gradient[:, side], expected, rtol=1e-6, atol=1e-6)
        assert (gradient.abs().sum(1) > 1e-3).all()  # a gradient for every box, from every level


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 2])
def test_aligned(sampler, ratio):
    features = pyramid(1, (120, 150))
    boxes = [boxes_of_side(LEVEL_SIDES)]
    aligned = MultiScaleAffineCrop(list(STRIDES), 3, ratio, **SMALL, aligned=True, sampler=sampler)
    result = aligned(features, boxes, [(120, 150)])
    for k, box in enumerate(boxes[0].split(1)):
        level = str(k % 4)
        expected = roi_align(features[level], [box], 3, 1 / STRIDES[level], ratio, aligned=True)
        torch.testing.assert_close(result[k : k + 1], expected, rtol=0, atol=1e-10)
    by_default = MultiScaleAffineCrop(list(STRIDES), 3, ratio, **SMALL, sampler=sampler)(features, boxes, [(120, 150)])
    assert (result - by_default).abs().max() > 0.1


@both_samplers
def test_unused_maps_are_ignored(sampler):
    features = pyramid(1, (120, 150))
    boxes, size = [boxes_of_side(LEVEL_SIDES)], [(120, 150)]
    pool = MultiScaleAffineCrop(["0", "1"], 3, 2, **SMALL, sampler=sampler)
    expected = pool({name: features[name] for name in ("0", "1")}, boxes, size)
    assert torch.equal(pool({**features, "pool": torch.full((1, 2, 1, 1), torch.nan)}, boxes, size), expected)


@pytest.fixture
def told(monkeypatch):
    """The scales that a pooler tells for maps and images, by a call of it."""
    taken = []
    monkeypatch.setattr(detector.crop.pyramid, "crop_levels", lambda *arguments: taken.append(arguments[4]))

    def scales(maps, *sizes, **settings):
        pool = MultiScaleAffineCrop([str(i) for i in range(len(maps))], 3, 2, **settings)
        pool({str(i): torch.empty(1, 1, *size) for i, size in enumerate(maps)}, [torch.zeros(0, 4)], sizes)
        return taken.pop()

    return scales


def padded(size, multiple=32):
    return tuple(-(-side // multiple) * multiple for side in size)


@pytest.mark.parametrize("size_divisible", [None, 32])
def test_the_scales_do_not_depend_on_the_size_of_the_image(told, size_divisible):
    """Of images padded to a multiple of 32. torchvision's first image decides: by one of 67 x 3 all scales double."""
    for side in range(1, 1334):
        for size in {(side, 1), (1, side), (side, side), (side, 1333), (1333, side), (side, 40)}:
            maps = [tuple(s // stride for s in padded(size)) for stride in STRIDES.values()]
            assert told(maps, size, size_divisible=size_divisible) == [1 / stride for stride in STRIDES.values()], size


def test_the_scales_of_a_batch_are_those_of_its_largest_sides(told):
    assert told([(8, 32)], (3, 128), (20, 1)) == [1 / 4]


@pytest.mark.parametrize("settings", [{}, {"size_divisible": 1}])
def test_the_scales_of_images_that_are_not_padded(told, settings):
    """The default takes them for padded ones only where both sides are short, and a map is as large as of either."""
    for height in range(1, 400):
        for width in {1, 48, height, 399}:
            maps = [(-(-height // stride), -(-width // stride)) for stride in (4, 8)]
            if max(height, width) >= 48:
                assert told(maps, (height, width), **settings) == [1 / 4, 1 / 8], (height, width)


def test_the_scales_of_images_padded_to_another_multiple(told):
    for side in range(1, 300):
        maps = [tuple(s // stride for s in padded((side, 5), 128)) for stride in (16, 64)]
        assert told(maps, (side, 5), size_divisible=128) == [1 / 16, 1 / 64]


@both_samplers
def test_feature_dtype_is_kept_and_levels_may_differ(sampler):
    # Autocast can hand over levels of different dtypes; torchvision gives back the first one's.
    features = pyramid(1, (120, 150), dtype=torch.float32)
    boxes, size = [boxes_of_side(LEVEL_SIDES, dtype=torch.float32)], [(120, 150)]
    pool = MultiScaleAffineCrop(list(STRIDES), 3, 2, **SMALL, sampler=sampler)
    expected = pool(features, boxes, size)
    mixed = {name: f.bfloat16() if name in ("0", "2") else f for name, f in features.items()}
    result = pool(mixed, boxes, size)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.05)


def test_it_is_a_multi_scale_roi_align():
    pool = MultiScaleAffineCrop(("0", "1"), (7, 5), 2, canonical_scale=100, canonical_level=3, aligned=True)
    assert isinstance(pool, MultiScaleRoIAlign)
    stock = MultiScaleRoIAlign(["0", "1"], (7, 5), 2, canonical_scale=100, canonical_level=3)
    for name in ("featmap_names", "output_size", "sampling_ratio", "canonical_scale", "canonical_level"):
        assert getattr(pool, name) == getattr(stock, name)
    assert not pool.state_dict()
    assert repr(pool) == (
        "MultiScaleAffineCrop(featmap_names=['0', '1'], output_size=(7, 5), sampling_ratio=2, aligned=True)"
    )
    assert repr(MultiScaleAffineCrop(["0"], 7, 2, sampler="gather")).endswith(", aligned=False, sampler=gather)")


@both_samplers
def test_faster_rcnn_takes_it(sampler):
    backbone = nn.Conv2d(3, 4, 3, stride=16, padding=1)
    backbone.out_channels = 4
    pool = MultiScaleAffineCrop(["0"], 3, 2, sampler=sampler)
    model = FasterRCNN(
        backbone,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((32,),), ((1.0,),)),
        box_roi_pool=pool,
        min_size=64,
        max_size=64,
        box_score_thresh=0.0,
    ).eval()
    assert model.roi_heads.box_roi_pool is pool
    with torch.no_grad():
        (detections,) = model([torch.rand(3, 64, 64)])
    assert len(detections["boxes"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({"a": torch.zeros(1, 1, 4, 4)}, [torch.zeros(0, 4)], [(8, 8)]), ValueError, r"none of .*\['0'\].*\['a'\]"),
        (({"0": torch.zeros(1, 1, 4, 4)}, [torch.zeros(0, 4)], []), ValueError, "image_shapes must have .* got none"),
        (({"0": torch.zeros(1, 1, 4, 4)}, [torch.zeros(1, 5)], [(8, 8)]), ValueError, r"boxes\[0\] .* \[1, 5\]"),
        (({"0": torch.zeros(1, 1, 4, 4)}, [torch.full((1, 4), torch.nan)], [(8, 8)]), ValueError, "boxes must be fin"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiScaleAffineCrop(["0"], 2, 2)(*arguments)


def test_the_constructors_errors():
    with pytest.raises(ValueError, match="size_divisible must be at least 1, got 0"):
        MultiScaleAffineCrop(["0"], 2, 2, size_divisible=0)
    with pytest.raises(TypeError, match=r"output_size must be an int or a pair of ints, got 2\.5"):
        MultiScaleAffineCrop(["0"], 2.5, 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_box_that_is_not_finite_is_an_error_on_a_pyramid_too(bad):
    # It maps to no level; it must not be left out in silence, as one of negative area is.
    boxes = boxes_of_side(LEVEL_SIDES)
    boxes[3, 2] = bad
    with pytest.raises(ValueError, match="boxes must be finite, got"):
        MultiScaleAffineCrop(list(STRIDES), 2, 2)(pyramid(1, (120, 150)), [boxes], [(120, 150)])
