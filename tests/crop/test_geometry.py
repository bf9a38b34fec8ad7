import pytest
import torch
import torch.nn.functional as F

from detector import affine_crop, boxes_to_theta, denormalize_boxes, normalize_boxes

BOX = [-0.5, -0.3, 0.7, 0.8]
FUNCTIONS = {
    "boxes_to_theta": boxes_to_theta,
    "normalize_boxes": lambda boxes: normalize_boxes(boxes, (300, 500), 0.5),
    "denormalize_boxes": lambda boxes: denormalize_boxes(boxes, (300, 500), 0.5),
}
ROTATED = {**FUNCTIONS, "boxes_to_theta": lambda boxes: boxes_to_theta(boxes, (300, 500))}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
both_kinds = pytest.mark.parametrize(
    ("function", "boxes"),
    [pytest.param(f, "corners", id=name) for name, f in FUNCTIONS.items()]
    + [pytest.param(f, "rotated", id=f"{name}, rotated") for name, f in ROTATED.items()],
)


def some_boxes(dtype=torch.float64):
    return torch.tensor([[3.1, 4.7, 20.3, 17.9], [-5.2, 2.4, 9.6, 40.8], [12.0, 8.0, 6.0, 3.0]], dtype=dtype)


def rotated_boxes(dtype=torch.float64):
    boxes = [[12.3, 9.1, 8.2, 3.4, 33], [-2.5, 7.2, 5.1, 9.3, -151], [7, 4, 0, 2, 90], [1, 2, 3, 4, 765]]
    return torch.tensor(boxes, dtype=dtype)


KINDS = {"corners": some_boxes, "rotated": rotated_boxes}


@pytest.mark.parametrize("corner", [(-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0)])
def test_theta_maps_the_unit_frame_onto_the_box(corner):
    boxes = torch.tensor([BOX, [0.2, 0.9, -0.6, -1.4], [-1, -1, 1, 1]], dtype=torch.float64)  # one is inverted
    u, v = corner
    x1, y1, x2, y2 = boxes.unbind(1)
    expected = torch.stack([x1 + (x2 - x1) * (u + 1) / 2, y1 + (y2 - y1) * (v + 1) / 2], 1)
    point = torch.tensor([u, v, 1], dtype=torch.float64)
    torch.testing.assert_close(boxes_to_theta(boxes) @ point, expected, rtol=0, atol=1e-15)
    assert boxes_to_theta(boxes[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("corner", [(-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0)])
def test_theta_of_rotated_boxes_in_pixels(corner, aligned):
    """The unit frame's corners are the box's corners, turned counter-clockwise as seen, on a map that is not square."""
    size, scale, boxes = (17, 23), 0.3, rotated_boxes()
    theta = boxes_to_theta(normalize_boxes(boxes, size, scale, aligned), size)
    x, y, width, height, angle = boxes.unbind(1)
    # With y down, counter-clockwise as seen is from the right (x) to the top (-y).
    right, down = corner[0] * width / 2, corner[1] * height / 2
    turn = torch.polar(torch.ones_like(x), angle.deg2rad())
    point = turn * torch.complex(right, -down)
    expected = torch.stack([x + point.real, y - point.imag], 1)
    found = denormalize_boxes((theta @ torch.tensor([*corner, 1.0]).double()).repeat(1, 2), size, scale, aligned)
    torch.testing.assert_close(found[:, :2], expected, rtol=0, atol=1e-12)


def test_theta_of_an_unrotated_box_is_that_of_its_corners():
    corners = some_boxes()[:2]
    rotated = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2], torch.zeros(2, 1)], 1)
    expected = boxes_to_theta(normalize_boxes(corners, (17, 23), 0.3))
    found = boxes_to_theta(normalize_boxes(rotated, (17, 23), 0.3), (17, 23))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert boxes_to_theta(rotated[:0], (17, 23)).shape == (0, 2, 3)


def test_normalize_corners_of_the_map():
    # The outer corners of a 40 x 60 map of stride 4, which lie at 160 and 240 pixels of the image.
    boxes = torch.tensor([[0.0, 0.0, 240.0, 160.0], [120.0, 80.0, 180.0, 40.0]])
    expected = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.5, -0.5]])
    torch.testing.assert_close(normalize_boxes(boxes, (40, 60), 0.25), expected, rtol=0, atol=1e-6)
    further = normalize_boxes(boxes, (40, 60), 0.25, aligned=False) - expected
    half_pixel = torch.tensor([1 / 60, 1 / 40, 1 / 60, 1 / 40]).expand(2, 4)
    torch.testing.assert_close(further, half_pixel, rtol=0, atol=1e-6)


