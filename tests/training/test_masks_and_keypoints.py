"""Mask and Keypoint R-CNN from end to end on a handful of digits: trained, scored, predicted, refined, saved."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import refused, score
from support.marks import slow
from support.part_data import POINTS, write_digits_with_parts
from support.tiny_training import TINY

from detector.data.dataset import CocoDetection
from detector.data.masks import MaskLayers, decode_masks, mask_area
from detector.evaluation.metric import SIGMA, SUMMARIES
from detector.evaluation.running import EvaluationOptions, run_detector
from detector.evaluation.timing import measure_stages
from detector.models.config import DetectorConfig
from detector.pretrained import load_detector
from detector.tools.browse import main as browse
from detector.tools.predict import main as predict
from detector.tools.refine import main as refine
from detector.tools.train import main as train
from detector.training import CocoDataModule, DetectionTask


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits_with_parts(tmp_path_factory.mktemp("parts") / "digits", splits={"train": 8, "val": 4})


def arguments(data, run_dir, part, *others):
    return [*TINY, f"--data.root={data}", f"--run_dir={run_dir}", f"--model.detector.finds={part}", *others]


@pytest.fixture(scope="module", params=["masks", "keypoints"])
def run(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    part = request.param
    losses = '["box", "mask"]' if part == "masks" else '["box", "keypoint"]'
    train(arguments(data, folder, part, "--trainer.max_epochs=2", f"--model.box_gradient.losses={losses}"))
    return part, folder


def test_a_run_leaves_the_scores_of_its_part(run):
    part, folder = run
    kind = "segm" if part == "masks" else "keypoints"
    scores = json.loads((folder / "scores.json").read_text())
    assert {f"{kind}/AP", f"{kind}/AP50", "AP"} <= scores.keys()
    report = json.loads((folder / "report.json").read_text())
    assert report[kind]["scores"]["AP"] == scores[f"{kind}/AP"]
    results = json.loads((folder / "detections.json").read_text())
    assert results
    assert all(("segmentation" if part == "masks" else "keypoints") in result for result in results)
    page = (folder / "report.html").read_text()
    assert f'<h2 id="{kind}">' in page
    assert ("AP of masks and boxes" in page) == (part == "masks")
    assert ("OKS threshold" in page) == (part == "keypoints")
    assert not any(note.startswith("No ") for note in report["notes"])


@pytest.fixture(scope="module")
def found_again(run, data, tmp_path_factory):
    """Data whose truth is every third of what the run has found in val, and the scores of its checkpoint on them.

    Those of so short a run on the true objects are next to nothing.
    """
    part, folder = run
    root = shutil.copytree(data, tmp_path_factory.mktemp("again") / "digits")
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    found = json.loads((folder / "detections.json").read_text())
    kept = [one for one in found if part == "keypoints" or mask_area(one["segmentation"]) > 0][::3]
    content["annotations"] = [
        {**one, "id": number, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0, "num_keypoints": 5}
        for number, one in enumerate(kept, start=1)
    ]
    path.write_text(json.dumps(content))
    score(checkpoint=str(folder), root=str(root), split="val", output=str(root / "e"), workers=0)
    return root, json.loads((root / "e" / "scores.json").read_text())


def test_its_checkpoint_and_its_results_file_are_scored_as_by_pycocotools(run, found_again, tmp_path):
    part, folder = run
    root, scores = found_again
    kind, field, loss = ("segm", "segmentation", "mask") if part == "masks" else ("keypoints", "keypoints", "keypoint")
    report = json.loads((root / "e" / "report.json").read_text())
    assert report["losses"][f"loss_{loss}"] > 0
    annotations, results = root / "annotations" / "instances_val.json", folder / "detections.json"
    score(results=str(results), annotations=str(annotations), output=str(tmp_path / "e"))
    assert json.loads((tmp_path / "e" / "scores.json").read_text()) == pytest.approx(scores)
    truth = COCO(annotations)
    entries = json.loads(results.read_text())
    names = ("image_id", "category_id", "score", field)
    scorer = COCOeval(truth, truth.loadRes([{name: entry[name] for name in names} for entry in entries]), kind)
    if part == "keypoints":
        scorer.params.kpt_oks_sigmas = np.full(len(POINTS), SIGMA)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert 0.05 < scores[f"{kind}/AP"] < 0.95
    assert [scores[f"{kind}/{name}"] for name in SUMMARIES[kind]] == pytest.approx(scorer.stats.tolist())


@pytest.mark.parametrize("run", ["masks"], indirect=True)
def test_masks_of_an_image_are_never_many_at_its_full_size(run, data, monkeypatch):
    """They are not read where nothing is compared with them, and resized before they are told apart for the losses."""
    detector = load_detector(run[1])
    split = CocoDetection(data / "val", data / "annotations" / "instances_val.json", annotation_types=("masks",))
    detector.model.transform.min_size = (160,)
    read, of = [], MaskLayers.of
    sizes, masks = [], MaskLayers.masks

    def reading(*arguments):
        read.append(arguments)
        return of(*arguments)

    def telling_apart(layers):
        sizes.append(tuple(layers.maps.shape[1:]))
        return masks(layers)

    monkeypatch.setattr(MaskLayers, "of", reading)
    monkeypatch.setattr(MaskLayers, "masks", telling_apart)
    monkeypatch.setattr(torchvision.models.detection.transform, "paste_masks_in_image", None)  # all detections at once
    running = (detector.model, split, detector.category_ids, EvaluationOptions(workers=0))
    run_detector(*running)
    measure_stages(detector.model, split, images=2)
    assert read == []
    run_detector(*running, labels=torch.arange(len(detector.category_ids) + 1))
    assert len(read) == len(sizes) == len(split)
    assert all(min(size) == 160 for size in sizes)


def test_what_it_finds_in_an_image(run, data, tmp_path):
    part, folder = run
    detector = load_detector(folder)
    image = next((data / "val").glob("*.png"))
    found = detector.detect(image, min_score=0.0)
    assert len(found)
    values = next(iter(found))
    if part == "masks":
        assert found.masks.shape == (len(found), *found.image.shape[1:])
        assert found.masks.dtype == torch.bool
        assert torch.equal(decode_masks([values["segmentation"]], *found.image.shape[1:])[0].bool(), found.masks[0])
        assert found.keypoints is None
    else:
        assert found.keypoints.shape == (len(found), len(POINTS), 3)
        assert list(values["keypoints"]) == POINTS
        assert values["keypoints"]["middle"] == [
            *found.keypoints[0, 4, :2].tolist(),
            float(found.keypoints_scores[0, 4]),
        ]
        assert detector.keypoints.skeleton == ((0, 4), (1, 4), (2, 4), (3, 4))
        assert found.masks is None
    plain = found.draw(min_score=2.0)
    assert found.draw().tobytes() != plain.tobytes()
    detector.save(tmp_path / "saved")
    again = load_detector(tmp_path / "saved")
    assert again.keypoints == detector.keypoints
    assert repr(again.detect(image, min_score=0.0)) == repr(found)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert ("A Mask R-CNN" if part == "masks" else "A Keypoint R-CNN") in card
    assert f"pipeline_tag: {'image-segmentation' if part == 'masks' else 'keypoint-detection'}" in card
    assert f"- {'mask-rcnn' if part == 'masks' else 'keypoint-rcnn'}\n" in card
    assert "- faster-rcnn\n" not in card


def test_predict_writes_them(run, data, tmp_path):
    part, folder = run
    predict([str(data / "val"), "--checkpoint", str(folder), "--output", str(tmp_path / "p"), "--min_score", "0"])
    numbers = json.loads((tmp_path / "p" / "predictions.json").read_text())
    found = [one for image in numbers["images"] for one in image["detections"]]
    results = json.loads((tmp_path / "p" / "detections.json").read_text())
    assert found
    assert len(found) == len(results)
    if part == "masks":
        assert {mask_area(one["segmentation"]) for one in found} == {mask_area(one["segmentation"]) for one in results}
    else:
        assert {tuple(one["keypoints"]["middle"][:2]) for one in found} == {
            tuple(one["keypoints"][12:14]) for one in results
        }


@pytest.mark.parametrize("run", [slow("masks"), "keypoints"], indirect=True)
def test_it_is_refined_and_its_parts_are_looked_for_in_the_refined_boxes(run, found_again, tmp_path):
    part, folder = run
    data, before = found_again
    refine(
        [
            *("--checkpoint", str(folder), "--root", str(data), "--train_split", "train", "--split", "val"),
            *("--run_dir", str(tmp_path / "r"), "--max_steps", "2", "--workers", "0", "--flip", "false"),
        ]
    )
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    kind = "segm" if part == "masks" else "keypoints"
    assert f"{kind}/AP" in scores
    score(checkpoint=str(tmp_path / "r"), root=str(data), split="val", refine="both", output=str(tmp_path / "e"))
    both = json.loads((tmp_path / "e" / "report.json").read_text())["refinement"]
    for when in ("before", "after"):
        of_both = {name: -1.0 if value is None else value for name, value in both[when]["scores"].items()}
        assert of_both == pytest.approx({"before": before, "after": scores}[when])
    assert load_detector(tmp_path / "r").keypoints == load_detector(folder).keypoints


@pytest.mark.parametrize("run", ["masks", slow("keypoints")], indirect=True)
def test_a_run_goes_on_and_starts_another(run, data, tmp_path):
    part, folder = run
    first = arguments(data, tmp_path / "a", part, "--trainer.max_steps=2", "--trainer.max_epochs=-1")
    train(first)
    train([*first, "--ckpt_path=last"])  # it has ended, and is scored again
    train(arguments(data, tmp_path / "b", part, f"--model.detector.weights={folder}", "--trainer.max_steps=1"))
    before, after = (load_detector(one).model.state_dict() for one in (folder, tmp_path / "b"))
    head = "mask_head" if part == "masks" else "keypoint_head"
    names = [name for name in before if head in name]
    assert names
    assert all((before[name] - after[name]).abs().max() < 0.01 for name in names)


def test_boxes_alone_start_a_detector_of_masks(data, tmp_path, capsys):
    train([*TINY, f"--data.root={data}", f"--run_dir={tmp_path / 'boxes'}", "--trainer.max_steps=1"])
    train(
        arguments(
            data, tmp_path / "a", "masks", f"--model.detector.weights={tmp_path / 'boxes'}", "--trainer.max_steps=1"
        )
    )
    detector = load_detector(tmp_path / "a")
    assert detector.settings.annotation_types == ("masks",)
    assert detector.model.roi_heads.has_mask()


def test_data_without_masks_is_refused_in_a_sentence(data, tmp_path):
    path = tmp_path / "digits"
    write_digits_with_parts(path, splits={"train": 2, "val": 2})
    for file in (path / "annotations").iterdir():
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        file.write_text(json.dumps(content))
    with refused(rf"no object has masks \(segmentation\).*delete {path}", code=1):
        train(arguments(path, tmp_path / "run", "masks", "--data.generate=digits"))
    assert not (tmp_path / "run").exists()


def test_images_with_next_to_no_key_points_are_not_trained_on(data, tmp_path):
    path = write_digits_with_parts(tmp_path / "digits", splits={"train": 4, "val": 2})
    file = path / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    images = [image["id"] for image in content["images"]]
    for annotation in content["annotations"]:
        if annotation["image_id"] == images[0]:
            annotation["keypoints"][2::3] = [0] * len(POINTS)
    some = next(a for a in content["annotations"] if a["image_id"] == images[1])
    some["keypoints"][2::3] = [2, 0, 1, 0, 1]  # enough, even alone
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != images[1] or a is some]
    file.write_text(json.dumps(content))
    module = CocoDataModule(root=str(path), train_split="train", val_split="val", min_size=None)

    class Trainer:
        lightning_module = DetectionTask(DetectorConfig(name="timm/test_efficientnet", finds="keypoints"))
        world_size, global_rank = 1, 0

    module.trainer = Trainer()
    module.setup("fit")
    assert images[0] not in module.train_set.image_ids
    assert len(module.train_set) == len({a["image_id"] for a in content["annotations"]} - {images[0]})
    assert any("fewer than 3 labelled keypoints" in note for note in module.notes)
    assert len(module.val_set) == 2


def test_a_split_with_next_to_no_key_points_is_refused(data, tmp_path):
    path = write_digits_with_parts(tmp_path / "digits", splits={"train": 2, "val": 2})
    file = path / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["keypoints"] = [0] * (3 * len(POINTS))
    file.write_text(json.dumps(content))
    with refused("instances_train.json: no image has 3 or more labelled keypoints", code=1):
        train(arguments(path, tmp_path / "run", "keypoints"))


def test_splits_with_other_key_points_are_refused(data, tmp_path):
    path = write_digits_with_parts(tmp_path / "digits", splits={"train": 2, "val": 2})
    file = path / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace("top_left", "upper_left"))
    with refused("train and val have different keypoints: .*upper_left", code=1):
        train(arguments(path, tmp_path / "run", "keypoints"))


def renamed(path, split, names):
    file = path / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        del category["keypoints"], category["skeleton"]
        category |= {"keypoints": names} if names else {}
    file.write_text(json.dumps(content))


def test_key_points_without_sides_are_mirrored_and_that_is_said(tmp_path, capsys):
    path = write_digits_with_parts(tmp_path / "digits", splits={"train": 2, "val": 2})
    renamed(path, "train", ["a", "b", "c", "d", "e"])
    renamed(path, "val", None)  # numbers, which fit any names
    file = path / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["keypoints"] = [0] * 15
    file.write_text(json.dumps(content))
    short = ("--trainer.max_steps=1", "--trainer.max_epochs=-1")
    within = "{transforms: [torchvision.transforms.v2.RandomVerticalFlip]}"
    flip = f"--data.augmentation=[{{class_path: RandomOrder, init_args: {within}}}]"
    train(arguments(path, tmp_path / "run", "keypoints", *short, flip))
    train(arguments(path, tmp_path / "run", "keypoints", *short, flip, "--ckpt_path=last"))
    assert load_detector(tmp_path / "run").keypoints.names == ("a", "b", "c", "d", "e")
    notes = json.loads((tmp_path / "run" / "report.json").read_text())["notes"]
    assert "train: images are mirrored" in notes[0]
    assert "(a, b, c, d, e)" in notes[0]
    assert notes[1].startswith("Objects whose keypoints are all unlabelled: 1. ")
    assert len(notes) == 2
    train(arguments(path, tmp_path / "plain", "keypoints", *short, "--data.augmentation=[]"))
    notes = json.loads((tmp_path / "plain" / "report.json").read_text())["notes"]
    assert not any("mirrored" in note for note in notes)


@pytest.mark.parametrize("run", ["keypoints"], indirect=True)
def test_key_points_of_other_names_begin_anew(run, data, tmp_path, caplog):
    part, folder = run
    path = write_digits_with_parts(tmp_path / "digits", splits={"train": 2, "val": 2})
    for split in ("train", "val"):
        renamed(path, split, POINTS[::-1])
    first = ("--trainer.max_steps=1", "--trainer.max_epochs=-1", f"--model.detector.weights={folder}")
    train(arguments(path, tmp_path / "other", part, *first))
    assert "2 that do not fit begin anew (roi_heads.keypoint_predictor" in caplog.text
    caplog.clear()
    train(arguments(data, tmp_path / "same", part, *first))
    assert "begin anew" not in caplog.text


def test_a_run_of_masks_does_not_go_on_as_one_of_boxes(run, data, tmp_path):
    part, folder = run
    given = [*TINY, f"--data.root={data}", f"--run_dir={tmp_path / 'x'}", f"--ckpt_path={folder}/checkpoints/best.ckpt"]
    with refused(f"trained with (finds {part}|keypoints)", code=1):
        train([*given, "--trainer.max_epochs=2"])


def test_browsing_draws_them(data, tmp_path):
    browse([*TINY, f"--data.root={data}", f"--output={tmp_path / 'boxes.png'}", "--count=2", "--epochs=1"])
    for part in ("masks", "keypoints"):
        output = f"--output={tmp_path / part}.png"
        browse([*TINY, f"--data.root={data}", f"--model.detector.finds={part}", output, "--count=2", "--epochs=1"])
        assert (tmp_path / f"{part}.png").read_bytes() != (tmp_path / "boxes.png").read_bytes()


@pytest.mark.slow
def test_two_epochs_on_real_polygons_and_crowds(coco_cc, tmp_path):
    sizes = ("--data.min_size=96", "--data.max_size=128", "--model.detector.min_size=96")
    splits = ("--data.train_split=train2017", "--data.val_split=val2017")
    losses = '--model.box_gradient.losses=["box", "mask"]'
    train(arguments(coco_cc, tmp_path / "run", "masks", "--trainer.max_epochs=2", losses, *sizes, *splits))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["segm"]["scores"]["AP"] >= 0
    assert report["about"]["objects"] > 500
    assert json.loads((tmp_path / "run" / "detections.json").read_text())
