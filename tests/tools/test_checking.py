"""Data sets with everything wrong: each problem is named, none ends in a traceback."""

import copy
import itertools
import json
import re
import time
import unicodedata
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.annotation_files import (
    GONE,
    VALID,
    added,
    boxed,
    changed,
    coco_box,
    nodes,
    problems_in,
    scattered,
    write,
    write_splits,
)

from detector.data import image_files
from detector.data.annotations import read_annotations
from detector.data.check_dataset import DatasetReport, check_dataset
from detector.data.checks import Finding, check_annotations
from detector.data.dataset import CocoDetection
from detector.data.digits import write_digits
from detector.data.entries import BOX, CocoFile
from detector.data.image_files import check_files, check_image
from detector.errors import DataError
from detector.evaluation.truth import coco_of
from detector.models.anchors import anchor_advice
from detector.models.config import DetectorConfig

NESTED = [[[[[]]]]]
CASES = [
    (None, "not in COCO's format", "error", "not a nothing"),
    ([1], "not in COCO's format", "error", "not a list"),
    (changed("images", value=GONE), "not in COCO's format", "error", "'images' must be a list, got nothing"),
    (changed("annotations", value={}), "not in COCO's format", "error", "'annotations' must be a list, got dict"),
    (changed("categories", value="cat"), "not in COCO's format", "error", "'categories' must be a list, got str"),
    (changed("images", 1, value=3), "images that are no dicts", "error", "images[1] must be a dict, got int"),
    (changed("annotations", 1, value=None), "annotations that are no dicts", "error", "annotations[1] must"),
    (changed("images", 0, "id", value=GONE), "images without id", "error", "images[0] has no id"),
    (
        changed("images", 0, "file_name", value=GONE),
        "images without file_name",
        "error",
        "images[0] (id 4) has no file_name",
    ),
    (changed("images", 0, "width", value=GONE), "images without width", "error", "has no width"),
    (
        changed("annotations", 1, "bbox", value=GONE),
        "annotations without bbox",
        "error",
        "annotations[1] (id 2) has no bbox",
    ),
    (changed("annotations", 1, "image_id", value=GONE), "annotations without image_id", "error", "no image_id"),
    (
        changed("categories", 0, "name", value=GONE),
        "categories without name",
        "error",
        "categories[0] (id 7) has no name",
    ),
    (changed("images", 0, "id", value="4"), "images with a wrong id", "error", "id '4', must be an integer"),
    (changed("images", 0, "id", value=True), "images with a wrong id", "error", "id True"),
    (changed("images", 0, "id", value=2**63), "images with a wrong id", "error", "id 9223372036854775808"),
    (changed("annotations", 0, "id", value=1.0), "annotations with a wrong id", "error", "annotations[0] (id 1.0)"),
    (changed("annotations", 0, "image_id", value=NESTED), "annotations with a wrong image_id", "error", "[[[[[]]]]]"),
    (changed("annotations", 0, "category_id", value=None), "annotations with a wrong category_id", "error", "None"),
    (
        changed("images", 0, "file_name", value=5),
        "images with a wrong file_name",
        "error",
        "file_name 5, must be a str",
    ),
    (changed("images", 0, "width", value=0), "images with a wrong width", "error", "width 0, must be an integer of at"),
    (changed("images", 0, "height", value=-1), "images with a wrong height", "error", "images[0] (id 4) has height -1"),
    (changed("images", 0, "height", value=20.0), "images with a wrong height", "error", "height 20.0"),
    (changed("images", 0, "height", value=2**63), "images with a wrong height", "error", "height 9223372036854775808"),
    (changed("categories", 0, "name", value=[]), "categories with a wrong name", "error", "name [], must be a string"),
    (boxed(1, 2, 3), "annotations with a wrong bbox", "error", "annotations[1] (id 2) has bbox [1, 2, 3], must be 4"),
    (boxed(1, 2, 3, float("nan")), "annotations with a wrong bbox", "error", "nan"),
    (boxed(1, 2, 3, float("inf")), "annotations with a wrong bbox", "error", "inf"),
    (boxed(1, 2, 3, 10**400), "annotations with a wrong bbox", "error", "finite"),
    (boxed(1, 2, 3, "4"), "annotations with a wrong bbox", "error", "'4'"),
    (boxed(1, 2, 3, True), "annotations with a wrong bbox", "error", "True"),
    (changed("annotations", 0, "bbox", value={}), "annotations with a wrong bbox", "error", "bbox {}"),
    (changed("annotations", 0, "area", value=-1), "annotations with a wrong area", "error", "number from 0 to 1e10"),
    (
        changed("annotations", 0, "area", value=2e10),
        "annotations with a wrong area",
        "error",
        "a number from 0 to 1e10",
    ),
    (boxed(0, 0, 1e200, 1e200), "annotations with a wrong bbox", "error", "each 0 or from 1e-100 to 1e9 in size"),
    (boxed(0, 0, 1e-200, 1e-200), "annotations with a wrong bbox", "error", "each 0 or from 1e-100 to 1e9 in size"),
    (changed("annotations", 0, "area", value="1"), "annotations with a wrong area", "error", "area '1', must be"),
    (
        changed("annotations", 0, "iscrowd", value=2),
        "annotations with a wrong iscrowd",
        "error",
        "iscrowd 2, must be 0",
    ),
    (changed("annotations", 0, "iscrowd", value=None), "annotations with a wrong iscrowd", "error", "iscrowd None"),
    (
        changed("images", 1, value={**VALID["images"][0], "file_name": "c.png"}) | {"annotations": []},
        "images with the same id",
        "error",
        "images[1] (id 4): id 4 is used twice, first by images[0]",
    ),
    (added("annotations", image_id=9), "annotations with the same id", "error", "first by annotations[0]"),
    (added("categories", name="bird"), "categories with the same id", "error", "categories[2] (id 7): id 7 is used"),
    (
        changed("categories", 0, "name", value="dog"),
        "categories with the same name",
        "warning",
        "name 'dog' is used twice",
    ),
    (
        changed("images", 1, "file_name", value="a.png"),
        "images with the same file_name",
        "warning",
        "first by images[0]",
    ),
    (
        changed("annotations", 0, "image_id", value=5),
        "annotations of an unknown image",
        "error",
        "image_id 5, and there",
    ),
    (changed("annotations", 0, "category_id", value=5), "annotations of an unknown category", "error", "category_id 5"),
    (
        boxed(1, 2, 0, 5),
        "empty boxes",
        "warning",
        "annotations[1] (id 2) has bbox [1, 2, 0, 5], without width or height",
    ),
    (boxed(1, 2, 5, -3), "empty boxes", "warning", "left out"),
    (boxed(30, 2, 5, 3), "boxes outside their image", "warning", "[30, 2, 5, 3], outside its image of 30x20 pixels"),
    (boxed(1, 20, 5, 3), "boxes outside their image", "warning", "left out"),
    (boxed(-5, 2, 5, 3), "boxes outside their image", "warning", "left out"),
    (boxed(1, -3, 5, 3), "boxes outside their image", "warning", "left out"),
    (boxed(-1.1, 2, 5, 3), "boxes that reach outside their image", "warning", "clipped"),
    (boxed(1, -1.1, 5, 3), "boxes that reach outside their image", "warning", "clipped"),
    (boxed(1, 2, 30.1, 3), "boxes that reach outside their image", "warning", "clipped"),
    (boxed(1, 2, 5, 19.1), "boxes that reach outside their image", "warning", "30x20 pixels: clipped"),
    (added("categories", id=8, name="bird"), "categories never used", "note", "categories[2] (id 8), 'bird'"),
    (added("images", id=8, file_name="c.png"), "images without annotations", "note", "images[2] (id 8), 'c.png'"),
]


