"""tools/eval.py from end to end, and what it measures beside the scores: losses and stages."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from support.commands import refused, score
from support.disk import fail
from support.refined_models import refined
from support.shapes import IDS, NAMES, truth_file, write_shapes
from support.tiny_detector import tiny_checkpoint
from support.tiny_models import tiny_rcnn
from support.tiny_training import REPOSITORY, changed_copy
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError, exit_on_user_error
from detector.evaluation import scoring
from detector.evaluation.losses import run_rcnn
from detector.evaluation.running import EvaluationOptions
from detector.evaluation.scoring import evaluate_detector
from detector.evaluation.timing import STAGES
from detector.pretrained.detector import Detector
from detector.pretrained.loading import load_detector
from detector.tools import evaluate, export

FILES = {"report.html", "report.json", "scores.json", "detections.json"}
UNREFINED = [stage for stage in (*STAGES, "total") if stage != "refinement"]
PUBLISHED = {"model": "some", "weights": "w.pth"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of random weights, in a run folder."""
    path = tmp_path_factory.mktemp("runs") / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(tiny_checkpoint(ids=IDS, names=NAMES), path)
    return path


@pytest.fixture(scope="module")
def scored(checkpoint, data, tmp_path_factory):
    """An evaluation with everything."""
    return evaluated(tmp_path_factory.mktemp("eval"), checkpoint=checkpoint, root=data, speed=2)


def evaluated(folder="out", **options):
    """Run tools/eval.py, and return what it wrote."""
    score(**{"split": "val", "workers": 0, "output": folder} | options)
    return written(Path(folder))


def written(folder):
    report, scores, found = (
        json.loads((folder / name).read_text()) for name in ("report.json", "scores.json", "detections.json")
    )
    page = (folder / "report.html").read_text()
    return SimpleNamespace(folder=folder, report=report, scores=scores, found=found, page=page, notes=report["notes"])


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


