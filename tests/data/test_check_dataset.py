"""Data sets with everything wrong: each error, warning and note is named, and none ends in a traceback."""

import copy
import itertools
import json
import time
import unicodedata
from functools import partial

import pytest
from PIL import Image
from support.annotation_files import (
    GONE,
    VALID,
    added,
    boxed,
    changed,
    coco_box,
    findings_in,
    scattered,
    write,
    write_splits,
)

from detector.data import image_files
from detector.data.annotations import read_annotations
from detector.data.check_dataset import DatasetReport, check_dataset
from detector.data.checks import Finding
from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.data.image_files import check_files, check_image
from detector.errors import DataError
from detector.models.anchors import anchor_advice
from detector.models.config import DetectorConfig


def kinds(findings) -> list[tuple[str, str]]:
    return [(finding.level, finding.kind) for finding in findings]


def image(position, field, value):
    return changed("images", position, field, value=value)


def annotation(field, value):
    return changed("annotations", 0, field, value=value)


BOX = ("error", "annotations with a wrong bbox")
SAME_ID = changed("images", 1, value={**VALID["images"][0], "file_name": "c.png"}) | {"annotations": []}
CASES = [
    ("error", "not in COCO's format", "", [None, [1]]),
    ("error", "not in COCO's format", "images", [changed("images", value=GONE)]),
    ("error", "not in COCO's format", "annotations", [changed("annotations", value={})]),
    ("error", "not in COCO's format", "categories", [changed("categories", value="cat")]),
    ("error", "images that are no dicts", "images[1]", [changed("images", 1, value=3)]),
    ("error", "annotations that are no dicts", "annotations[1]", [changed("annotations", 1, value=None)]),
    ("error", "images without id", "images[0]", [image(0, "id", GONE)]),
    ("error", "images without file_name", "images[0] (id 4)", [image(0, "file_name", GONE)]),
    ("error", "images without width", "images[0] (id 4)", [image(0, "width", GONE)]),
    ("error", "annotations without bbox", "annotations[0] (id 1)", [annotation("bbox", GONE)]),
    ("error", "annotations without image_id", "annotations[0] (id 1)", [annotation("image_id", GONE)]),
    ("error", "categories without name", "categories[0] (id 7)", [changed("categories", 0, "name", value=GONE)]),
    ("error", "images with a wrong id", "images[0]", [image(0, "id", value) for value in ("4", True, 2**63)]),
    ("error", "annotations with a wrong id", "annotations[0] (id 1.0)", [annotation("id", 1.0)]),
    ("error", "annotations with a wrong image_id", "[[[[[]]]]]", [annotation("image_id", [[[[[]]]]])]),
    ("error", "annotations with a wrong category_id", "None", [annotation("category_id", None)]),
    ("error", "images with a wrong file_name", "file_name 5", [image(0, "file_name", 5)]),
    ("error", "images with a wrong width", "width 0", [image(0, "width", 0)]),
    ("error", "images with a wrong height", "height", [image(0, "height", value) for value in (-1, 20.0, 2**63)]),
    ("error", "categories with a wrong name", "name []", [changed("categories", 0, "name", value=[])]),
    (*BOX, "annotations[1] (id 2) has bbox", [boxed(1, 2, 3), *(boxed(1, 2, 3, v) for v in (10**400, "4", True))]),
    (*BOX, "nan", [boxed(1, 2, 3, float("nan"))]),
    (*BOX, "inf", [boxed(1, 2, 3, float("inf"))]),
    (*BOX, "1e-100 to 1e9", [boxed(0, 0, 1e200, 1e200), boxed(0, 0, 1e-200, 1e-200)]),
    (*BOX, "bbox {}", [annotation("bbox", {})]),
    ("error", "annotations with a wrong area", "1e10", [annotation("area", value) for value in (-1, 2e10, "1")]),
    ("error", "annotations with a wrong iscrowd", "0 or 1", [annotation("iscrowd", value) for value in (2, None)]),
    ("error", "images with the same id", "images[0]", [SAME_ID]),
    ("error", "annotations with the same id", "annotations[0]", [added("annotations", image_id=9)]),
    ("error", "categories with the same id", "categories[2] (id 7)", [added("categories", name="bird")]),
    ("warning", "categories with the same name", "'dog'", [changed("categories", 0, "name", value="dog")]),
    ("warning", "images with the same file_name", "'a.png'", [image(1, "file_name", "a.png")]),
    ("error", "annotations of an unknown image", "image_id 5", [annotation("image_id", 5)]),
    ("error", "annotations of an unknown category", "category_id 5", [annotation("category_id", 5)]),
    ("warning", "empty boxes", "annotations[1] (id 2)", [boxed(1, 2, 0, 5), boxed(1, 2, 5, -3)]),
    (
        "warning",
        "boxes outside their image",
        "30x20",
        [boxed(30, 2, 5, 3), boxed(1, 20, 5, 3), boxed(-5, 2, 5, 3), boxed(1, -3, 5, 3)],
    ),
    (
        "warning",
        "boxes that reach outside their image",
        "30x20",
        [boxed(-1.1, 2, 5, 3), boxed(1, -1.1, 5, 3), boxed(1, 2, 30.1, 3), boxed(1, 2, 5, 19.1)],
    ),
    ("note", "categories never used", "'bird'", [added("categories", id=8, name="bird")]),
    ("note", "images without annotations", "'c.png'", [added("images", id=8, file_name="c.png")]),
]


