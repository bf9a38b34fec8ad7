"""Matching categories by name, whatever their ids and order."""

from types import SimpleNamespace

import pytest
from support.annotation_files import dataset, load

from detector.data.categories import label_as, match_ids, match_notes, same_categories, same_names
from detector.errors import DataError, ModelError
from detector.models.published import published_names


def test_same_names():
    assert same_names(["a", "b", "c"], ["c", "a", "d"]) == [1, None, 0]
    assert same_names(["a", "a", "b"], ["a", "b"]) == [None, None, 1]
    assert same_names(["a", "b"], ["a", "a", "b"]) == [None, 2]
    assert same_names(["Dog", "dog "], ["dog"]) == [None, None]
    assert same_names([], ["a"]) == []


def test_repeated_names_need_the_same_ids():
    twice = [(1, "a"), (2, "a"), (3, "b")]
    assert same_categories(twice, [(3, "b"), (2, "a"), (1, "a")]) == [1, 2, 3]
    assert same_categories([(9, "b")], twice) == [3]
    for ours, theirs in ((twice, [(1, "a"), (5, "a")]), (twice, [(1, "a")]), ([(7, "a")], twice)):
        with pytest.raises(DataError, match="'a'"):
            same_categories(ours, theirs)


def detector(ids, names):
    return SimpleNamespace(category_ids=ids, category_names=names)


def test_ids_of_a_detectors_labels():
    categories = [(0, "platelet"), (1, "red"), (2, "white")]
    assert match_ids(detector([1, 2, 3], ["red", "white", "platelet"]), categories) == [1, 2, 0]
    assert match_ids(detector([1, 2], ["white", "dust"]), categories) == [2, None]
    assert match_ids(detector([None, 1], ["red", "white"]), categories) == [None, 2]  # a gap, whatever its name
    assert match_ids(detector([None] * 3, ["class 1", "class 2", "class 3"]), categories) == [0, 1, 2]
    with pytest.raises(ModelError, match="2 classes"):
        match_ids(detector([None] * 2, ["class 1", "class 2"]), categories)
    with pytest.raises(ModelError, match=r"'dust'.*'platelet', 'red', 'white'"):
        match_ids(detector([1], ["dust"]), categories)
    with pytest.raises(ModelError, match=r"'red ' and 'red' .* 1 more"):
        match_ids(detector([1, 2], ["red ", "White"]), [(0, "red"), (1, "white")])
    names = published_names()
    ids = [i if name != "N/A" else None for i, name in enumerate(names)][1:]
    found = match_ids(detector(ids, names[1:]), [(0, "toothbrush"), (1, "person"), (2, "dog"), (3, "N/A")])
    matched = {names[label]: i for label, i in enumerate(found, start=1) if i is not None}
    assert matched == {"toothbrush": 0, "person": 1, "dog": 2}


def split(folder, *categories, boxes=()):
    folder.mkdir()
    annotations = [
        {"id": number, "image_id": 4, "category_id": category, "bbox": [number, 2, 10, 5]}
        for number, category in enumerate(boxes, start=1)
    ]
    options = {"annotations": annotations} if boxes else {}
    dataset(folder, categories=[{"id": i, "name": name} for i, name in categories], **options)
    return load(folder)


def test_a_data_set_gets_the_labels_of_another(tmp_path):
    train = split(tmp_path / "train", (3, "bird"), (5, "cat"), (7, "dog"), boxes=[3, 5, 7])
    val = split(tmp_path / "val", (3, "dog"), (7, "cat"), (8, "fish"), boxes=[3, 7, 8, 7])
    assert val[0][1]["labels"].tolist() == [1, 2, 3, 2]
    unknown, moved, left = label_as(val, train)
    assert "'fish'" in unknown
    assert "(1)" in unknown
    assert "'cat', 'dog'" in moved
    assert "'bird'" in left
    assert (val.category_names, val.category_ids) == (["bird", "cat", "dog"], [None, 7, 3])
    _, target = val[0]
    assert target["labels"].tolist() == [3, 2, 2]
    assert target["boxes"][:, 0].tolist() == [1, 2, 4]
    assert len(val.annotations.ids) == 4
    assert label_as(load(tmp_path / "train"), train) == []


def test_notes_name_classes_that_differ_by_case(tmp_path):
    train = split(tmp_path / "train", (3, "bird"), (7, "cat"))
    val = split(tmp_path / "val", (3, "bird"), (7, "Cat"))
    assert "'cat' and 'Cat'" in match_notes(detector([3, 7], ["bird", "cat"]), [3, None], val)[0]
    assert "'cat' and 'Cat'" in label_as(val, train)[0]
    other = load(tmp_path / "train")
    other.relabel([3], ["BIRD"])
    with pytest.raises(DataError, match="'bird' and 'BIRD'"):
        label_as(load(tmp_path / "train"), other)
