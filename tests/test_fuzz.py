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
from detector.data.checks import check_annotations
from detector.data.dataset import CocoDetection
from detector.data.entries import CocoFile
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


def fuzz(amount, cases, check, least=0.02):
    """Check many inputs. At least that share must be refused, and that share answered.

    Args:
        amount: number of inputs. From 2000 on, they are new each time.
        cases: a strategy of (kind, input).
        check: returns true for a right answer, false for a refusal, and raises if it is neither.
        least: see above.
    """
    counts = {True: Counter(), False: Counter()}

    @settings(
        max_examples=amount,
        deadline=None,
        derandomize=amount < 2000,
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
    kinds = sorted(counts[True] | counts[False])
    lines = [f"{kind}: {counts[False][kind]} refused, {counts[True][kind]} answered" for kind in kinds]
    refused, answered = counts[False].total(), counts[True].total()
    print(f"\n{refused:,} refused, {answered:,} answered", *lines, sep="\n    ")
    assert min(refused, answered) >= int(least * (refused + answered)), lines


def is_short_and_names(error, path):
    """The error names the file in one short line."""
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 5000


# Mutations of bytes and of JSON

PLACES = st.integers(0, 2**32 - 1)
EDITS = ("flip", "cut", "insert", "overwrite", "leave out", "double", "zeros")
INTEGERS = [0, 1, -1, 3, 4, 7, 9, 20, 30, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**308, 10**400]
FLOATS = "-0 0.5 5e-324 1e-200 1e-30 1e5 1e10 1e16 1e39 1e155 1e300 1.7e308 nan inf -inf -1e300"
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
WHOLE_FILES = (b"", b"{}", b"[]", b"null", b"NaN", b"[" * 100_000, b'{"a":' * 5000, b"1" * 5000, b"\x00" * 100, b"\xff")


@st.composite
def edited(draw, content, start=0, end=None, kinds=EDITS):
    """Bytes with one to three edits between two places: (kind of the first edit, bytes)."""
    content, first = bytearray(content), None
    end = len(content) if end is None else end
    for _ in range(draw(st.integers(1, 3))):
        kind, place, number = draw(st.sampled_from(kinds)), draw(PLACES), draw(st.integers(0, 255))
        first = first or kind
        at = min(start + place % (end - start + 1), len(content))
        if kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = bytes([number]) * (1 + number % 9)
        elif kind == "leave out":
            del content[at : at + 1 + number]
        elif kind == "double":
            content[at:at] = content[at : at + 1 + number]
        elif kind == "zeros":
            content[at : at + 8] = bytes(len(content[at : at + 8]))
        elif at < len(content):
            content[at] = number if kind == "overwrite" else content[at] ^ 1 << number % 8
    return first, bytes(content)


def at(data, path):
    for key in path:
        data = data[key]
    return data


@st.composite
def changed(draw, base, values):
    """JSON with one to three changes of its nodes: (kind, bytes). ``values`` are strategies for fields by name."""
    data, first = copy.deepcopy(base), None
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in nodes(data) if path]
        if not paths:
            break
        if draw(st.integers(0, 2)):  # set or remove a field of an entry
            entries = [path for path in paths if isinstance(at(data, path), dict)]
            node = at(data, draw(st.sampled_from(entries))) if entries else {}
            field = draw(st.sampled_from(sorted(values)))
            kind = f"field: {field}"
            if draw(st.integers(0, 5)):
                node[field] = draw(values[field] | JUNK)
            else:
                node.pop(field, None)
        else:
            kind = draw(st.sampled_from(["replace", "delete", "double", "nest", "move", "swap"]))
            path = draw(st.sampled_from(paths))
            node, key = at(data, path[:-1]), path[-1]
            if kind == "delete":
                del node[key]
            elif kind == "nest":
                for _ in range(draw(st.sampled_from([1, 3, 200]))):
                    node[key] = [node[key]]
            elif kind == "swap":
                node[key] = copy.deepcopy(at(data, draw(st.sampled_from(paths))))
            elif kind == "replace":
                node[key] = draw(JUNK)
            elif isinstance(node, list):
                node.insert(0, node.pop(key) if kind == "move" else copy.deepcopy(node[key]))
        first = first or kind
    return first, json.dumps(data).encode()


