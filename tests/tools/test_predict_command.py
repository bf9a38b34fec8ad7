"""tools/predict.py: image files in; pictures, names and COCO results out."""

import copy
import errno
import json
import multiprocessing
import os
import signal
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

pytest.importorskip("timm")

from support.commands import refused
from support.disk import BREAK
from support.refined_models import refined
from support.tiny_detector import IDS, NAMES, scene, tiny_checkpoint

from detector.data.annotations import read_annotations
from detector.data.results import read_results, results_file
from detector.errors import DataError, ModelError, UsageError
from detector.evaluation import evaluate
from detector.evaluation.truth import coco_of
from detector.pretrained import predict_files as predict_module
from detector.pretrained.detector import Detector
from detector.pretrained.loading import load_checkpoint
from detector.pretrained.predict_files import ImageFiles, find_images, predict_files
from detector.tools import source
from detector.tools.predict import main, predict

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save(tiny_checkpoint(), path)
    return str(path)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The current folder, which runs/predict is written to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint)


@pytest.fixture
def run(checkpoint, loaded, monkeypatch):
    """Call predict() with the checkpoint, which is loaded once, without workers, writing to out/."""
    load = source.load_source

    def load_once(*given):
        return (copy.deepcopy(loaded), checkpoint) if given == (checkpoint, None, None, None) else load(*given)

    monkeypatch.setattr(source, "load_source", load_once)
    options = {"checkpoint": checkpoint, "output": "out", "workers": 0}
    return lambda *images, **more: predict([str(image) for image in images], **options | more)