@pytest.mark.parametrize(
    ("data", "kind", "level", "words"), CASES, ids=[f"{case[1]}-{i}" for i, case in enumerate(CASES)]
)
def test_each_problem_is_named(tmp_path, data, kind, level, words):
    problems = problems_in(tmp_path, data)
    (problem,) = [problem for problem in problems if problem.kind == kind]
    assert problem.level == level
    assert words in problem.message
    assert problem.message.startswith(f"{tmp_path}/a.json: ")
    assert "\n" not in problem.message
    # What follows from it is no problem of its own, but that a wrong id is not there for those who refer to it.
    others = {other.kind for other in problems if other is not problem and other.level != "note"}
    assert others <= {"annotations of an unknown image", "annotations of an unknown category"}


def test_a_right_file_has_no_problem(tmp_path):
    assert problems_in(tmp_path, VALID) == []
    # Numbers that are right on the edge; crowds given as JSON's booleans.
    for data in (boxed(-1, -1, 32, 22), boxed(29.9, 19.9, 1, 1), changed("annotations", 0, "iscrowd", value=False)):
        assert problems_in(tmp_path, data) == []


def test_objects_of_no_image_have_no_other_problem(tmp_path):
    empty = {**VALID["annotations"][0], "bbox": [0, 0, 0, 0]}
    kinds = [problem.kind for problem in problems_in(tmp_path, {**VALID, "images": [], "annotations": [empty]})]
    assert kinds == ["annotations of an unknown image", "empty boxes", "categories never used"]


