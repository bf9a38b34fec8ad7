"""tools/eval.py from end to end, and what it measures beside the scores: losses and stages."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from support.commands import refused, score
from support.refined_models import refined
from support.tiny_detector import tiny_checkpoint
from support.tiny_models import SIZE, batch, copies, tiny_rcnn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from detector import swap_crop_head
from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError, exit_on_user_error
from detector.evaluation import Report, detect_with_losses, scoring, to_results
from detector.evaluation.confusion import image_rows, match_boxes
from detector.evaluation.losses import run_rcnn
from detector.evaluation.pictures import worst_and_best
from detector.evaluation.running import EvaluationOptions, run_detector
from detector.evaluation.scoring import evaluate_detector
from detector.evaluation.timing import STAGES, measure_stages
from detector.evaluation.truth import coco_of
from detector.models.published import published_names
from detector.pretrained.detector import Detector
from detector.pretrained.loading import load_detector
from detector.tools.export import export

REPOSITORY = Path(__file__).parents[2]
TOOLS = REPOSITORY / "tools"
NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
UNREFINED = [stage for stage in (*STAGES, "total") if stage != "refinement"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five images of coloured rectangles, of three classes."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    (root / "val").mkdir(parents=True)
    (root / "annotations").mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 6):
        pixels = np.full((60, 80, 3), 40 * i, dtype=np.uint8)
        for category in (3, 5, 8)[: 1 + i % 3]:
            x, y = (int(v) for v in generator.integers(0, 40, 2))
            pixels[y : y + 20, x : x + 30] = 25 * category
            box = {"bbox": [x, y, 30, 20], "area": 600, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": category, **box})
        Image.fromarray(pixels).save(root / "val" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 60})
    categories = [{"id": i, "name": f"<b>{i}</b>"} for i in (3, 5, 8)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def split(data):
    return CocoDetection(data / "val", data / "annotations" / "instances_val.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of random weights, in a run's folder."""
    path = tmp_path_factory.mktemp("runs") / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(tiny_checkpoint(ids=[3, 5, 8], names=["<b>3</b>", "<b>5</b>", "<b>8</b>"]), path)
    return path


@pytest.fixture(scope="module")
def scored(checkpoint, data, tmp_path_factory):
    """The folder of an evaluation with everything."""
    folder = tmp_path_factory.mktemp("eval")
    score(checkpoint=str(checkpoint), root=str(data), split="val", output=str(folder), speed=2, workers=0)
    return folder


def test_everything_is_written(scored, checkpoint, data, split):
    assert {path.name for path in scored.iterdir()} == {"report.html", "report.json", "scores.json", "detections.json"}
    report = json.loads((scored / "report.json").read_text())
    assert report["about"]["model"] == str(checkpoint)
    assert report["about"]["crop"] == "affine"
    assert report["about"]["images"] == 5
    assert report["about"]["weights"].startswith("sha256:")
    assert report["about"]["detections"] == len(json.loads((scored / "detections.json").read_text())) > 20
    assert set(report["losses"]) == {
        "loss",
        "loss_classifier",
        "loss_box_reg",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    assert [row["at"] for row in report["proposals"]["rows"]] == [100, 300, 1000]
    assert [row["stage"] for row in report["speed"]["rows"]] == UNREFINED
    assert report["notes"] == []
    page = (scored / "report.html").read_text()
    assert "<b>3</b>" not in page
    assert "&lt;b&gt;3&lt;/b&gt;" in page
    assert page.count("data:image/jpeg") >= 2
    assert "Objects by class and size" not in page
    assert report["operating_points"]["by_class"][0].keys() >= {"id", "name", "objects", "score", "f1"}
    scores = json.loads((scored / "scores.json").read_text())
    assert {name: None if value == -1 else value for name, value in scores.items()} == report["scores"]


def test_a_results_file_alone_gets_the_same_scores(scored, data, tmp_path, capsys):
    annotations = str(data / "annotations" / "instances_val.json")
    score(results=str(scored / "detections.json"), annotations=annotations)
    folder = tmp_path / "runs" / "eval-detections"
    assert json.loads((folder / "scores.json").read_text()) == json.loads((scored / "scores.json").read_text())
    assert "data:image" not in (folder / "report.html").read_text()
    score(results=str(scored / "detections.json"), root=str(data), split="val")  # a second run, with pictures
    assert "data:image" in (tmp_path / "runs" / "eval-detections-2" / "report.html").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["losses"] is None
    assert report["speed"] is None
    assert "in runs/eval-detections/" in capsys.readouterr().out


def test_by_default_results_lie_in_the_runs_folder(checkpoint, data):
    score(checkpoint=str(checkpoint), root=str(data), split="val", limit=2, workers=0)
    report = json.loads((checkpoint.parent.parent / "eval-val" / "report.json").read_text())
    assert report["about"]["images"] == 2
    assert "first 2 of 5 images" in report["notes"][0]


def test_both_evaluators(scored, data, tmp_path):
    pytest.importorskip("faster_coco_eval")
    score(
        results=str(scored / "detections.json"),
        root=str(data),
        split="val",
        output=str(tmp_path / "fast"),
        evaluator="faster-coco-eval",
    )
    one, two = (json.loads((folder / "scores.json").read_text()) for folder in (scored, tmp_path / "fast"))
    assert one == pytest.approx(two, abs=1e-6)
    assert "faster-coco-eval" in json.loads((tmp_path / "fast" / "report.json").read_text())["about"]["evaluator"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"checkpoint": "a", "results": "b"}, "give one of"),
        ({"checkpoint": "nothing.ckpt"}, "nothing.ckpt: no such file"),
        ({"model": NAME}, "--model needs --weights"),
        ({"model": "nothing", "weights": "w.pth"}, "not one of torchvision's detectors"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"pictures": -1}, "--pictures must be at least 0"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"min_score": 1.5}, "--min_score must be from 0 to 1"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "abacus"}, "--device abacus"),
        ({"device": "meta"}, "--device meta"),
        ({"split": "test"}, "instances_test.json: no such file"),
        ({"evaluator": "other"}, "--evaluator: invalid choice"),
        ({"refine": "on"}, "--refine on: the detector has no refinement"),
        ({"refine": "off"}, "--refine off: the detector has no refinement"),
        ({"refine": "both"}, "--refine both: the detector has no refinement"),
        ({"refine": "twice"}, "--refine: invalid choice"),
    ],
)
def test_mistakes_end_in_a_sentence(options, message, checkpoint, data):
    if not {"checkpoint", "model", "results"} & set(options) and options:
        options = {"checkpoint": str(checkpoint)} | options
    of_the_flags = message.startswith(("--", "give"))
    with refused(re.escape(message), code=2 if of_the_flags else 1):
        score(**{"root": str(data), "split": "val", "workers": 0} | options)


