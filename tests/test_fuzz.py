"""Files broken in many ways end in our own error or the right answer.

``pytest -m exhaustive -s tests/test_fuzz.py`` tries thousands of new inputs; by default there are few, always the same.
With ``-s`` each test prints their number.
"""

import codecs
import copy
import faulthandler
import io
import json
import os
import pickle
import re
import reprlib
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.annotation_files import VALID, nodes, write
from support.refined_models import refined
from support.scored import read

from detector.data.annotations import read_annotations
from detector.data.check_dataset import check_dataset
from detector.data.dataset import CocoDetection
from detector.data.images import read_image
from detector.errors import DataError, ModelError
from detector.evaluation.metric import evaluate
from detector.evaluation.running import Predictions
from detector.evaluation.scoring import evaluate_coco
from detector.evaluation.tables import report_text
from detector.evaluation.truth import coco_of
from detector.models.build import build_detector
from detector.models.config import DetectorConfig
from detector.models.published import batch_norm_eps, load_torchvision_detector
from detector.pretrained.description import DetectorDescription
from detector.pretrained.detector import Detector
from detector.pretrained.loading import CHECKPOINT_KEY, load_detector

HANG = 60  # seconds for one input


class Hang(BaseException):
    """Not an Exception, which would be taken for an error of the file."""


def _hangs(number, frame):
    raise Hang(f"one input took {HANG} s")


@pytest.fixture(autouse=True)
def watchdog():
    before = signal.signal(signal.SIGALRM, _hangs)
    yield
    signal.alarm(0)
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, before)


def amounts(few, many):
    return pytest.mark.parametrize("amount", [few, pytest.param(many, marks=pytest.mark.exhaustive)])


def fuzz(amount, cases, check, *, slow_from=2000, least=0.02):
    """Check many inputs; at least that part of them must be refused, and that part answered.

    Args:
        amount: of inputs.
        cases: a strategy of (kind, input).
        check: takes an input; true if it gave an answer, false if it was refused, and raises if neither is right.
        slow_from: from this amount on inputs are drawn anew each time.
        least: see above.
    """
    counts = {True: Counter(), False: Counter()}

    @settings(
        max_examples=amount,
        deadline=None,
        derandomize=amount < slow_from,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(case=cases)
    def run(case):
        kind, content = case
        signal.alarm(HANG)
        faulthandler.dump_traceback_later(2 * HANG, exit=True)  # a hang that is not in Python
        try:
            answered = check(content)
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
        counts[answered][kind] += 1

    run()
    kinds = sorted({*counts[True], *counts[False]})
    lines = [f"{kind}: {counts[False][kind]:,} refused, {counts[True][kind]:,} answered" for kind in kinds]
    refused, answered = counts[False].total(), counts[True].total()
    print(f"\n{refused + answered:,} tried: {refused:,} refused, {answered:,} answered", *lines, sep="\n    ")
    assert min(refused, answered) >= least * (refused + answered), lines


def is_short_and_names(error, path):
    """The error names the file in one short line."""
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 5000


# Broken bytes

SHORT = reprlib.Repr()
SHORT.maxother = SHORT.maxstring = SHORT.maxdict = 4000
SHORT.maxlevel = 3


class File(bytes):
    """A file's content, which a failing test shows by how it was made."""

    made: object = None

    def __repr__(self):
        return f"<{len(self)} bytes: {self[:400] if self.made is None else SHORT.repr(self.made)}>"


def made(content, *how):
    content = File(content)
    content.made = how
    return content


PLACES = st.integers(0, 2**32 - 1)
EDITS = ("flip", "cut", "insert", "overwrite", "leave out", "double", "zeros")


@st.composite
def edits(draw, most=3):
    """What :func:`edited` does to bytes: (kind, place, number) one after the other."""
    kind = draw(st.sampled_from(EDITS))
    first = (kind, draw(PLACES), draw(st.integers(0, 255)))
    others = st.tuples(st.sampled_from(EDITS), PLACES, st.integers(0, 255))
    return [first, *draw(st.lists(others, max_size=most - 1))]


def edited(content, steps):
    content = bytearray(content)
    for kind, place, number in steps:
        at = place % (len(content) + 1)
        if kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = bytes([number]) * (1 + number % 9)
        elif kind == "leave out":
            del content[at : at + 1 + number]
        elif kind == "double":
            content[at:at] = content[at : at + 1 + number]
        elif at < len(content):
            if kind == "flip":
                content[at] ^= 1 << number % 8
            elif kind == "overwrite":
                content[at] = number
            else:
                content[at : at + 8] = bytes(len(content[at : at + 8]))
    return made(content, *steps)


# Annotation files and results files

FLOATS = "-0 0.5 5e-324 1e-200 1e-30 1e5 1e10 1e16 1e39 1e155 1e300 1.7e308 nan inf -inf -1e300"
INTEGERS = [0, 1, -1, 3, 4, 7, 9, 20, 30, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**308, 10**400]
NUMBERS = st.sampled_from([*INTEGERS, *map(float, FLOATS.split())])
JUNK = st.recursive(
    NUMBERS
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "a.png", "../a.json", "/etc/passwd", "a\0", "1", "", "\x1b[31m\n", "n" * 5000]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BOXES = st.lists(st.integers(-20, 40), min_size=4, max_size=4) | st.lists(NUMBERS, min_size=4, max_size=4)
SQUARE = [2, 3, 12, 3, 12, 13, 2, 13]
COMPRESSED = {"size": [20, 30], "counts": "[1::0U`0"}
RUNS = {"size": [20, 30], "counts": [43, 10, 10, 10, 527]}
SEGMENTATIONS = [[SQUARE], COMPRESSED, RUNS]
FIELDS = {  # of an annotation or a result
    "id": st.integers(-1, 4),
    "area": NUMBERS | st.integers(-5, 5),
    "iscrowd": st.sampled_from([0, 1, True, False, 1.0, 0.5, -1, 2, "1", None, []]),
    "category_id": st.sampled_from([3, 7, 4, 7.0, "3"]),
    "image_id": st.sampled_from([4, 9, 3, 9.0, True]),
    "score": NUMBERS,
    "bbox": BOXES,
}
MASK_FIELDS = {
    "segmentation": st.sampled_from([*SEGMENTATIONS, None, [], {}, [[]], [SQUARE, SQUARE[:6]], [SQUARE[:7]], "11"])
    | st.lists(st.lists(NUMBERS | st.integers(-9, 40), max_size=9), max_size=3)
    | st.fixed_dictionaries(
        {"size": st.sampled_from([[20, 30], [30, 20], [20], None, [20, 30.0], [2**40, 2**40]])},
        optional={"counts": st.lists(NUMBERS | st.integers(0, 600), max_size=4) | st.text(max_size=9) | JUNK},
    )
    | st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=20).map(
        lambda counts: {"size": [20, 30], "counts": counts}
    ),
    "keypoints": st.lists(NUMBERS | st.sampled_from([0, 1, 2]), max_size=7) | JUNK,
}
EXTRA = ("ignore", "_ignore", "segmentation", "num_keypoints", "keypoints", "score", "supercategory", "id ", "area")
CHANGES = ("replace", "delete", "number", "double", "extra key", "nest", "move", "repeat key", "swap ids")