def test_everything_is_written(scored, checkpoint):
    assert {path.name for path in scored.folder.iterdir()} == FILES
    about = scored.report["about"]
    assert (about["model"], about["crop"], about["images"]) == (str(checkpoint), "affine", 5)
    assert about["weights"].startswith("sha256:")
    assert about["detections"] == len(scored.found) > 20
    losses = {"loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert set(scored.report["losses"]) == losses
    assert [row["at"] for row in scored.report["proposals"]["rows"]] == [100, 300, 1000]
    assert [row["stage"] for row in scored.report["speed"]["rows"]] == UNREFINED
    assert scored.notes == []
    assert NAMES[0] not in scored.page
    assert "&lt;b&gt;3&lt;/b&gt;" in scored.page
    assert scored.page.count("data:image/jpeg") >= 2
    assert scored.report["operating_points"]["by_class"][0].keys() >= {"id", "name", "objects", "score", "f1"}
    assert {name: None if value == -1 else value for name, value in scored.scores.items()} == scored.report["scores"]


def test_a_results_file_alone_gets_the_same_scores(scored, data, capsys):
    results = scored.folder / "detections.json"
    score(results=results, annotations=truth_file(data))
    alone = written(Path("runs", "eval-detections"))
    assert alone.scores == scored.scores
    assert "data:image" not in alone.page
    assert (alone.report["losses"], alone.report["speed"]) == (None, None)
    assert "in runs/eval-detections/" in capsys.readouterr().out
    score(results=results, root=data, split="val")  # a second run, with pictures
    assert "data:image" in written(Path("runs", "eval-detections-2")).page


def test_the_call_from_python_returns_the_evaluation(scored, data, capsys):
    evaluation = evaluate(results=scored.folder / "detections.json", root=data, split="val", output="out", pictures=0)
    assert (evaluation.scores, evaluation.stopped) == (scored.scores, None)
    assert written(Path("out")).scores == scored.scores


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        ({"checkpoint": None}, "--checkpoint, or --model with --weights, or --results", 2),
        ({"results": "b"}, "--checkpoint, or --model with --weights, or --results", 2),
        ({"checkpoint": "nothing.ckpt"}, "nothing.ckpt", 1),
        ({"checkpoint": None, "model": "fasterrcnn_mobilenet_v3_large_320_fpn"}, "--model .*--weights", 2),
        ({"checkpoint": None, "model": "nothing", "weights": "w.pth"}, "nothing", 1),
        ({"device": "cuda:99"}, "--device 'cuda:99'", 2),
        ({"device": "abacus"}, "--device 'abacus'", 2),
        ({"device": "meta"}, "--device 'meta'", 2),
        ({"split": "test"}, "instances_test.json", 1),
        ({"refine": "off"}, "--refine 'off'", 2),
        ({"refine": "both"}, "--refine 'both'", 2),
        ({"root": None}, "--root", 1),
        ({"output": "file/out"}, "file", 1),
    ],
)
def test_user_errors_come_before_the_run(options, words, code, checkpoint, data, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setattr("detector.evaluation.scoring.run_detector", None)
    options = {"checkpoint": checkpoint, "root": data} | options
    with refused(words, code=code):
        evaluated(**{name: value for name, value in options.items() if value is not None})


@pytest.mark.parametrize(
    "option", [("speed", 3), ("crop", "affine"), ("refine", "off"), ("device", "cpu"), ("skip_broken", True)]
)
def test_options_of_a_detector_are_refused_with_a_results_file(option, scored, data):
    with refused(f"--{option[0]}"):
        evaluated(results=scored.folder / "detections.json", root=data, **dict([option]))


def test_a_results_file_needs_the_truth(scored, data, monkeypatch):
    results = scored.folder / "detections.json"
    with refused("--annotations, or --root with --split"):
        score(results=results)
    with refused(r"nothing\.json", code=1):
        score(results=results, annotations="nothing.json")
    monkeypatch.setenv("DETECTOR_DATA", str(data.parent))
    evaluated(results=results, dataset=data.name, pictures=0)
    Path("{a}").mkdir()  # braces in names are no fields
    shutil.copy(truth_file(data), Path("{a}", "val.json"))
    assert evaluated("braces", results=results, annotations="{a}/{split}.json").scores == scored.scores


def test_ctrl_c_scores_what_was_seen(checkpoint, data, monkeypatch):
    seen = []

    def stop_after_3(*arguments, **options):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(1)
        return run_rcnn(*arguments, **options)

    monkeypatch.setattr("detector.evaluation.running.run_rcnn", stop_after_3)
    with pytest.raises(SystemExit) as stop:
        evaluated(checkpoint=checkpoint, root=data)
    assert stop.value.code == 130
    partial = written(Path("out"))
    assert partial.report["about"]["images"] == 3
    assert "3 of 5" in partial.notes[0]


@pytest.mark.parametrize("fails", ["write_json", "write_atomically"])
def test_scores_are_printed_on_a_full_disk(fails, scored, data, monkeypatch, capsys):
    monkeypatch.setattr(f"detector.evaluation.scoring.{fails}", fail)
    with pytest.raises(SystemExit, match="No space left"):
        score(results=scored.folder / "detections.json", root=data, split="val", output="full")
    assert "IoU=0.90" in capsys.readouterr().out


def test_an_evaluation_of_a_training_prints_the_scores_on_a_full_disk(checkpoint, data, tmp_path, monkeypatch, capsys):
    split, options = CocoDetection(data / "val", truth_file(data)), EvaluationOptions(workers=0)
    evaluation = evaluate_detector(load_detector(checkpoint), split, options, model="m", root="r", split_name="val")
    evaluation.write(tmp_path / "run", of_training=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | {"examples.png"}
    assert written(tmp_path / "run").page.count("data:image/jpeg") >= 5
    assert "Objects by class and size" not in capsys.readouterr().out
    monkeypatch.setattr("detector.evaluation.scoring.draw_examples", fail)
    with pytest.raises(OSError, match="No space left"):
        evaluation.write(tmp_path / "full", of_training=True)
    assert json.loads((tmp_path / "full" / "scores.json").read_text()) == evaluation.scores
    assert "IoU=0.90" in capsys.readouterr().out


def piped(*command, unbuffered="", output=None):
    """Run Python where nobody reads the output."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(writing) as closed:
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, stdout=output or closed, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_all_is_written_to_disk_although_the_pipe_is_closed(unbuffered, scored, data):
    """Unbuffered, the first line that is printed fails; otherwise, what is left at the end."""
    options = ["--results", scored.folder / "detections.json", "--root", data, "--split", "val", "--output", "closed"]
    done = piped(REPOSITORY / "tools" / "eval.py", *options, unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (141, "")
    assert {path.name for path in Path("closed").iterdir()} == FILES
    assert written(Path("closed")).scores == scored.scores


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_closed_and_full_outputs():
    script = """
from detector.errors import UserError, exit_on_user_error
with exit_on_user_error():
    print("some words")
    {}
"""
    done = piped("-c", script.format("raise UserError('wrong')"))
    assert (done.returncode, done.stderr) == (1, "error: wrong\n")
    with open("/dev/full", "w") as output:
        done = piped("-c", script.format("pass"), output=output)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")
    with pytest.raises(SystemExit, match="Broken pipe"), exit_on_user_error():  # another pipe
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(checkpoint, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent.parent, run)
    score(checkpoint=run, root=data, split="val", limit=2, workers=0)
    limited = written(run / "eval-val")
    assert limited.report["about"]["model"] == str(run / "checkpoints" / "last.ckpt")
    assert limited.report["about"]["images"] == 2
    assert "2 of 5" in limited.notes[0]
    assert load_detector(run).digest() == load_detector(checkpoint).digest() == limited.report["about"]["weights"]
    export(checkpoint=run, format="pretrained")
    assert "val" in (run / "pretrained" / "README.md").read_text()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ModelError, match=r"last\.ckpt"):
        load_detector(run)


@pytest.mark.parametrize(("pictures", "shown"), [(0, 0), (1, 2), (9, 8)])
def test_as_many_pictures_as_are_asked_for(pictures, shown, data):
    """Five images with an object each, and no correct detection: the worst image is also the best."""
    truth = json.loads(truth_file(data).read_text())["annotations"]
    found = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth if a["image_id"] < 4
    ]
    found += [{"image_id": i, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.9} for i in (1, 2, 3)]
    Path("found.json").write_text(json.dumps(found))
    page = evaluated(results="found.json", root=data, pictures=pictures).page
    assert page.count("data:image/jpeg") == shown  # all five of the worst; the best have something found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_scores_as_the_cpu_does(checkpoint, data, scored):
    gpu = evaluated(checkpoint=checkpoint, root=data, device="cuda", speed=2)
    assert gpu.report["scores"] == pytest.approx(scored.report["scores"], abs=0.05)
    assert set(gpu.report["losses"]) == set(scored.report["losses"])


@pytest.mark.slow
def test_one_stage_detectors_are_scored_with_their_losses(data):
    """Any torchvision detector by name; the weights give the number of classes."""
    name = "ssdlite320_mobilenet_v3_large"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    torch.save(model.state_dict(), "w.pth")
    options = {"model": name, "weights": "w.pth", "root": data}
    report = evaluated(limit=3, speed=1, **options).report
    assert report["about"]["crop"] is None
    assert report["proposals"] is None
    assert set(report["losses"]) == {"loss", "bbox_regression", "classification"}
    stages = ["decode and transform", "backbone", "head", "post-processing", "total"]
    assert [row["stage"] for row in report["speed"]["rows"]] == stages
    with refused("--crop 'affine'"):
        evaluated(crop="affine", **options)


@pytest.mark.parametrize("error", [DataError("broken"), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_scores_are_kept_if_timing_fails(error, checkpoint, data, monkeypatch):
    monkeypatch.setattr("detector.evaluation.scoring.measure_stages", raising(error))
    kept = evaluated(checkpoint=checkpoint, root=data, limit=2, speed=5)
    assert kept.report["speed"] is None
    assert kept.report["about"]["images"] == 2
    assert "No times" in " ".join(kept.notes)


@pytest.fixture
def published(monkeypatch):
    """Let ``--model`` name a detector of the test."""
    return lambda detector: monkeypatch.setattr("detector.tools.source.load_published", lambda *names: detector)


def test_mask_rcnn_is_scored_without_losses(data, published):
    model = tiny_rcnn("mask", box_predictor=FastRCNNPredictor(16, 4))
    model.roi_heads.mask_predictor = MaskRCNNPredictor(8, 8, 4)
    published(Detector(model, IDS, NAMES))
    done = evaluated(**PUBLISHED, crop="affine", root=data)
    assert done.report["losses"] is None
    assert "No segm scores" in done.notes[0]
    assert "No losses" in done.notes[1]
    assert done.report["proposals"]["rows"]
    assert done.report["about"]["crop"] == "affine"


def test_objects_of_classes_that_a_checkpoint_does_not_know_are_missed(data, published, capsys):
    published(Detector(tiny_rcnn(), IDS[:2], NAMES[:2]))
    done = evaluated(**PUBLISHED, root=data)
    assert f"'{NAMES[2]}'" in done.notes[0]
    assert "No losses" in done.notes[1]
    assert done.notes[0] in capsys.readouterr().err  # before the run
    assert done.report["by_class"][2]["name"] == NAMES[2]
    assert done.report["by_class"][2]["AR"] == 0
    assert done.report["confusion"]["matrix"][2] == [0, 0, 0, 2]
    assert "their objects (2) count as missed" in done.page


def renamed(data, root, ids, names):
    """A copy of the data in which categories have other ids and names, in the order of the old ids."""

    def change(content):
        content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, names)][::-1]
        for annotation in content["annotations"]:
            annotation["category_id"] = dict(zip(IDS, ids))[annotation["category_id"]]

    return changed_copy(data, root, "val", change)


def test_classes_are_matched_by_name(checkpoint, data, scored, tmp_path):
    """Ids from 0, in another order than the checkpoint's: the same detections of the same names, the same scores."""
    other = evaluated(checkpoint=checkpoint, root=renamed(data, tmp_path / "other", (2, 0, 1), NAMES))
    assert other.report["scores"] == scored.report["scores"]
    assert other.report["losses"] == scored.report["losses"]
    (note,) = other.notes
    assert "matched by name" in note
    assert other.found == [r | {"category_id": {3: 2, 5: 0, 8: 1}[r["category_id"]]} for r in scored.found]


def test_detections_of_classes_that_the_data_lacks_are_left_out(checkpoint, data, scored, tmp_path):
    def remove(content):
        del content["categories"][1]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 5]

    done = evaluated(checkpoint=checkpoint, root=changed_copy(data, tmp_path / "two", "val", remove))
    assert done.found == [r for r in scored.found if r["category_id"] != 5] != scored.found
    (note,) = done.notes
    assert f"'{NAMES[1]}'" in note


@pytest.mark.parametrize(
    ("ids", "names", "words"),
    [((3, 5, 8), ("x", "y", "z"), "'x', 'y', 'z'"), ((1, 2, 8), (NAMES[0], NAMES[0], NAMES[2]), f"'{NAMES[0]}'")],
)
def test_classes_that_cannot_be_matched_are_refused(ids, names, words, checkpoint, data, tmp_path):
    with refused(re.escape(words), code=1):
        evaluated(checkpoint=checkpoint, root=renamed(data, tmp_path / "a", ids, names))


def with_broken_images(data, root, change=lambda content: None):
    """A copy with an image that is cut off, one that is missing and one of another size; 2 and 5 are whole."""
    changed_copy(data, root, "val", change)
    path = root / "val" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    (root / "val" / "3.png").unlink()
    Image.new("RGB", (9, 9)).save(root / "val" / "4.png")
    return root


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1, "batch_size": 2, "speed": 2}])
def test_broken_images_are_left_out_named_and_counted(options, checkpoint, data, tmp_path, capsys):
    def keep_whole(content):
        for name, key in (("images", "id"), ("annotations", "image_id")):
            content[name] = [entry for entry in content[name] if entry[key] in (2, 5)]

    root = with_broken_images(data, tmp_path / "broken")
    options = {"checkpoint": checkpoint} | options
    with pytest.raises(SystemExit) as stop:
        evaluated(root=root, skip_broken=True, **options)
    assert stop.value.code == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"3 of 5 images .*: 1.png, 3.png, 4.png \(", said)
    one = written(Path("out"))
    assert one.notes == [f"{said}."]
    assert said[:40] in one.page
    two = evaluated("without", root=with_broken_images(data, tmp_path / "whole", keep_whole), **options)
    assert two.notes == []
    for name in ("scores", "proposals", "images", "confusion", "by_class"):
        assert one.report[name] == two.report[name], name
    assert one.report["losses"] == pytest.approx(two.report["losses"], rel=1e-5)
    assert one.report["about"]["images"] == 2