def test_results_that_do_not_belong_to_the_data(tmp_path, data):
    annotations = str(data / "annotations" / "instances_val.json")
    for content, message in (
        ([{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5}], r"has image_id 9, which"),
        ([{"image_id": 1, "category_id": 4, "bbox": [0, 0, 1, 1], "score": 0.5}], r"has category_id 4, which"),
        ({"images": []}, "not a results file"),
    ):
        (tmp_path / "found.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=message):
            score(results="found.json", annotations=annotations)


def test_ctrl_c_scores_what_was_seen(checkpoint, data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("detector.evaluation.running.run_rcnn", stopping_after(3, seen))
    with pytest.raises(SystemExit) as stop:
        score(checkpoint=str(checkpoint), root=str(data), split="val", output=str(tmp_path / "out"), workers=0)
    assert stop.value.code == 130
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["about"]["images"] == 3
    assert "Stopped by Ctrl-C: these are the first 3 of 5 images." in report["notes"]


def test_a_folder_that_cannot_be_is_refused_before_the_run(checkpoint, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("detector.evaluation.scoring.run_detector", None)
    with pytest.raises(SystemExit, match="file"):
        score(checkpoint=str(checkpoint), root=str(data), split="val", output=str(tmp_path / "file" / "out"))


FILES = {"report.html", "report.json", "scores.json", "detections.json"}


@pytest.mark.parametrize("fails", ["write_json", "write_atomically"])
def test_scores_are_printed_on_a_full_disk(fails, scored, data, monkeypatch, capsys):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"detector.evaluation.scoring.{fails}", full)
    with pytest.raises(SystemExit, match="No space left"):
        score(results=str(scored / "detections.json"), root=str(data), split="val", output="full")
    printed = capsys.readouterr().out
    assert "IoU=0.90" in printed
    assert "Objects by class and size" in printed


def test_an_evaluation_of_a_training_prints_the_scores_on_a_full_disk(checkpoint, split, tmp_path, monkeypatch, capsys):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = EvaluationOptions(workers=0)
    evaluation = evaluate_detector(load_detector(checkpoint), split, options, model="m", root="r", split_name="val")
    evaluation.write(tmp_path / "run", of_training=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | {"examples.png"}
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/jpeg") >= 5
    assert "Objects by class and size" not in capsys.readouterr().out
    monkeypatch.setattr("detector.evaluation.scoring.draw_examples", full)
    with pytest.raises(OSError, match="No space left"):
        evaluation.write(tmp_path / "full", of_training=True)
    assert json.loads((tmp_path / "full" / "scores.json").read_text()) == evaluation.scores
    assert "IoU=0.90" in capsys.readouterr().out


def piped(*command, unbuffered=False, output=None):
    """Run Python where nobody reads the output."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    words = [sys.executable, *map(str, command)]
    try:
        return subprocess.run(
            words, stdout=output or writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=300
        )
    finally:
        os.close(writing)


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", [False, True])
def test_all_is_written_though_nobody_reads(unbuffered, scored, data, tmp_path):
    """Unbuffered, the first line that is printed fails, else what is left at the end."""
    options = ["--results", scored / "detections.json", "--root", data, "--split", "val", "--output", "closed"]
    done = piped(TOOLS / "eval.py", *options, unbuffered=unbuffered)
    assert done.stderr == ""
    assert done.returncode == 141
    assert {path.name for path in (tmp_path / "closed").iterdir()} == FILES
    assert (tmp_path / "closed" / "report.html").read_text().endswith("</html>")
    assert json.loads((tmp_path / "closed" / "scores.json").read_text())["AP"] >= 0


@pytest.mark.slow
def test_other_tools_end_quietly_as_well(checkpoint, data, tmp_path):
    image = data / "val" / "1.png"
    done = piped(TOOLS / "predict.py", image, f"--checkpoint={checkpoint}", "--output=p", "--workers=0")
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "p" / "predictions.json").exists()
    done = piped(TOOLS / "check.py", data / "annotations" / "instances_val.json", "--images", data / "val")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_an_output_that_cannot_be_written_is_a_sentence(scored, data):
    options = ["--results", scored / "detections.json", "--root", data, "--split", "val", "--pictures", "0"]
    with open("/dev/full", "w") as full:
        done = piped(TOOLS / "eval.py", *options, output=full)
    assert done.stderr.strip() == "error: [Errno 28] No space left on device"
    assert done.returncode == 1


def test_a_mistake_is_told_though_nobody_reads():
    script = """
from detector.errors import UserError, exit_on_user_error
with exit_on_user_error():
    print("some words")
    raise UserError("a mistake")
"""
    done = piped("-c", script)
    assert (done.returncode, done.stderr) == (1, "error: a mistake\n")


def test_another_broken_pipe_is_a_mistake_all_the_same():
    with pytest.raises(SystemExit, match="Broken pipe"), exit_on_user_error():
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(checkpoint, scored, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent.parent, run, ignore=shutil.ignore_patterns("eval*"))
    score(checkpoint=str(run), root=str(data), split="val", limit=2, workers=0)
    report = json.loads((run / "eval-val" / "report.json").read_text())
    assert report["about"]["model"] == str(run / "checkpoints" / "last.ckpt")
    assert load_detector(run).digest() == load_detector(checkpoint).digest() == report["about"]["weights"]
    export(checkpoint=str(run), format="pretrained")
    assert (run / "pretrained" / "model.safetensors").exists()
    assert "val" in (run / "pretrained" / "README.md").read_text()
    # A saved folder is one, whatever else lies in it.
    shutil.copytree(run / "checkpoints", run / "pretrained" / "checkpoints")
    (run / "pretrained" / "checkpoints" / "last.ckpt").write_bytes(b"")
    load_detector(run / "pretrained")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ModelError, match=r"run: .*checkpoints/last\.ckpt"):
        load_detector(run)


def test_a_results_file_needs_the_truth(scored, data, tmp_path, monkeypatch):
    with refused("--results needs the ground truth: --annotations FILE, or --root FOLDER with --split"):
        score(results=str(scored / "detections.json"))
    monkeypatch.setenv("DETECTOR_DATA", str(data.parent))
    score(results=str(scored / "detections.json"), dataset=data.name, split="val", output="out", pictures=0)
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(("pictures", "shown"), [(0, 0), (1, 2), (9, 8)])
def test_as_many_pictures_as_are_asked_for(pictures, shown, scored, data, tmp_path):
    """Of five images, each with an object; not one is right, and the worst is best too."""
    truth = json.loads((data / "annotations" / "instances_val.json").read_text())["annotations"]
    found = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth if a["image_id"] < 4
    ]
    found += [{"image_id": i, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.9} for i in (1, 2, 3)]
    (tmp_path / "found.json").write_text(json.dumps(found))
    score(results="found.json", root=str(data), split="val", output="out", pictures=pictures)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == shown  # all five of the worst; the best have something found
    assert ("No pictures" in page) == (pictures == 0)


def test_pictures_show_what_was_counted(scored, data, split, monkeypatch):
    """The boxes that are drawn are those of the counts beside them."""
    found = json.loads((scored / "detections.json").read_text())
    least = float(np.median([one["score"] for one in found]))
    outcomes = match_boxes(coco_of(split.annotations), found, split.image_ids, min_score=least)
    report = Report({}, confusion={"min_score": least}, images=image_rows(outcomes))
    seen = []
    before = []

    def draw(image, boxes, split, unrefined):
        seen.append(boxes)
        before.append(unrefined)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("detector.evaluation.pictures.draw_outcomes", draw)
    pictures, _ = worst_and_best(split, report, outcomes, found, number=5)
    for picture, boxes in zip(pictures, before, strict=True):
        of_image = [one for one in found if one["image_id"] == picture.entry["id"]]
        assert boxes == [one for one in of_image if one["score"] >= least]
    assert sum(len(boxes) for boxes in before) > 5
    assert len(pictures) == len(seen) >= 5
    for picture, boxes in zip(pictures, seen):
        counts = Counter(box.kind for box in boxes)
        for kind in ("found", "missed", "confused", "false"):
            assert picture.entry[kind] == counts[kind]
    assert sum(len(boxes) for boxes in seen) > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_scores_as_the_cpu_does(checkpoint, data, scored, tmp_path):
    score(checkpoint=str(checkpoint), root=str(data), split="val", output="gpu", device="cuda", speed=2)
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (scored, tmp_path / "gpu"))
    assert two["scores"] == pytest.approx(one["scores"], abs=0.05)
    assert set(two["losses"]) == set(one["losses"])
    assert two["proposals"]["rows"][0]["at"] == 100


def stopping_after(images, seen):
    def detect(*arguments, **options):
        if len(seen) == images:
            raise KeyboardInterrupt
        seen.append(1)
        return run_rcnn(*arguments, **options)

    return detect


@pytest.mark.slow
def test_one_stage_detectors_are_scored_with_their_losses(data, tmp_path):
    """Any torchvision detector by name, the number of classes read off the weights."""
    name = "ssdlite320_mobilenet_v3_large"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = {"model": name, "weights": "w.pth", "root": str(data), "split": "val", "workers": 0}
    score(output="out", limit=3, speed=1, **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["about"]["crop"] is None
    assert report["proposals"] is None
    assert set(report["losses"]) == {"loss", "bbox_regression", "classification"}
    stages = ["decode and transform", "backbone", "head", "post-processing", "total"]
    assert [row["stage"] for row in report["speed"]["rows"]] == stages
    with refused(r"--crop affine: .* has no RoI pooler", code=2):
        score(crop="affine", **options)


def test_losses_of_a_one_stage_detector_are_those_of_training():
    model = RetinaNet(tiny_rcnn().backbone, 3, min_size=SIZE, max_size=SIZE, score_thresh=0.0)
    model.anchor_generator = tiny_rcnn().rpn.anchor_generator
    model.head = torchvision.models.detection.retinanet.RetinaNetHead(8, 2, 3)
    images, targets = batch()
    model.train()
    with torch.no_grad():
        wanted = model(images, copies(targets))
    detections, losses = detect_with_losses(model, images, copies(targets))
    assert losses.keys() == wanted.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, wanted[name])
    assert model.training
    with torch.no_grad():
        assert torch.equal(detections[0]["boxes"], model.eval()(images)[0]["boxes"])


class TestStages:
    @pytest.mark.parametrize("kind", ["box", "mask", "keypoint"])
    def test_every_stage_takes_time_and_they_add_up(self, split, kind, monkeypatch):
        """By a clock that ticks once a look: nothing that is measured twice, nothing left out."""
        ticks = iter(range(10**6))
        monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
        model = swap_crop_head(tiny_rcnn(kind))
        model.train()
        done = []
        found = measure_stages(model, split, images=4, on_image=done.append)
        assert model.training
        assert len(done) == 7
        rows = {row["stage"]: row["ms"] for row in found["rows"]}
        assert list(rows) == UNREFINED
        assert sum(rows.values()) - rows["total"] == pytest.approx(rows["total"])
        pools = {"box": 1, "mask": 2, "keypoint": 2}[kind]
        assert rows["crop"] == 1000 * pools  # one tick for each module
        assert rows["head"] == 2000 * pools
        assert rows["decode and transform"] == 2000
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_the_refinement_is_a_stage_of_its_own(self, split, monkeypatch):
        """All of it, climbing too, and once: the other stages take what they took."""
        ticks = iter(range(10**6))
        monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
        model = refined(swap_crop_head(tiny_rcnn()), iterations=2, ascent_steps=2)
        refine = type(model.roi_heads).refined

        def slow(heads, *arguments):
            for _ in range(10):
                next(ticks)
            return refine(heads, *arguments)

        monkeypatch.setattr(type(model.roi_heads), "refined", slow)
        rows = {row["stage"]: row["ms"] for row in measure_stages(model, split, images=2)["rows"]}
        assert list(rows) == [*STAGES, "total"]
        assert rows["refinement"] == 11000
        assert (rows["crop"], rows["head"]) == (1000, 2000)
        assert "refined" not in vars(model.roi_heads)
        model.roi_heads.refinement.enabled = False
        assert [row["stage"] for row in measure_stages(model, split, images=2)["rows"]] == UNREFINED

    def test_each_row(self, split):
        found = measure_stages(tiny_rcnn(), split, images=2)
        assert found["images"] == 2
        for row in found["rows"]:
            assert 0 <= row["low"] <= row["ms"] <= row["high"]
            assert row["images_per_second"] == pytest.approx(1000 / row["ms"], rel=0.01)


@pytest.mark.parametrize("stop", [DataError("broken"), KeyboardInterrupt()])
def test_the_scores_of_a_run_are_of_all_images_or_there_are_none(split, monkeypatch, stop):
    """As tools/train.py scores at its end: a part would score as if the other objects had been missed."""
    get = CocoDetection.__getitem__

    def fail(self, index):
        if index == 3:
            raise stop
        return get(self, index)

    monkeypatch.setattr(CocoDetection, "__getitem__", fail)
    with pytest.raises(type(stop)):
        run_detector(tiny_rcnn(), split, [3, 5], EvaluationOptions(workers=0))


def test_nothing_of_an_images_size_is_kept(split):
    """Memory stays flat: while a batch is computed, the images of those before are gone."""
    alive = []

    class Watching(torch.nn.Module):
        def forward(self, images):
            before = [reference() for reference in alive]
            assert sum(image is not None for image in before[:-1]) == 0
            alive.extend(weakref.ref(image) for image in images)
            boxes = torch.tensor([[1.0, 2, 30, 40]], requires_grad=True) + images[0].sum() * 0
            return [{"boxes": boxes, "labels": torch.ones(1).long(), "scores": torch.ones(1)}]

    found = run_detector(Watching(), split, split.category_ids, EvaluationOptions(workers=0))
    assert len(alive) == 5
    assert found.image_ids == [1, 2, 3, 4, 5]
    assert all(isinstance(result["bbox"][0], float) for result in found.results)


def test_mask_rcnn_is_scored_without_losses(data, tmp_path, monkeypatch):
    model = tiny_rcnn("mask", box_predictor=FastRCNNPredictor(16, 4))
    model.roi_heads.mask_predictor = MaskRCNNPredictor(8, 8, 4)
    detector = Detector(model, [3, 5, 8], ["<b>3</b>", "<b>5</b>", "<b>8</b>"])
    monkeypatch.setattr("detector.tools.source.load_published", lambda name, weights: detector)
    options = {"root": str(data), "split": "val", "workers": 0, "output": "out"}
    score(model="maskrcnn", weights="w.pth", crop="affine", **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["losses"] is None
    assert report["notes"][0] == "No segm scores: the annotations have no masks."
    assert "No losses: the annotations have no masks" in report["notes"][1]
    assert report["proposals"]["rows"]
    assert report["about"]["crop"] == "affine"


def test_objects_of_classes_that_a_checkpoint_does_not_know_are_missed(data, tmp_path, monkeypatch, capsys):
    detector = Detector(tiny_rcnn(), [3, 5], ["<b>3</b>", "<b>5</b>"])
    monkeypatch.setattr("detector.tools.source.load_published", lambda name, weights: detector)
    score(model="some", weights="w.pth", root=str(data), split="val", workers=0, output="out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    note = "The detector does not know the classes '<b>8</b>': their objects (2) count as missed."
    assert report["notes"] == [note, "No losses: the detector lacks some of the classes."]
    assert note in capsys.readouterr().err  # before the run
    assert report["by_class"][2]["name"] == "<b>8</b>"
    assert report["by_class"][2]["AR"] == 0
    assert report["confusion"]["matrix"][2] == [0, 0, 0, 2]
    assert "their objects (2) count as missed" in (tmp_path / "out" / "report.html").read_text()


def renamed(data, root, ids, names):
    """A copy of the data in which categories have other ids and names, in the order of the old ids."""
    shutil.copytree(data, root)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    new = dict(zip((3, 5, 8), ids))
    content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, names)][::-1]
    for annotation in content["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    path.write_text(json.dumps(content))
    return root


def test_classes_are_matched_by_name(checkpoint, data, scored, tmp_path):
    """Ids from 0, in another order than the checkpoint's: the same detections of the same names, the same scores."""
    root = renamed(data, tmp_path / "other", (2, 0, 1), ("<b>3</b>", "<b>5</b>", "<b>8</b>"))
    score(checkpoint=str(checkpoint), root=str(root), split="val", workers=0, output="out")
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (scored, tmp_path / "out"))
    assert two["scores"] == one["scores"]
    assert two["losses"] == one["losses"]
    names = "'<b>3</b>', '<b>5</b>', '<b>8</b>'"
    assert two["notes"] == [f"Classes are matched by name: {names} have other ids in the data than in the detector."]
    found, wanted = (json.loads((f / "detections.json").read_text()) for f in (tmp_path / "out", scored))
    assert found == [r | {"category_id": {3: 2, 5: 0, 8: 1}[r["category_id"]]} for r in wanted]


def test_what_is_detected_of_classes_that_the_data_lacks_is_left_out(checkpoint, data, scored, tmp_path):
    root = tmp_path / "two"
    shutil.copytree(data, root)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    del content["categories"][1]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 5]
    path.write_text(json.dumps(content))
    score(checkpoint=str(checkpoint), root=str(root), split="val", workers=0, output="out")
    found, wanted = (json.loads((f / "detections.json").read_text()) for f in (tmp_path / "out", scored))
    assert any(r["category_id"] == 5 for r in wanted)
    assert found == [r for r in wanted if r["category_id"] != 5]
    (note,) = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert note.startswith(
        "The data has 2 of the detector's 3 classes: what is detected of the others ('<b>5</b>') is left"
    )


def test_nothing_in_common_or_names_that_do_not_tell_are_refused(checkpoint, data, tmp_path):
    options = {"checkpoint": str(checkpoint), "split": "val", "workers": 0, "output": "out"}
    root = renamed(data, tmp_path / "a", (3, 5, 8), ("x", "y", "z"))
    with pytest.raises(SystemExit, match=r"\('<b>3</b>', .*\) has the name of .* \('x', 'y', 'z'\)"):
        score(root=str(root), **options)
    root = renamed(data, tmp_path / "b", (1, 2, 8), ("<b>3</b>", "<b>3</b>", "<b>8</b>"))
    with pytest.raises(
        SystemExit, match=r"several categories are called '<b>3</b>', and the one with id 3 has no other"
    ):
        score(root=str(root), **options)


def with_broken_images(data, root):
    """A copy with an image that is cut off, one that is missing and one of another size; 2 and 5 are whole."""
    shutil.copytree(data, root)
    path = root / "val" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    (root / "val" / "3.png").unlink()
    Image.new("RGB", (9, 9)).save(root / "val" / "4.png")
    return root


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1, "batch_size": 2, "speed": 2}])
def test_broken_images_are_left_out_named_and_counted(options, checkpoint, data, tmp_path, capsys):
    root = with_broken_images(data, tmp_path / "broken")
    options = {"checkpoint": str(checkpoint), "split": "val"} | options
    with pytest.raises(SystemExit, match="none of the images that were asked for can be read: 1 of "):
        score(root=str(root), output="none", skip_broken=True, limit=1, **options)
    assert not Path("none").exists()
    with pytest.raises(SystemExit) as stop:
        score(root=str(root), output="out", skip_broken=True, **options)
    assert stop.value.code == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"3 of 5 images cannot be read and are left out with their objects \(\d\): 1.png, 3.png, 4.png \(", said
    )
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["images"] = [image for image in content["images"] if image["id"] in (2, 5)]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in (2, 5)]
    path.write_text(json.dumps(content))
    score(root=str(root), output="without", **options)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "without"))
    assert one["notes"] == [f"{said}."]
    assert two["notes"] == []
    for name in ("scores", "proposals", "images", "confusion", "by_class"):
        assert one[name] == two[name], name
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["about"]["images"] == 2
    assert said[:40] in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_broken_images_and_several_processes(checkpoint, data, tmp_path):
    root = with_broken_images(data, tmp_path / "broken")
    with pytest.raises(SystemExit):
        score(checkpoint=str(checkpoint), root=str(root), split="val", workers=0, output="one", skip_broken=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(REPOSITORY / "tools" / "eval.py"), "--skip_broken=true"]
    command += [f"--checkpoint={checkpoint}", f"--root={root}", "--split=val", "--workers=0", "--output=out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 of 5 images cannot be read and are left out with their objects (") == 1
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "out"))
    assert [note.split("(1")[0] for note in one["notes"]] == [note.split("(1")[0] for note in two["notes"]]
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-6)
    assert one["images"] == two["images"]


