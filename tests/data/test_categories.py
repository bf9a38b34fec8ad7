"""Which category of a data set a label stands for: by name, whatever ids and order."""

from types import SimpleNamespace

import pytest
import torch
from support.coco_folders import dataset, load

from detector.data.categories import label_as, match_ids, match_notes, same_categories, same_names
from detector.data.dataset import CocoDetection
from detector.errors import DataError, ModelError
from detector.models.published import published_names


def test_names_are_the_same_where_they_are_there_once():
    assert same_names(["a", "b", "c"], ["c", "a", "d"]) == [1, None, 0]
    assert same_names(["a", "a", "b"], ["a", "b"]) == [None, None, 1]
    assert same_names(["a", "b"], ["a", "a", "b"]) == [None, 2]
    assert same_names(["Dog", "dog "], ["dog"]) == [None, None]
    assert same_names([], ["a"]) == []


def test_names_that_are_there_twice_need_the_same_ids():
    twice = [(1, "a"), (2, "a"), (3, "b")]
    assert same_categories(twice, [(3, "b"), (2, "a"), (1, "a")]) == [1, 2, 3]
    assert same_categories([(9, "b")], twice) == [3]
    for ours, theirs in ((twice, [(1, "a"), (5, "a")]), (twice, [(1, "a")]), ([(7, "a")], twice)):
        with pytest.raises(DataError, match="several categories are called 'a', and the one with id"):
            same_categories(ours, theirs)


def detector(ids, names):
    return SimpleNamespace(category_ids=ids, category_names=names)


def test_ids_of_a_detectors_labels():
    categories = [(0, "platelet"), (1, "red"), (2, "white")]
    assert match_ids(detector([1, 2, 3], ["red", "white", "platelet"]), categories) == [1, 2, 0]
    assert match_ids(detector([1, 2], ["white", "dust"]), categories) == [2, None]
    assert match_ids(detector([None, 1], ["red", "white"]), categories) == [None, 2]  # a gap, whatever it is called
    assert match_ids(detector([None] * 3, ["class 1", "class 2", "class 3"]), categories) == [0, 1, 2]
    with pytest.raises(ModelError, match="the weights have 2 classes, the data has 3"):
        match_ids(detector([None] * 2, ["class 1", "class 2"]), categories)
    with pytest.raises(ModelError, match=r"\('dust'\) .* of the data \('platelet', 'red', 'white'\)"):
        match_ids(detector([1], ["dust"]), categories)


def test_a_subset_of_coco_with_ids_of_its_own():
    names = published_names()
    ids = [i if name != "N/A" else None for i, name in enumerate(names)][1:]
    subset = [(0, "toothbrush"), (1, "person"), (2, "dog"), (3, "N/A")]
    found = match_ids(detector(ids, names[1:]), subset)
    assert {names[label]: i for label, i in enumerate(found, start=1) if i is not None} == {
        "toothbrush": 0,
        "person": 1,
        "dog": 2,
    }


def test_one_data_set_has_the_labels_of_another(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    dataset(
        tmp_path / "train", categories=[{"id": 3, "name": "bird"}, {"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}]
    )
    boxes = [
        {"id": number, "image_id": 4, "category_id": category, "bbox": [number, 2, 10, 5]}
        for number, category in enumerate([3, 7, 8, 7], start=1)
    ]
    dataset(
        tmp_path / "val",
        annotations=boxes,
        categories=[{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 8, "name": "fish"}],
    )
    train, val = load(tmp_path / "train"), load(tmp_path / "val")
    assert val[0][1]["labels"].tolist() == [1, 2, 3, 2]
    notes = label_as(val, train)
    assert notes == [
        "The training split does not have the classes 'fish': their objects (1) count as missed.",
        "Classes are matched by name: 'cat', 'dog' have other ids in the data than in the training split.",
        "The data has 2 of the training split's 3 classes: detections of the others ('bird') are left out.",
    ]
    assert val.category_names == ["bird", "cat", "dog"]
    assert val.category_ids == [None, 7, 3]
    _, target = val[0]
    assert target["labels"].tolist() == [3, 2, 2]
    assert target["boxes"][:, 0].tolist() == [1, 2, 4]
    assert len(val.annotations.ids) == 4
    assert label_as(load(tmp_path / "train"), train) == []


def test_images_that_are_left_out(tmp_path):
    dataset(tmp_path)
    data = load(tmp_path)
    said = data.leave_out({4: "a.png: broken"})
    assert said == "1 of 2 images cannot be read and are left out with their objects (4): a.png (a.png: broken)"
    assert (data.image_ids, len(data)) == ([9], 1)
    assert data[0][1]["image_id"] == 9
    assert torch.equal(data[0][1]["boxes"], torch.zeros(0, 4))
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png"):
        load(tmp_path)
    data = load(tmp_path, skip_missing=True)
    assert isinstance(data, CocoDetection)
    with pytest.raises(DataError, match="no such image"):
        data[1]
    with pytest.raises(DataError, match="no such image folder"):
        CocoDetection(tmp_path / "nowhere", tmp_path / "annotations.json", skip_missing=True)


def test_names_that_differ_by_a_blank_or_by_case_are_told_apart(tmp_path):
    with pytest.raises(ModelError, match=r"'red ' and 'red' differ only by blanks, and 1 more$"):
        match_ids(detector([1, 2], ["red ", "White"]), [(0, "red"), (1, "white")])
    for name, names in (("train", ["bird", "cat"]), ("val", ["bird", "Cat"])):
        (tmp_path / name).mkdir()
        dataset(
            tmp_path / name, categories=[{"id": i, "name": called} for i, called in zip((3, 7), names, strict=True)]
        )
    train, val = load(tmp_path / "train"), load(tmp_path / "val")
    notes = match_notes(detector([3, 7], ["bird", "cat"]), [3, None], load(tmp_path / "val"))
    assert "does not have the classes 'Cat'" in notes[0]
    assert "'cat' and 'Cat' differ only by case" in notes[0]
    note = label_as(val, train)[0]
    assert "'cat' and 'Cat' differ only by case" in note
    other = load(tmp_path / "train")
    other.relabel([3], ["BIRD"])
    with pytest.raises(DataError, match="'bird' and 'BIRD' differ only by case"):
        label_as(load(tmp_path / "train"), other)