def test_what_is_there_twice_is_used(tmp_path):
    kinds = [problem.kind for problem in problems_in(tmp_path, added("categories", name="bird"))]
    assert kinds == ["categories with the same id"]


def test_a_list_that_is_missing_is_one_problem(tmp_path):
    for name in ("images", "categories"):
        kinds = [problem.kind for problem in problems_in(tmp_path, changed(name, value=GONE))]
        assert kinds == ["not in COCO's format"]
    assert [p.kind for p in problems_in(tmp_path, changed("annotations", value=3))] == ["not in COCO's format"]


def test_all_problems_are_found_at_once(tmp_path):
    data = copy.deepcopy(VALID)
    data["images"][0]["width"] = 0
    data["annotations"][0] |= {"iscrowd": 7, "bbox": [1, 2, 0, 5], "category_id": 50}
    data["annotations"].insert(0, "box")
    kinds = [problem.kind for problem in problems_in(tmp_path, data)]
    assert kinds == [
        "images with a wrong width",
        "annotations that are no dicts",
        "annotations with a wrong iscrowd",
        "annotations of an unknown category",
        "empty boxes",
        "categories never used",
    ]


def test_one_sentence_says_how_many_more_there_are(tmp_path):
    path = tmp_path / "a.json"
    for wrong, more in ((1, None), (2, "1 more error: "), (3, "2 more errors: ")):
        data = copy.deepcopy(VALID)
        for annotation in data["annotations"][:wrong]:
            annotation["bbox"] = None
        data["annotations"].append(
            {**VALID["annotations"][1], "id": 8, "bbox": [0, 0, 0, 0]}
        )  # a warning does not count
        path.write_text(json.dumps(data))
        with pytest.raises(DataError) as error:
            read_annotations(path)
        first = f"{path}: annotations[0] (id 1) has bbox None, must be {BOX.meant}"
        assert str(error.value) == first + (f" (and {more}tools/check.py {path} lists them)" if more else "")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, 4, 7, 9, 2**63, -(2**63), 10**400, "a.png"])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutations(draw):
    """The valid file with up to three nodes replaced by any value or deleted."""
    data = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in nodes(data) if path]))
        node = data
        for key in path[:-1]:
            node = node[key]
        if draw(st.booleans()):
            node[path[-1]] = draw(VALUES)
        else:
            del node[path[-1]]
        if not data:
            break
    return data


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=VALUES | mutations())
def test_any_value_is_checked_and_what_has_no_error_is_read(tmp_path, data):
    path = tmp_path / "a.json"
    try:
        problems = problems_in(tmp_path, data)
    except DataError:  # Infinity, and nothing else
        return
    assert all("\n" not in problem.message for problem in problems)
    DatasetReport(problems).to_text()
    path.write_text(json.dumps(data))
    errors = [problem for problem in problems if problem.level == "error"]
    if errors:
        with pytest.raises(DataError) as error:
            read_annotations(path)
        assert str(error.value).startswith(errors[0].message)
    else:
        coco = coco_of(read_annotations(path))
        assert len(coco.anns) == len(data["annotations"])
        assert all({"area", "iscrowd"} <= set(annotation) for annotation in coco.anns.values())


def kinds(findings: DatasetReport) -> list[tuple[str, str]]:
    return [(problem.level, problem.kind) for problem in findings.findings]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gone.png", "missing image files"),
        ("", "missing image files"),
        ("sub/gone.png", "missing image files"),
        ("a.png/x", "missing image files"),
        ("../outside.png", "image files outside their folder"),
        ("/etc/passwd", "image files outside their folder"),
        ("sub/../../outside.png", "image files outside their folder"),
        ("nul\0.png", "missing image files"),
        ("l" * 5000, "missing image files"),
        ("sub/inside.png", None),
        ("sub/../a.png", None),
    ],
)
def test_image_files_that_are_not_in_the_folder(tmp_path, name, kind):
    path = write(tmp_path, changed("images", 0, "file_name", value=name))
    (tmp_path / "images" / "sub").mkdir()
    for copied in ("outside.png", "images/sub/inside.png"):
        (tmp_path / copied).write_bytes((tmp_path / "images" / "a.png").read_bytes())
    expected = [("error", kind)] if kind else []
    names = [image["file_name"] for image in json.loads(path.read_text())["images"]]
    found = list(check_files([None, *names], tmp_path / "images", "image {}".format))
    assert [(position, problem.level, problem.kind) for position, problem in found] == [(1, *one) for one in expected]
    assert all("image 1 has file_name " in problem.message for _, problem in found)
    assert kinds(check_dataset(path, tmp_path / "images", decode=False)) == expected
    assert kinds(check_dataset(path, tmp_path / "images")) == expected  # named once: not opened
    if kind:
        with pytest.raises(DataError, match=r"images\[0\]"):
            CocoDetection(tmp_path / "images", path)
    else:
        CocoDetection(tmp_path / "images", path)