def json_files(base, values):
    """(kind, bytes) of a JSON file, right and broken."""
    text = json.dumps(base)
    repeated = text.replace('"bbox": ', '"bbox": [7], "bbox": ', 1).encode()  # of which the last counts
    codings = [text.replace("cat", "\xe4").encode(coding) for coding in ("utf-16", "utf-8-sig", "utf-32", "latin-1")]
    others = st.sampled_from([*WHOLE_FILES, repeated, *codings]).map(lambda content: ("another file", content))
    mutated = changed(base, values)
    return st.one_of(mutated, mutated, mutated, edited(text.encode()), others)


# Annotation files and results files

SQUARE = [2, 3, 12, 3, 12, 13, 2, 13]
SEGMENTATIONS = [
    [SQUARE],
    {"size": [20, 30], "counts": "[1::0U`0"},
    {"size": [20, 30], "counts": [43, 10, 10, 10, 527]},
]
FIELDS = {  # right and wrong values of an annotation or a result
    "id": st.integers(-1, 4),
    "area": NUMBERS | st.integers(-5, 5),
    "iscrowd": st.sampled_from([0, 1, True, False, 1.0, 0.5, -1, 2, "1", None, []]),
    "category_id": st.sampled_from([3, 7, 4, 7.0, "3"]),
    "image_id": st.sampled_from([4, 9, 3, 9.0, True]),
    "score": NUMBERS,
    "bbox": st.lists(st.integers(-20, 40) | NUMBERS, min_size=4, max_size=4),
    "file_name": st.sampled_from(["../out.png", "/etc/passwd", "b.png", "../images/a.png"]),
    "ignore": st.just(1),
}
TEXTS = st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=20)
MASK_FIELDS = FIELDS | {
    "segmentation": st.sampled_from([*SEGMENTATIONS, None, [], {}, [[]], [SQUARE, SQUARE[:6]], [SQUARE[:7]], "11"])
    | st.lists(st.lists(NUMBERS | st.integers(-9, 40), max_size=9), max_size=3)
    | st.fixed_dictionaries(
        {"size": st.sampled_from([[20, 30], [30, 20], [20], None, [20, 30.0], [2**40, 2**40]])},
        optional={"counts": st.lists(NUMBERS | st.integers(0, 600), max_size=4) | TEXTS | JUNK},
    )
    | TEXTS.map(lambda counts: {"size": [20, 30], "counts": counts}),
    "keypoints": st.lists(NUMBERS | st.sampled_from([0, 1, 2]), max_size=7) | st.lists(st.sampled_from("abc")),
    "skeleton": st.lists(st.lists(st.integers(-1, 3), max_size=3), max_size=2),
}
RESULTS = [
    {"image_id": 4, "category_id": 7, "bbox": [1, 2, 10.5, 5], "score": 0.9},
    {"image_id": 4, "category_id": 3, "bbox": [5, 6, 20, 10], "score": 0.75},
    {"image_id": 4, "category_id": 3, "bbox": [5, 5, 20, 9], "score": 0.75},
    {"image_id": 9, "category_id": 3, "bbox": [3, 3, 5, 5], "score": 0.125},
]


def with_masks_and_keypoints():
    """The valid file with masks of each kind, and keypoints."""
    data = copy.deepcopy(VALID)
    for category in data["categories"]:
        category |= {"keypoints": ["left_ear", "right_ear"], "skeleton": [[1, 2]]}
    for annotation, segmentation in zip(data["annotations"], SEGMENTATIONS, strict=True):
        annotation |= {"segmentation": segmentation, "keypoints": [3, 4, 2, 8.5, 9, 1], "num_keypoints": 2}
    return data


def right_scores(coco, data, results):
    """A report can be made and printed, and counts all objects."""
    evaluation = evaluate_coco(coco, Predictions(list(coco.imgs), results), about={})
    report = evaluation.report.to_dict()
    assert "nan" not in report_text(evaluation.report) + evaluation.tables
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    objects = Counter(a["category_id"] for a in data["annotations"] if not a.get("iscrowd", 0))
    assert {row["id"]: row["objects"] for row in report["by_class"]} == {c: objects[c] for c in coco.cats}
    matrix = np.array(report["confusion"]["matrix"])
    assert matrix[:-1].sum(axis=1).tolist() == [objects[category] for category in sorted(coco.cats)]
    assert all(score is None or 0 <= score <= 1 for score in report["scores"].values())


