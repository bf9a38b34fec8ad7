"""Mask and Keypoint R-CNN from end to end: trained, scored, predicted, refined, saved."""

import json
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import v2

pytest.importorskip("sklearn")
pytest.importorskip("timm")

from support.commands import refused, score
from support.part_data import POINTS, write_digits_with_parts
from support.tiny_training import TINY, changed_copy, tiny_run

from detector import load_detector
from detector.data.masks import decode_masks, mask_area
from detector.errors import DataError, MissingAnnotationsError
from detector.models.config import DetectorConfig
from detector.tools.browse import main as browse
from detector.tools.predict import main as predict
from detector.tools.refine import main as refine
from detector.training import CocoDataModule, DetectionTask

KINDS = {"masks": "segm", "keypoints": "keypoints"}  # names of the IoU types
ONE_STEP = ("--trainer.max_steps=1", "--trainer.max_epochs=-1")


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits_with_parts(tmp_path_factory.mktemp("parts") / "digits", splits={"train": 8, "val": 4})


@pytest.fixture(scope="module", params=["masks", "keypoints"])
def run(request, data, tmp_path_factory):
    """The annotation type, and the folder of a run that learned it."""
    kind = request.param
    flags = (f"--model.detector.finds={kind}", f'--model.box_gradient.losses=["box", "{kind.removesuffix("s")}"]')
    return kind, tiny_run(data, tmp_path_factory.mktemp(kind) / "run", *flags, "--trainer.max_epochs=2")


def test_a_run_writes_scores_results_and_a_page(run):
    kind, folder = run
    iou_type, report = KINDS[kind], read(folder / "report.json")
    assert report[iou_type]["scores"]["AP"] == read(folder / "scores.json")[f"{iou_type}/AP"]
    results = read(folder / "detections.json")
    assert results
    assert all(("segmentation" if kind == "masks" else "keypoints") in result for result in results)
    assert f'<h2 id="{iou_type}">' in (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def found_again(run, data, tmp_path_factory):
    """Data whose truth is every third detection of the run, so that its AP is not 0, and the scores on it."""
    kind, folder = run

    def change(content):
        found = read(folder / "detections.json")
        kept = [one for one in found if kind == "keypoints" or mask_area(one["segmentation"]) > 0][::3]
        content["annotations"] = [
            {**one, "id": number, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0, "num_keypoints": 5}
            for number, one in enumerate(kept, start=1)
        ]

    root = changed_copy(data, tmp_path_factory.mktemp("again") / "digits", "val", change)
    score(checkpoint=folder, root=root, split="val", output=root / "e", workers=0)
    return root, read(root / "e" / "scores.json")


def test_checkpoint_and_results_file_have_the_same_scores(run, found_again, tmp_path):
    kind, folder = run
    root, scores = found_again
    assert read(root / "e" / "report.json")["losses"][f"loss_{kind.removesuffix('s')}"] > 0
    assert 0.05 < scores[f"{KINDS[kind]}/AP"] < 0.95
    annotations, results = root / "annotations" / "instances_val.json", folder / "detections.json"
    score(results=results, annotations=annotations, output=tmp_path / "e")
    assert read(tmp_path / "e" / "scores.json") == pytest.approx(scores)


def test_detections_in_an_image(run, data, tmp_path):
    kind, folder = run
    detector = load_detector(folder)
    image = next((data / "val").glob("*.png"))
    found = detector.detect(image, min_score=0.0)
    values = next(iter(found))
    if kind == "masks":
        assert found.masks.shape == (len(found), *found.image.shape[1:])
        assert torch.equal(decode_masks([values["segmentation"]], *found.image.shape[1:])[0].bool(), found.masks[0])
        assert found.keypoints is None
    else:
        assert found.keypoints.shape == (len(found), len(POINTS), 3)
        assert list(values["keypoints"]) == POINTS
        middle = [*found.keypoints[0, 4, :2].tolist(), float(found.keypoints_scores[0, 4])]
        assert values["keypoints"]["middle"] == middle
        assert found.masks is None
    assert found.draw().tobytes() != found.draw(min_score=2.0).tobytes()
    detector.save(tmp_path / "saved")
    again = load_detector(tmp_path / "saved")
    assert again.keypoints == detector.keypoints
    assert repr(again.detect(image, min_score=0.0)) == repr(found)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert {"masks": "image-segmentation", "keypoints": "keypoint-detection"}[kind] in card


def test_predict_writes_them(run, data, tmp_path):
    kind, folder = run
    predict([str(data / "val"), "--checkpoint", str(folder), "--output", str(tmp_path / "p"), "--min_score", "0"])
    numbers, results = read(tmp_path / "p" / "predictions.json"), read(tmp_path / "p" / "detections.json")
    found = [one for image in numbers["images"] for one in image["detections"]]
    assert len(found) == len(results) > 0
    if kind == "masks":
        assert {mask_area(one["segmentation"]) for one in found} == {mask_area(one["segmentation"]) for one in results}
    else:
        middles = {tuple(one["keypoints"]["middle"][:2]) for one in found}
        assert middles == {tuple(one["keypoints"][12:14]) for one in results}


@pytest.mark.slow
def test_refinement_looks_for_them_in_the_refined_boxes(run, found_again, tmp_path):
    kind, folder = run
    data, before = found_again
    flags = {"checkpoint": folder, "root": data, "train_split": "train", "split": "val", "run_dir": tmp_path / "r"}
    refine([f"--{name}={value}" for name, value in {**flags, "max_steps": 2, "workers": 0, "flip": "false"}.items()])
    scores, compared = read(tmp_path / "r" / "scores.json"), read(tmp_path / "r" / "report.json")["refinement"]
    assert f"{KINDS[kind]}/AP" in scores
    for when, expected in (("before", before), ("after", scores)):
        assert {n: -1.0 if s is None else s for n, s in compared[when]["scores"].items()} == pytest.approx(expected)
    assert load_detector(tmp_path / "r").keypoints == load_detector(folder).keypoints


@pytest.mark.slow
def test_a_run_starts_another_and_does_not_resume_as_one_of_boxes(run, data, tmp_path):
    kind, folder = run
    tiny_run(data, tmp_path / "b", f"--model.detector.finds={kind}", f"--model.detector.weights={folder}", *ONE_STEP)
    before, after = (load_detector(one).model.state_dict() for one in (folder, tmp_path / "b"))
    names = [name for name in before if f"{kind.removesuffix('s')}_head" in name]
    assert names
    assert all((before[name] - after[name]).abs().max() < 0.01 for name in names)
    with refused("trained with (detector.finds|keypoints) ", code=1):
        tiny_run(data, tmp_path / "x", f"--ckpt_path={folder}/checkpoints/best.ckpt", "--trainer.max_epochs=2")


@pytest.mark.slow
def test_boxes_alone_start_a_detector_of_masks(data, tmp_path):
    boxes = tiny_run(data, tmp_path / "boxes", *ONE_STEP)
    masks = ("--model.detector.finds=masks", f"--model.detector.weights={boxes}")
    detector = load_detector(tiny_run(data, tmp_path / "a", *masks, *ONE_STEP))
    assert detector.settings.annotation_types == ("masks",)
    assert detector.model.roi_heads.has_mask()


def set_up(root, kind, **options):
    """Read the splits for a detector of keypoints or masks."""
    module = CocoDataModule(root=str(root), train_split="train", val_split="val", min_size=None, **options)
    task = DetectionTask(DetectorConfig(name="timm/test_efficientnet", finds=kind))
    module.trainer = SimpleNamespace(lightning_module=task, world_size=1, global_rank=0)
    module.setup("fit")
    return module


def test_data_without_masks_is_refused(data, tmp_path):
    def change(content):
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    with pytest.raises(MissingAnnotationsError, match="segmentation"):
        set_up(changed_copy(data, tmp_path / "digits", "train", change), "masks")


def test_images_with_few_keypoints_are_not_trained_on(data, tmp_path):
    def change(content):
        first, second = (image["id"] for image in content["images"][:2])
        some = next(one for one in content["annotations"] if one["image_id"] == second)
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != second or one is some]
        some["keypoints"][2::3] = [2, 0, 1, 0, 1]  # enough
        for annotation in content["annotations"]:
            if annotation["image_id"] == first:
                annotation["keypoints"][2::3] = [0] * len(POINTS)

    module = set_up(changed_copy(data, tmp_path / "digits", "train", change), "keypoints")
    ids = [image["id"] for image in read(data / "annotations" / "instances_train.json")["images"]]
    assert module.train_set.image_ids == ids[1:]
    assert any("fewer than 3 labelled keypoints" in note for note in module.notes)
    assert len(module.val_set) == 4