def write_image(path, *size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    v2.functional.to_pil_image(scene(*size, seed=seed)).save(path, **options)
    return path


@pytest.fixture
def photos(home):
    """Six images of two sizes, in a folder with subfolders and files that are no images."""
    folder = home / "photos"
    sizes = [(48, 64), (48, 64), (48, 64), (64, 48), (64, 48), (48, 64)]
    for number, (size, name) in enumerate(zip(sizes, ("a.png", "b.PNG", "c.bmp", "sub/a.png", "sub/x/e.gif", "z.tif"))):
        write_image(folder / name, *size, seed=number)
    write_image(folder / "._a.png")
    write_image(folder / ".thumbnails" / "a.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.png").mkdir()
    return folder


def turned(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def bomb(width, height):
    """A PNG of a few bytes that claims a size."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def read(folder="out"):
    folder = Path(folder)
    return json.loads((folder / "predictions.json").read_text()), json.loads((folder / "detections.json").read_text())


def names_of(found):
    return [image["file_name"] for image in found["images"]]


def found_names(given):
    return [file.name for file in find_images(given)[0]]


def pictures_of(folder="out"):
    folder = Path(folder) / "pictures"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---- find_images


def test_images_of_files_folders_and_patterns(photos, home):
    everything = ["a.png", "b.PNG", "c.bmp", "sub/a.png", "sub/x/e.gif", "z.tif"]
    assert found_names([photos]) == everything
    assert [file.id for file in find_images([str(photos)])[0]] == [1, 2, 3, 4, 5, 6]
    assert found_names([photos / "c.bmp", photos]) == ["c.bmp", *(name for name in everything if name != "c.bmp")]
    assert [file.path for file in find_images([f"{photos}/**/a.png"])[0]] == [photos / "a.png", photos / "sub/a.png"]
    assert found_names([photos / "notes.txt"]) == ["notes.txt"]  # an explicit path
    assert found_names([photos / "._a.png"]) == ["._a.png"]
    (photos / "[1].png").write_bytes((photos / "a.png").read_bytes())
    assert found_names([photos / "[1].png"]) == ["[1].png"]
    os.symlink(photos / "a.png", home / "link.png")
    assert found_names([photos / "a.png", "photos/../photos/a.png", "photos/a.*", home / "link.png"]) == ["a.png"]


def test_formats_that_pillow_reads_are_found_and_others_are_skipped(home, monkeypatch):
    formats = {suffix for suffix in (".avif", ".jp2", ".webp") if suffix in Image.registered_extensions()}
    for suffix in (*formats, ".png", ".pgm"):
        write_image(home / "in" / f"a{suffix}")
    write_image(home / "in" / "a.jfif", format="JPEG")
    others = {"b.heic", "c.HEIC", "sub/d.dng", "e.psd", "f.svg"}
    for name in (*others, "._g.heic", ".hidden/h.heic", "notes.txt", "k.pdf", "l"):
        (home / "in" / name).parent.mkdir(exist_ok=True)
        (home / "in" / name).write_bytes(b"")
    files, skipped = find_images(["in", "in", home / "in" / "sub" / ".." / "a.png"])
    assert {file.name for file in files} == {f"a{suffix}" for suffix in (*formats, ".png", ".pgm", ".jfif")}
    assert skipped == {".heic": 2, ".dng": 1, ".psd": 1, ".svg": 1}
    # Pillow may be built without AVIF.
    known = {suffix: name for suffix, name in Image.registered_extensions().items() if name != "AVIF"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    (home / "in" / "a.avif").write_bytes(b"")
    files, skipped = find_images(["in"])
    assert "a.avif" not in [file.name for file in files]
    assert skipped[".avif"] == 1


def test_skipped_formats_are_counted_and_no_failure(home, run, capsys):
    write_image(home / "in" / "a.png")
    for name in ("b.heic", "c.HEIC", "d.svg"):
        (home / "in" / name).write_bytes(b"")
    assert not run("in").broken
    assert "2 .heic, 1 .svg" in capsys.readouterr().err
    assert read()[0]["left_out"] == {".heic": 2, ".svg": 1}
    (home / "in" / "a.png").unlink()
    with pytest.raises(DataError, match=r"2 \.heic, 1 \.svg"):
        run("in")


@pytest.mark.parametrize(
    ("given", "name"),
    [(["photos/*.webp"], "webp"), (["photos", "nothing"], "nothing"), (["empty"], "empty"), ([""], "no such")],
)
def test_missing_images_are_named(photos, home, given, name):
    (home / "empty" / "photo.png").mkdir(parents=True)
    with pytest.raises(DataError, match=name):
        find_images(given)


# ---- output


def test_pictures_names_and_results(photos, checkpoint, run, capsys):
    assert not run(photos, min_score=0.6).broken
    found, results = read()
    assert {path.name for path in Path("out").iterdir()} == {"pictures", "predictions.json", "detections.json"}
    assert names_of(found) == ["a.png", "b.PNG", "c.bmp", "sub/a.png", "sub/x/e.gif", "z.tif"]
    assert pictures_of() == ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg", "sub/x/e.jpg", "z.jpg"]
    head = {name: found[name] for name in ("broken", "model", "crop", "min_score")}
    assert head == {"broken": [], "model": checkpoint, "crop": "affine", "min_score": 0.6}
    assert found["categories"] == [{"id": i, "name": name, "min_score": 0.6} for i, name in zip(IDS, NAMES)]
    sizes = [(image["id"], image["width"], image["height"]) for image in found["images"]]
    assert sizes == [(1, 64, 48), (2, 64, 48), (3, 64, 48), (4, 48, 64), (5, 48, 64), (6, 64, 48)]
    assert [Path(image["path"]) for image in found["images"]] == [photos / name for name in names_of(found)]
    count = sum(len(image["detections"]) for image in found["images"])
    assert count > 5
    assert f"{count} objects in 6 images" in capsys.readouterr().out
    detector = load_checkpoint(checkpoint)  # the Python call returns the same
    for image in found["images"]:
        expected = list(detector.detect(image["path"], min_score=0.6))
        assert image["detections"] == [
            {
                "name": one["name"],
                "category_id": IDS[one["label"] - 1],
                "score": pytest.approx(one["score"], abs=1e-5),
                "box": pytest.approx(one["box"], abs=1e-3),
            }
            for one in expected
        ]
        ours = [one for one in results if one["image_id"] == image["id"]]
        assert len(ours) == len(detector.detect(image["path"], min_score=0)) > len(expected)
        for one, other in zip(ours, image["detections"]):
            x, y, width, height = one["bbox"]
            assert [x, y, x + width, y + height] == pytest.approx(other["box"], abs=1e-4)
            assert (one["score"], one["category_id"]) == (other["score"], other["category_id"])
    for name in pictures_of():
        with Image.open(Path("out", "pictures", name)) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) >= 400


def test_results_do_not_depend_on_the_batch(photos, run):
    run(photos, output="one")
    run(photos, output="two", batch_size=3, workers=2)
    ours, theirs = read("one")[1], read("two")[1]
    assert len(ours) == len(theirs) == 60
    for one, other in zip(ours, theirs):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


@pytest.mark.parametrize(
    ("batch_size", "pixels", "expected"),
    [(2, None, [2, 1, 2, 1]), (8, 2 * 48 * 64, [2, 1, 2, 1]), (8, 1, [1] * 6)],
)
def test_a_batch_has_images_of_one_size_and_few_pixels(photos, run, monkeypatch, batch_size, pixels, expected):
    batches, detect_batch = [], Detector.detect_batch

    def watched(detector, images):
        batches.append([image.shape for image in images])
        return detect_batch(detector, images)

    monkeypatch.setattr(Detector, "detect_batch", watched)
    if pixels is not None:
        monkeypatch.setattr(predict_module, "BATCH_PIXELS", pixels)
    run(photos, batch_size=batch_size)
    assert [len(batch) for batch in batches] == expected
    assert all(len(set(batch)) == 1 for batch in batches)


def test_each_image_gets_a_picture_of_its_own(photos, run, home):
    write_image(home / "other" / "A.png", seed=9)
    write_image(home / "other" / "a.bmp", seed=10)
    run(photos / "a.png", photos / "sub" / "a.png", "other")
    assert pictures_of() == ["A-3.jpg", "a-2.jpg", "a-4.jpg", "a.jpg"]
    assert names_of(read()[0]) == ["a.png", "a.png", "A.png", "a.bmp"]
    write_image(home / "in" / "a.png")
    write_image(home / "in" / "a.jpg" / "b.png")
    run("in", output="two")
    assert pictures_of("two") == ["a-2.jpg", "a.jpg/b.jpg"]


def test_labels_without_categories_stand_for_themselves(photos, checkpoint):
    detector, files = load_checkpoint(checkpoint), ImageFiles(find_images([photos / "a.png"])[0])
    labels = detector.detect(photos / "a.png", min_score=0).labels.tolist()
    detector.category_ids = [None] * 3
    done = predict_files(detector, files, Path("out"), workers=0)
    assert [one["category_id"] for one in done.results] == labels
    assert [one["id"] for one in read()[0]["categories"]] == [1, 2, 3]
    detector.category_ids = [None, 5, None]  # gaps, as in COCO's ids: such labels are no results
    done = predict_files(detector, files, Path("out"), workers=0)
    assert {one["category_id"] for one in done.results} == {5}
    assert [one["id"] for one in read()[0]["categories"]] == [5]


def test_a_picture_is_no_larger_than_a_jpeg_can_be(home):
    predict_module._write_picture(home / "long.jpg", Image.new("RGB", (70000, 20)))
    assert Image.open(home / "long.jpg").width == 65500


def test_remarks_on_images_are_printed_and_written(home, run, capsys):
    grey = scene()[0].numpy()
    for name in ("b.tif", "c.png"):
        (home / "in").mkdir(exist_ok=True)
        Image.fromarray(grey.astype("uint16") * 16).save(home / "in" / name)
    Image.fromarray(grey.astype("float32") / 255).save(home / "in" / "d\x1b[31m.tif")
    write_image(home / "in" / "e.gif", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    Image.fromarray(grey).save(home / "in" / "f.png")
    run("in", workers=1)
    images = read()[0]["images"]
    assert [len(image["remarks"]) for image in images] == [1, 1, 1, 1, 0]
    assert images[0]["remarks"] == images[1]["remarks"]
    lines = capsys.readouterr().err.splitlines()
    assert [images[i]["remarks"][0] in line for i, line in zip((0, 2, 3), lines, strict=True)] == [True] * 3
    assert ["b.tif" in lines[0], "e.gif" in lines[2], "\x1b" in lines[1]] == [True, True, False]
    assert images[0]["detections"] == images[1]["detections"] == images[2]["detections"] == images[4]["detections"]


def test_max_pixels(home, run, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    write_image(home / "a.png")
    for options in ({}, {"workers": 1}, {"max_pixels": 3071}):
        (broken,) = run("a.png", **options).broken
        assert "max_pixels" in broken["error"]
    assert not run("a.png", max_pixels=3072).broken


# ---- folders that exist


def test_a_second_run_gets_its_own_folder(photos, run):
    for folder in ("runs/predict", "runs/predict-2"):
        run(photos / "a.png", output=None)
        assert names_of(read(folder)[0]) == ["a.png"]


def test_pictures_of_an_earlier_run_are_deleted_and_nothing_else(photos, run):
    run(photos)
    earlier = {image["picture"] for image in read()[0]["images"]}
    assert earlier == {f"pictures/{name}" for name in pictures_of()}
    for name in ("pictures/mine.jpg", "pictures/sub/mine.jpg", "pictures/notes.txt", "mine.jpg"):
        Path("out", name).write_bytes(b"mine")
    os.symlink(photos, Path("out", "pictures", "link"))
    run(photos / "b.PNG")
    kept = ["mine.jpg", "notes.txt", "sub/mine.jpg"]
    assert pictures_of() == ["b.jpg", *kept]
    assert [image["picture"] for image in read()[0]["images"]] == ["pictures/b.jpg"]
    run(photos / "a.png", pictures=False)
    assert pictures_of() == kept
    assert "picture" not in read()[0]["images"][0]
    assert Path("out", "mine.jpg").exists()
    assert len(found_names([photos])) == 6


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.jpg", "pictures/../../outside.jpg", "/{home}/outside.jpg", "pictures/link/outside.jpg"),
        *("pictures/../mine.jpg", "mine.jpg", "pictures/mine.txt", "pictures/folder.jpg"),
        *("pictures/link.jpg", "pictures/inner.jpg", "pictures/\0.jpg", ".jpg", f"{'x' * 5000}.jpg"),
    ],
    ids=range(13),
)
def test_a_hostile_predictions_file_deletes_nothing(home, name):
    for mine in ("outside.jpg", "out/mine.jpg", "out/pictures/mine.txt", "out/pictures/folder.jpg/mine.jpg"):
        Path(mine).parent.mkdir(exist_ok=True, parents=True)
        Path(mine).write_bytes(b"mine")
    os.symlink(home, "out/pictures/link")
    os.symlink(home / "outside.jpg", "out/pictures/link.jpg")
    os.symlink(home / "out/pictures/folder.jpg/mine.jpg", "out/pictures/inner.jpg")
    content = {"images": [{"picture": name.replace("/{home}", str(home))}]}
    Path("out", "predictions.json").write_text(json.dumps(content))
    assert predict_module._earlier_pictures(Path("out")) == []


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"images": [1]}', '{"images": [{}, {"picture": 7}]}'])
def test_a_foreign_predictions_file_is_ignored(home, content):
    Path("predictions.json").write_text(content)
    assert predict_module._earlier_pictures(Path()) == []


def test_an_earlier_picture_as_input_is_refused(photos, run):
    run("photos/a.png", output="photos")
    before = {path: path.read_bytes() for path in photos.rglob("*.j*")}
    assert len(before) == 3
    for pictures in (True, False):
        with pytest.raises(DataError, match=r"photos/pictures/a\.jpg"):
            run("photos", output="photos", pictures=pictures)
    assert {path: path.read_bytes() for path in photos.rglob("*.j*")} == before


def test_no_input_image_is_replaced(home, run):
    path = write_image(home / "data" / "pictures" / "a.jpg")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"data/pictures/a\.jpg"):
        run("data/pictures", output="data")
    assert [path.name for path in Path("data").iterdir()] == ["pictures"]
    run("data/pictures", output="data", pictures=False)
    run("data", output="data")  # writes pictures/pictures/a.jpg
    assert path.read_bytes() == before


# ---- annotations


def write_annotations(path, images, categories=None, **changes):
    annotations = [
        {"id": number, "image_id": image["id"], "category_id": 2, "bbox": [4, 4, 20, 20]}
        for number, image in enumerate(images, start=1)
    ]
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)] if categories is None else categories
    content = {"images": images, "annotations": annotations, "categories": categories} | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return str(path)


ONE_IMAGE = [{"id": 581929, "file_name": "a.png", "width": 64, "height": 48}]


def test_results_have_the_ids_of_the_annotations_and_can_be_scored(photos, home, run):
    sizes = {"z.tif": (64, 48), "sub/a.png": (48, 64), "c.bmp": (64, 48), "a.png": (64, 48), "b.PNG": (64, 48)}
    images = [
        {"id": 1000 - number, "file_name": name, "width": width, "height": height}
        for number, (name, (width, height)) in enumerate((sizes | {"sub/x/e.gif": (48, 64)}).items())
    ]
    path = write_annotations(home / "instances.json", images)
    run(photos, annotations=path)
    found, results = read()
    ids = {image["file_name"]: image["id"] for image in images}
    assert {image["file_name"]: image["id"] for image in found["images"]} == ids
    assert {one["image_id"] for one in results} == set(ids.values())
    truth = read_annotations(path)
    checked = read_results(results_file("out/detections.json"), truth)
    scores, _ = evaluate(coco_of(truth), checked[0] if isinstance(checked, tuple) else checked)
    assert scores["AR100"] >= 0


def test_results_have_the_category_ids_of_the_annotations(photos, home, run, capsys):
    """Categories are matched by name."""
    run(photos / "a.png", output="own")
    wanted = read("own")[1]
    categories = [{"id": 100, "name": NAMES[0]}, {"id": 99, "name": NAMES[2]}, {"id": IDS[1], "name": "dust"}]
    path = write_annotations(home / "i.json", ONE_IMAGE, categories, annotations=[])
    capsys.readouterr()
    run(photos / "a.png", annotations=path)
    assert repr(NAMES[1]) in capsys.readouterr().err
    found, results = read()
    new = {IDS[0]: 100, IDS[2]: 99}
    assert {r["category_id"] for r in wanted} >= {IDS[1], IDS[2]}
    assert results == [
        r | {"image_id": 581929, "category_id": new[r["category_id"]]} for r in wanted if r["category_id"] in new
    ]
    assert [(one["id"], one["name"]) for one in found["categories"]] == [(100, NAMES[0]), (99, NAMES[2])]
    path = write_annotations(home / "i.json", ONE_IMAGE, [{"id": 1, "name": "dust"}], annotations=[])
    run(photos / "a.png", annotations=path)
    assert "Note: " in capsys.readouterr().err
    assert [r["category_id"] for r in read()[1]] == [r["category_id"] for r in wanted]


def test_the_annotated_size_decides_how_an_image_is_turned(home, run):
    write_image(home / "stored.png", exif=turned(6))
    write_image(home / "turned.png", exif=turned(6))
    write_image(home / "wrong.png")
    sizes = {"stored.png": (64, 48), "turned.png": (48, 64), "wrong.png": (48, 64)}
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, (name, (width, height)) in enumerate(sizes.items())
    ]
    done = run(*sizes, annotations=write_annotations(home / "instances.json", images))
    assert [(image["width"], image["height"]) for image in done.images] == [(64, 48), (48, 64)]
    (broken,) = done.broken
    assert broken["file_name"] == "wrong.png"
    assert "48x64" in broken["error"]


def test_images_and_annotations_that_do_not_match(photos, home, run):
    path = write_annotations(home / "i.json", ONE_IMAGE)
    with pytest.raises(DataError, match=r"b\.PNG"):
        run(photos, annotations=path)
    with pytest.raises(DataError, match=r"sub/a\.png and .*/a\.png"):
        run(photos / "a.png", photos / "sub" / "a.png", annotations=path)
    with pytest.raises(DataError, match=r"nothing\.json"):
        run(photos, annotations="nothing.json")
    path = write_annotations(home / "i.json", [ONE_IMAGE[0] | {"file_name": "val2017\\A.png"}])
    with pytest.raises(DataError, match=r"val2017\\\\A\.png"):  # the name that was probably meant
        run(photos / "a.png", annotations=path)
    path = write_annotations(home / "i.json", ONE_IMAGE, categories=7)
    with pytest.raises(DataError, match="categories"):
        run(photos / "a.png", annotations=path)
    assert not Path("out").exists()


@pytest.mark.parametrize("annotations", [None, [{"caption": "cells"}]])
def test_images_and_categories_alone_are_enough(photos, home, run, annotations):
    """As in COCO's image_info_test-dev2017.json."""
    run(photos / "a.png", annotations=write_annotations(home / "i.json", ONE_IMAGE, annotations=annotations))
    _, results = read()
    assert {result["image_id"] for result in results} == {581929}
    assert {result["category_id"] for result in results} <= set(IDS)


# ---- broken images


def write_broken(folder):
    whole = write_image(folder / "k.jpg", 200, 200).read_bytes()
    contents = {
        "cut.jpg": whole[: len(whole) // 2],
        "text.png": b"hello",
        "empty.png": b"",
        "bomb.png": bomb(60000, 60000),
        "header.png": bomb(64, 48),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    os.symlink("nowhere", folder / "gone.png")  # not a file: ignored
    return sorted(contents)


@pytest.mark.filterwarnings("error")
def test_broken_images_are_named_and_skipped(home, run, capsys):
    broken = write_broken(home / "in")
    write_image(home / "in" / "a.png")
    write_image(home / "in" / "z.png", seed=1)
    run("in", workers=2)
    out, err = capsys.readouterr()
    assert "3 of 8 images" in out
    found, results = read()
    assert names_of(found) == ["a.png", "k.jpg", "z.png"]
    assert pictures_of() == ["a.jpg", "k.jpg", "z.jpg"]
    assert {one["image_id"] for one in results} == {image["id"] for image in found["images"]}
    assert [one["file_name"] for one in found["broken"]] == broken
    for one in found["broken"]:
        assert one["path"] == f"in/{one['file_name']}"
        assert one["error"].startswith(one["path"])
        assert one["error"] in err
    assert "Traceback" not in err


# ---- interrupted


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_the_detections_so_far(photos, checkpoint, monkeypatch, capfd, ctrl_c, workers):
    """A terminal's Ctrl-C reaches the workers as well."""
    for number in range(20):  # keeps the workers busy
        write_image(photos / f"zz{number}.png", seed=number)
    detect_batch = Detector.detect_batch

    def stopping(detector, images):
        if len(pictures_of()) == 3:
            assert len(multiprocessing.active_children()) == workers
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return detect_batch(detector, images)

    monkeypatch.setattr(Detector, "detect_batch", stopping)
    flags = ["--checkpoint", checkpoint, "--output=out", "--batch_size=1", f"--workers={workers}"]
    assert main([str(photos), *flags]) == 130
    found, results = read()
    assert names_of(found) == ["a.png", "b.PNG", "c.bmp"]
    assert {one["image_id"] for one in results} == {1, 2, 3}
    out, err = capfd.readouterr()
    assert "3 of 26 images" in out
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("call", BREAK)
def test_a_full_disk(photos, run, monkeypatch, call):
    BREAK[call](monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        run(photos / "a.png")
    assert {path.name for path in Path("out").iterdir()} == {"pictures"}


def test_a_disk_that_fills_up_keeps_the_numbers_so_far(photos, run, monkeypatch):
    write_bytes = Path.write_bytes

    def filling(path, content):
        if path.name != "c.jpg":
            return write_bytes(path, content)
        write_bytes(path, content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", filling)
    with pytest.raises(OSError, match=r"out/pictures/c\.jpg"):
        run(photos)
    assert names_of(read()[0]) == ["a.png", "b.PNG"]
    assert pictures_of() == ["a.jpg", "b.jpg"]


# ---- the detector


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"checkpoint": None}, UsageError, "checkpoint"),
        ({"checkpoint": None, "model": "fasterrcnn_resnet50_fpn"}, UsageError, "weights"),
        ({"checkpoint": None, "model": "resnet18", "weights": "DEFAULT"}, ModelError, "resnet18"),
        ({"weights": "w.pth"}, UsageError, "checkpoint"),
        ({"device": "cuda:99"}, UsageError, "device"),
        ({"checkpoint": "nothing.ckpt"}, ModelError, "nothing.ckpt"),
        ({"output": "photos/a.png"}, OSError, "photos/a.png"),
        ({"refine": "off"}, UsageError, "refine"),
    ],
)
def test_arguments_that_cannot_be(photos, run, options, error, name):
    with pytest.raises(error, match=name):
        run("photos", **options)
    assert not Path("out").exists()


def test_a_refinement_is_on_unless_it_is_switched_off(checkpoint, photos, run):
    detector = load_checkpoint(checkpoint)
    refined(detector.model)
    detector.save("refined")
    before = run(photos / "a.png").results
    after = run(photos / "a.png", checkpoint="refined").results
    assert run(photos / "a.png", checkpoint="refined", refine="on").results == after
    assert run(photos / "a.png", checkpoint="refined", refine="off").results == before
    assert [one["bbox"] for one in before] != [one["bbox"] for one in after]


# ---- min_score="auto"


def write_report(path, points, weights, **about):
    about = {"weights": weights, "refinement": None, "time": "2030-01-02T03:04:05+00:00"} | about
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about} | ({} if points is None else {"operating_points": points})))


