import pytest
import torch
from support.crops import both_samplers, randn, slopes
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from torch import nn
from torchvision.ops import MultiScaleRoIAlign, roi_align

import detector.rcnn.pooler
from detector import MultiScaleAffineCrop

NAMES, SIZE = list(STRIDES), (120, 150)
both_ratios = pytest.mark.parametrize("ratio", [-1, 2])


def both(*args, sampler="auto", **kwargs):
    """Ours and torchvision's, which takes its scales from the first image that it sees: here an ordinary one."""
    stock = MultiScaleRoIAlign(*args, **kwargs)
    stock(pyramid(1, (512, 512)), [torch.zeros(0, 4, dtype=torch.float64)], [(512, 512)])
    return MultiScaleAffineCrop(*args, **kwargs, sampler=sampler), stock


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return boxes_of_side((4.0 + 300 * torch.rand(count, generator=generator) ** 2).tolist(), seed)


@both_samplers
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2])
@pytest.mark.parametrize("names", [NAMES, ["0", "1"], ["1", "2", "3"], ["2"]], ids=str)
@pytest.mark.parametrize("canonical", [{}, SMALL, {"canonical_scale": 100, "canonical_level": 3}], ids=str)
def test_values_equal_multi_scale_roi_align(sampler, canonical, names, ratio, device):
    for seed, sizes in enumerate([[(120, 150), (33, 300), (210, 7)], [(1, 1)], [(299, 40), (40, 299)]]):
        features = pyramid(len(sizes), tuple(max(side) for side in zip(*sizes, strict=True)))
        features = {name: f.to(device) for name, f in features.items()}
        boxes = [random_boxes(count, seed + count).to(device) for count in (5, 0, 3)[: len(sizes)]]
        ours, theirs = both(names, [(2, 4), 3, (3, 2)][seed], ratio, **canonical, sampler=sampler)
        result, expected = ours(features, boxes, sizes), theirs(features, boxes, sizes)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@both_samplers
@both_ratios
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.bfloat16, torch.float32]], ids=str)
@pytest.mark.parametrize("channels", [3, 64])
def test_dtypes(sampler, ratio, dtypes, channels, device):
    """Autocast can make levels of different dtypes. torchvision returns the first one's."""
    maps = pyramid(2, SIZE, channels)
    features = {name: f.to(device, dtypes[int(name) % len(dtypes)]).requires_grad_() for name, f in maps.items()}
    wide = {name: f.detach().float().requires_grad_() for name, f in features.items()}
    boxes = [boxes_of_side(LEVEL_SIDES, i, torch.float32).to(device) for i in range(2)]
    ours, theirs = both(NAMES, 3, ratio, **SMALL, sampler=sampler)
    result, expected = ours(features, boxes, [SIZE, (100, 130)]), theirs(wide, boxes, [SIZE, (100, 130)])
    assert result.dtype == dtypes[0]
    rtol, atol, error = (0, 5e-4, 1e-4) if dtypes[0] == torch.float32 else (1e-2, 1e-2, 1e-2)
    torch.testing.assert_close(result.float(), expected, rtol=rtol, atol=atol)
    upstream = torch.randn_like(expected).to(dtypes[0])
    gradients = torch.autograd.grad(result, list(features.values()), upstream)
    wanted = torch.autograd.grad(expected, list(wide.values()), upstream.float())
    for gradient, of_stock in zip(gradients, wanted, strict=True):
        assert (gradient.float() - of_stock).norm() < error * of_stock.norm()


@both_samplers
@pytest.mark.parametrize("names", [NAMES, ["1"]], ids=str)
@both_ratios
@pytest.mark.parametrize("sides", [LEVEL_SIDES, [80], []], ids=str)
def test_gradients_through_every_level(sampler, ratio, names, sides, device):
    """To the maps as torchvision's, to the boxes by finite differences of it; also levels and images without RoIs."""
    features = {name: f.to(device).requires_grad_() for name, f in pyramid(3, SIZE).items() if name in names}
    ours, theirs = both(names, (3, 2), ratio, **SMALL, sampler=sampler)
    boxes = boxes_of_side(sides, 3).reshape(-1, 4).to(device).requires_grad_()
    none = torch.zeros(0, 4, dtype=torch.float64, device=device)

    def crop(pool, boxes):
        return pool(features, [none, boxes, none], [SIZE, (110, 90), SIZE])

    result, expected = crop(ours, boxes), crop(theirs, boxes)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    upstream = randn(*result.shape).to(device)
    *gradients, box_gradient = torch.autograd.grad(result, [*features.values(), boxes], upstream)
    if sides:
        wanted = torch.autograd.grad(expected, list(features.values()), upstream)
        torch.testing.assert_close(tuple(gradients), wanted, rtol=0, atol=1e-10)
        expected = slopes(lambda moved: crop(theirs, moved), boxes.detach(), upstream)
        torch.testing.assert_close(box_gradient, expected, rtol=1e-6, atol=1e-6)
        assert (box_gradient.abs().sum(1) > 1e-3).all()