def test_splits_without_keypoints_or_with_others_are_refused(data, tmp_path):
    def clear(content):
        for annotation in content["annotations"]:
            annotation["keypoints"] = [0] * (3 * len(POINTS))

    def rename(content):
        for category in content["categories"]:
            category["keypoints"][0] = "upper_left"

    with pytest.raises(DataError, match=r"instances_train\.json.*3 or more"):
        set_up(changed_copy(data, tmp_path / "none", "train", clear), "keypoints")
    with pytest.raises(DataError, match=r"val: .*train.*upper_left"):
        set_up(changed_copy(data, tmp_path / "others", "val", rename), "keypoints")


def names_of_keypoints(names):
    def change(content):
        for category in content["categories"]:
            del category["keypoints"], category["skeleton"]
            category |= {"keypoints": names} if names else {}

    return change


def test_mirrored_keypoints_without_sides_are_reported(data, tmp_path):
    train = changed_copy(data, tmp_path / "train", "train", names_of_keypoints(["a", "b", "c", "d", "e"]))
    root = changed_copy(train, tmp_path / "digits", "val", names_of_keypoints(None))  # numbers, which fit any names
    for augmentation in ([v2.RandomOrder([v2.RandomVerticalFlip()])], []):
        module = set_up(root, "keypoints", augmentation=augmentation)
        reported = any("mirrored" in note and "(a, b, c, d, e)" in note for note in module.notes)
        assert reported == bool(augmentation)
        assert module.val_set.keypoints.names == module.train_set.keypoints.names == ("a", "b", "c", "d", "e")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["keypoints"], indirect=True)
def test_keypoints_of_other_names_start_from_random_weights(run, data, tmp_path, caplog):
    kind, folder = run
    other = changed_copy(data, tmp_path / "a", "train", names_of_keypoints(POINTS[::-1]))
    other = changed_copy(other, tmp_path / "b", "val", names_of_keypoints(POINTS[::-1]))
    for root, fits in ((other, False), (data, True)):
        caplog.clear()
        flags = (f"--model.detector.finds={kind}", f"--model.detector.weights={folder}", *ONE_STEP)
        tiny_run(root, tmp_path / f"run-{fits}", *flags)
        assert ("roi_heads.keypoint_predictor" in caplog.text) == (not fits)


def test_browsing_draws_them(data, tmp_path):
    pictures = set()
    for finds in ("masks", "keypoints"):
        output, flags = tmp_path / finds / "sheet.png", (f"--model.detector.finds={finds}", "--count=1", "--epochs=1")
        browse([*TINY, f"--data.root={data}", f"--output={output}", *flags])
        pictures.add(output.read_bytes())
    assert len(pictures) == 2
