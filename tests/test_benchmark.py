"""tools/benchmark.py on maps of a few pixels: what it measures and writes. No test depends on a time."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_rcnn
from torchvision.ops import roi_align

from detector import swap_crop_head

spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).parents[1] / "tools" / "benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

TINY = ["--rois", "4", "12", "--size", "64", "96", "--channels", "4", "--repeats", "1"]

pytestmark = pytest.mark.slow


def tiny_detector(case, options, swapped):
    model = tiny_rcnn("mask" if "mask" in case.name else "box")
    return swap_crop_head(model) if swapped else model


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    options = ["--detectors", *benchmark.DETECTORS, "--detector_dtypes", "float32", "bfloat16", "--batches", "1", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "make_detector", tiny_detector)
        benchmark.main([*TINY, *options, "--layouts", "channels_last", "--folder", str(folder)])
    return folder


def test_everything_is_measured(results):
    data = json.loads((results / "benchmark.json").read_text())
    assert data["bandwidth"] > 0
    measured = {(*entry["case"].values(), entry["pooler"]) for entry in data["poolers"]}
    for pooler in ("torchvision", "grid_sample", "gather"):
        fpn = {("FPN", dtype, "channels_last", rois, 7, pooler) for dtype in benchmark.DTYPES for rois in (4, 12)}
        assert fpn | {("single level", "float32", "channels_last", rois, 7, pooler) for rois in (4, 12)} < measured
        assert ("FPN", "float32", "channels_last", 12, 14, pooler) in measured
    assert ("FPN", "float32", "channels_last", 12, 7, benchmark.DETERMINISTIC) in measured
    for entry in data["poolers"]:
        assert 0 < entry["forward"]["seconds"][0] < entry["forward_backward"]["seconds"][0]
    for maps, layout, rois, bins in [("single level", "channels_last", 12, 7), ("36 x 36 pixels", "NCHW", 10, 5)]:
        for pooler in ("prroi_pool2d", "roi_align_rotated"):
            assert (maps, "float32", layout, rois, bins, pooler) in measured
    assert len({(entry["task"], *entry["case"].values(), entry["swapped"]) for entry in data["detector"]}) == 32
    assert all(entry["seconds"][0] > 0 for entry in data["detector"])
    text = (results / "benchmark.md").read_text()
    assert "| FPN, 7 x 7, bfloat16, channels_last | 12 | gather |" in text
    assert "| maskrcnn_resnet50_fpn | training step | 2 | bfloat16, channels_last |" in text


def test_results_are_rendered_again(results, tmp_path, capsys):
    (tmp_path / "copy.json").write_text((results / "benchmark.json").read_text())
    benchmark.main(["--render", str(tmp_path / "copy.json")])
    text = (results / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.md").read_text() == text
    assert text in capsys.readouterr().out


def test_a_ratio_is_taken_within_each_round():
    # A machine that is ten times slower in the second round: 2, 2 and 3 times the reference.
    assert benchmark.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == "2.00 (2.00-3.00)"


def test_the_detectors_that_are_compared():
    options = argparse.Namespace(size=[64, 96], device=torch.device("cpu"), sampler="gather")
    case = benchmark.DetectorCase("maskrcnn_resnet50_fpn", 1, "float32", "channels_last")
    stock, swapped = (benchmark.make_detector(case, options, swapped) for swapped in (False, True))
    assert type(stock.roi_heads.mask_roi_pool) is benchmark.MultiScaleRoIAlign
    assert swapped.roi_heads.mask_roi_pool.sampler == "gather"
    assert swapped.roi_heads.box_gradient.losses == ("box", "mask")
    for ours, theirs in zip(swapped.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_targets_make_positives():
    options = argparse.Namespace(size=[64, 96], device=torch.device("cpu"), sampler="auto")
    case = benchmark.DetectorCase("fasterrcnn_resnet50_fpn", 1, "float32", "NCHW")
    (target,) = benchmark._reachable_targets(benchmark.make_detector(case, options, False), [torch.rand(3, 64, 96)])
    assert (target["boxes"][:, 2:] <= torch.tensor([96, 64])).all()
    assert (target["boxes"][:, 2:] - target["boxes"][:, :2] > 16).any(1).all()


def test_fewest_bytes():
    options = argparse.Namespace(size=[64, 96], images=1, channels=4, sampling_ratio=2, device=torch.device("cpu"))
    inputs = benchmark.Inputs(benchmark.Case("single level", "float32", "channels_last", 2, 7), options)
    # Stride 16, one bin with one sample: from 40 to 72 pixels it is at 3.5, between 3 and 4; the second box, at 0.5
    # in y and x, lies in the corner.
    inputs.boxes = [torch.tensor([[40.0, 0.0, 72.0, 16.0], [0.0, 0.0, 16.0, 16.0]])]
    pixel = 4 * 4  # channels, bytes
    crops = 2 * 49 * pixel
    moved = {"forward": 8 * pixel + crops, "forward_backward": 8 * pixel + 2 * crops + 24 * pixel}
    assert inputs.fewest_bytes(1, 1) == {**moved, "box_gradient": 8 * pixel}


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_the_pixels_of_the_floor_are_those_that_roi_align_reads(ratio):
    features = torch.zeros(1, 1, 9, 40, dtype=torch.float64, requires_grad=True)
    box = [3.3, 1.2, 37.9, 5.1]
    crops = roi_align(features, [torch.tensor([box], dtype=torch.float64)], 7, 1.0, ratio)
    (gradient,) = torch.autograd.grad(crops.sum(), features)
    rows = benchmark._neighbours(box[1], box[3], 7, ratio, 9)
    columns = benchmark._neighbours(box[0], box[2], 7, ratio, 40)
    read = torch.zeros(9, 40, dtype=torch.bool)
    read[rows[:, None], columns] = True
    assert torch.equal(read, gradient[0, 0] > 0)


def test_peak_memory_is_that_of_the_run():
    peak = benchmark.peak_memory(lambda: torch.ones(2**24).add(1), torch.device("cpu"))
    if peak is None:
        pytest.skip("not Linux with glibc")
    assert 2**27 * 0.9 < peak < 2**27 * 1.3
    assert benchmark.peak_memory(lambda: None, torch.device("cpu")) < 2**22


def test_results_survive_an_interruption(tmp_path, monkeypatch):
    measure = benchmark.measure_poolers

    def interrupted(cases, *rest):
        yield from measure(cases[:1], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure_poolers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*TINY, "--folder", str(tmp_path)])
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["poolers"]) == 3
    assert "gather" in (tmp_path / "benchmark.md").read_text()


def test_a_pooler_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    forward = benchmark.MultiScaleAffineCrop.forward

    def out_of_memory(pooler, *arguments):
        if pooler.sampler == "grid_sample":
            raise torch.OutOfMemoryError("out of memory\nand more")
        return forward(pooler, *arguments)

    monkeypatch.setattr(benchmark.MultiScaleAffineCrop, "forward", out_of_memory)
    options = ["--detectors", "--dtypes", "float32", "--sampling_ratio", "0", "--layouts", "NCHW"]
    benchmark.main([*TINY, *options, "--folder", str(tmp_path)])
    data = json.loads((tmp_path / "benchmark.json").read_text())
    assert {entry["pooler"] for entry in data["poolers"] if "error" in entry} == {"grid_sample"}
    assert "| grid_sample | out of memory |" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--rois", "0", "5"], ["--folder", "{results}"]])
def test_errors_name_the_flag(arguments, results, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([argument.format(results=results) for argument in arguments])
    assert arguments[0] in capsys.readouterr().err
