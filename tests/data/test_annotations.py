"""Annotation files as arrays: the same content as pycocotools reads, in little memory."""

import contextlib
import copy
import gzip
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from support.annotation_files import VALID, changed, write

from detector import files
from detector.data.annotations import read_annotations
from detector.data.check_dataset import check_dataset
from detector.data.dataset import CocoDetection
from detector.data.entries import Entries
from detector.errors import DataError
from detector.evaluation.truth import coco_of
from detector.files import read_json

FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def by_pycocotools(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def mixed():
    """Images in no order, and annotations in another."""
    data = copy.deepcopy(VALID)
    images = [{"id": i, "file_name": f"{i} ä.png", "width": 30 + i % 9, "height": 20} for i in (70, -3, 2**63 - 1, 5)]
    data["images"] = images
    places = np.random.default_rng(0).integers(0, 4, 50).tolist()
    data["annotations"] = [
        {"id": 1000 - n, "image_id": images[place]["id"], "category_id": 7 - 4 * (n % 2), "bbox": [n / 3, 1, 5 + n, 2]}
        | {"area": n * 1.5, "iscrowd": n % 5 == 0, "segmentation": [[n, 0, 9, 0, 9, 9.25]]}
        for n, place in enumerate(places)
    ]
    return data


def same_as_pycocotools(path, coco, image_ids, fields):
    expected = by_pycocotools(path)
    assert sorted(coco.imgs) == sorted(image_ids)
    assert {i: one["name"] for i, one in coco.cats.items()} == {i: one["name"] for i, one in expected.cats.items()}
    for image_id in image_ids:
        assert coco.imgs[image_id].items() <= expected.imgs[image_id].items()
        ours, theirs = (
            [[one[field] for field in fields] for one in index.imgToAnns[image_id]] for index in (coco, expected)
        )
        assert ours == theirs


def test_what_is_scored_is_what_pycocotools_reads(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(mixed()))
    annotations = read_annotations(path, annotation_types=["masks"])
    assert annotations.image_ids.tolist() == [-3, 5, 70, 2**63 - 1]
    same_as_pycocotools(path, coco_of(annotations), annotations.image_ids.tolist(), (*FIELDS, "segmentation"))
    same_as_pycocotools(path, coco_of(annotations, [70, -3]), [-3, 70], (*FIELDS, "segmentation"))
    expected = {one["id"] for one in mixed()["annotations"] if one["image_id"] == 5}
    assert coco_of(read_annotations(path), [5, 6]).anns.keys() == expected


def test_real_coco_is_what_pycocotools_reads(coco_cc):
    for split in ("train2017", "val2017"):
        path = coco_cc / "annotations" / f"instances_{split}.json"
        annotations = read_annotations(path, annotation_types=["masks"])
        same_as_pycocotools(path, coco_of(annotations), annotations.image_ids.tolist(), (*FIELDS, "segmentation"))


def test_annotations_lie_by_image_and_keep_their_order(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(mixed()))
    annotations = read_annotations(path)
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        expected = [one["id"] for one in mixed()["annotations"] if one["image_id"] == image_id]
        assert annotations.ids[annotations.of(index)].tolist() == expected
        assert annotations.image(index)["file_name"] == f"{image_id} ä.png"
    assert annotations.find([5, 6, 70]).tolist() == [1, -1, 2]


def test_an_area_that_is_missing_is_that_of_the_box(tmp_path):
    data = copy.deepcopy(VALID)
    data["annotations"][1]["bbox"] = [5, 5, -20, 10]
    annotations = read_annotations(write(tmp_path, data))
    assert annotations.areas.tolist() == [50, 0, 600]


def test_a_data_set_is_small_to_send_to_workers(tmp_path):
    count = 20_000
    data = copy.deepcopy(VALID)
    data["annotations"] = [{**VALID["annotations"][1], "id": n, "bbox": [n / count, 5, 20, 10]} for n in range(count)]
    path = write(tmp_path, data)
    sent = pickle.dumps(CocoDetection(tmp_path / "images", path))
    assert len(sent) < 100 * count
    assert pickle.loads(sent).counts().tolist() == [count, 0]


@pytest.mark.parametrize(("constant", "shown"), [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf")])
def test_words_that_python_writes_for_numbers(tmp_path, constant, shown):
    data = changed("annotations", 0, "area", value="here")
    data["images"][1]["file_name"] = name = f'b, {constant}, [{constant}] \\"{constant}.png'
    path = write(tmp_path, data)
    text = path.read_text()
    path.write_text(text.replace('"here"', constant))
    with pytest.raises(DataError, match=rf"annotations\[0\] \(id 1\) has area {shown}"):
        read_annotations(path)
    path.write_text(text.replace('"cat"', constant))
    with pytest.raises(DataError, match=rf"categories\[0\] \(id 7\) has name {shown}"):
        read_annotations(path)
    path.write_text(text.replace('"here"', f'5, "score": [{constant} , {constant}]'))
    annotations = read_annotations(path)
    assert annotations.areas[0] == 5
    assert annotations.file_names() == ["a.png", name]


def test_words_and_halves_in_one_file(tmp_path):
    path = write(tmp_path)
    for unread in ('[NaN, "\\ud800"]', '["\\ud800", NaN]', '["\\\\ud800 \\udce4", -Infinity]'):
        path.write_text(path.read_text().replace("{", f'{{"info": {unread}, ', 1))
        assert len(read_annotations(path).ids) == 3
    for broken in ('"\\ud8zz"', '"\\ud8"', "NaNs"):
        path.write_text(f'{{"info": {broken}, "images": [], "annotations": [], "categories": []}}')
        with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
            read_annotations(path)


def test_halves_of_surrogate_pairs_which_python_writes_for_file_names(tmp_path):
    path = write(tmp_path)
    text = path.read_text()
    for unread in ("\\ud83d\\ude00", "\\udce4", "\\ud800", "\\ud800x", "\\udc00\\ud800"):
        path.write_text(text.replace("{", f'{{"info": "{unread}", ', 1))
        assert read_annotations(path).file_names() == ["a.png", "b.png"]
    path.write_text(text.replace("a.png", "\\udce4.png"))
    with pytest.raises(DataError, match=r"images\[0\] \(id 4\) has file_name '\ufffd\.png', not in"):
        CocoDetection(tmp_path / "images", path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"PK\x03\x04", "ZIP"),
        (json.dumps(VALID).encode("utf-16"), "UTF-8"),
        (json.dumps(VALID).encode("utf-16-le"), "UTF-8"),
        (json.dumps(VALID).encode("utf-32"), "UTF-8"),
        (json.dumps(VALID, indent=1).encode()[:-30], "cut off"),
        (b'{"images": [],\n"annotations": [}', "line 2, column 17"),
    ],
)
def test_files_that_are_no_json_say_what_they_are(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json: .*{words}"):
        read_annotations(path)


def test_one_wrong_entry_of_many_is_named(tmp_path):
    data = copy.deepcopy(VALID)
    data["annotations"] = [{**VALID["annotations"][1], "id": n, "area": n} for n in range(5000)]
    data["annotations"][-1]["image_id"] = 4.0
    with pytest.raises(DataError, match=r"annotations\[4999\] \(id 4999\) has image_id 4\.0"):
        read_annotations(write(tmp_path, data))


@pytest.mark.parametrize("at_once", [2**24, 7])
def test_text_that_is_not_utf_8_is_named(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(files, "CHUNK", at_once)  # pieces that end within letters, too
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dog"', '"dög, ägypten, ü"'.encode()))
    assert read_annotations(path).categories[0]["name"] == "dög, ägypten, ü"
    for wrong in (content[:-5] + "é".encode()[:1], b"\x89PNG\r\n\xff"):  # cut off within a letter, no text
        path.write_bytes(wrong)
        with pytest.raises(DataError, match="not valid JSON"):
            read_annotations(path)
    path.write_bytes(content.replace(b'"cat"', b'"c\xe4t"'))
    column = content.index(b'"cat"') + 3
    for read in (read_annotations, read_json):
        with pytest.raises(DataError, match=rf"line 1, column {column}: byte 0xe4"):
            read(path)


def test_valid_files_are_not_read_entry_by_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(Entries, "_row", None)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(mixed()))
    assert len(read_annotations(path, annotation_types=["masks"]).ids) == 50


def test_lists_without_entries(tmp_path):
    nothing = {"images": [], "annotations": [], "categories": []}
    assert len(read_annotations(write(tmp_path, nothing))) == 0
    assert coco_of(read_annotations(write(tmp_path, nothing))).anns == {}
    assert read_annotations(write(tmp_path, {**VALID, "annotations": []})).boxes.shape == (0, 4)
    for images in ([], None):
        lost = {**VALID, "images": images, "annotations": [{**VALID["annotations"][0], "bbox": [0, 0, 0, 0]}]}
        with pytest.raises(DataError, match=r"a\.json: (annotations\[0\]|'images' must be a list)"):
            read_annotations(write(tmp_path, lost))


def test_given_annotations_hold_the_annotation_types(tmp_path):
    annotation = VALID["annotations"][0] | {"segmentation": [[1, 1, 9, 1, 9, 9]]}
    path = write(tmp_path, {**VALID, "annotations": [annotation]})
    with_masks = read_annotations(path, annotation_types=["masks"])
    assert CocoDetection(tmp_path / "images", with_masks, annotation_types=["masks"])[0][1]["masks"].any()
    assert set(CocoDetection(tmp_path / "images", with_masks)[0][1]) == {"boxes", "labels", "image_id"}
    with pytest.raises(ValueError, match="annotation_types"):
        CocoDetection(tmp_path / "images", read_annotations(path), annotation_types=["masks"])


def test_images_that_are_left_out_or_missing(tmp_path):
    path = write(tmp_path)
    data = CocoDetection(tmp_path / "images", path)
    assert "a.png: broken" in data.leave_out({4: "a.png: broken"})
    assert (data.image_ids, len(data), data[0][1]["image_id"]) == ([9], 1, 9)
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png"):
        CocoDetection(tmp_path / "images", path)
    with pytest.raises(DataError, match=r"b\.png"):
        CocoDetection(tmp_path / "images", path, skip_missing=True)[1]
    with pytest.raises(DataError, match="nowhere"):
        CocoDetection(tmp_path / "nowhere", path, skip_missing=True)


@pytest.mark.slow
def test_a_data_set_of_cocos_size_is_right_at_any_size(tmp_path):
    """The data set of the rehearsal, with fewer images."""
    scripts = Path(__file__).parents[2] / ".github" / "assets"
    pytest.importorskip("sklearn")
    folder = tmp_path / "coco"
    made = [sys.executable, scripts / "coco_sized.py", folder, "--images", "40", "--val_images", "5"]
    subprocess.run(made, check=True, capture_output=True)
    report = check_dataset(folder / "annotations" / "instances_train2017.json", folder / "train2017")
    assert {finding.level for finding in report.findings} <= {"note"}
    data = CocoDetection(
        folder / "train2017", folder / "annotations" / "instances_train2017.json", annotation_types=["masks"]
    )
    assert len(data) == 40
    assert data.counts().sum() > 200
    read = [sys.executable, scripts / "rehearsal.py", folder, "--read", "masks"]
    assert json.loads(subprocess.run(read, check=True, capture_output=True).stdout)["pickled"] > 0