@both_samplers
@pytest.mark.parametrize("names", [NAMES, ["1"]], ids=str)
@pytest.mark.parametrize("counts", [(3, 0), (0, 2), (0, 0)], ids=str)
def test_the_gradient_at_the_boxes_without_a_graph(sampler, names, counts):
    features = {name: feature.requires_grad_() for name, feature in pyramid(2, SIZE).items()}
    boxes = [random_boxes(count, count).requires_grad_() for count in counts]
    pool = MultiScaleAffineCrop(names, 3, 2, **SMALL, sampler=sampler)
    crops = pool(features, boxes, [SIZE, (100, 130)])
    upstream = randn(*crops.shape)
    with torch.no_grad():
        gradients = pool.box_gradient(features, boxes, [SIZE, (100, 130)], upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(crops, boxes, upstream), strict=True):
        assert not gradient.requires_grad
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)
        assert gradient.any() == bool(len(gradient))


@both_samplers
@pytest.mark.parametrize("names", [NAMES, ["1"]], ids=str)
def test_degenerate_boxes(sampler, names):
    """Boxes of negative area are zero where there are several levels, as in torchvision."""
    features = pyramid(1, SIZE)
    boxes = torch.tensor(
        [
            [50.3, 10.1, 20.2, 60.4],  # x inverted
            [10.2, 60.3, 50.1, 20.4],  # y inverted
            [90.3, 80.1, 20.2, 30.4],  # both: a positive area
            [30.3, 20.1, 30.3, 60.4],  # zero
            [10.3, 20.1, 80.9, 90.4],
        ],
        dtype=torch.float64,
        requires_grad=True,
    )
    ours, theirs = both(names, 3, 2, **SMALL, sampler=sampler)
    result = ours(features, [boxes], [SIZE])
    torch.testing.assert_close(result, theirs(features, [boxes.detach()], [SIZE]), rtol=0, atol=1e-10)
    assert bool(result[:2].any()) == (len(names) == 1)
    assert torch.autograd.grad(result.sum(), boxes)[0].isfinite().all()


@both_samplers
@both_ratios
def test_aligned(sampler, ratio):
    features, boxes = pyramid(1, SIZE), [boxes_of_side(LEVEL_SIDES)]
    result = MultiScaleAffineCrop(NAMES, 3, ratio, **SMALL, aligned=True, sampler=sampler)(features, boxes, [SIZE])
    for k, box in enumerate(boxes[0].split(1)):
        level = str(k % 4)
        expected = roi_align(features[level], [box], 3, 1 / STRIDES[level], ratio, aligned=True)
        torch.testing.assert_close(result[k : k + 1], expected, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "ratio"), [("grid_sample", 2), ("gather", -1)])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(sampler, ratio):
    """With grid_sample and fixed counts in one graph."""
    features = {name: f.requires_grad_() for name, f in pyramid(1, SIZE, 32).items()}
    boxes = [boxes_of_side(LEVEL_SIDES).requires_grad_()]
    pool = MultiScaleAffineCrop(NAMES, 3, ratio, **SMALL, sampler=sampler)
    in_one_graph = ratio > 0 and sampler == "grid_sample"
    crops = [
        p(features, boxes, [SIZE]) for p in (torch.compile(pool, backend="aot_eager", fullgraph=in_one_graph), pool)
    ]
    torch.testing.assert_close(*crops, rtol=0, atol=1e-10)
    upstream = randn(*crops[0].shape)
    gradients = [torch.autograd.grad(crop, [*features.values(), *boxes], upstream) for crop in crops]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