def some_results(data):
    """Right, moved and wrong results, of equal and of different scores."""
    for number, annotation in enumerate(data["annotations"]):
        x, y, w, h = annotation["bbox"]
        one = {name: annotation[name] for name in ("image_id", "category_id")} | {"bbox": [x, y, abs(w), abs(h)]}
        other = data["categories"][number % len(data["categories"])]["id"]
        yield one | {"bbox": [x + number, y, abs(w), abs(h)], "score": 0.75}
        yield one | {"score": 0.25 + number / 4}
        yield one | {"category_id": other, "score": 0.5}


def learned(data):
    """The (label, box in the image, annotation) of each object that is trained on, by the id of its image."""
    sizes = {image["id"]: (image["width"], image["height"]) * 2 for image in data["images"]}
    labels = {category: n for n, category in enumerate(sorted(c["id"] for c in data["categories"]), start=1)}
    objects = {image_id: [] for image_id in sizes}
    for annotation in data["annotations"]:
        x, y, w, h = (np.float32(side) for side in annotation["bbox"])
        corners = zip((x, y, x + w, y + h), sizes[annotation["image_id"]])
        x1, y1, x2, y2 = (float(min(max(side, 0), most)) for side, most in corners)
        if x2 > x1 and y2 > y1 and not annotation.get("iscrowd", 0):
            objects[annotation["image_id"]].append((labels[annotation["category_id"]], [x1, y1, x2, y2], annotation))
    return objects


@amounts(120, 10_000)
def test_annotation_files(tmp_path, amount):
    path, folder = write(tmp_path), tmp_path / "images"
    (tmp_path / "out.png").write_bytes((folder / "a.png").read_bytes())

    def check(content):
        path.write_bytes(content)
        try:
            coco = coco_of(read_annotations(path))
        except DataError as error:
            is_short_and_names(error, path)
            assert any(finding.level == "error" for finding in check_dataset(path).findings)
            return False
        assert all(finding.level != "error" for finding in check_annotations(CocoFile(path)))
        data = json.loads(content.removeprefix(codecs.BOM_UTF8).decode(errors="replace"))
        right_scores(coco, data, list(some_results(data)))
        try:
            loaded = CocoDetection(folder, path)
            targets = [loaded[index][1] for index in range(len(loaded))]
        except DataError as error:  # an image that is not there, or has another size
            is_short_and_names(error, folder)
            return True
        names = [image["file_name"] for image in data["images"]]
        assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in names)
        for target in targets:
            expected = [(label, box) for label, box, _ in learned(data)[int(target["image_id"])]]
            assert list(zip(target["labels"].tolist(), target["boxes"].tolist())) == expected
        return True

    fuzz(amount, json_files(VALID, FIELDS), check)


@amounts(100, 10_000)
def test_annotation_files_with_masks_and_keypoints(tmp_path, amount):
    path, folder = write(tmp_path), tmp_path / "images"

    def check(content):
        path.write_bytes(content)
        check_dataset(path, folder)
        try:
            loaded = CocoDetection(folder, path, annotation_types=["keypoints", "masks"])
            targets = [loaded[index][1] for index in range(len(loaded))]
            evaluate(coco := coco_of(loaded.annotations), [], iou_type="keypoints")
        except DataError as error:
            is_short_and_names(error, tmp_path)
            return False
        for target in targets:
            objects = [a for *_, a in learned(json.loads(content.decode("utf-8-sig")))[int(target["image_id"])]]
            assert target["keypoints"].shape == (len(objects), len(loaded.keypoints), 3)
            assert torch.isfinite(target["keypoints"]).all()
            for annotation, mask in zip(objects, target["masks"].numpy(), strict=True):
                has_mask = any(annotation.get("segmentation") or ())  # [[]] is none
                expected = coco.annToMask(coco.anns[annotation["id"]]) if has_mask else np.zeros_like(mask)
                assert np.array_equal(mask, expected)
        return True

    fuzz(amount, json_files(with_masks_and_keypoints(), MASK_FIELDS), check)


RESULTS_FILES = {
    "boxes": RESULTS,
    "masks": [{**one, "segmentation": mask} for one, mask in zip(RESULTS, [*SEGMENTATIONS, [SQUARE]])],
    "keypoints": [{**one, "keypoints": [3, 4, 0.5, 8.5, 9, 1]} for one in RESULTS],
}


