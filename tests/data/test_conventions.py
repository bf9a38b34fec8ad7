"""Results whose boxes are of another convention."""

import json
import re

import numpy as np
import pytest
from support.scored import annotations_of
from support.scored import notes_on as read_notes

from detector.data import results as results_module

SIZES = [(640, 480), (480, 640), (500, 500), (1280, 720), (600, 800), (1000, 400)]


def split(count=60, seed=0):
    rng = np.random.default_rng(seed)
    annotations = []
    for number in range(1, count + 1):
        width, height = SIZES[number % len(SIZES)]
        w, h = rng.uniform(20, 150, 2)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        annotations.append({"id": number, "image_id": number % len(SIZES), "category_id": 5, "bbox": [x, y, w, h]})
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "a"}]}


def notes_on(tmp_path, content, change, *, noise=2.0, false=20):
    """The notes on results that are near the objects, and on some that are not, with their numbers changed."""
    rng = np.random.default_rng(1)
    results = []
    for annotation in content["annotations"]:
        box = np.array(annotation["bbox"]) + rng.normal(0, noise, 4)
        found = {"image_id": annotation["image_id"], "category_id": 5, "score": float(rng.uniform(0.3, 1))}
        results.append(found | {"bbox": [float(v) for v in change(*box, *SIZES[annotation["image_id"]])]})
    for _ in range(false):
        image = int(rng.integers(len(SIZES)))
        box = [*rng.uniform(0, 300, 2), *rng.uniform(10, 100, 2)]
        found = {"image_id": image, "category_id": 5, "score": float(rng.uniform(0, 0.5))}
        results.append(found | {"bbox": [float(v) for v in change(*box, *SIZES[image])]})
    (tmp_path / "results.json").write_text(json.dumps(results))
    return read_notes(tmp_path / "results.json", annotations_of(content))


def resized(x, y, w, h, width, height, scale):
    return x * scale, y * scale, w * scale, h * scale


FORMS = {
    "x, y, width and height": lambda x, y, w, h, *_: (x, y, w, h),
    "corners (x1, y1, x2, y2)": lambda x, y, w, h, *_: (x, y, x + w, y + h),
    "centres (cx, cy, width, height)": lambda x, y, w, h, *_: (x + w / 2, y + h / 2, w, h),
}


def normalised(form):
    return lambda *box: [value / side for value, side in zip(FORMS[form](*box), box[4:] * 2)]


READINGS = {form: FORMS[form] for form in list(FORMS)[1:]}
READINGS |= {f"{form}, normalised": normalised(form) for form in FORMS}
READINGS |= {"corners with y before x": lambda x, y, w, h, *_: (y, x, y + h, x + w)}
CORNERS = READINGS["corners (x1, y1, x2, y2)"]
SCALES = {
    "of images {} times as large": [(0.5, lambda *box: resized(*box, 0.5)), (2, lambda *box: resized(*box, 2))],
    "to a longer side of {} pixels": [(320, lambda *box: resized(*box, 320 / max(box[4:])))],
    "to a shorter side of {} pixels": [(800, lambda *box: resized(*box, 800 / min(box[4:])))],
    "resized to {} x": [
        (416, lambda x, y, w, h, width, height: tuple(416 * v for v in (x / width, y / height, w / width, h / height)))
    ],
}


@pytest.mark.parametrize("looks", READINGS)
@pytest.mark.parametrize("noise", [0, 2.0])
def test_the_note_names_the_convention(tmp_path, looks, noise):
    (note,) = notes_on(tmp_path, split(), READINGS[looks], noise=noise)
    assert looks in note


@pytest.mark.parametrize(("words", "number", "change"), [(w, *case) for w, cases in SCALES.items() for case in cases])
@pytest.mark.parametrize("noise", [0, 2.0])
def test_the_note_on_resized_images_says_to_how_many_pixels(tmp_path, words, number, change, noise):
    (note,) = notes_on(tmp_path, split(), change, noise=noise)
    pattern = re.escape(words).replace(r"\{\}", r"([\d.]+)")
    (said,) = re.findall(pattern if not noise else r"images.*?([\d.]+)", note)  # of poor boxes another one may fit best
    assert noise or float(said) == pytest.approx(number, rel=0.03)


@pytest.mark.parametrize("noise", [0, 5, 20, 60])
def test_valid_boxes_have_no_note_however_poor(tmp_path, noise):
    def same(x, y, w, h, width, height):
        return x, y, abs(w), abs(h)

    for seed in range(2):
        assert notes_on(tmp_path, split(seed=seed), same, noise=noise) == []


@pytest.mark.parametrize("images", [1, 3, 6])
@pytest.mark.parametrize("scale", [0.7, 0.9, 1.1, 1.4])
def test_boxes_of_a_wrong_scale_have_no_note(tmp_path, images, scale):
    """Too small or too large around the right centres, in few images or several."""

    def poor(x, y, w, h, width, height):
        return x + w * (1 - scale) / 2, y + h * (1 - scale) / 2, w * scale, h * scale

    for seed in range(2):
        content = split(3 * images, seed=seed)
        for annotation in content["annotations"]:
            annotation["image_id"] %= images
        assert notes_on(tmp_path, content, poor, false=3) == []


def test_normalised_boxes_of_images_of_one_size(tmp_path):
    content = split()
    content["images"] = [{**image, "width": 640, "height": 480} for image in content["images"]]
    (note,) = notes_on(tmp_path, content, lambda x, y, w, h, *_: (x / 640, y / 480, w / 640, h / 480))
    assert "normalised (0..1)" in note


def test_few_boxes_or_none_have_no_note(tmp_path):
    assert notes_on(tmp_path, split(2), CORNERS, false=0) == []
    assert notes_on(tmp_path, split(0), CORNERS, false=0) == []
    assert notes_on(tmp_path, split(0), CORNERS, false=9) == []


def test_keypoints_and_masks_of_results(tmp_path, monkeypatch):
    content = split(8)
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation |= {"keypoints": [x, y, 2, x + w, y + h, 2], "segmentation": [[x, y, x + w, y, x + w, y + h]]}
    truth = annotations_of(content, annotation_types=["masks", "keypoints"])

    def notes(change):
        results = []
        for annotation in content["annotations"]:
            one = {name: annotation[name] for name in ("image_id", "category_id", "bbox", "keypoints", "segmentation")}
            results.append(one | {"score": 0.5} | change(annotation, *SIZES[annotation["image_id"]]))
        (tmp_path / "results.json").write_text(json.dumps(results))
        return read_notes(tmp_path / "results.json", truth)

    def normalised(annotation, width, height):
        x1, y1, _, x2, y2, _ = annotation["keypoints"]
        return {"keypoints": [x1 / width, y1 / height, 1, x2 / width, y2 / height, 1]}

    assert notes(lambda *_: {}) == []
    (note,) = notes(normalised)
    assert "keypoints" in note
    assert "normalised" in note
    monkeypatch.setattr(results_module, "MAX_COMPARED", 3)  # a few of them say the same
    (note,) = notes(normalised)
    assert "normalised" in note
    monkeypatch.undo()
    (note,) = notes(lambda *_: {"segmentation": [[0.1, 0.1, 0.4, 0.1, 0.4, 0.4]]})
    assert "8 of 8 masks" in note