class Traceable(nn.Module):
    """A pooler of four levels called with tensors alone."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, *tensors):
        maps, boxes = tensors[:4], list(tensors[4:])
        return self.pool(dict(zip("0123", maps)), boxes, [(64, 96)] * len(boxes))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
def test_jit_trace_takes_boxes_on_other_levels():
    def inputs(counts, scale, seed):
        maps = [randn(2, 3, 64 // stride, 96 // stride, dtype=torch.float32, seed=seed) for stride in (4, 8, 16, 32)]
        return (*maps, *(random_boxes(count, seed).float() * scale for count in counts))

    pool, stock = (Traceable(p) for p in both(NAMES, 3, 2, **SMALL, sampler="gather"))
    graph = torch.jit.trace(pool, inputs((6, 3), 1.0, 0))
    for counts, scale in (((6, 3), 1.0), ((2, 9), 0.3), ((0, 7), 0.1), ((4, 0), 3.0), ((0, 0), 1.0)):
        arguments = inputs(counts, scale, 1)
        torch.testing.assert_close(graph(*arguments), stock(*arguments), rtol=0, atol=5e-4)


# --- Scales ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scales_of(monkeypatch):
    """The scales that a pooler takes for sizes of maps and images."""
    taken = []
    monkeypatch.setattr(detector.rcnn.pooler, "crop_levels", lambda *arguments: taken.append(arguments[2].scales))

    def scales(maps, *sizes, **settings):
        pool = MultiScaleAffineCrop([str(i) for i in range(len(maps))], 3, 2, **settings)
        pool({str(i): torch.empty(1, 1, *size) for i, size in enumerate(maps)}, [torch.zeros(0, 4)], sizes)
        return taken.pop()

    return scales


def padded(size, multiple):
    return tuple(-(-side // multiple) * multiple for side in size)


@pytest.mark.parametrize(("size_divisible", "multiple"), [(None, 32), (32, 32), (128, 128)])
def test_scales_of_padded_images(scales_of, size_divisible, multiple):
    """They do not depend on the image's size. In torchvision those of a first image of 67 x 3 are doubled."""
    strides = STRIDES.values() if multiple == 32 else (16, 64)
    for side in [*range(1, 130), *range(130, 1334, 37)]:
        for size in {(side, 1), (1, side), (side, side), (side, 1333), (1333, side), (side, 40)}:
            maps = [tuple(s // stride for s in padded(size, multiple)) for stride in strides]
            assert scales_of(maps, size, size_divisible=size_divisible) == [1 / stride for stride in strides], size
    assert scales_of([(8, 32)], (3, 128), (20, 1)) == [1 / 4]  # by the largest sides of a batch


@pytest.mark.parametrize("settings", [{}, {"size_divisible": 1}])
def test_scales_of_images_without_padding(scales_of, settings):
    """The default may take padding for granted where both sides are short."""
    for height in range(1, 400, 3):
        for width in {1, 48, height, 399}:
            maps = [(-(-height // stride), -(-width // stride)) for stride in (4, 8)]
            if max(height, width) >= 48:
                assert scales_of(maps, (height, width), **settings) == [1 / 4, 1 / 8], (height, width)


# --- The module ------------------------------------------------------------------------------------------------------


def test_it_is_a_multi_scale_roi_align():
    settings = {"canonical_scale": 100, "canonical_level": 3}
    pool, stock = (c(["0", "1"], (7, 5), 2, **settings) for c in (MultiScaleAffineCrop, MultiScaleRoIAlign))
    assert isinstance(pool, MultiScaleRoIAlign)
    for name in ("featmap_names", "output_size", "sampling_ratio", *settings):
        assert getattr(pool, name) == getattr(stock, name)
    assert not pool.state_dict()
    assert repr(pool).startswith(repr(stock)[:-1].replace("RoIAlign", "AffineCrop"))
    with pytest.raises(ValueError, match="size_divisible"):
        MultiScaleAffineCrop(["0"], 2, 2, size_divisible=0)
    with pytest.raises(TypeError, match="output_size"):
        MultiScaleAffineCrop(["0"], 2.5, 2)


ONE_MAP, NO_BOXES = {"0": torch.zeros(1, 1, 4, 4)}, [torch.zeros(0, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": torch.zeros(1, 1, 4, 4)}, NO_BOXES, [(8, 8)]), "feature maps"),
        ((ONE_MAP, NO_BOXES, []), "image_shapes"),
        ((ONE_MAP, [torch.zeros(1, 5)], [(8, 8)]), r"boxes\[0\]"),
        ((ONE_MAP, [torch.full((1, 4), torch.nan)], [(8, 8)]), "boxes must be finite"),
        (({"0": torch.zeros(2, 1, 4, 4), "1": torch.zeros(1, 1, 2, 2)}, NO_BOXES, [(8, 8)]), "same N and C"),
        # It maps to no level, and must not be left out in silence.
        ((pyramid(1, SIZE), [torch.tensor([[0, 0, torch.inf, 9.0]])], [SIZE]), "boxes must be finite"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleAffineCrop(NAMES, 2, 2)(*arguments)