@pytest.mark.parametrize(
    ("level", "kind", "words", "contents"), CASES, ids=[f"{c[1]}-{i}" for i, c in enumerate(CASES)]
)
def test_each_finding_names_the_entry_and_the_field(tmp_path, level, kind, words, contents):
    for data in contents:
        findings = findings_in(tmp_path, data)
        (finding,) = [finding for finding in findings if finding.kind == kind]
        assert finding.level == level
        assert words in finding.message
        assert finding.message.startswith(f"{tmp_path}/a.json: ")
        assert "\n" not in finding.message
        # Nothing follows from it, except that a wrong id is missing for those who refer to it.
        others = {other.kind for other in findings if other is not finding and other.level != "note"}
        assert others <= {"annotations of an unknown image", "annotations of an unknown category"}


def test_valid_files_have_no_findings(tmp_path):
    on_the_edge = (boxed(-1, -1, 32, 22), boxed(29.9, 19.9, 1, 1))
    for data in (VALID, *on_the_edge, annotation("iscrowd", False)):
        assert findings_in(tmp_path, data) == []
    write_digits(tmp_path / "digits", splits={"val": 4})
    report = check_dataset(tmp_path / "digits" / "annotations" / "instances_val.json", tmp_path / "digits" / "val")
    assert {finding.level for finding in report.findings} <= {"note"}
    assert report.contents.startswith("4 images with ")


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data_has_no_errors_or_warnings(bccd, coco_cc, split):
    assert check_dataset(bccd / "annotations" / f"instances_{split}.json", bccd / split).findings == []
    report = check_dataset(coco_cc / "annotations" / f"instances_{split}2017.json", coco_cc / f"{split}2017")
    assert {finding.kind for finding in report.findings} <= {"categories never used", "images without annotations"}
    assert report.contents.endswith(" of 80 categories")


def test_all_are_found_at_once_and_the_first_error_is_raised(tmp_path):
    data = copy.deepcopy(VALID)
    data["images"][0]["width"] = 0
    data["annotations"][0] |= {"iscrowd": 7, "bbox": [1, 2, 0, 5], "category_id": 50}
    data["annotations"].insert(0, "box")
    findings = findings_in(tmp_path, data)
    assert [f.kind for f in findings if f.level == "error"] == [
        "images with a wrong width",
        "annotations that are no dicts",
        "annotations with a wrong iscrowd",
        "annotations of an unknown category",
    ]
    assert [f.kind for f in findings if f.level != "error"] == ["empty boxes", "categories never used"]
    with pytest.raises(DataError) as error:
        read_annotations(tmp_path / "a.json")
    assert str(error.value).startswith(f"{findings[0].message} (and 3 more errors: tools/check.py {tmp_path}/a.json")
    with pytest.raises(DataError, match="bbox") as error:
        read_annotations(write(tmp_path, boxed(1, 2)))
    assert "more" not in str(error.value)


