"""The Triton kernels: under Triton's interpreter, cross-compiled for GPUs that are not here, and what a call launches.

The interpreter needs a process of its own, because it must be chosen before Triton is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.crops import INTERPRETED, general_boxes, randn, with_index
from support.cross_compile import compile_for
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from support.tiny_models import tiny_rcnn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import MultiScaleRoIAlign, roi_align

import detector.crop.crop
from detector import (
    BoxGradient,
    MultiScaleAffineCrop,
    RefinementConfig,
    add_refinement,
    affine_crop,
    exact_crop,
    swap_crop_head,
)
from detector.crop.triton_sampler import why_not

pytest.importorskip("triton")
FOLDER = Path(__file__).parent
NAMES, SIZE = list(STRIDES), (120, 150)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_under_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def run_interpreted(*selection):
    """Run tests of this folder under the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *selection]
    # Not those of the process that runs this test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=FOLDER.parents[1]
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 10


@compiled
def test_under_the_interpreter():
    run_interpreted(str(FOLDER / "test_triton.py"))


@compiled
@pytest.mark.slow
def test_the_checks_of_all_crops_under_the_interpreter():
    run_interpreted(str(FOLDER), "-k", "triton", "-m", "", "--ignore", str(Path(__file__)))


# --- Under the interpreter -------------------------------------------------------------------------------------------


def pool(ratio=2, sampler="triton", names=NAMES):
    return MultiScaleAffineCrop(names, 3, ratio, **SMALL, sampler=sampler)


@interpreted
@both_layouts
@pytest.mark.parametrize("ratio", [2, -1])
def test_values_and_gradients_of_a_pyramid(layout, ratio):
    features = {n: m.contiguous(memory_format=layout).requires_grad_() for n, m in pyramid(2, SIZE, 5).items()}
    boxes = [boxes_of_side(LEVEL_SIDES[:4], 1).requires_grad_(), boxes_of_side(LEVEL_SIDES[:1]).requires_grad_()]
    inputs, results = [*features.values(), *boxes], []
    for sampler in ("triton", "gather"):
        crops = pool(ratio, sampler)(features, boxes, [SIZE] * 2)
        results.append([crops, *torch.autograd.grad(crops, inputs, randn(*crops.shape))])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)
    stock = MultiScaleRoIAlign(NAMES, 3, ratio, **SMALL)(features, [b.detach() for b in boxes], [SIZE] * 2)
    torch.testing.assert_close(results[0][0], stock, rtol=0, atol=1e-10)
    for gradient, source in zip(results[0][1:], features.values()):
        assert gradient.is_contiguous(memory_format=layout)
        assert gradient.shape == source.shape


@interpreted
@pytest.mark.parametrize("frozen", ["boxes", "maps"])
def test_only_the_needed_gradients(frozen):
    source, boxes = randn(1, 4, 8, 9), general_boxes(3, (8, 9))
    wanted = (boxes if frozen == "maps" else source).requires_grad_()
    gradients = []
    for sampler in ("triton", "gather"):
        crops = affine_crop(source, [boxes], 2, 1.0, 2, sampler=sampler)
        gradients.append(torch.autograd.grad(crops, wanted, randn(*crops.shape)))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@interpreted
@pytest.mark.parametrize(("channels", "bins"), [(1, 3), (40, 3), (2, 9)], ids=str)
def test_blocks_of_channels_and_bins(channels, bins):
    """257 channels are 17 blocks of a gradient, and 9 x 9 bins are two blocks."""
    source, boxes = randn(1, channels, 8, 9).requires_grad_(), general_boxes(1, (8, 9)).requires_grad_()
    results = []
    for sampler in ("triton", "gather"):
        crops = affine_crop(source, [boxes], bins, 1.0, 1, sampler=sampler)
        results.append([crops, *torch.autograd.grad(crops, [source, boxes], randn(*crops.shape))])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@interpreted
@pytest.mark.parametrize("ratio", [2, -1])
def test_it_compiles_into_one_graph(ratio):
    source, boxes = randn(2, 3, 8, 9).requires_grad_(), general_boxes(3, (8, 9)).requires_grad_()
    compiled = torch.compile(affine_crop, fullgraph=True, backend="aot_eager")
    results = []
    for crop in (compiled, affine_crop):
        crops = crop(source, [boxes[:1], boxes[1:]], (2, 3), 1.0, ratio, sampler="triton")
        results.append([crops, *torch.autograd.grad(crops, [source, boxes], randn(*crops.shape))])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    exact = torch.compile(exact_crop, fullgraph=True, backend="aot_eager")(source, [boxes[:1]], 2, sampler="triton")
    torch.testing.assert_close(exact, exact_crop(source, [boxes[:1]], 2), rtol=0, atol=1e-10)