def test_a_folder_instead_of_an_image_is_found_when_it_is_opened(tmp_path):
    path = write(tmp_path, changed("images", 0, "file_name", value="sub"))
    (tmp_path / "images" / "sub").mkdir()
    assert kinds(check_dataset(path, tmp_path / "images")) == [("error", "unreadable images")]


def test_a_value_is_shown_in_a_line_however_large_it_is(tmp_path):
    text = json.dumps(changed("annotations", 0, "bbox", value="large"))
    nested = "[" * 300 + "]" * 300
    for large in (nested, f'{{"a": {nested}}}', f'"{"n" * 10**6}"', "1" * 5000, f"[{'1' * 5000}]", "1e999", "NaN"):
        (tmp_path / "a.json").write_text(text.replace('"large"', large))
        (problem,) = check_annotations(CocoFile(tmp_path / "a.json"))
        assert problem.kind == "annotations with a wrong bbox"
        assert len(problem.message) < 1000


def test_image_folder_that_is_not_there(tmp_path):
    path = write(tmp_path)
    for folder in (tmp_path / "nowhere", path, tmp_path / ("l" * 5000)):
        findings = check_dataset(path, folder)
        assert kinds(findings) == [("error", "missing image folder")]
        assert str(folder) in findings.findings[0].message


