"""The Triton kernel: under Triton's interpreter, cross-compiled for GPUs that are not here, and what a call launches.

The interpreter needs a process of its own, because it must be chosen before Triton is imported.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.crops import INTERPRETED, general_boxes, randn, with_index
from support.operator_counts import OperatorCounts
from support.pyramids import LEVEL_SIDES, SMALL, STRIDES, boxes_of_side, pyramid
from support.tiny_models import tiny_rcnn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import MultiScaleRoIAlign, roi_align

import detector.crop.crop
from detector import (
    BoxGradient,
    MultiScaleAffineCrop,
    RefinementConfig,
    add_refinement,
    affine_crop,
    prroi_pool2d,
    swap_crop_head,
)
from detector.crop.triton_sampler import Flat, _launch, why_not

pytest.importorskip("triton")

from support.cross_compile import compile_for
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from detector.crop import triton_kernels

FOLDER = Path(__file__).parent
NAMES, SIZE = list(STRIDES), (120, 150)
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def runs_the_kernel(test):
    """Mark a test for the process of test_under_the_interpreter, or for a GPU."""
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA, or Triton's interpreter")(test))


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
    pooler = FOLDER.parent / "rcnn" / "test_pooler.py"
    run_interpreted(str(FOLDER), str(pooler), "-k", "triton", "-m", "", "--ignore", str(Path(__file__)))


# --- Under the interpreter, or on a GPU ------------------------------------------------------------------------------


def pool(ratio=2, sampler="triton", names=NAMES):
    return MultiScaleAffineCrop(names, 3, ratio, **SMALL, sampler=sampler)


def on_device(tensor):
    """The tensor on the device of this file, as a leaf that requires a gradient."""
    return tensor.detach().to(DEVICE).requires_grad_()


def assert_equals_the_gather(crop, inputs):
    """Values and gradients of a crop with either sampler; and that the kernel was launched for ours."""
    results = []
    for sampler in ("triton", "gather"):
        with OperatorCounts() as launches:
            crops = crop(sampler)
            results.append([crops, *torch.autograd.grad(crops, inputs, randn(*crops.shape).to(crops))])
        assert ("affine_crop" in launches.kernels) == (sampler == "triton")
        assert ("affine_crop_backward" in launches.kernels) == (sampler == "triton")
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)
    return results[0]


@runs_the_kernel
@both_layouts
@pytest.mark.parametrize("ratio", [2, -1])
def test_values_and_gradients_of_a_pyramid(layout, ratio):
    maps = {n: on_device(m.contiguous(memory_format=layout)) for n, m in pyramid(2, SIZE, 5).items()}
    boxes = [on_device(boxes_of_side(LEVEL_SIDES[:4], 1)), on_device(boxes_of_side(LEVEL_SIDES[:1]))]
    inputs = [*maps.values(), *boxes]
    crops, *gradients = assert_equals_the_gather(lambda s: pool(ratio, s)(maps, boxes, [SIZE] * 2), inputs)
    stock = MultiScaleRoIAlign(NAMES, 3, ratio, **SMALL)(maps, [b.detach() for b in boxes], [SIZE] * 2)
    torch.testing.assert_close(crops, stock, rtol=0, atol=1e-10)
    for gradient, source in zip(gradients, maps.values()):
        assert gradient.is_contiguous(memory_format=layout)
        assert gradient.shape == source.shape


@runs_the_kernel
@pytest.mark.parametrize("strides", [{"0": 4, "2": 16}, {"0": 8, "1": 8}], ids=str)
def test_boxes_on_no_level(strides):
    """Larger ones than the levels have, where one is left out, and those of negative area."""
    maps = {name: on_device(m) for name, m in pyramid(1, SIZE, strides=strides).items()}
    boxes = boxes_of_side([20, 300, 20])
    boxes[2] = boxes[2, [2, 1, 0, 3]]
    boxes = on_device(boxes)

    def crop(sampler):
        return pool(2, sampler, list(strides))(maps, [boxes], [SIZE])

    crops, *_ = assert_equals_the_gather(crop, [*maps.values(), boxes])
    assert crops[0].any()
    assert not crops[2].any()
    assert crops[1].any() == (len(set(strides.values())) == 1)


@runs_the_kernel
@pytest.mark.parametrize("frozen", ["boxes", "maps"])
def test_only_the_needed_gradients(frozen):
    source, boxes = randn(1, 4, 8, 9).to(DEVICE), general_boxes(3, (8, 9)).to(DEVICE)
    wanted = (boxes if frozen == "maps" else source).requires_grad_()
    assert_equals_the_gather(lambda s: affine_crop(source, [boxes], 2, 1.0, 2, sampler=s), [wanted])


@runs_the_kernel
@pytest.mark.parametrize(("channels", "bins"), [(1, 3), (257, 1), (2, 9)], ids=str)
def test_blocks_of_channels_and_bins(channels, bins):
    """257 channels are 17 blocks of a gradient, and 9 x 9 bins are two blocks."""
    source, boxes = on_device(randn(1, channels, 8, 9)), on_device(general_boxes(1, (8, 9)))
    assert_equals_the_gather(lambda s: affine_crop(source, [boxes], bins, 1.0, 1, sampler=s), [source, boxes])


@runs_the_kernel
def test_tensors_that_are_not_dense():
    source, columns = on_device(randn(1, 3, 16, 18)), on_device(general_boxes(2, (8, 9)).T.contiguous())

    def crop(sampler):
        crops = affine_crop(source[:, :, ::2, 1::2], [columns.T], 2, 1.0, 2, sampler=sampler)
        return crops.transpose(2, 3)  # so that the upstream gradient is not dense

    assert_equals_the_gather(crop, [source, columns])


@runs_the_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_boxes_of_half_precision_with_the_index_of_their_image(dtype):
    maps = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 4, 4).to(DEVICE)
    rois = with_index([1.0, 2.0, 0.0, 3.0, 4.0], torch.tensor([[1.0, 1, 3, 3]]).repeat(5, 1)).to(DEVICE, dtype)
    crops = affine_crop(maps, rois, 1, 1.0, 1, sampler="triton").flatten()
    assert crops[:4].tolist() == [1, 2, 0, 3]
    assert crops[4].isnan()


@runs_the_kernel
def test_no_images():
    source, rois = on_device(torch.zeros(0, 3, 8, 9)), on_device(torch.tensor([[0.0, 1, 1, 5, 6]]))
    crops = affine_crop(source, rois, 2, 1.0, 2, sampler="triton")
    assert crops.isnan().all()
    assert not torch.autograd.grad(crops.sum(), rois)[0].any()


@runs_the_kernel
def test_deterministic_mode_takes_the_gather(request):
    request.getfixturevalue("deterministic")
    with OperatorCounts() as launches:
        affine_crop(randn(1, 3, 8, 9).to(DEVICE), [general_boxes(1, (8, 9)).to(DEVICE)], 2, sampler="triton")
    assert "affine_crop" not in launches.kernels


@runs_the_kernel
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("ratio", [2, -1])
def test_it_compiles_into_one_graph(ratio):
    source, boxes = on_device(randn(2, 3, 8, 9)), on_device(general_boxes(3, (8, 9)))
    compiled = torch.compile(affine_crop, fullgraph=True, backend="aot_eager")
    results = []
    for crop in (compiled, affine_crop):
        crops = crop(source, [boxes[:1], boxes[1:]], (2, 3), 1.0, ratio, sampler="triton")
        results.append([crops, *torch.autograd.grad(crops, [source, boxes], randn(*crops.shape).to(DEVICE))])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@runs_the_kernel
@pytest.mark.usefixtures("fresh_compiler")
def test_prroi_pool_is_the_kernel_in_compiled_graphs_too():
    source, boxes = on_device(randn(2, 3, 8, 9)), on_device(general_boxes(3, (8, 9)))
    rois = [boxes[:1], boxes[1:]]
    expected = assert_equals_the_gather(lambda m: prroi_pool2d(source, rois, 2, 3, 0.9, method=m), [source, boxes])
    compiled = torch.compile(prroi_pool2d, fullgraph=True, backend="aot_eager")
    pooled = compiled(source, rois, 2, 3, 0.9, method="triton")
    gradients = torch.autograd.grad(pooled, [source, boxes], randn(*pooled.shape).to(DEVICE))
    torch.testing.assert_close([pooled, *gradients], expected, rtol=0, atol=1e-10)


@runs_the_kernel
@pytest.mark.parametrize("areas", [None, [30.0]])
def test_the_operator_passes_opcheck(areas):
    maps = [on_device(randn(2, 3, 8, 9)), on_device(randn(2, 3, 4, 5))][: 1 + bool(areas)]
    boxes, image = on_device(general_boxes(2, (8, 9))), torch.tensor([1, 0], device=DEVICE)
    arguments = (maps, boxes, image, areas, [2, 1], [1.0, 0.5][: len(maps)], 2, False)
    torch.library.opcheck(torch.ops.detector.affine_crop.default, arguments)
    upstream = randn(2, 3, 2, 1).to(DEVICE)
    torch.library.opcheck(
        torch.ops.detector.affine_crop_backward.default,
        (upstream, [m.detach() for m in maps], boxes.detach(), *arguments[2:], "both"),
    )


@runs_the_kernel
def test_invalid_rois_are_nan():
    """On every device; other samplers raise errors on a CPU."""
    boxes = on_device(general_boxes(5, (8, 9)))
    rois = with_index([0.0, 2.0, 0.5, float("nan"), -1.0], boxes)
    source = on_device(randn(2, 3, 8, 9))
    crops = affine_crop(source, rois, 2, sampler="triton")
    assert crops[1:].isnan().all()
    expected = roi_align(source, rois[:1].detach(), 2)
    torch.testing.assert_close(crops[:1], expected, rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(crops.sum(), [source, boxes])
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected.sum(), source)[0], rtol=0, atol=1e-10)
    assert not gradients[1][1:].any()
    assert gradients[1][0].any()


@runs_the_kernel
@pytest.mark.parametrize("losses", [("box",), ("box", "classification", "mask")], ids=str)
def test_a_training_step_and_an_inference(losses):
    """Of a Mask R-CNN with a refinement; its losses, gradients and detections are those of the gather."""
    few = {"box_batch_size_per_image": 6, "rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 3}
    images = [torch.rand(3, 64, 64).to(DEVICE)]
    target = {"boxes": torch.tensor([[10.0, 10, 40, 50]]), "labels": torch.tensor([1])}
    target = {name: tensor.to(DEVICE) for name, tensor in target.items()}
    target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8, device=DEVICE)
    results = []
    for sampler in ("gather", "triton"):
        model = add_refinement(tiny_rcnn("mask", **few), RefinementConfig(ascent_steps=1)).to(DEVICE)
        swap_crop_head(model, BoxGradient(losses=losses), sampler=sampler)
        torch.manual_seed(0)
        with OperatorCounts() as training:
            found = model.train()(images, [dict(target)])
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(sum(found.values()), parameters, allow_unused=True)
        with torch.inference_mode(), OperatorCounts() as inference:
            detections = model.eval()(images)[0]
        results.append([*found.values(), *detections.values(), *(g for g in gradients if g is not None)])
    # The pools of boxes and masks, the boxes that are classified again, and the iterations of the refinement, each
    # backward too. The gradient of the box loss alone is one more.
    config = model.roi_heads.refinement.config
    assert training.kernels["affine_crop"] == 3 + config.train_iterations
    assert training.kernels["affine_crop_backward"] == 3 + config.train_iterations + (losses == ("box",))
    # Both pools, the start and the iterations of the refinement, and the ascent.
    assert inference.kernels["affine_crop"] > 3 + config.iterations
    assert inference.kernels["affine_crop_backward"] > 0
    assert len(results[0]) > 20
    for expected, ours in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= 1e-4 * max(expected.abs().max(), 1e-3)


@runs_the_kernel
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 1, 30000, 30000), (1, 1, 30000, 90000)], ids=str)
def test_more_than_two_to_the_31_elements(shape):
    """In all images or in one. On a CPU the zeros are never touched, so they take no memory."""
    source = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    image, _, y, x = (side - 10 if side > 10 else side - 1 for side in shape)
    source[image, 0, y : y + 2, x : x + 2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert (image * shape[2] + y) * shape[3] + x > 2**31
    box = torch.tensor([[image, x, y, x + 2, y + 2]], dtype=torch.float32, device=DEVICE)
    assert affine_crop(source, box, 1, 1.0, 2, aligned=True, sampler="triton").item() == 2.5


# --- Compiled for other machines -------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("task", ["crop", "both"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_channels_last_maps_are_read_and_written_in_vectors(task, dtype, architecture):
    code = compile_for("cuda", architecture, task, True, dtype)["ptx"]
    assert re.search(r"ld\.global\.v4\.b32", code)
    # Products fused into sums, or divisions that round otherwise, would move samples across the border.
    assert "fma.rn" not in code
    assert "div.rn" in code
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


@compiled
@pytest.mark.parametrize(
    "sizes",
    [
        {"C": 1, "BINS_Y": 1, "BINS_X": 1, "BLOCK_BINS": 1, "BLOCK_C": 1},
        {"C": 257, "BINS_Y": 14, "BINS_X": 14},
        {"GEOMETRY": "float64", "SUM": "float64"},
        {"OFFSET": "int64"},
    ],
    ids=str,
)
def test_other_sizes_and_dtypes_compile(sizes):
    assert compile_for("cuda", 90, "both", True, "fp64" if "SUM" in sizes else "fp32", **sizes)


@compiled
def test_sizes_and_numbers_need_no_new_compilation():
    """Triton compiles anew for integers that are 1 or multiples of 16, unless it is told not to."""

    def key(sizes, rois, images):
        tensor = torch.empty(64)
        pointers = [tensor, torch.empty(16, dtype=torch.int64), *[tensor] * 3]
        constants = {parameter.name: 1 for parameter in triton_kernels.crop_kernel.params if parameter.is_constexpr}
        return bind((tensor, tensor), sizes, sizes, *pointers, rois, images, 4, 1, **constants)[1]

    arguments = (
        triton_kernels.crop_kernel.signature,
        triton_kernels.crop_kernel.params,
        make_backend(GPUTarget("cuda", 90, 32)),
    )
    bind = create_function_from_signature(*arguments)
    first = key((200.0, 100.0), 1000, 2)
    assert first == key((16.0, 1.0), 1000, 2) == key((200.0, 100.0), 1, 2) == key((200.0, 100.0), 16, 1)


# --- What a call launches --------------------------------------------------------------------------------------------


@compiled
@both_layouts
@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("names", [["1"], NAMES], ids=str)
@pytest.mark.parametrize("images", [1, 2])
def test_a_forward_is_one_launch_and_reads_no_value(monkeypatch, images, names, ratio, layout):
    """On tensors without values, as if on a GPU: reading one would raise, for adaptive counts too."""
    monkeypatch.setattr(detector.crop.crop, "_has_triton", lambda device: True)
    with FakeTensorMode():
        strides = {name: STRIDES[name] for name in names}
        maps = {n: torch.empty(images, 64, 128 // s, 160 // s, device="cuda") for n, s in strides.items()}
        maps = {n: m.contiguous(memory_format=layout).requires_grad_() for n, m in maps.items()}
        boxes = [torch.empty(5, 4, device="cuda", requires_grad=True) for _ in range(images)]
        with OperatorCounts() as forward:
            pool(ratio, names=names)(maps, boxes, [SIZE] * images)
    # The indices of images, and both tensors joined. torchvision starts more for that alone.
    joined = {"cat": 2} if images > 1 else {}
    assert forward.kernels == {"affine_crop": 1, "full_like": images, **joined}
    assert not forward.syncs


@compiled
@pytest.mark.parametrize("takes", [False, True])
def test_auto_takes_it_on_a_gpu_if_it_is_turned_on(monkeypatch, takes):
    monkeypatch.setattr(detector.crop.crop, "_has_triton", lambda device: True)
    monkeypatch.setattr(detector.crop.crop, "AUTO_TAKES_TRITON", takes)
    with FakeTensorMode(), OperatorCounts() as on_gpu:
        affine_crop(torch.empty(1, 3, 8, 9, device="cuda"), [torch.empty(2, 4, device="cuda")], 2, 1.0, 2)
    assert ("affine_crop" in on_gpu.kernels) == takes
    with OperatorCounts() as on_cpu:
        affine_crop(randn(1, 3, 8, 9), [general_boxes(2, (8, 9))], 2, 1.0, 2)
    assert "affine_crop" not in on_cpu.kernels


@runs_the_kernel
def test_a_backward_is_one_launch():
    features = {name: on_device(m) for name, m in pyramid(2, SIZE, 20).items()}
    boxes = [on_device(boxes_of_side(LEVEL_SIDES[:1], seed)) for seed in range(2)]
    crops = pool()(features, boxes, [SIZE] * 2)
    upstream = torch.ones_like(crops)
    with OperatorCounts() as backward:
        torch.autograd.grad(crops, [*features.values(), *boxes], upstream)
    assert backward.kernels == {
        "affine_crop_backward": 1,
        "sum": 1,
    }  # of the boxes' gradient over two blocks of channels
    with OperatorCounts() as of_boxes:
        pool().box_gradient(features, boxes, [SIZE] * 2, upstream)
    assert of_boxes.kernels == {"cat": 2, "full_like": 2, "affine_crop_backward": 1, "sum": 1}


@compiled
@both_layouts
@pytest.mark.parametrize("task", ["crop", "both"])
def test_the_operator_copies_nothing(monkeypatch, task, layout):
    """No map, box or gradient that is dense."""
    maps = [randn(2, 3, side, side).float().contiguous(memory_format=layout) for side in (8, 4)]
    boxes, image, geometry = (
        general_boxes(2, (8, 8)).float(),
        torch.tensor([0, 1]),
        Flat([9.0], [2, 2], [1, 0.5], 2, True),
    )
    crops, gradients = torch.zeros(2, 3, 2, 2), (torch.zeros(480), torch.zeros(1, 2, 4))
    given = []
    stub = {(2,): lambda *arguments, **constants: given.append(arguments)}
    monkeypatch.setattr(triton_kernels, "crop_kernel", stub)
    with OperatorCounts() as launches:
        _launch(task, maps, boxes, image, geometry, crops, *(gradients if task == "both" else ()))
    assert not launches.kernels
    assert all(ours is theirs for ours, theirs in zip(given[0][0], maps, strict=True))


@runs_the_kernel
def test_the_kernel_is_tried_on_real_tensors():
    """A result that was found on tensors without values would be remembered."""
    with FakeTensorMode():
        assert why_not.__wrapped__(DEVICE) is None


@runs_the_kernel
def test_no_memory_for_the_trial_is_an_error(monkeypatch):
    """It may pass, so it must not be remembered."""

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        why_not.__wrapped__(DEVICE)


@compiled
def test_why_the_kernel_cannot_run(monkeypatch):
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)  # so that the kernel is tried, which fails on a CPU
    assert "Triton failed" in why_not.__wrapped__(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "detector.crop.triton_kernels", None)
    assert "cannot be imported" in why_not.__wrapped__(torch.device("cpu"))


@compiled
@pytest.mark.usefixtures("fresh_compiler")
def test_tensors_on_a_cpu_take_another_sampler_with_one_warning():
    source, boxes = randn(1, 2, 8, 9), [general_boxes(2, (8, 9))]
    expected = affine_crop(source, boxes, 2, 1.0, 2)
    detector.crop.crop._warn_once.cache_clear()
    compiled_crop = torch.compile(affine_crop, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for crop in (affine_crop, compiled_crop):
            crops = crop(source, boxes, 2, 1.0, 2, sampler="triton")
            torch.testing.assert_close(crops, expected, rtol=0, atol=1e-12)
        assert torch.equal(prroi_pool2d(source, boxes, 2, 2, method="triton"), prroi_pool2d(source, boxes, 2, 2))
    assert len([w for w in warned if "triton" in str(w.message)]) == 1