@interpreted
@pytest.mark.parametrize("areas", [None, [30.0]])
def test_the_operator_passes_opcheck(areas):
    maps = [randn(2, 3, 8, 9).requires_grad_(), randn(2, 3, 4, 5).requires_grad_()][: 1 + bool(areas)]
    boxes, image = general_boxes(2, (8, 9)).requires_grad_(), torch.tensor([1, 0])
    arguments = (maps, boxes, image, areas, [2, 1], [1.0, 0.5][: len(maps)], 2, False)
    torch.library.opcheck(torch.ops.detector.affine_crop.default, arguments)
    upstream = randn(2, 3, 2, 1)
    torch.library.opcheck(
        torch.ops.detector.affine_crop_backward.default,
        (upstream, [m.detach() for m in maps], boxes.detach(), *arguments[2:], "both"),
    )


@interpreted
def test_invalid_rois_are_nan():
    """On every device; other samplers raise errors on a CPU."""
    boxes = general_boxes(5, (8, 9)).requires_grad_()
    rois = with_index([0.0, 2.0, 0.5, float("nan"), -1.0], boxes)
    source = randn(2, 3, 8, 9).requires_grad_()
    crops = affine_crop(source, rois, 2, sampler="triton")
    assert crops[1:].isnan().all()
    expected = roi_align(source, rois[:1].detach(), 2)
    torch.testing.assert_close(crops[:1], expected, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(crops.sum(), [source, boxes])
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected.sum(), source)[0], rtol=0, atol=1e-10)
    assert not gradients[1][1:].any()
    assert gradients[1][0].any()


@interpreted
@pytest.mark.parametrize("losses", [("box",), ("box", "classification", "mask")], ids=str)
def test_a_training_step_and_an_inference(losses):
    """Of a Mask R-CNN with a refinement; its losses, gradients and detections are those of the gather."""
    few = {"box_batch_size_per_image": 6, "rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 3}
    images = [torch.rand(3, 64, 64)]
    target = {"boxes": torch.tensor([[10.0, 10, 40, 50]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    results = []
    for sampler in ("gather", "triton"):
        model = add_refinement(tiny_rcnn("mask", **few), RefinementConfig(boxes_per_image=3, ascent_steps=1))
        swap_crop_head(model, BoxGradient(losses=losses), sampler=sampler)
        torch.manual_seed(0)
        found = model.train()(images, [dict(target)])
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(found.values()), parameters, allow_unused=True)
        with torch.inference_mode():
            detections = model.eval()(images)[0]
        results.append([*found.values(), *detections.values(), *(g for g in gradients if g is not None)])
    assert len(results[0]) > 20
    for expected, ours in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= 1e-4 * max(expected.abs().max(), 1e-3)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 1, 30000, 30000), (1, 1, 30000, 90000)], ids=str)