@st.composite
def changes(draw, base, most=3):
    """(kind, JSON text): a right file with nodes replaced, deleted, doubled, nested, exchanged."""
    data = copy.deepcopy(base)
    kinds = draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=most))
    for kind in kinds:
        paths = [path for path in nodes(data) if path]
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        numbers = [path for path in paths if type(at(data, path)) in (int, float)]
        if kind in ("number", "swap ids") and numbers:
            path = draw(st.sampled_from(numbers))
        node = at(data, path[:-1])
        if kind == "delete":
            del node[path[-1]]
        elif kind == "number":
            node[path[-1]] = draw(NUMBERS)
        elif kind == "double" and isinstance(node, list):
            node.append(copy.deepcopy(node[path[-1]]))
            if isinstance(node[-1], dict) and draw(st.booleans()):
                node[-1]["id"] = draw(st.integers(-3, 12))
        elif kind == "extra key" and isinstance(node, dict):
            node[draw(st.sampled_from(EXTRA))] = draw(JUNK)
        elif kind == "nest":
            for _ in range(draw(st.sampled_from([1, 3, 200]))):
                node[path[-1]] = [node[path[-1]]]
        elif kind == "move" and isinstance(node, list):
            node.insert(0, node.pop(path[-1]))
        elif kind == "swap ids" and numbers:
            other = draw(st.sampled_from(numbers))
            node[path[-1]] = at(data, other)
        elif kind != "repeat key":
            names = st.sampled_from(["../out.png", "/etc/passwd", "b.png", "../images/a.png"])
            node[path[-1]] = draw(names if path[-1] == "file_name" else JUNK)
    text = json.dumps(data)
    if "repeat key" in kinds:  # of which the last counts
        text = text.replace('"bbox": ', '"bbox": [7], "bbox": ', 1)
    return kinds[0], made(text.encode(), text)


@st.composite
def fields(draw, base):
    """(kind, JSON text): a right file, of whose annotations a field or two are set, and others left out."""
    data = copy.deepcopy(base)
    entries = data if isinstance(data, list) else data["annotations"]
    field = draw(st.sampled_from(sorted(FIELDS)))
    entries[draw(PLACES) % len(entries)][field] = draw(FIELDS[field])
    for entry in entries:
        other = draw(st.none() | st.sampled_from(["area", "iscrowd", "bbox"]))
        if other == "bbox":
            entry[other] = draw(BOXES)
        else:
            entry.pop(other, None)
    return f"field: {field}", made(json.dumps(data).encode(), data)


def at(data, path):
    for key in path:
        data = data[key]
    return data


CODINGS = ("utf-16", "utf-8-sig", "utf-32", "latin-1", "cp037")
WHOLE_FILES = (b"", b"{}", b"[]", b"null", b"NaN", b"[" * 100_000, b'{"a":' * 5000, b"1" * 5000, b"\x00" * 100, b"\xff")