def test_values_are_shown_in_one_line_however_large(tmp_path):
    text = json.dumps(annotation("bbox", "large"))
    nested = "[" * 300 + "]" * 300
    for large in (nested, f'{{"a": {nested}}}', f'"{"n" * 10**6}"', "1" * 5000, f"[{'1' * 5000}]", "1e999", "NaN"):
        (tmp_path / "a.json").write_text(text.replace('"large"', large))
        (finding,) = check_dataset(tmp_path / "a.json").findings
        assert (finding.level, finding.kind) == BOX
        assert len(finding.message) < 1000


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(
            (name, "missing image files")
            for name in ("gone.png", "", "sub/gone.png", "a.png/x", "nul\0.png", "l" * 5000)
        ),
        *((name, "image files outside their folder") for name in ("../out.png", "/etc/passwd", "sub/../../out.png")),
        *((name, None) for name in ("sub/inside.png", "sub/../a.png")),
    ],
)
def test_image_files_that_are_not_in_the_folder(tmp_path, name, kind):
    path = write(tmp_path, image(0, "file_name", name))
    (tmp_path / "images" / "sub").mkdir()
    for copied in ("out.png", "images/sub/inside.png"):
        (tmp_path / copied).write_bytes((tmp_path / "images" / "a.png").read_bytes())
    expected = [("error", kind)] if kind else []
    found = list(check_files([None, name, "b.png"], tmp_path / "images", "image {}".format))
    assert [position for position, _ in found] == [1] * len(expected)
    assert all("image 1 has file_name " in finding.message for _, finding in found)
    assert kinds(check_dataset(path, tmp_path / "images", decode=False).findings) == expected
    assert kinds(check_dataset(path, tmp_path / "images").findings) == expected  # it is not opened
    if kind:
        with pytest.raises(DataError, match=r"images\[0\]"):
            CocoDetection(tmp_path / "images", path)
    else:
        CocoDetection(tmp_path / "images", path)


def test_folders(tmp_path):
    path = write(tmp_path, image(0, "file_name", "sub"))
    (tmp_path / "images" / "sub").mkdir()
    assert kinds(check_dataset(path, tmp_path / "images").findings) == [("error", "unreadable images")]
    for folder in (tmp_path / "nowhere", path, tmp_path / ("l" * 5000)):
        (finding,) = check_dataset(path, folder).findings
        assert (finding.level, finding.kind) == ("error", "missing image folder")
        assert str(folder) in finding.message
    for name in ("sub", "b.png"):
        (tmp_path / "images" / name).rename(tmp_path / name)
    with pytest.raises(DataError, match=rf"images\[0\].*1 more error.*{path} --images {tmp_path / 'images'}"):
        CocoDetection(tmp_path / "images", path)


def test_images_that_cannot_be_read_as_annotated(tmp_path, monkeypatch):
    Image.new("RGB", (48, 64)).save(tmp_path / "whole.png")
    (tmp_path / "two\nlines.png").write_text("no image")
    size = {"width": 48, "height": 64}
    assert check_image(tmp_path, {"file_name": "whole.png", **size}) is None
    for name in ("two\nlines.png", "gone.png"):
        finding = check_image(tmp_path, {"file_name": name, **size})
        assert (finding.level, finding.kind) == ("error", "unreadable images")
        assert " ".join(name.split()) in finding.message
        assert "\n" not in finding.message
    finding = check_image(tmp_path, {"file_name": "whole.png", "width": 64, "height": 48})
    assert (finding.level, finding.kind) == ("error", "sizes that differ")
    assert "48x64" in finding.message