def test_more_than_two_to_the_31_elements(shape):
    """In all images or in one. The zeros are never touched, so they take no memory."""
    source = torch.zeros(shape, dtype=torch.bfloat16)
    image, _, y, x = (side - 10 if side > 10 else side - 1 for side in shape)
    source[image, 0, y : y + 2, x : x + 2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert (image * shape[2] + y) * shape[3] + x > 2**31
    box = torch.tensor([[image, x, y, x + 2, y + 2]], dtype=torch.float32)
    assert affine_crop(source, box, 1, 1.0, 2, aligned=True, sampler="triton").item() == 2.5


# --- Compiled for other machines -------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("task", ["crop", "both"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_channels_last_maps_are_read_and_written_in_vectors(task, dtype, architecture):
    code = compile_for("cuda", architecture, task, True, dtype)["ptx"]
    assert re.search(r"ld\.global\.v4\.b32", code)
    if task == "both":
        adds = re.findall(r"(?:atom|red)\.global\S*\.add\S*", code)
        assert adds
        # Earlier GPUs have no such instruction.
        assert all(".v4.f32" in add for add in adds) == (architecture == 90)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("backend", [("cuda", 80), ("cuda", 90), ("hip", "gfx942")], ids=str)
@pytest.mark.parametrize("task", ["crop", "maps", "boxes", "both"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [2, 0, -1])
def test_every_variant_compiles(backend, task, channels_last, ratio):
    assert compile_for(*backend, task, channels_last, ratio=ratio, levels=1 if ratio == -1 else 4)


# --- What a call launches --------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """The operators of a call that start a kernel on a GPU."""

    free = ("view", "_unsafe_view", "expand", "permute", "slice", "select", "split", "split_with_sizes", "unsqueeze")
    free += ("detach", "alias", "empty", "new_empty", "empty_like", "t", "transpose", "unbind", "as_strided")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space != "prim" and name not in self.free:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@compiled
@both_layouts
@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("names", [["1"], NAMES], ids=str)
@pytest.mark.parametrize("images", [1, 2])
def test_a_forward_is_one_launch_and_reads_no_value(monkeypatch, images, names, ratio, layout):
    """On tensors without values, as if on a GPU: reading one would raise, for adaptive counts too."""
    monkeypatch.setattr(detector.crop.crop, "_why_no_triton", lambda device: None)
    with FakeTensorMode():
        strides = {name: STRIDES[name] for name in names}
        maps = {n: torch.empty(images, 64, 128 // s, 160 // s, device="cuda") for n, s in strides.items()}
        maps = {n: m.contiguous(memory_format=layout).requires_grad_() for n, m in maps.items()}
        boxes = [torch.empty(5, 4, device="cuda", requires_grad=True) for _ in range(images)]
        with Launches() as forward:
            pool(ratio, names=names)(maps, boxes, [SIZE] * images)
    # The indices of images, and both tensors joined. torchvision starts more for that alone.
    assert sorted(forward.names) == ["affine_crop", *["cat"] * (images > 1) * 2, *["full_like"] * images]


@compiled
@pytest.mark.parametrize("takes", [False, True])
def test_auto_takes_it_on_a_gpu_if_it_is_turned_on(monkeypatch, takes):
    monkeypatch.setattr(detector.crop.crop, "_why_no_triton", lambda device: None)
    monkeypatch.setattr(detector.crop.crop, "AUTO_TAKES_TRITON", takes)
    with FakeTensorMode(), Launches() as on_gpu:
        affine_crop(torch.empty(1, 3, 8, 9, device="cuda"), [torch.empty(2, 4, device="cuda")], 2, 1.0, 2)
    assert ("affine_crop" in on_gpu.names) == takes
    with Launches() as on_cpu:
        affine_crop(randn(1, 3, 8, 9), [general_boxes(2, (8, 9))], 2, 1.0, 2)
    assert "affine_crop" not in on_cpu.names


@interpreted
def test_a_backward_is_one_launch():
    features = {name: m.requires_grad_() for name, m in pyramid(2, SIZE, 20).items()}
    boxes = [boxes_of_side(LEVEL_SIDES[:1], seed).requires_grad_() for seed in range(2)]
    crops = pool()(features, boxes, [SIZE] * 2)
    upstream = torch.ones_like(crops)
    with Launches() as backward:
        torch.autograd.grad(crops, [*features.values(), *boxes], upstream)
    assert backward.names == ["affine_crop_backward", "sum"]  # of the boxes' gradient over two blocks of channels
    with Launches() as of_boxes:
        pool().box_gradient(features, boxes, [SIZE] * 2, upstream)
    assert of_boxes.names[-2:] == ["affine_crop_backward", "sum"]
    assert set(of_boxes.names[:-2]) == {"cat", "full_like"}


@interpreted
def test_the_kernel_is_tried_on_real_tensors():
    """A result that was found on tensors without values would be remembered."""
    with FakeTensorMode():
        assert why_not.__wrapped__(torch.device("cpu")) is None


@compiled
def test_why_the_kernel_cannot_run(monkeypatch):
    kernels = pytest.importorskip("detector.crop.triton_kernels")
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # so that the kernel is tried, which fails on a CPU
    assert "Triton failed" in why_not.__wrapped__(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "detector.crop.triton_kernels", None)
    assert "cannot be imported" in why_not.__wrapped__(torch.device("cpu"))


@compiled
def test_tensors_on_a_cpu_warn_and_another_sampler_is_taken():
    source, boxes = randn(1, 2, 8, 9), [general_boxes(2, (8, 9))]
    with pytest.warns(UserWarning, match="triton"):
        crops = affine_crop(source, boxes, 2, 1.0, 2, sampler="triton")
    assert torch.equal(crops, affine_crop(source, boxes, 2, 1.0, 2))
    with pytest.warns(UserWarning, match="triton"):
        crops = exact_crop(source, boxes, 2, sampler="triton")
    assert torch.equal(crops, exact_crop(source, boxes, 2))