def test_normalize_a_rotated_box():
    box = torch.tensor([60.0, 40.0, 120.0, 80.0, 30.0])  # the middle of a quarter of that map, and half its sides
    expected = torch.tensor([-0.5, -0.5, 1.0, 1.0, 30.0])
    torch.testing.assert_close(normalize_boxes(box, (40, 60), 0.25), expected, rtol=0, atol=1e-6)
    further = normalize_boxes(box, (40, 60), 0.25, aligned=False) - expected
    torch.testing.assert_close(further, torch.tensor([1 / 60, 1 / 40, 0, 0, 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0625, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_denormalize_is_the_inverse(kind, scale, aligned):
    boxes = torch.stack([KINDS[kind]()] * 2)  # any leading dimensions
    there = normalize_boxes(boxes, (17, 23), scale, aligned)
    torch.testing.assert_close(denormalize_boxes(there, (17, 23), scale, aligned), boxes, rtol=0, atol=1e-12)


@both_kinds
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(function, boxes, given, autocast):
    """Computed in float32 or better, not cast at the end."""
    boxes = KINDS[boxes](given)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = function(boxes)
    wide = torch.promote_types(given, torch.float32)
    assert result.dtype == wide
    assert torch.equal(result, function(boxes.to(wide)))


@both_kinds
def test_differentiable(function, boxes):
    assert torch.autograd.gradcheck(function, KINDS[boxes]().requires_grad_())


@every_function
@pytest.mark.parametrize(
    ("boxes", "error"),
    [
        (torch.zeros(3, 6), ValueError),
        (torch.zeros(3, 3), ValueError),
        (torch.zeros(()), ValueError),
        (torch.zeros(2, 4, dtype=torch.int64), TypeError),
        ([[0.0, 0.0, 1.0, 1.0]], TypeError),
    ],
)
def test_invalid_boxes(function, boxes, error):
    with pytest.raises(error, match="boxes must"):
        function(boxes)


def test_theta_takes_a_matrix_of_boxes():
    with pytest.raises(ValueError, match=r"boxes .*\[K, 4\].* got \[2, 3, 4\]"):
        boxes_to_theta(torch.zeros(2, 3, 4))


def test_theta_needs_the_size_for_rotated_boxes_only():
    with pytest.raises(ValueError, match=r"boxes .*\[K, 4\].* got \[2, 5\]"):
        boxes_to_theta(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"boxes .*\[K, 5\] with size.* got \[2, 4\]"):
        boxes_to_theta(torch.zeros(2, 4), (17, 23))


@pytest.mark.parametrize("function", [normalize_boxes, denormalize_boxes])
@pytest.mark.parametrize(("size", "scale"), [((0, 5), 1), ((5, 0), 1), ((5, 5), 0.0), ((5, 5), float("nan"))])
def test_invalid_size_and_scale(function, size, scale):
    with pytest.raises(ValueError, match="spatial_scale" if scale != 1 else "size"):
        function(some_boxes(), size, scale)


# float32: a box gradient is a sum over 37,632 samples of slopes times 112 pixels, 2e4 in size.
@pytest.mark.parametrize(("dtype", "atol", "box_atol"), [(torch.float64, 1e-11, 1e-7), (torch.float32, 2e-4, 2.0)])
def test_worked_example(dtype, atol, box_atol):
    """The README's example, a batch of images cropped by one normalised box each, against PyTorch's functions."""
    images = torch.randn(16, 3, 224, 224, dtype=dtype, requires_grad=True)
    box = torch.tensor([BOX] * 16, dtype=dtype, requires_grad=True)
    upstream = torch.randn(16, 3, 112, 112, dtype=dtype)
    x1, y1, x2, y2 = box.unbind(1)
    zero = torch.zeros_like(x1)
    theta = torch.stack([(x2 - x1) / 2, zero, (x2 + x1) / 2, zero, (y2 - y1) / 2, (y2 + y1) / 2], 1).view(16, 2, 3)
    grid = F.affine_grid(theta, [16, 3, 112, 112], align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [images, box])

    assert torch.equal(boxes_to_theta(box), theta)
    pixels = denormalize_boxes(box, (224, 224))
    crops = affine_crop(images, list(pixels.split(1)), (112, 112), sampling_ratio=1, aligned=True)
    gradients = torch.autograd.grad((crops * upstream).sum(), [images, box])
    torch.testing.assert_close(crops, expected, rtol=0, atol=atol)
    torch.testing.assert_close(gradients[0], expected_gradients[0], rtol=0, atol=atol)
    torch.testing.assert_close(gradients[1], expected_gradients[1], rtol=0, atol=box_atol)