def test_only_images_whose_entry_and_file_are_valid_are_opened(tmp_path, monkeypatch):
    data = copy.deepcopy(VALID)
    data["images"] += [
        {"id": 10, "file_name": "gone.png", "width": 30, "height": 20},
        {"id": 11, "file_name": "a.png", "width": "30", "height": 20},
        {"id": 12, "file_name": "../a.json", "width": 30, "height": 20},
        "a.png",
        {"id": 13, "file_name": "a.png", "width": 31, "height": 20},
    ]
    path = write(tmp_path, data)
    (tmp_path / "images" / "b.png").write_text("no image")
    report = check_dataset(path, tmp_path / "images", workers=2)
    opened = [f for f in report.findings if f.kind in ("unreadable images", "sizes that differ")]
    assert ["b.png" in opened[0].message, "31x20" in opened[1].message, len(opened)] == [True, True, 2]
    assert report.contents == "7 images with 3 annotations of 2 categories"
    monkeypatch.setattr(image_files, "check_image", None)
    unopened = [finding for finding in report.findings if finding not in opened]
    assert check_dataset(path, tmp_path / "images", decode=False).findings == unopened


def test_interrupting_leaves_the_queue(tmp_path, monkeypatch):
    opened = []

    def slow(folder, image, orientation):
        time.sleep(0.002)
        opened.append(image)

    def interrupted(images, *arguments, **options):
        yield from itertools.islice(images, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(image_files, "check_image", slow)
    monkeypatch.setattr(image_files, "tqdm", interrupted)
    data = {**VALID, "images": [{**VALID["images"][0], "id": i} for i in range(2000)], "annotations": []}
    with pytest.raises(KeyboardInterrupt):
        check_dataset(write(tmp_path, data), tmp_path / "images", workers=1)
    assert len(opened) < 2000


def test_files_that_cannot_be_read_are_one_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    for unreadable in (path, tmp_path / "none.json", tmp_path):
        report = check_dataset(unreadable, tmp_path)
        assert kinds(report.findings) == [("error", "unreadable annotation file")]
        assert str(unreadable) in report.findings[0].message
        assert report.to_text().endswith("\n1 error")


def test_the_text_is_grouped_and_counted():
    warnings = [Finding("x", "warning", f"x{i}") for i in range(1500)]
    findings = [Finding("b", "note", "n1"), *warnings, Finding("e", "error", "e1"), Finding("y", "warning", "y1")]
    assert DatasetReport(findings, "2 images").to_text(2).splitlines() == [
        *("1 error: e", "    e1", ""),
        *("1,500 warnings: x", "    x0", "    x1", "    ... and 1,498 more", ""),
        *("1 warning: y", "    y1", ""),
        *("1 note: b", "    n1", ""),
        "1 error, 1,501 warnings, 1 note in 2 images",
    ]
    assert DatasetReport([], "2 images").to_text() == "nothing wrong in 2 images"
    assert DatasetReport(findings[:1], "2 images").to_text().endswith("\nnothing wrong, 1 note in 2 images")
    assert DatasetReport(findings[1:3], "").to_text(0).endswith("\n    ... and 2 more\n\n2 warnings")


@pytest.mark.parametrize(
    "annotations",
    [
        [],
        [{**VALID["annotations"][0], "bbox": [1, 2, -10, 5]}],
        [{**VALID["annotations"][0], "bbox": [1, 2, 0, 5]}, {**VALID["annotations"][1], "bbox": [40, 2, 5, 5]}],
        [VALID["annotations"][2]],  # a crowd
    ],
)
def test_a_file_without_a_box_to_train_on_is_an_error(tmp_path, annotations):
    path = write(tmp_path, {**VALID, "annotations": annotations})
    assert [f.kind for f in check_dataset(path).findings if f.level == "error"] == ["no box to train on"]
    assert not CocoDetection(tmp_path / "images", path).counts().any()


def test_ignore_is_a_note_that_is_counted(tmp_path):
    data = copy.deepcopy(VALID)
    for entry, value in zip(data["annotations"], (1, True, 0)):
        entry["ignore"] = value
    path = write(tmp_path, data)
    notes = [f for f in check_dataset(path).findings if f.kind == "annotations with ignore 1"]
    assert [note.level for note in notes] == ["note", "note"]
    assert "annotations[0] (id 1)" in notes[0].message
    assert read_annotations(path).warnings == {"annotations with ignore 1": 2}
    data["annotations"][0]["ignore"], data["annotations"][1]["ignore"] = "no", {"a": [1]}
    assert read_annotations(write(tmp_path, data)).warnings == {}


def corners(x, y, w, h, width, height):
    return x, y, x + w, y + h


def centres(x, y, w, h, width, height):
    return x + w / 2, y + h / 2, w, h


def normalised(convention):
    def box(x, y, w, h, width, height):
        return [value / side for value, side in zip(convention(x, y, w, h, width, height), (width, height) * 2)]

    return box


NORMALISED = ("error", "annotation file whose boxes look normalised (0..1)")
CORNERS = ("error", "annotation file whose boxes look like corners (x1, y1, x2, y2)")
CENTRES = ("warning", "annotation file whose boxes look like centres (cx, cy, width, height)")


@pytest.fixture
def looks(tmp_path):
    def looks(data):
        """Findings on a whole file."""
        return [pair for pair in kinds(findings_in(tmp_path, data)) if pair[1].startswith("annotation file")]

    return looks


@pytest.mark.parametrize("convention", [coco_box, corners, centres])
def test_normalised_boxes_are_one_error(tmp_path, convention):
    (finding,) = findings_in(tmp_path, scattered(normalised(convention)))
    assert (finding.level, finding.kind) == NORMALISED
    assert "60 of 60" in finding.message
    with pytest.raises(DataError, match="normalised"):
        read_annotations(tmp_path / "a.json")


def test_small_boxes_and_placeholders_are_not_normalised(looks):
    for box in (lambda x, y, *_: (x, y, 0.5, 0.5), lambda *_: (0, 0, 1, 1), lambda *_: (0, 1, 1, 0)):
        assert looks(scattered(box)) == []
    mixed = scattered(normalised(coco_box))
    small = copy.deepcopy(mixed)
    for entry in small["images"]:
        entry["height"] = 10
    assert looks(small) == []  # in an image of few pixels it may be true
    for entry in mixed["annotations"][:30]:
        entry["bbox"] = [9, 9, 20, 20]
    assert looks(mixed) == []  # no more than half
    mixed["annotations"][0]["bbox"] = [0.2, 0.2, 0.5, 0.1]
    assert looks(mixed) == [NORMALISED]


def test_corners_are_distinguished_from_boxes_that_reach_outside(tmp_path, looks):
    assert looks(scattered(corners)) == [CORNERS]
    found = findings_in(tmp_path, scattered(corners))
    assert found[0].kind == CORNERS[1]  # before the boxes that reach outside, which it explains
    assert f"{sum(f.kind.startswith('boxes') for f in found)} of 60" in found[0].message
    assert looks(scattered(corners, count=10)) == []  # too few
    one_wrong = scattered(corners)
    one_wrong["annotations"][0]["bbox"] = [300, 200, 100, 50]
    assert looks(one_wrong) == []  # x2 is below x1
    assert looks(scattered(coco_box)) == []
    # Valid boxes of large objects fit as corners, too, and a third of them reaches outside here.
    large = scattered(lambda *_: (30, 20, 500, 400))
    for entry in large["annotations"][:20]:
        entry["bbox"][0] = 150
    assert looks(large) == []


def test_centres_are_distinguished_from_boxes_that_reach_outside(looks):
    assert looks(scattered(centres, count=300)) == [CENTRES]
    assert looks(scattered(centres, count=20)) == []
    at_the_edge = scattered(centres, count=300)
    for entry in at_the_edge["annotations"][:10]:
        entry["bbox"][0] = 0
    assert looks(at_the_edge) == []


def test_duplicate_boxes(tmp_path):
    data = copy.deepcopy(VALID)
    box = data["annotations"][1]
    data["annotations"] += [
        {**box, "id": 10},
        {**box, "id": 11, "bbox": [float(value) for value in box["bbox"]]},
        {**box, "id": 12, "category_id": 7},
        {**box, "id": 13, "image_id": 9},
        {**box, "id": 14, "bbox": [5, 5, 20, 11]},
        {**box, "id": 15, "iscrowd": 1},
        {**data["annotations"][2], "id": 16, "iscrowd": 0},  # one object with the box of the crowd
        {**data["annotations"][2], "id": 17},
    ]
    findings = findings_in(tmp_path, data)
    assert kinds(findings) == [("warning", "duplicate boxes")] * 2
    for finding, position in zip(findings, (3, 4)):
        assert f"annotations[{position}] (id {position + 7})" in finding.message
        assert "annotations[1]" in finding.message


@pytest.fixture
def splits(tmp_path):
    return write_splits(tmp_path)


def test_images_that_two_splits_share(splits):
    val, images, train, train_images = splits
    (finding,) = check_dataset(val, images, other=train, other_images=train_images).findings
    assert (finding.level, finding.kind) == ("warning", "images that the other split has, too")
    assert f"{val}: images[1] (id 9), 'b.png'" in finding.message
    assert f"{train}: images[1] (id 1), 'a.png'" in finding.message
    # By name alone another one is found.
    for arguments in ({}, {"images": images}, {"images": images, "other_images": train_images, "decode": False}):
        (finding,) = check_dataset(val, other=train, **arguments).findings
        assert (finding.level, finding.kind) == ("note", "file names that the other split has, too")
        assert f"{val}: images[0] (id 4), 'a.png'" in finding.message


def test_files_outside_the_folders_are_not_compared(splits, tmp_path):
    val, images, train, train_images = splits
    (tmp_path / "secret.png").write_bytes(b"secret")
    (images / "a.png").write_bytes(b"secret")
    names = [{**VALID["images"][0], "file_name": name} for name in ("../secret.png", "/etc/passwd", "nul\0")]
    train.write_text(json.dumps({**VALID, "images": names}))
    found = kinds(check_dataset(val, images, other=train, other_images=train_images).findings)
    assert found == [("error", "unreadable images")]  # a.png


def test_the_other_split_must_exist(splits, tmp_path):
    val, images, train, train_images = splits
    broken = tmp_path / "broken.json"
    for content, kind in (("{", "unreadable annotation file"), ("[]", "not in COCO's format")):
        broken.write_text(content)
        (finding,) = check_dataset(val, images, other=broken, other_images=train_images).findings
        assert (finding.level, finding.kind) == ("error", kind)
        assert str(broken) in finding.message
    (finding,) = check_dataset(val, images, other=train, other_images=tmp_path / "nowhere").findings
    assert (finding.level, finding.kind) == ("error", "missing image folder")
    assert str(tmp_path / "nowhere") in finding.message


def test_anchors_are_a_note_if_boxes_are_valid(tmp_path):
    path = tmp_path / "a.json"
    settings = DetectorConfig(min_size=48, max_size=64, anchor_sizes=(256, 300, 400, 500, 600))
    advice = partial(anchor_advice, settings=settings)
    for box, expected in (
        (coco_box, {("note", "anchors that most objects lie outside of")}),
        (corners, {CORNERS}),
        (normalised(coco_box), {NORMALISED}),
        (lambda *_: (1, 2, 0, 5), {("warning", "empty boxes"), ("error", "no box to train on")}),
    ):
        path.write_text(json.dumps(scattered(box)))
        found = kinds(check_dataset(path, anchor_advice=advice).findings)
        assert {kind for kind in found if "outside their" not in kind[1] and "dupl" not in kind[1]} == expected
    # The boxes are those of training: clipped, without crowds.
    data = scattered(coco_box)
    for entry in data["annotations"][:40]:
        entry["iscrowd"] = 1
    data["annotations"][40]["bbox"] = [-500, -500, 540, 540]
    path.write_text(json.dumps(data))
    for name in ("0.png", "1.png"):
        (tmp_path / name).touch()
    (note,) = [f for f in check_dataset(path, anchor_advice=advice).findings if f.kind.startswith("anchors")]
    assert note.message == f"{path}: {advice(*CocoDetection(tmp_path, path).shapes())}"


@pytest.mark.parametrize(
    ("named", "there"),
    [
        ("photos\\a.png", "a.png"),
        ("C:\\photos\\a.png", "a.png"),
        ("photos/a.png", "a.png"),
        ("/data/photos/a.png", "a.png"),
        ("../photos/a.png", "a.png"),
        ("sub\\b.png", "sub/b.png"),
        ("my%20photo.png", "my photo.png"),
        ("my photo%232.png", "my photo#2.png"),
        ("a%20b.png", "a%20B.png"),
        ("A.PNG", "a.png"),
        ("a .png", "a.png"),
        ("a.png", "sub/deep/a.png"),
        ("deep/a.png", "sub/deep/a.png"),
        ("a.jpg", "a.jpeg"),
        ("a.png?v=1", "a.png"),
        (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")),
        (unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")),
    ],
)
def test_a_similar_name_is_suggested(tmp_path, named, there):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).touch()
    ((_, finding),) = check_files([named], tmp_path, "images[{}]".format)
    assert repr(there) in finding.message


def test_at_most_two_similar_names_are_suggested(tmp_path, monkeypatch):
    for name in ("A.png", "a.PNG"):
        (tmp_path / name).touch()
    (tmp_path / "b.png").mkdir()

    def message(name):
        return next(check_files([name], tmp_path, "images[{}]".format))[1].message

    assert "'A.png'" in message("a.png")
    assert "'a.PNG'" in message("a.png")
    for named in ("B.png", "c.png", "", "."):
        assert "?" not in message(named)
    monkeypatch.setattr(image_files, "MAX_LISTED", 0)  # a folder with too many files
    assert "'A.png'" not in message("a.png")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("red cell", "Red cell"),
        ("red cell", "red  cell"),
        ("red cell", "red\u00a0cell"),
        ("red cell", "REDCELL"),
        ("café", "cafe\u0301"),
        ("red-cell", "red_cell"),
        ("red cell", "red\u200bcell"),
    ],
)
def test_category_names_that_are_almost_the_same(tmp_path, ours, theirs):
    def named(*names):
        return {**VALID, "categories": [{"id": i, "name": name} for i, name in zip((7, 3, 8), names)]}

    def found(path, **options):
        return [f for f in check_dataset(path, **options).findings if f.level != "note"]

    (warning,) = found(write(tmp_path, named(ours, "dog", theirs)))
    assert (warning.level, warning.kind) == ("warning", "category names that are almost the same")
    assert repr(ours) in warning.message
    assert repr(theirs) in warning.message
    other = tmp_path / "other.json"
    other.write_text(json.dumps(named(theirs, "dog")))
    path = write(tmp_path, named(ours, "dog"))
    assert [finding.kind for finding in found(path, other=other)] == [warning.kind]
    other.write_text(json.dumps(named(theirs, "cat")))
    assert ("error", "no category of the other split") in kinds(found(path, other=other))
    other.write_text(json.dumps({**VALID, "categories": [{"id": i, "name": ours} for i in (1, 2)]}))
    for one, two in ((path, other), (other, path)):  # either may be trained on
        assert ("error", "categories that cannot be matched") in kinds(found(one, other=two))
    other.write_text(json.dumps(named(ours, "dog")))
    assert found(path, other=other) == []