def json_files(base):
    """(kind, bytes) of a JSON file, right and broken."""
    text = json.dumps(base)
    return st.one_of(
        fields(base),
        changes(base),
        changes(base, most=1),
        edits().map(lambda steps: (f"bytes: {steps[0][0]}", edited(text.encode(), steps))),
        st.sampled_from(CODINGS).map(lambda coding: ("encoding", text.replace("cat", "\xe4").encode(coding))),
        st.sampled_from(WHOLE_FILES).map(lambda content: ("another file", content)),
    )


def right_scores(coco, data, results):
    """A report can be made and printed, and counts all objects."""
    evaluation = evaluate_coco(coco, Predictions(list(coco.imgs), results), about={})
    report = evaluation.report.to_dict()
    assert "nan" not in report_text(evaluation.report) + evaluation.tables
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    objects = Counter(a["category_id"] for a in data["annotations"] if not a.get("iscrowd", 0))
    assert {row["id"]: row["objects"] for row in report["by_class"]} == {
        category["id"]: objects[category["id"]] for category in data["categories"]
    }
    matrix = np.array(report["confusion"]["matrix"])
    assert matrix[:-1].sum(axis=1).tolist() == [objects[category] for category in sorted(coco.cats)]
    assert all(score is None or 0 <= score <= 1 for score in report["scores"].values())


def some_results(data):
    """Right, wrong, doubled and moved ones, of equal and of different scores."""
    results = []
    for number, annotation in enumerate(data["annotations"]):
        x, y, w, h = annotation["bbox"]
        box = [x + number, y, abs(w), abs(h)]
        one = {"image_id": annotation["image_id"], "category_id": annotation["category_id"], "bbox": box}
        other = data["categories"][number % len(data["categories"])]["id"]
        results += [
            {**one, "score": 0.75},
            {**one, "bbox": [x, y, abs(w), abs(h)], "score": 0.25 + number / 4},
            {**one, "category_id": other, "score": 0.5},
        ]
    return results


def right_targets(data, folder, path):
    """What training gets: the boxes that are not empty within their images."""
    try:
        loaded = CocoDetection(folder, path)
        samples = [loaded[index] for index in range(len(loaded))]
    except DataError as error:  # an image that is not there, or has another size
        is_short_and_names(error, folder)
        return
    names = [image["file_name"] for image in data["images"]]
    assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in names)
    kept = 0
    for image, target in samples:
        height, width = image.shape[1:]
        boxes, labels = target["boxes"], target["labels"]
        assert torch.isfinite(boxes).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        wanted = []
        label_of = {category: n for n, category in enumerate(sorted(c["id"] for c in data["categories"]), start=1)}
        for annotation in data["annotations"]:
            if annotation["image_id"] != int(target["image_id"]) or annotation.get("iscrowd", 0):
                continue
            x, y, w, h = (np.float32(side) for side in annotation["bbox"])
            sides = [min(max(side, 0), most) for side, most in zip((x, y, x + w, y + h), (width, height) * 2)]
            if sides[2] > sides[0] and sides[3] > sides[1]:
                wanted.append((label_of[annotation["category_id"]], *map(float, sides)))
        assert wanted == [(int(label), *box) for label, box in zip(labels, boxes.tolist())]
        kept += len(wanted)
    assert kept == loaded.counts().sum()