@pytest.mark.parametrize("kind", RESULTS_FILES)
@amounts(60, 7_000)
def test_results_files(tmp_path, amount, kind):
    types = [] if kind == "boxes" else ["masks", "keypoints"]
    data = with_masks_and_keypoints() if types else VALID
    truth, path = read_annotations(write(tmp_path, data), annotation_types=types), tmp_path / "found.json"

    def check(content):
        path.write_bytes(content)
        try:
            results = read(path, truth)
            for iou_type, field in {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}.items():
                if results and field in results[0] and types:
                    scores, _ = evaluate(coco_of(truth), results, iou_type=iou_type)
                    assert all(score == -1 or 0 <= score <= 1 for score in scores.values())
        except DataError as error:  # the metric knows no files
            is_short_and_names(error, path if str(path) in str(error) else "keypoints")
            return False
        assert len(results) == len(json.loads(content))
        assert all(len(result["bbox"]) == 4 for result in results)
        right_scores(coco_of(truth), data, results)
        return True

    fuzz(amount, json_files(RESULTS_FILES[kind], MASK_FIELDS if types else FIELDS), check)


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
    text = chunk(b"tEXt", b"a\0b") + chunk(b"zTXt", b"c\0\0" + zlib.compress(b"d" * 99)) + chunk(b"eXIf", _exif(6)[6:])
    png, two = _saved(rgb, "PNG", icc_profile=b"profile" * 9), {"save_all": True, "append_images": [rgb.rotate(180)]}
    images = {
        "JPEG": _saved(rgb, "JPEG"),
        "JPEG, progressive": _saved(rgb, "JPEG", progressive=True, restart_marker_rows=1),
        "JPEG, EXIF": _saved(rgb, "JPEG", exif=_exif(6), icc_profile=b"profile" * 9),
        "JPEG, CMYK": _saved(_pixels("CMYK"), "JPEG"),
        "JPEG, MPO": _saved(rgb, "MPO", **two),
        "PNG": png,
        "PNG, text": png[:33] + text + png[33:],
        "PNG, interlaced": interlaced(),
        "PNG, animated": _saved(rgb, "PNG", **two),
        "GIF": _saved(_pixels("P"), "GIF"),
        "GIF, animated": _saved(_pixels("P"), "GIF", **two),
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


@st.composite
def image_files(draw):
    """(kind, (suffix, bytes, the whole file that was cut off))"""
    name = draw(st.sampled_from(sorted(IMAGES)))
    content, suffix = IMAGES[name], draw(st.sampled_from((".jpg", ".png", ".tif", ".webp", "")))
    how = draw(st.sampled_from(["edit", "edit", "edit", "cut", "head", "two", "orientation"]))
    if how == "cut":
        return f"{name.split(',')[0]}: cut", (suffix, content[: draw(PLACES) % len(content)], content)
    if how == "two":
        place, other = draw(PLACES), IMAGES[draw(st.sampled_from(sorted(IMAGES)))]
        return "two formats", (suffix, content[: place % len(content)] + other[place % len(other) :], None)
    if how == "orientation":
        exif = _exif(draw(st.sampled_from([*range(10), 65535])))
        exif = draw(st.just(exif) | edited(exif).map(lambda pair: pair[1]))
        if draw(st.booleans()):
            return "EXIF", (suffix, _saved(_pixels("RGB"), "JPEG", exif=exif), None)
        png = IMAGES["PNG"]
        return "EXIF", (suffix, png[:33] + chunk(b"eXIf", exif[6:]) + png[33:], None)
    end = min(len(content), 64) if how == "head" else None  # where the sizes are
    return f"{name.split(',')[0]}: {how}", (suffix, draw(edited(content, 0, end))[1], None)


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
        pixels = None
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                pixels = read_image(path)
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
from detector.errors import DataError, ModelError
{}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        print("read", tuple(getattr(read(path), "shape", ())))
    except (DataError, ModelError) as error:
        assert path in str(error) and len(str(error)) < 2000, error
        print("refused")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def in_another_process(imported, paths):
    """Whether each file is read or refused, and by how many MiB the memory grows."""
    command, folder = [sys.executable, "-c", READ.format(imported), *paths], paths[0].parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=2 * HANG)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.slow