def test_missing_files_are_counted_in_the_one_sentence(tmp_path):
    path = write(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).unlink()
    rest = rf"\(and 1 more error: tools/check\.py {path} --images {tmp_path / 'images'} lists them\)$"
    with pytest.raises(DataError, match=rf"'a\.png', not in {tmp_path / 'images'} {rest}"):
        CocoDetection(tmp_path / "images", path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_that_cannot_be_read_as_annotated(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(pixels).save(whole)
    (tmp_path / f"cut.{suffix}").write_bytes(whole.read_bytes()[:-300])
    (tmp_path / f"empty.{suffix}").write_bytes(b"")
    (tmp_path / f"two\nlines.{suffix}").write_text("no image")
    size = {"width": 48, "height": 64}
    assert check_image(tmp_path, {"file_name": whole.name, **size}) is None
    for name, words in (
        ("cut", "cut off"),
        ("empty", "cannot be read"),
        ("two\nlines", "two lines"),
        ("no", "no such"),
    ):
        problem = check_image(tmp_path, {"file_name": f"{name}.{suffix}", **size})
        assert (problem.kind, problem.level) == ("unreadable images", "error")
        assert words in problem.message
        assert str(tmp_path) in problem.message
        assert "\n" not in problem.message
    problem = check_image(tmp_path, {"file_name": whole.name, "width": 64, "height": 48})
    assert (problem.kind, problem.level) == ("sizes that differ", "error")
    assert "48x64 pixels, its annotation says 64x48" in problem.message


def test_a_decoder_that_fails_in_its_own_way_is_an_unreadable_image(tmp_path, monkeypatch):
    root = write(tmp_path).parent

    def avif(path, **options):
        raise RuntimeError("Failed to decode image: Missing or empty image item")

    monkeypatch.setattr(Image, "open", avif)
    problem = check_image(root / "images", VALID["images"][0])
    assert (problem.kind, problem.level) == ("unreadable images", "error")
    assert "Missing or empty image item" in problem.message


def test_only_images_whose_entry_and_file_are_right_are_opened(tmp_path, monkeypatch):
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
    findings = check_dataset(path, tmp_path / "images", workers=2)
    opened = [problem for problem in findings.findings if problem.kind in ("unreadable images", "sizes that differ")]
    assert ["b.png" in opened[0].message, "31x20" in opened[1].message] == [True, True]
    assert len(opened) == 2
    assert findings.contents == "7 images with 3 annotations of 2 categories"
    monkeypatch.setattr("detector.data.image_files.check_image", None)
    assert check_dataset(path, tmp_path / "images", decode=False) == DatasetReport(
        [problem for problem in findings.findings if problem not in opened], findings.contents
    )


def test_interrupting_leaves_the_queue(tmp_path, monkeypatch):
    opened = []

    def slow(folder, image, orientation):
        time.sleep(0.002)
        opened.append(image)

    monkeypatch.setattr("detector.data.image_files.check_image", slow)
    data = {**VALID, "images": [{**VALID["images"][0], "id": i} for i in range(5000)], "annotations": []}
    path = write(tmp_path, data)

    def interrupted(images, *arguments, **options):
        yield from itertools.islice(images, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr("detector.data.image_files.tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(path, tmp_path / "images", workers=1)
    assert len(opened) < 5000


def test_files_that_are_no_json_are_one_problem(tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps(VALID)
    for content in (b"", text[:-20].encode(), b"\xff\xfe\x00", b"[" * 100_000, b"1" * 5000):
        path.write_bytes(content)
        findings = check_dataset(path, tmp_path)
        assert kinds(findings) == [("error", "unreadable annotation file")]
        assert str(path) in findings.findings[0].message
        assert findings.to_text().endswith("\n1 error")
    path.write_text(text[:-20])
    assert "cut off" in check_dataset(path).findings[0].message
    assert kinds(check_dataset(tmp_path / "none.json")) == [("error", "unreadable annotation file")]
    assert kinds(check_dataset(tmp_path)) == [("error", "unreadable annotation file")]


def test_report_is_grouped_and_counted():
    problems = [
        Finding("b", "note", "n1"),
        *(Finding("x", "warning", f"x{i}") for i in range(1500)),
        Finding("e", "error", "e1"),
        Finding("y", "warning", "y1"),
        Finding("e", "error", "e2"),
    ]
    assert DatasetReport(problems, "2 images").to_text(2).splitlines() == [
        *("2 errors: e", "    e1", "    e2", ""),
        *("1,500 warnings: x", "    x0", "    x1", "    ... and 1,498 more", ""),
        *("1 warning: y", "    y1", ""),
        *("1 note: b", "    n1", ""),
        "2 errors, 1,501 warnings, 1 note in 2 images",
    ]
    assert DatasetReport([], "2 images").to_text() == "nothing wrong in 2 images"
    assert DatasetReport(problems[:1], "2 images").to_text().endswith("\nnothing wrong, 1 note in 2 images")
    assert (
        DatasetReport(problems[3:5], "2 images").to_text(0).endswith("\n    ... and 2 more\n\n2 warnings in 2 images")
    )


def test_digits_have_no_problem(tmp_path):
    write_digits(tmp_path / "digits", splits={"train": 12, "val": 4})
    for split, count in (("train", 12), ("val", 4)):
        path = tmp_path / "digits" / "annotations" / f"instances_{split}.json"
        findings = check_dataset(path, tmp_path / "digits" / split)
        assert {problem.level for problem in findings.findings} <= {"note"}
        assert findings.contents.startswith(f"{count} images with ")


def test_flaws_are_what_training_leaves_out(tmp_path):
    data = copy.deepcopy(VALID)
    for box in ([1, 2, 0, 5], [40, 2, 5, 5], [-9, -9, 50, 50], [-5, 2, 5, 5], [1, 1, 2, 2]):
        data["annotations"].append({**VALID["annotations"][1], "id": len(data["annotations"]) + 1, "bbox": box})
    path = write(tmp_path, data)
    found = kinds(check_dataset(path, tmp_path / "images"))
    left_out = [kind for _, kind in found if kind in ("empty boxes", "boxes outside their image")]
    assert len(left_out) == 3
    assert len(found) == 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_micrographs(bccd, split):
    findings = check_dataset(bccd / "annotations" / f"instances_{split}.json", bccd / split)
    assert findings.findings == []


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco(coco_cc, split):
    findings = check_dataset(coco_cc / "annotations" / f"instances_{split}.json", coco_cc / split)
    assert {problem.kind for problem in findings.findings} <= {"categories never used", "images without annotations"}
    assert findings.contents.endswith(" of 80 categories")


def corners(x, y, w, h, width, height):
    return x, y, x + w, y + h


def centres(x, y, w, h, width, height):
    return x + w / 2, y + h / 2, w, h


def normalised(convention):
    def box(x, y, w, h, width, height):
        return [value / side for value, side in zip(convention(x, y, w, h, width, height), (width, height) * 2)]

    return box


def tiny(x, y, w, h, width, height):
    return x, y, 0.5, 0.5


@pytest.fixture
def looks(tmp_path):
    def looks(data):
        """What a file looks like as a whole: the level and the sentence."""
        found = [problem for problem in problems_in(tmp_path, data) if problem.kind.startswith("annotation file")]
        assert len(found) <= 1
        return [(problem.level, problem.kind, problem.message) for problem in found]

    return looks


@pytest.mark.parametrize("convention", [coco_box, corners, centres])
def test_normalised_boxes_are_one_error(tmp_path, looks, convention):
    data = scattered(normalised(convention))
    ((level, kind, message),) = looks(data)
    assert (level, kind) == ("error", "annotation file whose boxes look normalised (0..1)")
    assert message.startswith(f"{tmp_path}/a.json: 60 of 60 boxes look normalised")
    assert "multiply by the image's width and height" in message
    assert [problem.level for problem in problems_in(tmp_path, data)] == ["error"]
    with pytest.raises(DataError, match="60 of 60 boxes look normalised"):
        read_annotations(tmp_path / "a.json")


def test_boxes_that_are_small_or_placeholders_are_not_taken_for_normalised(looks):
    for box in (tiny, lambda *numbers: (0, 0, 1, 1), lambda *numbers: (0, 1, 1, 0)):
        assert looks(scattered(box)) == []
    mixed = scattered(normalised(coco_box))
    small = copy.deepcopy(mixed)
    for image in small["images"]:
        image["height"] = 10
    assert looks(small) == []  # in an image of few pixels it may be true
    for annotation in mixed["annotations"][:30]:
        annotation["bbox"] = [9, 9, 20, 20]
    assert looks(mixed) == []  # no more than half
    mixed["annotations"][0]["bbox"] = [0.2, 0.2, 0.5, 0.1]
    assert "31 of 60 boxes look normalised" in looks(mixed)[0][2]


def test_corners_are_told_from_boxes_that_reach_outside(tmp_path, looks):
    ((level, kind, message),) = looks(scattered(corners))
    assert (level, kind) == ("warning", "annotation file whose boxes look like corners (x1, y1, x2, y2)")
    assert "60 would not as corners" in message
    assert "subtract x1 from x2, and y1 from y2" in message
    # Said before the boxes that reach outside, which it explains.
    assert problems_in(tmp_path, scattered(corners))[0].message == message
    (count,) = re.findall(r"a\.json: (\d+) of 60 boxes reach outside", message)
    assert int(count) == sum(p.kind.startswith("boxes") for p in problems_in(tmp_path, scattered(corners)))
    assert looks(scattered(corners, count=10)) == []  # too few
    one_wrong = scattered(corners)
    one_wrong["annotations"][0]["bbox"] = [300, 200, 100, 50]
    assert looks(one_wrong) == []  # what lies left of its left edge is no corner
    assert looks(scattered(coco_box)) == []
    # Right boxes of large objects fit as corners, too, and a third of them reaches outside here.
    large = scattered(lambda *_: (30, 20, 500, 400))
    for annotation in large["annotations"][:20]:
        annotation["bbox"][0] = 150
    assert looks(large) == []


def test_centres_are_told_from_boxes_that_reach_outside(looks):
    ((level, kind, message),) = looks(scattered(centres, count=300))
    assert (level, kind) == ("warning", "annotation file whose boxes look like centres (cx, cy, width, height)")
    assert "subtract half of width and height from x and y" in message
    assert looks(scattered(centres, count=20)) == []
    at_the_edge = scattered(centres, count=300)
    for annotation in at_the_edge["annotations"][:10]:
        annotation["bbox"][0] = 0
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
        {**data["annotations"][2], "id": 16, "iscrowd": 0},  # of the crowd's box there is one object
        {**data["annotations"][2], "id": 17},
    ]
    problems = problems_in(tmp_path, data)
    assert [(p.kind, p.level) for p in problems] == [("duplicate boxes", "warning")] * 2
    for problem, position in zip(problems, (3, 4)):
        assert f"annotations[{position}] (id {position + 7}) has the image, category and bbox of annotations[1]" in (
            problem.message
        )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(VALID), encoding=encoding)
    findings = check_dataset(path)
    if encoding == "utf-16":
        assert kinds(findings) == [("error", "unreadable annotation file")]
        assert "save it as UTF-8" in findings.findings[0].message
    else:
        assert findings.findings == []
        assert len(read_annotations(path).ids) == 3


@pytest.fixture
def splits(tmp_path):
    return write_splits(tmp_path)


def test_images_that_two_splits_share(splits):
    val, images, train, train_images = splits
    findings = check_dataset(val, images, other=train, other_images=train_images)
    assert kinds(findings) == [("warning", "images that the other split has, too")]
    where = f"{val}: images[1] (id 9), 'b.png', is byte for byte {train}: images[1] (id 1), 'a.png'"
    assert findings.findings[0].message.startswith(where)
    assert kinds(check_dataset(val, images)) == []
    # By their names alone it is another, and perhaps none.
    for arguments in ({}, {"images": images}, {"images": images, "other_images": train_images, "decode": False}):
        findings = check_dataset(val, other=train, **arguments)
        assert kinds(findings) == [("note", "file names that the other split has, too")]
        assert f"{val}: images[0] (id 4), 'a.png', has the name of {train}: images[1] (id 1)" in (
            findings.findings[0].message
        )


def test_files_outside_the_folders_are_not_compared(splits, tmp_path):
    val, images, train, train_images = splits
    (tmp_path / "secret.png").write_bytes(b"secret")
    (images / "a.png").write_bytes(b"secret")
    names = [{**VALID["images"][0], "file_name": name} for name in ("../secret.png", "/etc/passwd", "nul\0")]
    train.write_text(json.dumps({**VALID, "images": names}))
    findings = check_dataset(val, images, other=train, other_images=train_images)
    assert kinds(findings) == [("error", "unreadable images")]  # that a.png is no image any more


def test_the_other_split_must_be_there(splits, tmp_path):
    val, images, train, train_images = splits
    for content, kind in (("{", "unreadable annotation file"), ("[]", "not in COCO's format")):
        (tmp_path / "broken.json").write_text(content)
        findings = check_dataset(val, images, other=tmp_path / "broken.json", other_images=train_images)
        assert kinds(findings) == [("error", kind)]
        assert f"{tmp_path / 'broken.json'}: " in findings.findings[0].message
    findings = check_dataset(val, images, other=train, other_images=tmp_path / "nowhere")
    assert kinds(findings) == [("error", "missing image folder")]
    assert str(tmp_path / "nowhere") in findings.findings[0].message


def test_anchors_are_a_note_and_only_of_boxes_that_are_right(tmp_path):
    path = tmp_path / "a.json"
    settings = DetectorConfig(min_size=48, max_size=64, anchor_sizes=(256, 300, 400, 500, 600))
    data = scattered(coco_box)
    for wrong, expected in (
        (coco_box, [("note", "anchors that most objects lie outside of")]),
        (corners, [("warning", "annotation file whose boxes look like corners (x1, y1, x2, y2)")]),
        (normalised(coco_box), [("error", "annotation file whose boxes look normalised (0..1)")]),
        (lambda *_: (1, 2, 0, 5), [("warning", "empty boxes"), ("error", "no box to train on")]),
    ):
        path.write_text(json.dumps(scattered(wrong)))
        found = kinds(check_dataset(path, anchor_advice=partial(anchor_advice, settings=settings)))
        assert [kind for kind in dict.fromkeys(found) if "outside their" not in kind[1] and "dupl" not in kind[1]] == (
            expected
        )
    # As training sees them: clipped, without crowds.
    for annotation in data["annotations"][:40]:
        annotation["iscrowd"] = 1
    data["annotations"][40]["bbox"] = [-500, -500, 540, 540]
    path.write_text(json.dumps(data))
    for name in ("0.png", "1.png"):
        (tmp_path / name).touch()
    advice = anchor_advice(*CocoDetection(tmp_path, path).shapes(), settings)
    (note,) = [
        p
        for p in check_dataset(path, anchor_advice=partial(anchor_advice, settings=settings)).findings
        if p.kind.startswith("anchors")
    ]
    assert note.message == f"{path}: {advice}"
    assert " of 20 objects " in advice


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
def test_the_name_that_would_fit_is_said(tmp_path, named, there):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).touch()
    ((_, problem),) = check_files([named], tmp_path, "images[{}]".format)
    assert problem.message.endswith(f"; did you mean {there!r}?")


def test_a_folder_that_holds_too_much_is_looked_at_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_LISTED", 1)
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    found = list(check_files(["A.png", "B.png"], tmp_path, "images[{}]".format))
    assert sum("did you mean" in problem.message for _, problem in found) == 1


def test_two_names_are_said_where_several_would_fit_and_none_where_none_does(tmp_path):
    for name in ("A.png", "a.PNG"):
        (tmp_path / name).touch()
    (tmp_path / "b.png").mkdir()
    ((_, problem),) = check_files(["a.png"], tmp_path, "images[{}]".format)
    assert "'A.png'" in problem.message
    assert "'a.PNG'" in problem.message
    for named in ("B.png", "c.png", "", "."):
        ((_, problem),) = check_files([named], tmp_path, "images[{}]".format)
        assert "did you mean" not in problem.message


@pytest.mark.parametrize(
    ("ours", "theirs", "how"),
    [
        ("red cell", "Red cell", "by case"),
        ("red cell", "red cell ", "by blanks"),
        ("red cell", "red  cell", "by blanks"),
        ("red cell", "red\u00a0cell", "by blanks"),
        ("red cell", "redcell", "by blanks"),
        ("café", "cafe\u0301", "by hyphens, underscores or Unicode form"),
        ("red cell", "REDCELL", "by case and blanks"),
        ("red-cell", "red_cell", "by hyphens, underscores or Unicode form"),
        ("red cell", "red\u200bcell", "by hyphens, underscores or Unicode form"),
    ],
)
def test_category_names_that_are_almost_the_same(tmp_path, ours, theirs, how):
    def named(*names):
        return {**VALID, "categories": [{"id": i, "name": name} for i, name in zip((7, 3, 8), names)]}

    path = write(tmp_path, named(ours, "dog", theirs))
    (warning,) = [p for p in check_dataset(path).findings if p.level == "warning"]
    assert warning.kind == "category names that are almost the same"
    assert warning.message.endswith(f"{ours!r} and {theirs!r} differ only {how}")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(named(theirs, "dog")))
    path = write(tmp_path, named(ours, "dog"))
    (warning,) = [p for p in check_dataset(path, other=other).findings if p.level == "warning"]
    assert warning.message.endswith(f"{ours!r} and {theirs!r} differ only {how}")
    other.write_text(json.dumps(named(theirs, "cat")))
    (error,) = [p for p in check_dataset(path, other=other).findings if p.level == "error"]
    assert error.kind == "no category of the other split"
    assert error.message.endswith(f"{ours!r} and {theirs!r} differ only {how}")
    other.write_text(json.dumps({**VALID, "categories": [{"id": i, "name": ours} for i in (1, 2)]}))
    (error,) = [p for p in check_dataset(path, other=other).findings if p.level == "error"]
    assert error.kind == "categories that cannot be matched"
    assert any(p.kind == error.kind for p in check_dataset(other, other=path).findings)  # whichever is trained on
    other.write_text(json.dumps(named(ours, "dog")))
    assert not any("almost" in p.kind for p in check_dataset(path, other=other).findings)


@pytest.mark.parametrize(
    "annotations",
    [
        [],
        [{**VALID["annotations"][0], "bbox": [1, 2, -10, 5]}],
        [{**VALID["annotations"][0], "bbox": [1, 2, 0, 5]}, {**VALID["annotations"][1], "bbox": [40, 2, 5, 5]}],
        [VALID["annotations"][2]],  # a crowd
    ],
)
def test_what_training_refuses_is_an_error(tmp_path, annotations):
    path = write(tmp_path, {**VALID, "annotations": annotations})
    (error,) = [p for p in check_dataset(path).findings if p.level == "error"]
    assert error.kind == "no box to train on"
    assert not CocoDetection(tmp_path / "images", path).counts().any()  # by which training goes


def test_ignore_is_a_note_that_is_counted(tmp_path):
    data = copy.deepcopy(VALID)
    for annotation, value in zip(data["annotations"], (1, True, 0)):
        annotation["ignore"] = value
    path = write(tmp_path, data)
    notes = [p for p in check_dataset(path).findings if "ignore" in p.kind]
    assert [p.level for p in notes] == ["note", "note"]
    assert "annotations[0] (id 1)" in notes[0].message
    assert read_annotations(path).warnings == {"annotations with ignore 1": 2}
    data["annotations"][0]["ignore"], data["annotations"][1]["ignore"] = "no", {"a": [1]}  # whatever it means
    assert read_annotations(write(tmp_path, data)).warnings == {}