@amounts(120, 10_000)
def test_annotation_files(tmp_path, amount):
    path = write(tmp_path)
    (tmp_path / "out.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())

    def check(content):
        path.write_bytes(content)
        try:
            coco = coco_of(read_annotations(path))
        except DataError as error:
            is_short_and_names(error, path)
            return False
        data = json.loads(content.removeprefix(codecs.BOM_UTF8).decode(errors="replace"))
        right_scores(coco, data, some_results(data))
        right_targets(data, tmp_path / "images", path)
        return True

    fuzz(amount, json_files(VALID), check)


def with_masks_and_keypoints():
    """The valid file with masks of each kind, and keypoints."""
    data = copy.deepcopy(VALID)
    for category in data["categories"]:
        category |= {"keypoints": ["left_ear", "right_ear"], "skeleton": [[1, 2]]}
    for annotation, segmentation in zip(data["annotations"], SEGMENTATIONS, strict=True):
        annotation |= {"segmentation": segmentation, "keypoints": [3, 4, 2, 8.5, 9, 1], "num_keypoints": 2}
    return data


@st.composite
def mask_fields(draw, base):
    """(kind, JSON text): a right file, with other masks or keypoints, also of what the categories name."""
    data = copy.deepcopy(base)
    entries = data if isinstance(data, list) else data["annotations"]
    field = draw(st.sampled_from(sorted(MASK_FIELDS)))
    entries[draw(PLACES) % len(entries)][field] = draw(MASK_FIELDS[field])
    if isinstance(data, dict) and draw(st.booleans()):
        names = st.lists(st.sampled_from(["left", "right", "nose"]) | JUNK, max_size=3) | JUNK
        lines = st.lists(st.lists(st.integers(-1, 3), max_size=3) | JUNK, max_size=2) | JUNK
        data["categories"][draw(PLACES) % 2] |= {"keypoints": draw(names), "skeleton": draw(lines)}
    return f"field: {field}", made(json.dumps(data).encode(), data)


def learned(loaded):
    """The annotations of each image's target."""
    coco = coco_of(loaded.annotations)
    for image_id in loaded.image_ids:
        info, objects = coco.imgs[image_id], [a for a in coco.imgToAnns[image_id] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clamp(min=0).minimum(torch.tensor([info["width"], info["height"]] * 2))
        yield [a for a, (x1, y1, x2, y2) in zip(objects, boxes.tolist()) if x2 > x1 and y2 > y1]


def right_masks(path, folder):
    """Masks are those of pycocotools."""
    loaded = CocoDetection(folder, path, annotation_types=["masks"])
    coco = coco_of(loaded.annotations)
    for index, objects in enumerate(learned(loaded)):
        image, target = loaded[index]
        assert target["masks"].shape == (len(objects), *image.shape[1:])
        for annotation, mask in zip(objects, target["masks"].numpy(), strict=True):
            if any(annotation.get("segmentation") or ()):  # [[]] is none
                assert np.array_equal(mask, coco.annToMask(annotation))
            else:
                assert not mask.any()


@amounts(100, 10_000)
def test_annotation_files_with_masks_and_keypoints(tmp_path, amount):
    path = write(tmp_path)
    (tmp_path / "out.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())

    def check(content):
        path.write_bytes(content)
        check_dataset(path, tmp_path / "images")
        try:
            loaded = CocoDetection(tmp_path / "images", path, annotation_types=["keypoints", "masks"])
            samples = [loaded[index] for index in range(len(loaded))]
            right_masks(path, tmp_path / "images")
            evaluate(coco_of(loaded.annotations), [], iou_type="keypoints")
        except DataError as error:
            is_short_and_names(error, tmp_path)
            return False
        for (_, target), objects in zip(samples, learned(loaded), strict=True):
            assert target["keypoints"].shape == (len(objects), len(loaded.keypoints), 3)
            assert torch.isfinite(target["keypoints"]).all()
        return True

    base = with_masks_and_keypoints()
    fuzz(amount, st.one_of(mask_fields(base), mask_fields(base), changes(base)), check)


RESULTS = [
    {"image_id": 4, "category_id": 7, "bbox": [1, 2, 10.5, 5], "score": 0.9},
    {"image_id": 4, "category_id": 3, "bbox": [5, 6, 20, 10], "score": 0.75},
    {"image_id": 4, "category_id": 3, "bbox": [5, 5, 20, 9], "score": 0.75},
    {"image_id": 9, "category_id": 3, "bbox": [3, 3, 5, 5], "score": 0.125},
]


@amounts(100, 10_000)
def test_results_files(tmp_path, amount):
    truth, path = read_annotations(write(tmp_path)), tmp_path / "found.json"

    def check(content):
        path.write_bytes(content)
        try:
            results = read(path, truth)
        except DataError as error:
            is_short_and_names(error, path)
            return False
        assert len(results) == len(json.loads(content))
        right_scores(coco_of(truth), VALID, results)
        return True

    others = st.sampled_from([("another file", json.dumps(VALID).encode())])
    fuzz(amount, PLACES.flatmap(lambda n: json_files(RESULTS) if n % 30 else others), check)


MASK_RESULTS = [
    [{**result, "segmentation": segmentation} for result, segmentation in zip(RESULTS, [*SEGMENTATIONS, [SQUARE]])],
    [{**result, "keypoints": [3, 4, 0.5, 8.5, 9, 1]} for result in RESULTS],
]


@amounts(100, 10_000)
def test_results_files_of_masks_and_keypoints(tmp_path, amount):
    truth = read_annotations(write(tmp_path, with_masks_and_keypoints()), annotation_types=["masks", "keypoints"])
    path = tmp_path / "found.json"

    def check(content):
        path.write_bytes(content)
        try:
            results = read(path, truth)
            for kind, field in {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}.items():
                if results and field in results[0]:
                    scores, _ = evaluate(coco_of(truth), results, iou_type=kind)
                    assert all(score == -1 or 0 <= score <= 1 for score in scores.values())
        except DataError as error:  # the metric knows no files
            is_short_and_names(error, path if str(path) in str(error) else "keypoints")
            return False
        assert len(results) == len(json.loads(content))
        assert all(len(result["bbox"]) == 4 for result in results)
        return True

    cases = [make(base) for base in MASK_RESULTS for make in (mask_fields, mask_fields, changes)]
    fuzz(amount, st.one_of(cases), check)


# Images


def _pixels(mode):
    values = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(values).convert(mode)


def _saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    return exif.tobytes()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def interlaced():
    """A PNG in Adam7 order, which Pillow reads and does not write: 8 x 8, grey."""
    passes = [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]
    rows = b"".join((b"\0" + bytes(range(width))) * height for width, height in passes)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _images():
    rgb = _pixels("RGB")
    text = chunk(b"tEXt", b"a\0b") + chunk(b"zTXt", b"c\0\0" + zlib.compress(b"d" * 99))
    text += chunk(b"eXIf", _exif(6)[6:])
    png = _saved(rgb, "PNG", icc_profile=b"profile" * 9)
    images = {
        "JPEG": _saved(rgb, "JPEG"),
        "JPEG, progressive": _saved(rgb, "JPEG", progressive=True, restart_marker_rows=1),
        "JPEG, EXIF": _saved(rgb, "JPEG", exif=_exif(6), icc_profile=b"profile" * 9),
        "JPEG, CMYK": _saved(_pixels("CMYK"), "JPEG"),
        "JPEG, MPO": _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "PNG": png,
        "PNG, text": png[:33] + text + png[33:],
        "PNG, interlaced": interlaced(),
        "PNG, animated": _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]),
        "GIF": _saved(_pixels("P"), "GIF"),
        "GIF, animated": _saved(_pixels("P"), "GIF", save_all=True, append_images=[_pixels("P").rotate(180)]),
        "BMP": _saved(rgb, "BMP"),
        "BMP, palette": _saved(_pixels("P"), "BMP"),
        "TIFF": _saved(rgb, "TIFF"),
        "TIFF, 16 bit": _saved(_pixels("I;16"), "TIFF"),
        "TIFF, EXIF": _saved(rgb, "TIFF", tiffinfo={274: 6}),
        "WebP": _saved(rgb, "WEBP", exif=_exif(3)),
        "WebP, lossless": _saved(_pixels("RGBA"), "WEBP", lossless=True),
        "PPM": _saved(rgb, "PPM"),
        "PPM, plain": b"P3 13 11 255\n" + b"1 20 255 " * 143,
    }
    images |= {f"PNG, {mode}": _saved(_pixels(mode), "PNG") for mode in ("L", "LA", "RGBA", "P", "1", "I;16")}
    images |= {f"TIFF, {c}": _saved(rgb, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "jpeg")}
    return images


IMAGES = _images()
SUFFIXES = (".jpg", ".png", ".gif", ".bmp", ".tif", ".webp", ".ppm", "")


@st.composite
def image_files(draw):
    """(kind, (suffix, bytes, the whole file that was cut off))"""
    name = draw(st.sampled_from(sorted(IMAGES)))
    content, suffix = IMAGES[name], draw(st.sampled_from(SUFFIXES))
    how = draw(st.sampled_from(["edit", "edit", "edit", "cut", "head", "two", "orientation"]))
    if how == "cut":
        cut = content[: draw(PLACES) % len(content)]
        return f"{name.split(',')[0]}: cut", (suffix, made(cut, name, len(cut)), made(content, name))
    if how == "head":  # where the sizes are
        steps = [(kind, place % min(len(content), 64), n) for kind, place, n in draw(edits()) if kind != "cut"]
        return f"{name.split(',')[0]}: head", (suffix, edited(content, steps), None)
    if how == "two":
        other = IMAGES[draw(st.sampled_from(sorted(IMAGES)))]
        place = draw(PLACES)
        return "two formats", (suffix, content[: place % len(content)] + other[place % len(other) :], None)
    if how == "orientation":
        exif = edited(_exif(draw(st.sampled_from([*range(10), 65535]))), draw(st.just([]) | edits(most=2)))
        if draw(st.booleans()):
            return "EXIF", (suffix, _saved(_pixels("RGB"), "JPEG", exif=exif), None)
        png = IMAGES["PNG"]
        return "EXIF", (suffix, png[:33] + chunk(b"eXIf", exif[6:]) + png[33:], None)
    return f"{name.split(',')[0]}: edit", (suffix, edited(content, draw(edits())), None)


def declared(content):
    """Width and height as the head says them, where that is easy to read."""
    if content.startswith(b"\x89PNG\r\n\x1a\n") and content[12:16] == b"IHDR":
        return struct.unpack(">II", content[16:24])
    if content[:2] == b"BM" and content[14:18] == b"\x28\0\0\0":
        width, height = struct.unpack("<ii", content[18:26])
        return width, abs(height)
    with Image.open(io.BytesIO(content)) as image:
        return image.size


@amounts(200, 20_000)
def test_images(tmp_path, amount, capfd):
    def check(case):
        suffix, content, whole = case
        path = tmp_path / f"image{suffix}"
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                pixels = read_image(path)
            except DataError as error:
                is_short_and_names(error, path)
                pixels = None
            try:
                assert read_image(path, size=(13, 11)).shape == (3, 11, 13)
            except DataError as error:
                is_short_and_names(error, path)
        assert not heard
        if pixels is None:
            return False
        assert pixels.dtype == torch.uint8
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert tuple(pixels.shape) in {(3, h, w) for w, h in (declared(content), declared(content)[::-1])}
        if whole is not None:  # cut off behind the last pixel, or refused
            path.write_bytes(whole)
            assert torch.equal(pixels, read_image(path))
        return True

    fuzz(amount, image_files(), check)
    captured = capfd.readouterr()
    print(captured.out)
    # libtiff, which Pillow calls for a compressed TIFF, says there by itself why it cannot read it.
    assert not re.search(r"Warning|Traceback|\.py|PIL", captured.err)


def bombs(width, height):
    """Files of a few bytes that say they are that large."""
    gif = b"GIF89a" + struct.pack("<HH", min(width, 65535), min(height, 65535)) + b"\x80\0\0" + bytes(6)
    frame = b"," + struct.pack("<HHHH", 0, 0, min(width, 65535), min(height, 65535)) + b"\0\x02\x02\x4c\x01\0;"
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, min(width * height, 2**32 - 1))]
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    packed = zlib.compress(bytes(min((width + 15) // 8 * height, 2**25)), 9)
    webp = struct.pack("<I", (min(width, 2**24) - 1))[:3] + struct.pack("<I", (min(height, 2**24) - 1))[:3]
    body = b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + webp
    return {
        "png": b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b""),
        "gif": gif + frame,
        "bmp": b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6),
        "tif": tiff,
        "ppm": b"P6 %d %d 255\n" % (width, height),
        "webp": b"RIFF" + struct.pack("<I", len(body)) + body,
    }


READ = """
import resource, sys, warnings
warnings.simplefilter("always")
from detector.data.images import read_image
from detector.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        print(path, tuple(read_image(path).shape))
    except DataError as error:
        assert path in str(error), error
        print("refused")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_decompression_bombs_are_refused_before_they_are_unpacked(tmp_path):
    paths = []
    for width, height in (
        (60000, 60000),
        (10000, 9000),
        (13000, 13000),
        (2**30, 1),
        (1, 2**30),
        (2**31 - 1, 2**31 - 1),
    ):
        for suffix, content in bombs(width, height).items():
            paths.append(tmp_path / f"{width}x{height}.{suffix}")
            paths[-1].write_bytes(content)
    png = IMAGES["PNG"]
    packed = zlib.compress(bytes(2**27), 9)
    for name, content in (
        ("zTXt", b"a\0\0" + packed),
        ("iTXt", b"a\0\1\0\0\0" + packed),
        ("iCCP", b"a\0\0" + packed),
        ("IDAT", zlib.compress(bytes(2**27), 9)),
    ):
        paths.append(tmp_path / f"{name}.png")
        paths[-1].write_bytes(png[:33] + chunk(name.encode(), content) + png[33:])
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=HANG)
    assert done.stderr == ""
    *lines, grown = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines):
        # What is beside the pixels may be passed over, and so may rows that are too many.
        assert line == "refused" or (path.stem in ("iCCP", "IDAT") and line == f"{path} (3, 11, 13)"), line
    print(f"\n{len(paths)} bombs: {lines.count('refused')} refused; memory grew by {grown} MiB")
    assert int(grown) < 64


# Checkpoints, and folders of save_pretrained

TINY = DetectorConfig(name="timm/test_efficientnet", fpn_channels=8, box_head_size=8, min_size=32, max_size=32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A detector: its weights' digest, a checkpoint of it, and its folder."""
    torch.manual_seed(0)
    model = build_detector(TINY, 2, pretrained=False)
    folder = tmp_path_factory.mktemp("saved")
    detector = Detector(model, [3, 7], ["dog", "cat"], settings=TINY)
    detector.save(folder)
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        CHECKPOINT_KEY: DetectorDescription(TINY, "roi_align", [3, 7], ["dog", "cat"], batch_norm_eps(model)).to_dict(),
    }
    return detector.digest(), checkpoint, folder