def points_of(scores, overall=0.5, ids=IDS):
    rows = [
        {"id": i, "name": name, "objects": 3, "score": score, "precision": 0.5, "recall": 0.5, "f1": 0.5}
        for i, name, score in zip(ids, NAMES, scores)
    ]
    mean = None if overall is None else {"score": overall, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    return {"iou": 0.5, "mean": mean, "by_class": sorted(rows, key=lambda row: row["id"])}


@pytest.fixture
def trained(home, checkpoint):
    """A checkpoint in a run folder."""
    path = home / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(Path(checkpoint).read_bytes())
    return str(path)


def test_auto_takes_the_scores_of_the_last_report_on_these_weights(photos, trained, loaded, run, capsys):
    run(photos, checkpoint=trained, output="every", min_score=0)
    every, results = read("every")
    by_class = {i: sorted(one["score"] for one in results if one["category_id"] == i) for i in IDS}
    # A detection with exactly the minimum score counts. A class without a score takes the overall one.
    overall = by_class[31][len(by_class[31]) // 2]
    least = {7: 0.9, 2: by_class[2][-10], 31: None}
    home, digest = Path(trained).parent.parent, loaded.digest()
    write_report(home / "eval-val" / "report.json", points_of(least.values(), overall), digest)
    write_report(home / "eval-old" / "report.json", points_of([0, 0, 0]), digest, time="2029-12-31")
    write_report(home / "eval-other" / "report.json", points_of([0, 0, 0]), "sha256:0", time="2031")
    write_report(home / "eval-refined" / "report.json", points_of([0, 0, 0]), digest, time="2031", refinement="off")
    capsys.readouterr()
    run(photos, checkpoint=trained, min_score="auto")
    assert "2030-01-02" in capsys.readouterr().out
    least[31] = overall
    found, all_of_them = read()
    assert found["categories"] == [
        {"id": i, "name": name, "min_score": least[i]} for i, name in zip(IDS, NAMES, strict=True)
    ]
    assert found["min_score"] == min(least.values())
    assert all_of_them == results
    for one, other in zip(found["images"], every["images"], strict=True):
        assert one["detections"] == [d for d in other["detections"] if d["score"] >= least[d["category_id"]]]
    kept = [d["category_id"] for image in found["images"] for d in image["detections"]]
    assert (kept.count(2), kept.count(31)) == (10, (len(by_class[31]) + 1) // 2)


@pytest.mark.parametrize(
    ("category_ids", "ids"),
    [
        (IDS, [IDS[2], IDS[0], 99]),  # by name: one of the data's ids is another class's of the detector
        ([None] * 3, [3, 4, 9]),  # without categories, in order
    ],
)
def test_auto_matches_the_classes(photos, loaded, run, monkeypatch, category_ids, ids):
    detector = copy.deepcopy(loaded)
    detector.category_ids = category_ids
    monkeypatch.setattr(source, "load_source", lambda *given: (detector, "weights"))
    write_report(Path("runs", "eval", "report.json"), points_of([0.1, 0.2, 0.3], ids=ids), loaded.digest())
    run("photos/a.png", min_score="auto")
    assert [one["min_score"] for one in read()[0]["categories"]] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("weights", "points", "named"),
    [
        (None, None, "has no best score"),
        (None, points_of([None] * 3, None), "has no best score"),
        ("sha256:0", points_of([0.5] * 3), "run/ or runs/"),
    ],
)
def test_auto_without_scores_of_these_weights(photos, trained, loaded, run, weights, points, named):
    write_report(Path(trained).parent.parent / "eval-val" / "report.json", points, weights or loaded.digest())
    with pytest.raises(ModelError, match=named) as caught:
        run("photos", checkpoint=trained, min_score="auto")
    assert caught.value.setting == "min_score"
    assert not Path("out").exists()


# ---- the command line


def test_the_command_line(home, checkpoint, capsys):
    write_image(home / "in" / "a.png")
    (home / "in" / "b.png").write_text("no image")
    flags = ["--checkpoint", checkpoint, "--no-pictures", "--min-score", "0", "--workers=0", "--output", "x-y"]
    assert main(["in", *flags, "--device", "cpu"]) == 3
    assert "in/b.png" in capsys.readouterr().err
    assert names_of(read("x-y")[0]) == ["a.png"]
    assert not Path("x-y", "pictures").exists()
    (home / "in" / "a.png").rename("--a.png")
    assert main([*flags, "--batch_size=3", "--max_pixels=9999", "--", "--a.png"]) == 0
    with refused("--min_score", code=1):
        main(["in", "--checkpoint", checkpoint, "--min_score=auto"])