def test_no_image_that_can_be_read_is_an_error(checkpoint, data, tmp_path):
    root = with_broken_images(data, tmp_path / "broken")
    for number in (2, 5):
        (root / "val" / f"{number}.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"error: none of the images .*: 5 of 5 images cannot be read"):
        score(checkpoint=str(checkpoint), root=str(root), split="val", workers=0, output="out", skip_broken=True)
    assert not (tmp_path / "out" / "scores.json").exists()


def test_published_classes_may_be_others_than_the_datas(data, tmp_path, monkeypatch):
    """COCO's 90 of which the data has one, and objects of two that it does not know."""
    root = tmp_path / "people"
    shutil.copytree(data, root)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text().replace('"category_id": 3', '"category_id": 1'))
    content["categories"][0] = {"id": 1, "name": "person"}
    path.write_text(json.dumps(content))
    names = published_names()
    detector = Detector(tiny_rcnn(box_predictor=FastRCNNPredictor(16, 91)), list(range(1, 91)), names[1:])
    monkeypatch.setattr("detector.tools.source.load_published", lambda name, weights: detector)
    score(model="some", weights="w.pth", root=str(root), split="val", workers=0, output="out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["losses"] is None
    assert "does not know the classes '<b>5</b>', '<b>8</b>'" in report["notes"][0]
    assert {r["category_id"] for r in json.loads((tmp_path / "out" / "detections.json").read_text())} <= {1}


def test_losses_are_the_same_every_time(scored, checkpoint, data, tmp_path):
    options = {"root": str(data), "split": "val", "workers": 0, "output": "again"}
    score(checkpoint=str(checkpoint), **options)
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (scored, tmp_path / "again"))
    assert one["losses"] == two["losses"]