def as_file(checkpoint, **options):
    file = io.BytesIO()
    torch.save(checkpoint, file, **options)
    return file.getvalue()


def right_or_refused(path, digest, *, names=True):
    """Whether the detector of a file is there, with the weights that were saved; else it must be refused."""
    try:
        detector = load_detector(path)
    except ModelError as error:
        is_short_and_names(error, path)
        return False
    assert digest is None or detector.digest() == digest
    assert not names or detector.category_names == ["dog", "cat"]
    return True


def repacked(content, change):
    """A ZIP archive with its members, (name, bytes), changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in change(members):
                archive.writestr(name, data)
    return made(file.getvalue())


@st.composite
def checkpoint_files(draw, whole, old):
    how = draw(st.sampled_from(["edit", "edit", "head", "end", "members", "legacy"]))
    if how in ("edit", "legacy"):
        steps = draw(edits())
        return f"{how}: {steps[0][0]}", edited(whole if how == "edit" else old, steps)
    if how in ("head", "end"):  # the pickle, and the archive's directory
        steps = []
        for kind, place, number in draw(edits()):
            far = place % 8000
            steps.append((kind, far if how == "head" else max(len(whole) - far, 0), number))
        return how, edited(whole, [step for step in steps if step[0] != "cut"])
    one, two = draw(PLACES), draw(PLACES)
    kind = draw(st.sampled_from(["swap", "drop", "rename", "double", "nothing"]))

    def change(members):
        i, j = one % len(members), two % len(members)
        if kind == "swap":
            (a, x), (b, y) = members[i], members[j]
            members[i], members[j] = (a, y), (b, x)
        elif kind == "drop":
            del members[i]
        elif kind == "rename":
            members[i] = (members[j][0], members[i][1])
        elif kind == "double":
            members.append((members[i][0], members[j][1]))
        return members

    return f"members: {kind}", made(repacked(whole, change), kind, one, two)


@amounts(60, 6_000)
def test_checkpoints_with_broken_bytes(tmp_path, saved, amount):
    digest, checkpoint, _ = saved
    path = tmp_path / "last.ckpt"
    whole, old = File(as_file(checkpoint)), File(as_file(checkpoint, _use_new_zipfile_serialization=False))

    def check(content):
        path.write_bytes(content)
        # Two tensors of one size may be exchanged: the archive is as right as before, and holds other weights.
        return right_or_refused(path, None if content.made[:1] == ("swap",) else digest)

    fuzz(amount, checkpoint_files(whole, old), check)


@st.composite
def settings_of_another(draw, checkpoint):  # a function, or a failing test would show all its numbers
    """(kind, a checkpoint's dict): with fields missing, of other types, absurd; with other weights."""
    content = copy.deepcopy(checkpoint())
    saved, state = content[CHECKPOINT_KEY], content["state_dict"]
    kind = draw(st.sampled_from(["settings", "settings", "field", "number", "names", "weights", "values", "shuffled"]))
    if kind == "settings":
        field = draw(st.sampled_from(sorted(saved["detector"])))
        what = field, draw(JUNK | SIZES | OTHERS | st.lists(SIZES, min_size=2, max_size=5))
        saved["detector"][field] = what[1]
    elif kind == "field":
        paths = [path for path in nodes({CHECKPOINT_KEY: saved}) if path] + [("state_dict",), ("epoch",)]
        path = draw(st.sampled_from(paths))
        what = path, draw(st.just("deleted") | JUNK | OTHERS)
        if isinstance(what[1], str) and what[1] == "deleted":
            del at(content, path[:-1])[path[-1]]
        else:
            at(content, path[:-1])[path[-1]] = what[1]
    elif kind == "number":
        name = draw(st.sampled_from(sorted(saved["batch_norm_eps"])))
        what = draw(st.just(1e-5) | NUMBERS | JUNK)
        saved["batch_norm_eps"][name] = what
    elif kind == "names":
        count, name = what = draw(st.sampled_from([0, 1, 2, 3, 100_000])), draw(JUNK)
        saved["category_ids"], saved["category_names"] = list(range(count)), [name] * count
    elif kind == "shuffled":
        names, what = sorted(state), draw(st.integers(1, 50))
        content["state_dict"] = {name: state[name] for name in names[what:] + names[:what]}
    else:
        what = name = draw(st.sampled_from([name for name in state if state[name].dim()]))
        value = state[name]
        if kind == "weights":
            number = draw(st.sampled_from(range(len(TENSORS))))
            what, state[name] = (name, number), TENSORS[number](value)
        elif value.is_floating_point():
            value = value.contiguous().clone()
            value.view(-1)[draw(PLACES) % value.numel()] = draw(
                st.sampled_from([float("nan"), float("inf"), -float("inf")])
            )
            state[name] = value
    return kind, made(as_file(content), kind, what)


SIZES = st.sampled_from([0, -1, 1, 2, 8, 9, 100, 10**5, 10**6, 2**31 - 1, 2**31, 10**9, 10**12, 2**63, 10**400])
LAUGHS = ["ha"]
for _ in range(30):
    LAUGHS = [LAUGHS] * 10  # a billion of a billion, in a file of a kilobyte
NAMES = "fasterrcnn_resnet50_fpn timm/resnet18 timm/vit_tiny timm/ maskrcnn_resnet50_fpn timm/hf-hub:a/b timm/../x"
OBJECTS = [torch.zeros(2), torch.tensor(3), torch.zeros(0), torch.float32, torch.Size([2]), {1, 2}, (8, 8), b"x", 1j]
OTHERS = st.sampled_from([*NAMES.split(), "DEFAULT", "packaged", "ha", *OBJECTS]).map(
    lambda value: LAUGHS if isinstance(value, str) and value == "ha" else value
)
TENSORS = [
    lambda value: value.double().requires_grad_(),
    lambda value: value.to(torch.float64).to_sparse(),
    lambda value: value.to("meta"),
    lambda value: value.to(torch.complex64),
    lambda value: value.bool(),
    lambda value: value[:1].clone().expand(value.shape),  # as large as the model's, out of nothing
    lambda value: value.new_zeros(1).expand(10**6, 10**6),
    lambda value: value[:-1],
    lambda value: value[None],
    lambda value: value.new_zeros(0),
    lambda value: torch.nn.Parameter(value, requires_grad=False),
    lambda value: [1],
    lambda value: None,
]


@amounts(40, 2_000)
def test_checkpoints_of_another_structure(tmp_path, saved, amount):
    digest, checkpoint, _ = saved
    path = tmp_path / "last.ckpt"

    def check(content):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Validating sparse tensor")  # torch's own, of a file that is refused
            return right_or_refused(path, digest, names=content.made[0] not in ("names", "field"))

    fuzz(amount, settings_of_another(lambda: checkpoint), check)


HEADERS = ("F64", "I32", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "BOOL", "U64", "", "X")


@st.composite
def folders(draw, config, weights):
    """(kind, (config.json, model.safetensors)), one of them broken."""
    config, weights = config(), weights()
    how = draw(st.sampled_from(["config", "config: bytes", "weights: bytes", "header", "header: bytes", "no file"]))
    if how == "config":
        kind, content = draw(changes(json.loads(config)))
        return f"config: {kind}", (content, weights)
    if how == "config: bytes":
        if draw(st.integers(0, 9)) == 0:
            return "config: another file", (draw(st.sampled_from([*WHOLE_FILES, b"3", b'"a"', b'["model"]'])), weights)
        return how, (edited(config, draw(edits())), weights)
    if how == "weights: bytes":
        return how, (config, edited(weights, draw(edits())))
    (size,) = struct.unpack("<Q", weights[:8])
    if how == "header":
        header = json.loads(weights[8 : 8 + size])
        entry = header[draw(st.sampled_from(sorted(header)))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "size"]))
        if field == "dtype":
            entry[field] = draw(st.sampled_from(HEADERS) | JUNK)
        elif field != "size" and field in entry:
            entry[field] = draw(st.lists(SIZES, max_size=4) | JUNK | st.permutations(entry[field]))
        text = json.dumps(header).encode()
        size = draw(SIZES.filter(lambda size: 0 <= size < 2**64)) if field == "size" else len(text)
        return f"header: {field}", (config, made(struct.pack("<Q", size) + text + weights[8 + size :], field, entry))
    if how == "header: bytes":
        steps = [(kind, place % (8 + size), n) for kind, place, n in draw(edits()) if kind != "cut"]
        return how, (config, edited(weights, steps))
    return how, (None, weights) if draw(st.booleans()) else (config, None)


