"""tools/benchmark.py on maps of a few pixels: what it measures, writes and survives. No test looks at a time."""

import argparse
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

REPOSITORY = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("benchmark", REPOSITORY / "tools" / "benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

TINY = ["--rois", "4", "12", "--size", "64", "96", "--channels", "4", "--repeats", "1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    benchmark.main([*TINY, "--folder", str(folder)])
    return folder


def options(**changes):
    settings = {"size": [64, 96], "images": 2, "channels": 4, "sampling_ratio": 2, "device": torch.device("cpu")}
    return argparse.Namespace(**settings | changes)


def test_everything_is_measured(results):
    data = json.loads((results / "benchmark.json").read_text())
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert data["bandwidth"] > 0
    measured = {(*entry["case"].values(), entry["pooler"]) for entry in data["poolers"]}
    for pooler in ("torchvision", "grid_sample", "gather"):
        for layout in ("NCHW", "channels_last"):
            for rois in (4, 12):
                for dtype in ("float32", "bfloat16"):
                    assert ("FPN", dtype, layout, rois, 7, pooler) in measured
                assert ("single level", "float32", layout, rois, 7, pooler) in measured
            assert ("FPN", "float32", layout, 12, 14, pooler) in measured
    assert ("single level", "float32", "NCHW", 4, 7, benchmark.COPIED) in measured
    for entry in data["poolers"]:
        forward, both = entry["forward"]["seconds"], entry["forward_backward"]["seconds"]
        assert len(forward) == len(both) == 1
        assert all(0 < f < b for f, b in zip(forward, both))
    measured = {(entry["model"], entry["task"], entry["layout"], entry["swapped"]) for entry in data["detector"]}
    assert len({one for one in measured if one[0] == "fasterrcnn_resnet50_fpn"}) == 8
    masks = [entry for entry in data["detector"] if entry["model"] == "maskrcnn_resnet50_fpn"]
    assert {(entry["task"], entry["layout"]) for entry in masks} == {("training step", "channels_last")}
    assert [entry["losses"] for entry in masks] == [None, ["box"], ["box", "mask"]]
    assert len(data["detector"]) == 8 + len(masks)
    for entry in data["detector"]:
        assert all(seconds > 0 for seconds in entry["seconds"])
        if entry["task"] == "training step":
            assert 0 < entry["truths"] < entry["positives"] < entry["rois"]  # the RPN's own proposals among them
            assert bool(entry["box_loss_gradient_at_rpn"]) == entry["swapped"]
            assert ("mask_loss_gradient_at_rpn" in entry) == (entry in masks)
    assert [bool(entry["mask_loss_gradient_at_rpn"]) for entry in masks] == [False, False, True]
    text = (results / "benchmark.md").read_text()
    assert "| FPN, 7 x 7, bfloat16, channels_last | 12 | gather |" in text
    assert "| training step | channels_last |" in text
    assert "| maskrcnn_resnet50_fpn, one image | layout |" in text
    assert "| training step, losses: box and mask | channels_last |" in text
    assert "- NCHW, from 4 to 12 RoIs: torchvision" in text


def test_results_are_rendered_again(results, tmp_path, capsys):
    (tmp_path / "copy.json").write_text((results / "benchmark.json").read_text())
    benchmark.main(["--render", str(tmp_path / "copy.json")])
    assert (tmp_path / "benchmark.md").read_text() == (results / "benchmark.md").read_text()
    assert (results / "benchmark.md").read_text() in capsys.readouterr().out


def test_results_of_a_time_without_masks_are_rendered_as_they_were(results, tmp_path):
    data = json.loads((results / "benchmark.json").read_text())
    data["detector"] = [entry for entry in data["detector"] if entry["model"] == "fasterrcnn_resnet50_fpn"]
    for entry in data["detector"]:
        del entry["model"], entry["losses"]
    (tmp_path / "benchmark.json").write_text(json.dumps(data))
    benchmark.main(["--render", str(tmp_path / "benchmark.json")])
    text = (results / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.md").read_text() == text.partition("\n\n| maskrcnn")[0] + "\n"


def test_the_mask_rcnn_has_fewer_rounds_and_its_table_says_how_many(results, monkeypatch):
    rounds = {}

    def measure(name, tasks, named, layouts, repeats, options):
        rounds[name] = repeats
        return iter(())

    monkeypatch.setattr(benchmark, "_measure_model", measure)
    list(benchmark.measure_detector(options(repeats=5, layouts=["NCHW"])))
    assert rounds == {"fasterrcnn_resnet50_fpn": 5, "maskrcnn_resnet50_fpn": 3}
    assert "Rounds: 1; " in (results / "benchmark.md").read_text()


def test_an_interruption_before_anything_was_swapped_is_rendered(results):
    data = json.loads((results / "benchmark.json").read_text())
    data["detector"] = data["detector"][:1]
    assert not data["detector"][0]["swapped"]
    assert "one image" not in benchmark.report(data)


def test_the_plot(results):
    assert (results / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_is_taken_within_each_round():
    # A machine that is ten times slower in the second round: 2, 2 and 3 times the reference.
    assert benchmark.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == "2.00 (2.00-3.00)"


@pytest.mark.parametrize("pooler", ["grid_sample", "gather", benchmark.COPIED])
def test_all_poolers_compute_the_same(pooler):
    case = benchmark.Case("single level", "float32", "NCHW", 9, 7)
    inputs = benchmark.Inputs(case, options(size=[320, 320]))
    # Away from the edges, where the naive crop has another rule.
    box = torch.tensor([[60.3, 70.1, 200.2, 150.7]])
    inputs.boxes = [torch.cat([box + shift for shift in range(count)]) for count in (5, 4)]
    poolers = benchmark.make_poolers(case, options())
    expected = poolers["torchvision"](inputs.features, inputs.boxes, inputs.image_shapes)
    assert type(poolers["torchvision"]) is MultiScaleRoIAlign
    boxes = [boxes.requires_grad_() for boxes in inputs.boxes]
    crops = poolers[pooler](inputs.features, boxes, inputs.image_shapes)
    torch.testing.assert_close(crops, expected, rtol=0, atol=1e-3)
    crops.sum().backward()
    assert all(b.grad.abs().sum() > 0 for b in boxes)


def test_the_fewest_bytes():
    case = benchmark.Case("single level", "float32", "channels_last", 2, 7)
    inputs = benchmark.Inputs(case, options(images=1))
    # Stride 16, one bin with one sample: from 40 to 72 pixels it is at 3.5, between 3 and 4; the second box, at 0.5
    # in y and x, lies in the corner.
    inputs.boxes = [torch.tensor([[40.0, 0.0, 72.0, 16.0], [0.0, 0.0, 16.0, 16.0]])]
    pixel = 4 * 4  # channels, bytes
    crops = 2 * 49 * pixel
    assert inputs.fewest_bytes(1, 1) == {
        "forward": 8 * pixel + crops,
        "forward_backward": 8 * pixel + 2 * crops + 24 * pixel,
        "box_gradient": 8 * pixel,
    }


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
    def run():
        torch.ones(2**24).add(1)

    peak = benchmark.peak_memory(run, torch.device("cpu"))
    if peak is None:
        pytest.skip("not Linux with glibc")
    assert 2**27 * 0.9 < peak < 2**27 * 1.3
    assert benchmark.peak_memory(lambda: None, torch.device("cpu")) < 2**22


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch, capsys):
    measure = benchmark.measure_poolers

    def interrupted(cases, *rest):
        yield from measure(cases[:1], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure_poolers", interrupted)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*TINY, "--folder", str(tmp_path)])
    assert stopped.value.code == 130
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["poolers"]) == len(benchmark.POOLERS)
    assert "Stopped" in capsys.readouterr().err
    assert "gather" in (tmp_path / "benchmark.md").read_text()


def test_a_full_disk_loses_no_result(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match=r"cannot be written to: .*No space left"):
        benchmark.main([*TINY, "--no_detector", "--folder", str(tmp_path)])
    out = capsys.readouterr()
    assert "Stopped: [Errno 28] No space left" in out.err
    assert "| FPN, 7 x 7, float32, NCHW | 4 | torchvision |" in out.out


def test_a_pooler_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    forward = benchmark.CopiedMapPooler.forward

    def out_of_memory(*arguments):
        forward(*arguments)
        raise torch.OutOfMemoryError("out of memory\nand a long story")

    monkeypatch.setattr(benchmark.CopiedMapPooler, "forward", out_of_memory)
    benchmark.main([*TINY, "--no_detector", "--dtypes", "float32", "--folder", str(tmp_path)])
    data = json.loads((tmp_path / "benchmark.json").read_text())
    failed = [entry for entry in data["poolers"] if "error" in entry]
    assert {entry["pooler"] for entry in failed} == {benchmark.COPIED}
    assert "| a map copied per RoI | out of memory |" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize("flags", [["--sampling_ratio", "0"], ["--dtypes", "bfloat16", "--layouts", "NCHW"]])
def test_other_settings(flags, tmp_path):
    benchmark.main([*TINY, "--no_detector", *flags, "--folder", str(tmp_path)])
    assert "| gather |" in (tmp_path / "benchmark.md").read_text()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device abacus: "),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--rois", "0", "5"], r"--rois must be at least 1, got \[0, 5\]"),
        (["--folder", "{results}"], "has results already; give another"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, results, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([argument.format(results=results) for argument in arguments])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("content", [None, "", "[]", '{"machine": {}}'])
def test_rendering_what_are_no_results_is_an_error(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"results.json has no results of this tool"):
        benchmark.main(["--render", str(path)])