@pytest.mark.parametrize("fails", [DataError("broken"), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_whatever_happens_while_times_are_taken_the_scores_are_kept(fails, checkpoint, data, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise fails

    monkeypatch.setattr("detector.evaluation.scoring.measure_stages", fail)
    options = {"root": str(data), "split": "val", "output": "out", "workers": 0}
    score(checkpoint=str(checkpoint), limit=2, speed=5, **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["speed"] is None
    assert report["about"]["images"] == 2
    assert "No times" in " ".join(report["notes"])


def test_only_images_that_were_scored_are_timed(split, monkeypatch):
    seen = []
    get = CocoDetection.__getitem__
    monkeypatch.setattr(CocoDetection, "__getitem__", lambda self, index: seen.append(index) or get(self, index))
    measure_stages(tiny_rcnn(), split, images=4, among=2)
    assert set(seen) == {0, 1}


def test_no_images_at_all(checkpoint, data, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    content = json.loads((data / "annotations" / "instances_val.json").read_text()) | {"images": [], "annotations": []}
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    options = {"root": str(tmp_path), "split": "val", "output": "out", "workers": 0}
    score(checkpoint=str(checkpoint), speed=3, **options)
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["AP"] == -1


def test_memory_that_runs_out_is_a_sentence(checkpoint, data, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("detector.evaluation.running.run_rcnn", fail)
    with pytest.raises(SystemExit, match="out of memory: take fewer or smaller images"):
        score(checkpoint=str(checkpoint), root=str(data), split="val", workers=0, output="out")


def test_a_damaged_image_of_a_results_file_is_noted_on_the_page(scored, data, tmp_path):
    root = tmp_path / "shapes"
    shutil.copytree(data, root)
    report = json.loads((scored / "report.json").read_text())
    name = report["images"][0]["file_name"]  # the worst, of which there is a picture
    (root / "val" / name).write_bytes(b"no image")
    score(results=str(scored / "detections.json"), root=str(root), split="val", output="out")
    assert "cannot be read as an image" in (tmp_path / "out" / "report.html").read_text()
    assert "data:image" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"speed": 3},
        {"crop": "affine"},
        {"refine": "off"},
        {"device": "cpu"},
        {"weights": "w"},
        {"skip_broken": True},
    ],
)
def test_what_is_of_a_detector_is_refused_with_a_results_file(options, scored, data):
    with refused(rf"--{next(iter(options))}: of a detector"):
        score(results=str(scored / "detections.json"), root=str(data), split="val", **options)


def test_braces_in_names_are_no_fields(scored, data, tmp_path):
    (tmp_path / "{a}").mkdir()
    shutil.copy(data / "annotations" / "instances_val.json", tmp_path / "{a}" / "val.json")
    score(results=str(scored / "detections.json"), annotations="{a}/{split}.json", split="val", output="out")
    with pytest.raises(SystemExit, match=r"nothing\.json: no such file"):
        score(results=str(scored / "detections.json"), annotations="nothing.json")
    with pytest.raises(SystemExit, match=r"its folder with --root FOLDER"):
        score(checkpoint="some")


def test_label_0_is_the_background():
    found = {"boxes": torch.zeros(2, 4), "labels": torch.tensor([0, 2]), "scores": torch.ones(2)}
    assert [r["category_id"] for r in to_results([found], [1], [3, 7])] == [7]


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(checkpoint, data, scored, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(REPOSITORY / "tools" / "eval.py")]
    command += [f"--checkpoint={checkpoint}", f"--root={data}", "--split=val", "--workers=0", "--output=out"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("IoU=0.90") == 1
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (scored, tmp_path / "out"))
    assert two["about"]["images"] == 5
    assert one["scores"] == pytest.approx(two["scores"], abs=1e-6)
    assert one["confusion"] == two["confusion"]
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
    assert one["proposals"] == two["proposals"]
    assert one["images"] == two["images"]
    found = [json.loads((folder / "detections.json").read_text()) for folder in (scored, tmp_path / "out")]
    assert [r["image_id"] for r in found[0]] == [r["image_id"] for r in found[1]]
    for ours, theirs in zip(*found, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)


@pytest.fixture(scope="module")
def refining(checkpoint, tmp_path_factory):
    """A folder of the detector of the checkpoint, with a refinement that moves its boxes."""
    detector = load_detector(checkpoint)
    refined(detector.model, iterations=2, ascent_steps=1)
    folder = tmp_path_factory.mktemp("refined") / "saved"
    detector.save(folder)
    return folder


class TestRefine:
    def scored(self, refining, data, **options):
        name = options.get("refine", "default")
        score(checkpoint=str(refining), root=str(data), split="val", workers=0, output=name, **options)
        files = ("report.json", "scores.json", "detections.json")
        return *(json.loads(Path(name, file).read_text()) for file in files), Path(name, "report.html").read_text()

    def test_off_is_the_detector_as_it_was(self, refining, data, scored):
        report, _, found, page = self.scored(refining, data, refine="off")
        assert found == json.loads((scored / "detections.json").read_text())
        assert report["about"]["refinement"] == "off"
        assert report["refinement"] is None
        assert 'id="refinement"' not in page

    def test_on_is_the_default(self, refining, data, scored):
        report, scores, found, _ = self.scored(refining, data)
        assert report["about"]["refinement"] == "2 iterations, 1 ascent steps"
        assert (scores, found) == self.scored(refining, data, refine="on")[1:3]
        before = json.loads((scored / "detections.json").read_text())
        assert [one["score"] for one in found] == [one["score"] for one in before]
        assert [one["bbox"] for one in found] != [one["bbox"] for one in before]
        assert report["losses"].keys() == json.loads((scored / "report.json").read_text())["losses"].keys()

    def test_both_are_compared(self, refining, data, monkeypatch, capsys):
        """The scores of random weights are next to nothing: what is scored is looked at as well."""
        off, on = self.scored(refining, data, refine="off"), self.scored(refining, data, refine="on")
        capsys.readouterr()
        written = []
        write = scoring.evaluate_predictions

        def spied(found, *arguments, **options):
            written.append((found.results, found.unrefined))
            return write(found, *arguments, **options)

        monkeypatch.setattr(scoring, "evaluate_predictions", spied)
        report, scores, found, page = self.scored(refining, data, refine="both")
        assert [list(results) for results in written[0]] == [on[2], off[2]]
        printed = capsys.readouterr().out
        assert (scores, found) == on[1:3]
        assert report["about"]["refinement"] == "2 iterations, 1 ascent steps"
        for when, alone in (("before", off[0]), ("after", on[0])):
            assert report["refinement"][when] == {"scores": alone["scores"], "by_iou": alone["by_iou"]}
        assert report["losses"] == on[0]["losses"]
        assert report["proposals"] == on[0]["proposals"]
        for name in ("AP", "AP50", "AP75", "AP90"):
            one, two = off[0]["scores"][name], on[0]["scores"][name]
            assert re.search(rf"\n +{name} +{one:.3f} +{two:.3f} +{re.escape(f'{two - one:+.3f}')}\n", printed)
        assert 'id="refinement"' in page

    def test_a_run_that_is_stopped_is_not_compared(self, refining, data, monkeypatch):
        stop = iter([False, True])
        run = scoring.run_detector

        def stopped(*arguments, **options):
            found = run(*arguments, **options)
            found.stopped = KeyboardInterrupt() if next(stop) else None
            return found

        with monkeypatch.context() as patch:
            patch.setattr(scoring, "run_detector", stopped)
            report, _, found, _ = self.scored(refining, data, refine="both")
        assert report["refinement"] is None
        assert "Not compared with the detector without its refinement" in report["notes"][0]
        assert found == self.scored(refining, data, refine="on")[2]

    def test_yaml_reads_on_and_off_as_true_and_false(self, refining, data, tmp_path):
        (tmp_path / "flags.yaml").write_text("refine: off\nsplit: val\nworkers: 0\noutput: out\n")
        score(config="flags.yaml", checkpoint=str(refining), root=str(data))
        assert json.loads(Path("out", "report.json").read_text())["about"]["refinement"] == "off"