def test_decompression_bombs_are_refused_before_they_are_unpacked(tmp_path):
    paths = []
    sizes = [(60000, 60000), (10000, 9000), (13000, 13000), (2**30, 1), (1, 2**30), (2**31 - 1, 2**31 - 1)]
    for width, height in sizes:
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
    *lines, grown = in_another_process("from detector.data.images import read_image as read", paths)
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines):
        # What is beside the pixels may be passed over, and so may rows that are too many.
        assert line == "refused" or (path.stem in ("iCCP", "IDAT") and line == "read (3, 11, 13)"), line
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


def right_or_refused(path, digest):
    """Whether the detector of a file is loaded, with the saved weights. Otherwise it must be refused."""
    try:
        detector = load_detector(path)
    except ModelError as error:
        is_short_and_names(error, path)
        return False
    assert digest is None or detector.digest() == digest
    return True


def repacked(content, change):
    """A ZIP archive with its members, (name, bytes), changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in change(members):
                archive.writestr(name, data)
    return file.getvalue()


@st.composite
def members_changed(draw, whole):
    one, two, kind = draw(PLACES), draw(PLACES), draw(st.sampled_from(["swap", "drop", "rename", "double", "nothing"]))

    def change(members):
        (a, x), (b, y) = members[i := one % len(members)], members[j := two % len(members)]
        if kind == "swap":
            members[i], members[j] = (a, y), (b, x)
        elif kind == "drop":
            del members[i]
        elif kind == "rename":
            members[i] = (b, x)
        return [*members, (a, y)] if kind == "double" else members

    return f"members: {kind}", repacked(whole, change)


@amounts(60, 6_000)
def test_checkpoints_with_broken_bytes(tmp_path, saved, amount):
    digest, checkpoint, _ = saved
    path = tmp_path / "last.ckpt"
    whole, old = as_file(checkpoint), as_file(checkpoint, _use_new_zipfile_serialization=False)
    kinds = [kind for kind in EDITS if kind != "cut"]
    ends = edited(whole, 0, 8000, kinds) | edited(whole, len(whole) - 8000, None, kinds)  # pickle, archive's directory

    def check(case):
        content, exact = case
        path.write_bytes(content)
        return right_or_refused(path, digest if exact else None)

    cases = st.one_of(edited(whole), edited(whole), edited(old), ends, members_changed(whole))
    # Two tensors of one size may be exchanged: the archive is as right as before, and holds other weights.
    fuzz(amount, cases.map(lambda case: (case[0], (case[1], case[0] != "members: swap"))), check)


SIZES = st.sampled_from([0, -1, 1, 2, 8, 9, 100, 10**5, 10**6, 2**31 - 1, 2**31, 10**9, 10**12, 2**63, 10**400])
LAUGHS = ["ha"]
for _ in range(30):
    LAUGHS = [LAUGHS] * 10  # a billion of a billion, in a file of a kilobyte
NAMES = "fasterrcnn_resnet50_fpn timm/resnet18 timm/vit_tiny timm/ maskrcnn_resnet50_fpn timm/hf-hub:a/b timm/../x"
OBJECTS = [torch.zeros(2), torch.tensor(3), torch.zeros(0), torch.float32, torch.Size([2]), {1, 2}, (8, 8), b"x", 1j]
OTHERS = st.sampled_from([*NAMES.split(), "DEFAULT", "packaged", "ha", *OBJECTS]).map(
    lambda value: LAUGHS if isinstance(value, str) and value == "ha" else value  # never shown by a failing test
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
    lambda value: value.new_zeros(0),
    lambda value: torch.nn.Parameter(value, requires_grad=False),
    lambda value: value.float().index_fill(0, torch.tensor(0), float("nan")),
    lambda value: value.float().index_fill(0, torch.tensor(0), float("inf")),
    lambda value: [1],
    lambda value: None,
]


@st.composite
def other_structures(draw, checkpoint):  # a function: a failing test would show all its numbers
    """(kind, file): a checkpoint whose settings are missing, of other types or absurd; or with other weights."""
    content = copy.deepcopy(checkpoint())
    description, state = content[CHECKPOINT_KEY], content["state_dict"]
    kind = draw(st.sampled_from(["setting", "setting", "field", "names", "weights", "shuffled"]))
    if kind in ("setting", "field"):
        known = description["detector"] if kind == "setting" else {CHECKPOINT_KEY: description, "state_dict": 0}
        path = draw(st.sampled_from([path for path in nodes(known) if path]))
        node = at(description["detector"] if kind == "setting" else content, path[:-1])
        if kind == "field" and draw(st.booleans()):
            del node[path[-1]]
        else:
            node[path[-1]] = draw(JUNK | SIZES | OTHERS | st.lists(SIZES, min_size=2, max_size=5))
    elif kind == "names":
        count = draw(st.sampled_from([0, 1, 2, 3, 100_000]))
        description["category_ids"], description["category_names"] = list(range(count)), [draw(JUNK)] * count
    elif kind == "weights":
        name = draw(st.sampled_from([name for name in state if state[name].dim()]))
        state[name] = TENSORS[draw(st.sampled_from(range(len(TENSORS))))](state[name])
    else:
        content["state_dict"] = {name: state[name] for name in draw(st.permutations(sorted(state)))}
    return kind, as_file(content)


@amounts(40, 2_000)
def test_checkpoints_of_another_structure(tmp_path, saved, amount):
    digest, checkpoint, _ = saved
    path = tmp_path / "last.ckpt"

    def check(content):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Validating sparse tensor")  # torch's own, of a file that is refused
            return right_or_refused(path, digest)

    fuzz(amount, other_structures(lambda: checkpoint), check)


@st.composite
def folders(draw, config, weights):
    """(kind, (config.json, model.safetensors)), one of them broken."""
    config, weights = config(), weights()
    hows = ["config", "config: bytes", "weights: bytes", "header", "header: bytes", "no file", "another order"]
    how = draw(st.sampled_from(hows))
    (size,) = struct.unpack("<Q", weights[:8])
    if how == "header":
        header, numbers = json.loads(weights[8 : 8 + size]), weights[8 + size :]
        entry = header[draw(st.sampled_from(sorted(header)))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "size"]))
        kinds = ("F64", "I32", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "BOOL", "U64", "", "X")
        if field != "size":
            entry[field] = draw(st.sampled_from(kinds) | JUNK | st.lists(SIZES, max_size=4))
        text = json.dumps(header).encode()
        size = draw(SIZES.filter(lambda size: 0 <= size < 2**64)) if field == "size" else len(text)
        weights = struct.pack("<Q", size) + text + numbers
    elif how == "no file":
        config, weights = (None, weights) if draw(st.booleans()) else (config, None)
    elif how == "another order":
        config = json.dumps(json.loads(config), sort_keys=True).encode()
    elif how == "config":
        config = draw(changed(json.loads(config), {"name": JUNK}))[1]
    elif how == "config: bytes":
        config = draw(edited(config).map(lambda pair: pair[1]) | st.sampled_from([*WHOLE_FILES, b"3", b'["model"]']))
    else:
        weights = draw(edited(weights, 0, 8 + size if how == "header: bytes" else None))[1]
    return how, (config, weights)


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
        return right_or_refused(tmp_path, digest)

    fuzz(amount, folders(lambda: config, lambda: weights), check)


class Ran:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def pickled(whole, content):
    """A checkpoint with another pickle in it."""
    return repacked(whole, lambda members: [(n, content if n.endswith("data.pkl") else data) for n, data in members])


@pytest.mark.slow
def test_checkpoints_that_run_code_or_fill_the_memory(tmp_path, saved):
    _, checkpoint, _ = saved
    whole = as_file(checkpoint)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", pickle.dumps({}, 2))
        with archive.open("last/data/0", "w", force_zip64=True) as member:
            for _ in range(512):
                member.write(bytes(2**20))
    # Thousands of entries of the directory for one member claim together that the file holds gigabytes.
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
        "deep": pickled(whole, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "packed": packed.getvalue(),
        "twice": bytes(twice),
        "large": as_file(large),
        "not a dict": as_file([1]),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    paths = sorted(tmp_path.glob("*.ckpt"))
    *lines, grown = in_another_process("from detector.pretrained.loading import load_detector as read", paths)
    assert lines == ["refused"] * len(paths)
    assert int(grown) < 256
    assert not (tmp_path / "it-ran").exists()
    for path in paths:  # torchvision's own files may have the old format
        with pytest.raises(ModelError, match=path.stem):
            load_torchvision_detector("fasterrcnn_resnet50_fpn", str(path))
    assert not Path("it-ran").exists()