def test_a_broken_image_ends_the_run_without_the_flag_or_if_none_is_left(checkpoint, data, tmp_path):
    root = changed_copy(data, tmp_path / "broken", "val", lambda content: None)
    (root / "val" / "1.png").write_bytes(b"")
    with refused(r"1\.png.*--skip_broken true", code=1):
        evaluated(checkpoint=checkpoint, root=root)
    with refused("1 of 5 images", code=1):
        evaluated("none", checkpoint=checkpoint, root=root, skip_broken=True, limit=1)
    assert not Path("none").exists()


def torchrun(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(REPOSITORY / "tools" / "eval.py"), "--split=val", "--workers=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(checkpoint, data, scored, tmp_path):
    done = torchrun(f"--checkpoint={checkpoint}", f"--root={data}", "--output=out")
    assert done.stdout.count("IoU=0.90") == 1
    two = written(Path("out"))
    assert two.report["about"]["images"] == 5
    assert two.report["scores"] == pytest.approx(scored.report["scores"], abs=1e-6)
    assert two.report["losses"] == pytest.approx(scored.report["losses"], abs=1e-4)
    for name in ("confusion", "proposals", "images"):
        assert two.report[name] == scored.report[name]
    assert [r["image_id"] for r in two.found] == [r["image_id"] for r in scored.found]
    assert [r["score"] for r in two.found] == pytest.approx([r["score"] for r in scored.found], abs=1e-4)
    root = with_broken_images(data, tmp_path / "broken")
    with pytest.raises(SystemExit):
        evaluated("one", checkpoint=checkpoint, root=root, skip_broken=True)
    done = torchrun(f"--checkpoint={checkpoint}", f"--root={root}", "--output=two", "--skip_broken")
    assert done.stderr.count("3 of 5 images") == 1
    one, two = written(Path("one")), written(Path("two"))
    assert [note.split("(1")[0] for note in one.notes] == [note.split("(1")[0] for note in two.notes]
    assert one.report["scores"] == pytest.approx(two.report["scores"], abs=1e-6)
    assert one.report["images"] == two.report["images"]


def test_no_images_at_all(checkpoint, data, tmp_path):
    root = changed_copy(data, tmp_path / "none", "val", lambda content: content.update(images=[], annotations=[]))
    with refused(r"instances_val\.json", code=1):
        evaluated(checkpoint=checkpoint, root=root)


def test_a_damaged_image_of_a_results_file_is_noted_on_the_page(scored, data, tmp_path):
    root = tmp_path / "shapes"
    shutil.copytree(data, root)
    (root / "val" / scored.report["images"][0]["file_name"]).write_bytes(b"no image")  # the worst
    page = evaluated(results=scored.folder / "detections.json", root=root).page
    assert "cannot be read as an image" in page
    assert "data:image" in page


class TestRefine:
    @pytest.fixture(scope="class")
    def source(self, checkpoint, data, tmp_path_factory):
        """The checkpoint's detector with a refinement that moves its boxes, in a saved folder."""
        detector = load_detector(checkpoint)
        refined(detector.model, iterations=2, ascent_steps=1)
        folder = tmp_path_factory.mktemp("refined") / "saved"
        detector.save(folder)
        return {"checkpoint": folder, "root": data}

    @pytest.fixture(scope="class")
    def on(self, source, tmp_path_factory):
        return evaluated(tmp_path_factory.mktemp("on"), **source)  # which is the default

    def test_off_is_the_detector_as_it_was(self, source, scored):
        Path("flags.yaml").write_text("refine: off\n")
        off = evaluated(config="flags.yaml", **source)
        assert off.found == scored.found
        assert (off.report["about"]["refinement"], off.report["refinement"]) == ("off", None)
        assert 'id="refinement"' not in off.page

    def test_on_moves_the_boxes(self, on, scored):
        assert on.report["about"]["refinement"] == "2 iterations, 1 ascent steps"
        assert {one["score"] for one in on.found} <= {one["score"] for one in scored.found}  # NMS may remove some
        assert [one["bbox"] for one in on.found] != [one["bbox"] for one in scored.found]
        assert on.report["losses"].keys() == scored.report["losses"].keys()

    def test_both_are_compared(self, source, on, scored, monkeypatch, capsys):
        """The scores of random weights are next to nothing, so the detections are compared too."""
        compared, evaluate_predictions = [], scoring.evaluate_predictions

        def spy(found, *arguments, **options):
            compared.append((list(found.results), list(found.unrefined)))
            return evaluate_predictions(found, *arguments, **options)

        monkeypatch.setattr(scoring, "evaluate_predictions", spy)
        both = evaluated(refine="both", **source)
        assert compared == [(on.found, scored.found)]
        assert (both.scores, both.found) == (on.scores, on.found)
        for when, alone in (("before", scored), ("after", on)):
            assert both.report["refinement"][when] == {k: alone.report[k] for k in ("scores", "by_iou")}
        for name in ("losses", "proposals"):
            assert both.report[name] == on.report[name]
        printed = capsys.readouterr().out
        for name in ("AP", "AP50", "AP75", "AP90"):
            one, two = scored.report["scores"][name], on.report["scores"][name]
            assert re.search(rf"\n +{name} +{one:.3f} +{two:.3f} +{re.escape(f'{two - one:+.3f}')}\n", printed)
        assert 'id="refinement"' in both.page

    def test_a_run_that_is_stopped_is_not_compared(self, source, on, monkeypatch):
        stop = iter([False, True])
        run = scoring.run_detector

        def stopped(*arguments, **options):
            found = run(*arguments, **options)
            found.stopped = KeyboardInterrupt() if next(stop) else None
            return found

        monkeypatch.setattr(scoring, "run_detector", stopped)
        both = evaluated(refine="both", **source)
        assert both.report["refinement"] is None
        assert "Not compared" in both.notes[0]
        assert both.found == on.found