@pytest.mark.parametrize("is_refined", [False, True])
@amounts(40, 4_000)
def test_folders_of_save(tmp_path, saved, amount, is_refined):
    digest, _, folder = saved
    if is_refined:
        detector = load_detector(folder)
        refined(detector.model)
        folder = tmp_path / "refined"
        detector.save(folder)
        digest = detector.digest()
    names = ("config.json", "model.safetensors")
    config, weights = ((folder / name).read_bytes() for name in names)

    def check(contents):
        for name, content in zip(names, contents):
            (tmp_path / name).unlink(missing_ok=True)
            if content is not None:
                (tmp_path / name).write_bytes(content)
        return right_or_refused(tmp_path, digest, names=False)

    fuzz(amount, folders(lambda: config, lambda: weights), check)


class Ran:
    """What runs where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def pickled(whole, content):
    """A checkpoint with another pickle in it."""
    return repacked(
        whole, lambda members: [(name, content if name.endswith("data.pkl") else data) for name, data in members]
    )


LOAD = """
import resource, sys
from detector.errors import ModelError
from detector.pretrained.loading import load_detector
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_detector(path)
        print("loaded", path)
    except ModelError as error:
        assert path in str(error) and len(str(error)) < 2000, error
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_checkpoints_that_run_code_or_fill_the_memory(tmp_path, saved):
    _, checkpoint, _ = saved
    whole = as_file(checkpoint)
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", pickle.dumps({}, 2))
        with archive.open("last/data/0", "w", force_zip64=True) as member:
            for _ in range(512):
                member.write(bytes(2**20))
    # Thousands of entries of the directory for one member: together they say that the file holds gigabytes.
    twice = bytearray(repacked(whole, lambda members: sorted(members, key=lambda member: len(member[1]))))
    end = twice.rindex(b"PK\x05\x06")
    entries, size, start = struct.unpack("<HII", twice[end + 10 : end + 20])
    many = bytes(twice[twice.rindex(b"PK\x01\x02", start, end) : end]) * 30_000
    twice[end:end] = many
    end += len(many)
    twice[end + 8 : end + 20] = struct.pack("<HHII", entries + 30_000, entries + 30_000, size + len(many), start)
    large = copy.deepcopy(checkpoint)
    large[CHECKPOINT_KEY]["detector"]["box_head_size"] = 2**19
    for name, value in large["state_dict"].items():
        if "box_head" in name or "box_predictor" in name:
            shape = [2**19 if side == 8 else side for side in value.shape]
            large["state_dict"][name] = torch.zeros(1).expand(shape)
    files = {
        "code": pickle.dumps(Ran(), 2),
        "code in an archive": pickled(whole, pickle.dumps({"state_dict": Ran()}, 2)),
        "code in the old format": as_file(Ran(), _use_new_zipfile_serialization=False),
        "bytearray": pickled(whole, b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x60\x85R."),
        "bytearray of Python 2": pickled(whole, b"\x80\x02c__builtin__\nbytearray\nJ\0\0\0\x60\x85R."),
        "deep": pickled(whole, deep),
        "packed": packed.getvalue(),
        "twice": bytes(twice),
        "large": as_file(large),
        "not a dict": as_file([1]),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    paths = sorted(tmp_path.glob("*.ckpt"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], cwd=tmp_path, capture_output=True, text=True, timeout=2 * HANG
    )
    assert done.stderr == ""
    *loaded, grown = done.stdout.splitlines()
    assert loaded == []
    assert int(grown) < 256
    assert not (tmp_path / "it-ran").exists()
    for path in paths:  # read as torchvision's own files are, which may be of the old format
        with pytest.raises(ModelError, match=path.stem):
            load_torchvision_detector("fasterrcnn_resnet50_fpn", str(path))
    assert not Path("it-ran").exists()
