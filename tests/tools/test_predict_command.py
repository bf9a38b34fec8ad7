"""tools/predict.py: image files in; pictures, names and COCO results out."""

import errno
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
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
from support.tiny_training import REPOSITORY

from detector.data.annotations import read_annotations
from detector.data.drawing import draw
from detector.data.results import read_results, results_file
from detector.errors import DataError
from detector.evaluation import evaluate
from detector.evaluation.truth import coco_of
from detector.pretrained import predict_files as predict_module
from detector.pretrained.detector import Detector
from detector.pretrained.loading import load_checkpoint
from detector.pretrained.predict_files import find_images, predict_files
from detector.tools import predicting
from detector.tools.predict import main
from detector.tools.predicting import predict

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save(tiny_checkpoint(), path)
    return str(path)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where runs/predict is written to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_image(path, *size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    v2.functional.to_pil_image(scene(*size, seed=seed)).save(path, **options)
    return path


@pytest.fixture
def photos(home):
    """Six images of two sizes, in a folder with others below and things that are none."""
    folder = home / "photos"
    sizes = [(48, 64), (48, 64), (48, 64), (64, 48), (64, 48), (48, 64)]
    for number, (size, name) in enumerate(zip(sizes, ("a.png", "b.PNG", "c.bmp", "sub/a.png", "sub/x/e.gif", "z.tif"))):
        write_image(folder / name, *size, seed=number)
    write_image(folder / "._a.png")
    write_image(folder / ".thumbnails" / "a.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.png").mkdir()
    return folder


def bomb(width, height):
    """A PNG of a few bytes that says it is that large."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def read(folder):
    folder = Path(folder)
    return json.loads((folder / "predictions.json").read_text()), json.loads((folder / "detections.json").read_text())


def names_of(found):
    return [image["file_name"] for image in found["images"]]


def pictures_of(folder):
    folder = Path(folder) / "pictures"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---- what is found


def test_images_of_files_folders_and_patterns(photos):
    everything = ["a.png", "b.PNG", "c.bmp", "sub/a.png", "sub/x/e.gif", "z.tif"]
    assert [file.name for file in find_images([photos])] == everything
    assert [file.id for file in find_images([str(photos)])] == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in find_images([photos / "c.bmp", photos])] == [
        "c.bmp",
        *(set_less(everything, "c.bmp")),
    ]
    assert [file.name for file in find_images([f"{photos}/*.png"])] == ["a.png"]
    assert [file.path for file in find_images([f"{photos}/**/a.png"])] == [photos / "a.png", photos / "sub" / "a.png"]
    assert [file.name for file in find_images([photos / "notes.txt"])] == ["notes.txt"]  # it was asked for
    assert [file.name for file in find_images([photos / "._a.png"])] == ["._a.png"]
    (photos / "[1].png").write_bytes((photos / "a.png").read_bytes())
    assert [file.name for file in find_images([photos / "[1].png"])] == ["[1].png"]


def test_what_pillow_reads_is_taken_of_a_folder_and_images_of_other_kinds_are_counted(home, monkeypatch):
    kinds = {suffix for suffix in (".avif", ".jp2", ".webp") if suffix in Image.registered_extensions()}
    for suffix in (*kinds, ".png", ".pgm"):
        write_image(home / "in" / f"a{suffix}")
    for suffix in (".jfif", ".jpe"):
        write_image(home / "in" / f"a{suffix}", format="JPEG")
    others = {"b.heic", "c.HEIC", "sub/d.dng", "e.psd", "f.svg"}
    for name in (*others, "._g.heic", ".hidden/h.heic", "notes.txt", "i.json", "j.xml", "k.pdf", "l"):
        (home / "in" / name).parent.mkdir(exist_ok=True)
        (home / "in" / name).write_bytes(b"")
    (home / "in" / "folder.heic").mkdir()
    left_out = set()
    found = find_images(["in", "in", home / "in" / "sub" / ".." / "a.png"], left_out=left_out)
    assert {file.name for file in found} == {f"a{suffix}" for suffix in (*kinds, ".png", ".pgm", ".jfif", ".jpe")}
    assert left_out == {home / "in" / name for name in others}
    # A Pillow that was built without AVIF, as before version 11.3, knows no such suffix.
    known = {suffix: name for suffix, name in Image.registered_extensions().items() if name != "AVIF"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    (home / "in" / "a.avif").write_bytes(b"")
    left_out.clear()
    assert "a.avif" not in [file.name for file in find_images(["in"], left_out=left_out)]
    assert left_out == {home / "in" / name for name in (*others, "a.avif")}


def test_images_of_other_kinds_are_said_and_no_failure(home, checkpoint, capsys):
    write_image(home / "in" / "a.png")
    for name in ("b.heic", "c.HEIC", "d.svg"):
        (home / "in" / name).write_bytes(b"")
    assert predict(["in"], checkpoint=checkpoint, output="out") == 0
    said = "left out: 2 .heic, 1 .svg (not read here; convert them to JPEG, PNG or TIFF)"
    assert said in capsys.readouterr().err.splitlines()
    assert read("out")[0]["left_out"] == {".heic": 2, ".svg": 1}
    assert predict(["in/a.png"], checkpoint=checkpoint, output="out") == 0
    assert "left out" not in capsys.readouterr().err
    (home / "in" / "a.png").unlink()
    with pytest.raises(SystemExit, match=r"in: the folder holds no image .*, but 2 \.heic, 1 \.svg: convert them"):
        predict(["in"], checkpoint=checkpoint)


def set_less(names, name):
    return [other for other in names if other != name]


def test_an_image_is_looked_at_once_however_it_is_named(photos, home):
    os.symlink(photos / "a.png", home / "link.png")
    given = [photos / "a.png", "photos/a.png", "photos/../photos/a.png", "photos/a.*", home / "link.png"]
    assert [file.name for file in find_images(given)] == ["a.png"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["nothing.png"], r"nothing\.png: no such image, folder or pattern of files"),
        (["photos/*.webp"], r"photos/\*\.webp: no such image"),
        (["photos", "nothing"], "^nothing: no such image"),
        (["empty"], r"empty: the folder holds no image \(\.jpg, "),
        ([""], "no such image"),
    ],
)
def test_what_is_not_there(photos, home, given, reason):
    (home / "empty" / "photo.png").mkdir(parents=True)
    with pytest.raises(DataError, match=reason):
        find_images(given)


# ---- what is written


def test_pictures_names_and_results(photos, checkpoint, capsys):
    assert predict([str(photos)], checkpoint=checkpoint, output="out", min_score=0.6) == 0
    said = capsys.readouterr()
    found, results = read("out")
    assert {path.name for path in Path("out").iterdir()} == {"pictures", "predictions.json", "detections.json"}
    assert names_of(found) == ["a.png", "b.PNG", "c.bmp", "sub/a.png", "sub/x/e.gif", "z.tif"]
    assert pictures_of("out") == ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg", "sub/x/e.jpg", "z.jpg"]
    assert found["broken"] == []
    assert found["model"] == checkpoint
    assert found["crop"] == "affine"
    assert found["min_score"] == 0.6
    assert found["categories"] == [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]
    assert [(image["id"], image["width"], image["height"]) for image in found["images"]] == [
        (1, 64, 48),
        (2, 64, 48),
        (3, 64, 48),
        (4, 48, 64),
        (5, 48, 64),
        (6, 64, 48),
    ]
    assert [Path(image["path"]) for image in found["images"]] == [photos / name for name in names_of(found)]
    count = sum(len(image["detections"]) for image in found["images"])
    assert count > 5
    assert f"{count} objects in 6 images; pictures/, predictions.json and detections.json are in out/" in said.out
    # The same as the Python call, and all of them in COCO's format.
    detector = load_checkpoint(checkpoint)
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
    for name in pictures_of("out"):
        with Image.open(Path("out", "pictures", name)) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) >= 400


def test_boxes_are_drawn_from_min_score_on(photos, checkpoint):
    for folder, min_score in (("every", 0), ("none", 1)):
        predict([str(photos / "a.png")], checkpoint=checkpoint, output=folder, min_score=min_score)
    every, none = (Path(folder, "pictures", "a.jpg").read_bytes() for folder in ("every", "none"))
    assert every != none
    with Image.open(io.BytesIO(none)) as picture:
        pixels = v2.functional.pil_to_tensor(picture)
    plain = v2.functional.resize(scene(), [48 * 7, 64 * 7])
    assert (pixels.float() - plain.float()).abs().mean() < 3


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 0), (3, 2), (100, 1)])
def test_results_do_not_depend_on_the_batch(photos, checkpoint, batch_size, workers):
    predict([str(photos)], checkpoint=checkpoint, output="one", batch_size=8, workers=0)
    predict([str(photos)], checkpoint=checkpoint, output="two", batch_size=batch_size, workers=workers)
    ours, theirs = read("one")[1], read("two")[1]
    assert len(ours) == len(theirs) == 60
    for one, other in zip(ours, theirs):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


def looked_at(monkeypatch):
    """The number of images of each batch, and their sizes."""
    batches = []
    detect_batch = Detector.detect_batch

    def watched(detector, images):
        batches.append([tuple(image.shape) for image in images])
        return detect_batch(detector, images)

    monkeypatch.setattr(Detector, "detect_batch", watched)
    return batches


def test_a_batch_has_images_of_one_size_and_not_too_many_pixels(photos, checkpoint, monkeypatch):
    batches = looked_at(monkeypatch)
    predict([str(photos)], checkpoint=checkpoint, output="out", batch_size=2, workers=0)
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    assert all(len(set(batch)) == 1 for batch in batches)
    monkeypatch.setattr(predict_module, "BATCH_PIXELS", 2 * 48 * 64)
    batches.clear()
    predict([str(photos)], checkpoint=checkpoint, output="out", batch_size=8, workers=0)
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    monkeypatch.setattr(predict_module, "BATCH_PIXELS", 1)
    batches.clear()
    predict([str(photos)], checkpoint=checkpoint, output="out", batch_size=8, workers=0)
    assert [len(batch) for batch in batches] == [1] * 6


def test_two_images_of_one_name_get_two_pictures(photos, checkpoint, home):
    write_image(home / "other" / "A.png", seed=9)
    write_image(home / "other" / "a.bmp", seed=10)
    given = [str(photos / "a.png"), str(photos / "sub" / "a.png"), "other"]
    assert predict(given, checkpoint=checkpoint, output="out") == 0
    assert pictures_of("out") == ["A-3.jpg", "a-2.jpg", "a-4.jpg", "a.jpg"]
    found, _ = read("out")
    assert names_of(found) == ["a.png", "a.png", "A.png", "a.bmp"]
    assert len({image["path"] for image in found["images"]}) == 4


def test_a_picture_and_a_folder_of_one_name(home, checkpoint):
    write_image(home / "in" / "a.png")
    write_image(home / "in" / "a.jpg" / "b.png")
    assert predict(["in"], checkpoint=checkpoint, output="out") == 0
    assert pictures_of("out") == ["a-2.jpg", "a.jpg/b.jpg"]


def test_numbers_alone(photos, checkpoint, capsys):
    assert predict([str(photos)], checkpoint=checkpoint, output="out", pictures=False) == 0
    assert {path.name for path in Path("out").iterdir()} == {"predictions.json", "detections.json"}
    assert "pictures" not in capsys.readouterr().out


def test_labels_without_categories_stand_for_themselves(photos, checkpoint):
    detector = load_checkpoint(checkpoint)
    detector.category_ids = [None] * 3
    done = predict_files(detector, find_images([photos / "a.png"]), Path("out"), workers=0)
    assert [one["category_id"] for one in done.results] == detector.detect(
        photos / "a.png", min_score=0
    ).labels.tolist()
    assert [one["id"] for one in read("out")[0]["categories"]] == [1, 2, 3]
    detector.category_ids = [None, 5, None]  # as of COCO's gaps: those labels are no results
    done = predict_files(detector, find_images([photos / "a.png"]), Path("out"), workers=0)
    assert {one["category_id"] for one in done.results} == {5}
    assert [one["id"] for one in read("out")[0]["categories"]] == [5]


def test_a_picture_is_no_larger_than_a_jpeg_can_be(home):
    predict_module._write_picture(home / "long.jpg", Image.new("RGB", (70000, 20)))
    with Image.open(home / "long.jpg") as picture:
        assert picture.width == 65500


def test_a_photograph_is_turned_upright(home, checkpoint):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    write_image(home / "turned.png", exif=exif)
    v2.functional.to_pil_image(torch.rot90(scene(), -1, (1, 2))).save("upright.png")
    assert predict(["turned.png", "upright.png"], checkpoint=checkpoint, output="out") == 0
    (turned, upright), _ = (read("out")[0]["images"], None)
    assert (turned["width"], turned["height"]) == (48, 64)
    assert turned["detections"] == upright["detections"]
    with Image.open("out/pictures/turned.jpg") as picture:
        assert picture.height > picture.width
        assert ORIENTATION not in picture.getexif()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_done_to_images_is_said_and_written(home, checkpoint, capsys, workers):
    grey = scene()[0].numpy()
    write_image(home / "in" / "a.png")
    for name in ("b.tif", "c.png"):
        Image.fromarray(grey.astype("uint16") * 16).save(home / "in" / name)
    Image.fromarray(grey.astype("float32") / 255).save(home / "in" / "d\x1b[31m.tif")
    write_image(home / "in" / "e.gif", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    Image.fromarray(grey).save(home / "in" / "f.png")
    assert predict(["in"], checkpoint=checkpoint, output="out", workers=workers) == 0
    bits = "values of 16 bits or more that use at most 12, scaled by those 12"
    floats = "floats from 0 to 1, scaled to 0 to 255"
    frames = "several frames or pages, of which the first was taken"
    assert capsys.readouterr().err.splitlines() == [
        f"2 of the images (in/b.tif and others): {bits}",
        f"1 of the images (in/d [31m.tif): {floats}",
        f"1 of the images (in/e.gif): {frames}",
    ]
    images = read("out")[0]["images"]
    assert [image["remarks"] for image in images] == [[], [bits], [bits], [floats], [frames], []]
    found = [image["detections"] for image in images]
    assert found[1] == found[2] == found[3] == found[5]
    with Image.open("out/pictures/b.jpg") as seen, Image.open("out/pictures/f.jpg") as plain:
        assert seen.tobytes() == plain.tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_more_pixels_than_pillow_takes(home, checkpoint, capsys, monkeypatch, workers):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    write_image(home / "a.png")
    options = {"checkpoint": checkpoint, "output": "out", "workers": workers}
    assert predict(["a.png"], **options) == 3
    assert "exceeds limit of 2000 pixels" in (said := capsys.readouterr().err)
    assert "--max_pixels of tools/predict.py" in said
    assert predict(["a.png"], max_pixels=3071, **options) == 3
    assert "more than the 3,071 that are read" in capsys.readouterr().err
    assert predict(["a.png"], max_pixels=3072, **options) == 0
    assert names_of(read("out")[0]) == ["a.png"]


# ---- a folder that is there


def test_a_second_run_gets_a_folder_of_its_own(photos, checkpoint):
    for folder in ("runs/predict", "runs/predict-2", "runs/predict-3"):
        assert predict([str(photos / "a.png")], checkpoint=checkpoint) == 0
        assert names_of(read(folder)[0]) == ["a.png"]


def test_a_folder_that_is_there_is_used(photos, checkpoint):
    Path("out").mkdir()
    Path("out", "mine.txt").write_text("mine")
    for name in ("a.png", "c.bmp"):
        assert predict([str(photos / name)], checkpoint=checkpoint, output="out") == 0
    assert names_of(read("out")[0]) == ["c.bmp"]
    assert Path("out", "mine.txt").read_text() == "mine"


def test_pictures_of_an_earlier_run_go_and_nothing_else(photos, checkpoint):
    assert predict([str(photos)], checkpoint=checkpoint, output="out") == 0
    earlier = {image["picture"] for image in read("out")[0]["images"]}
    assert earlier == {f"pictures/{name}" for name in pictures_of("out")}
    for name in ("mine.jpg", "sub/mine.jpg", "notes.txt"):
        Path("out", "pictures", name).write_bytes(b"mine")
    Path("out", "mine.jpg").write_bytes(b"mine")
    os.symlink(photos, Path("out", "pictures", "link"))
    assert predict([str(photos / "b.PNG")], checkpoint=checkpoint, output="out") == 0
    kept = ["mine.jpg", "notes.txt", "sub/mine.jpg"]
    assert pictures_of("out") == ["b.jpg", *kept]
    assert [image["picture"] for image in read("out")[0]["images"]] == ["pictures/b.jpg"]
    assert predict([str(photos / "a.png")], checkpoint=checkpoint, output="out", pictures=False) == 0
    assert pictures_of("out") == kept
    assert "picture" not in read("out")[0]["images"][0]
    assert Path("out", "mine.jpg").exists()
    assert len(find_images([photos])) == 6


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON",
        b"[]",
        b"{}",
        b'{"images": null}',
        b'{"images": [1]}',
        b'{"images": [{}, {"picture": 7}]}',
        b'{"images": [{"picture": "pictures/\\u0000.jpg"}, {"picture": "pictures/a.jpg"}]}',
        b'{"images": [{"picture": "' + b"x" * 5000 + b'.jpg"}]}',
        *(
            json.dumps({"images": [{"picture": name}]}).encode()
            for name in (
                "../outside.jpg",
                "pictures/../../outside.jpg",
                "pictures/../mine.jpg",
                "pictures/link/outside.jpg",
                "pictures/link.jpg",
                "pictures/inner.jpg",
                "pictures/mine.txt",
                "pictures/folder.jpg",
                "mine.jpg",
                "/{home}/outside.jpg",
                "pictures",
                "",
            )
        ),
    ],
)
def test_a_file_that_claims_others_files_removes_none(home, checkpoint, content):
    write_image(home / "in" / "b.png")
    for name in ("outside.jpg", "out/mine.jpg", "out/pictures/mine.txt", "out/pictures/folder.jpg/mine.jpg"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_bytes(b"mine")
    os.symlink(home, "out/pictures/link")
    os.symlink(home / "outside.jpg", "out/pictures/link.jpg")
    os.symlink(home / "out/pictures/folder.jpg/mine.jpg", "out/pictures/inner.jpg")
    Path("out", "predictions.json").write_bytes(content.replace(b"/{home}", str(home).encode()))
    before = {path: path.lstat().st_ino for path in home.rglob("*")}
    assert predict(["in"], checkpoint=checkpoint, output="out", workers=0) == 0
    assert before.keys() <= set(home.rglob("*"))
    assert Path("outside.jpg").read_bytes() == b"mine"


def test_a_folder_of_pictures_that_lies_elsewhere_is_left_alone(photos, home, checkpoint):
    assert predict([str(photos / "a.png")], checkpoint=checkpoint, output="out") == 0
    Path("out", "pictures").rename("elsewhere")
    os.symlink(home / "elsewhere", "out/pictures")
    assert predict([str(photos / "c.bmp")], checkpoint=checkpoint, output="out") == 0
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["a.jpg", "c.jpg"]


def test_a_picture_of_an_earlier_run_is_not_looked_at_and_removed(photos, checkpoint):
    assert predict(["photos/a.png"], checkpoint=checkpoint, output="photos") == 0
    before = {path: path.read_bytes() for path in photos.rglob("*.j*")}
    assert len(before) == 3
    for options in ({}, {"pictures": False}):
        with pytest.raises(
            SystemExit, match=r"photos/pictures/a\.jpg: is one of the images, and a picture of the run before, w"
        ):
            predict(["photos"], checkpoint=checkpoint, output="photos", **options)
    assert {path: path.read_bytes() for path in photos.rglob("*.j*")} == before


def test_no_image_is_written_over(home, checkpoint):
    path = write_image(home / "data" / "pictures" / "a.jpg")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"data/pictures/a\.jpg: is one of the images"):
        predict(["data/pictures"], checkpoint=checkpoint, output="data")
    assert path.read_bytes() == before
    assert [path.name for path in Path("data").iterdir()] == ["pictures"]
    assert predict(["data/pictures"], checkpoint=checkpoint, output="data", pictures=False) == 0
    assert predict(["data"], checkpoint=checkpoint, output="data") == 0  # pictures/pictures/a.jpg
    assert path.read_bytes() == before


# ---- annotations


def write_annotations(path, images, name="file_name"):
    annotations = [
        {"id": number, "image_id": image["id"], "category_id": 2, "bbox": [4, 4, 20, 20]}
        for number, image in enumerate(images, start=1)
    ]
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def test_results_have_the_ids_of_the_annotations_and_can_be_scored(photos, home, checkpoint):
    names = ["z.tif", "sub/a.png", "c.bmp", "a.png", "b.PNG", "sub/x/e.gif"]
    sizes = {"sub/a.png": (48, 64), "sub/x/e.gif": (48, 64)}
    images = [
        {"id": 1000 - number, "file_name": name} | dict(zip(("width", "height"), sizes.get(name, (64, 48))))
        for number, name in enumerate(names)
    ]
    path = write_annotations(home / "instances.json", images)
    assert predict([str(photos)], checkpoint=checkpoint, output="out", annotations=path) == 0
    found, results = read("out")
    ids = {image["file_name"]: image["id"] for image in images}
    assert {image["file_name"]: image["id"] for image in found["images"]} == ids
    assert {one["image_id"] for one in results} == set(ids.values())
    truth = read_annotations(path)
    scores, _ = evaluate(coco_of(truth), read_results(results_file("out/detections.json"), truth)[0])
    assert scores["AR100"] >= 0


def test_results_have_the_category_ids_of_the_annotations(photos, home, checkpoint, capsys):
    """Those of the same names: scored as a file they are then what the detector itself is scored by."""
    images = [{"id": 5, "file_name": "a.png", "width": 64, "height": 48}]
    path = write_annotations(home / "instances.json", images)
    predict([str(photos / "a.png")], checkpoint=checkpoint, output="own")
    content = json.loads(Path(path).read_text())
    content["categories"] = [{"id": 100 - i, "name": name} for i, name in enumerate(NAMES[::2])] + [
        {"id": IDS[1], "name": "dust"}  # an id of the checkpoint's, for something else
    ]
    content["annotations"] = []
    Path(path).write_text(json.dumps(content))
    capsys.readouterr()
    predict([str(photos / "a.png")], checkpoint=checkpoint, output="out", annotations=path)
    assert f"the annotations have no {NAMES[1]!r}: of those detections.json has none" in capsys.readouterr().err
    found, results = read("out")
    _, wanted = read("own")
    new = {IDS[0]: 100, IDS[2]: 99}
    assert {r["category_id"] for r in wanted} >= {IDS[1], IDS[2]}
    expected = [r | {"image_id": 5, "category_id": new[r["category_id"]]} for r in wanted if r["category_id"] in new]
    assert results == expected
    assert found["categories"] == [{"id": 100, "name": NAMES[0]}, {"id": 99, "name": NAMES[2]}]
    content["categories"] = [{"id": 1, "name": "dust"}]
    Path(path).write_text(json.dumps(content))
    predict([str(photos / "a.png")], checkpoint=checkpoint, output="other", annotations=path)
    assert "The category ids of the results are the detector's own" in capsys.readouterr().err
    assert [r["category_id"] for r in read("other")[1]] == [r["category_id"] for r in wanted]


def test_the_annotations_size_decides_how_an_image_is_turned(home, checkpoint):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    write_image(home / "stored.png", exif=exif)
    write_image(home / "turned.png", exif=exif)
    write_image(home / "wrong.png")
    sizes = {"stored.png": (64, 48), "turned.png": (48, 64), "wrong.png": (48, 64)}
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, (name, (width, height)) in enumerate(sizes.items())
    ]
    path = write_annotations(home / "instances.json", images)
    assert predict(list(sizes), checkpoint=checkpoint, output="out", annotations=path) == 3
    found, _ = read("out")
    assert [(image["width"], image["height"]) for image in found["images"]] == [(64, 48), (48, 64)]
    (broken,) = found["broken"]
    assert broken["file_name"] == "wrong.png"
    assert "its annotation says 48x64" in broken["error"]


def test_images_that_the_annotations_do_not_know(photos, home, checkpoint):
    path = write_annotations(home / "i.json", [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}])
    with pytest.raises(SystemExit, match=r"b\.PNG: the annotations have no image 'b\.PNG' \(a file goes by its name"):
        predict([str(photos)], checkpoint=checkpoint, annotations=path)
    with pytest.raises(SystemExit, match=r"sub/a\.png and .*/a\.png are both 'a\.png' of the annotations; give one"):
        predict([str(photos / "a.png"), str(photos / "sub" / "a.png")], checkpoint=checkpoint, annotations=path)
    with pytest.raises(SystemExit, match=r"nothing\.json: no such file"):
        predict([str(photos)], checkpoint=checkpoint, annotations="nothing.json")
    (home / "i.json").write_text('{"images": []}')
    with pytest.raises(SystemExit, match=r"i\.json: 'categories' must be a list, got nothing"):
        predict([str(photos)], checkpoint=checkpoint, annotations=path)
    assert not Path("runs").exists()


def test_a_file_of_images_without_annotations_is_enough_for_a_submission(photos, home, checkpoint, capsys):
    """As COCO's own image_info_test-dev2017.json: images and categories alone."""
    path = write_annotations(home / "i.json", [{"id": 581929, "file_name": "a.png", "width": 64, "height": 48}])
    content = json.loads((home / "i.json").read_text())
    del content["annotations"]
    (home / "i.json").write_text(json.dumps(content | {"info": {}, "licenses": []}))
    assert predict([str(photos / "a.png")], checkpoint=checkpoint, output="out", annotations=path) == 0
    _, results = read("out")
    assert results
    assert {result["image_id"] for result in results} == {581929}
    assert {result["category_id"] for result in results} <= set(IDS)
    (home / "i.json").write_text(json.dumps(content | {"annotations": [{"caption": "cells"}]}))  # not looked at
    assert predict([str(photos / "a.png")], checkpoint=checkpoint, output="out", annotations=path) == 0


def test_the_name_that_the_annotations_have_is_said(photos, home, checkpoint):
    path = write_annotations(home / "i.json", [{"id": 1, "file_name": "val2017\\A.png", "width": 64, "height": 48}])
    with pytest.raises(SystemExit, match=r"they have 'val2017\\\\A\.png'"):
        predict([str(photos / "a.png")], checkpoint=checkpoint, annotations=path)


@pytest.mark.parametrize("setting", ["upright", "stored"])
def test_images_whose_size_does_not_tell_how_they_are_turned(home, checkpoint, capsys, setting):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    write_image(home / "a.png", exif=exif)
    path = write_annotations(home / "i.json", [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}])
    Image.open(home / "a.png").rotate(180 if setting == "upright" else 0).save(home / "b.png")
    main(["a.png", f"--checkpoint={checkpoint}", "--output=a", f"--annotations={path}", f"--orientation={setting}"])
    assert "EXIF orientation is 3" in capsys.readouterr().err
    main(["a.png", f"--checkpoint={checkpoint}", "--output=c", f"--orientation={setting}"])
    main(["b.png", f"--checkpoint={checkpoint}", "--output=b"])
    (with_file, _), (without, _), (turned, _) = (read(name) for name in "acb")
    boxes = [[one["box"] for one in found["images"][0]["detections"]] for found in (with_file, without, turned)]
    assert boxes[0] == boxes[1] == boxes[2] != []


def test_a_very_narrow_image_is_one_as_any_other(home, checkpoint):
    write_image(home / "photos" / "a.png", 3000, 2)
    write_image(home / "photos" / "b.png")
    write_image(home / "photos" / "c.png", 1, 2000)
    assert predict(["photos"], checkpoint=checkpoint, output="out") == 0
    found, _ = read("out")
    assert [image["file_name"] for image in found["images"]] == ["a.png", "b.png", "c.png"]


# ---- what is broken


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
    os.symlink("nowhere", folder / "gone.png")  # not a file: passed over
    return sorted(contents)


@pytest.mark.filterwarnings("error")
def test_broken_images_are_named_and_skipped(home, checkpoint, capsys):
    broken = write_broken(home / "in")
    write_image(home / "in" / "a.png")
    write_image(home / "in" / "z.png", seed=1)
    assert predict(["in"], checkpoint=checkpoint, output="out", workers=2) == 3
    said = capsys.readouterr()
    assert "in 3 of 8 images" in said.out
    found, results = read("out")
    assert names_of(found) == ["a.png", "k.jpg", "z.png"]
    assert pictures_of("out") == ["a.jpg", "k.jpg", "z.jpg"]
    assert {one["image_id"] for one in results} == {image["id"] for image in found["images"]}
    assert [one["file_name"] for one in found["broken"]] == broken
    for one in found["broken"]:
        assert one["path"] == f"in/{one['file_name']}"
        assert one["error"].startswith(one["path"])
        assert f"skipped: {one['error']}" in said.err
    assert "5 images could not be read, see above" in said.err
    reasons = {one["file_name"]: one["error"] for one in found["broken"]}
    assert "decompression bomb" in reasons["bomb.png"]
    assert "Traceback" not in said.err


def test_nothing_but_broken_images(home, checkpoint, capsys):
    broken = write_broken(home / "in")
    (home / "in" / "k.jpg").unlink()
    assert predict(["in"], checkpoint=checkpoint, output="out", workers=0) == 3
    found, results = read("out")
    assert (found["images"], results) == ([], [])
    assert len(found["broken"]) == len(broken)
    assert "0 objects in 0 of 5 images" in capsys.readouterr().out


def test_an_image_that_goes_away(photos, checkpoint):
    files = find_images([photos])
    (photos / "b.PNG").unlink()
    done = predict_files(load_checkpoint(checkpoint), files, Path("out"), workers=0)
    assert [one["file_name"] for one in done.broken] == ["b.PNG"]
    assert len(done.images) == 5


# ---- stopped


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_what_was_found(photos, checkpoint, monkeypatch, capfd, ctrl_c, workers):
    """As in a terminal, whose Ctrl-C reaches the workers as well."""
    for number in range(20):  # for the workers to be at
        write_image(photos / f"zz{number}.png", seed=number)
    detect_batch = Detector.detect_batch

    def stopping(detector, images):
        if len(pictures_of("out")) == 3:
            assert len(multiprocessing.active_children()) == workers
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return detect_batch(detector, images)

    monkeypatch.setattr(Detector, "detect_batch", stopping)
    assert predict([str(photos)], checkpoint=checkpoint, output="out", batch_size=1, workers=workers) == 130
    found, results = read("out")
    assert names_of(found) == ["a.png", "b.PNG", "c.bmp"]
    assert {one["image_id"] for one in results} == {1, 2, 3}
    said = capfd.readouterr()
    assert "in 3 of 26 images" in said.out
    assert said.err.endswith("interrupted\n")
    assert "Traceback" not in said.err


@pytest.mark.parametrize("call", BREAK)
def test_a_full_disk(photos, checkpoint, monkeypatch, call):
    BREAK[call](monkeypatch)
    with pytest.raises(SystemExit, match=r"^error: .*No space left on device"):
        predict([str(photos / "a.png")], checkpoint=checkpoint, output="out", workers=0)
    assert {path.name for path in Path("out").iterdir()} == {"pictures"}


def test_a_disk_that_fills_up_leaves_the_numbers_of_the_images_before(photos, checkpoint, monkeypatch):
    write_bytes = Path.write_bytes

    def filling(path, content):
        if path.name != "c.jpg":
            return write_bytes(path, content)
        write_bytes(path, content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", filling)
    with pytest.raises(SystemExit, match=r"picture cannot be written: No space left on device: 'out/pictures/c\.jpg'"):
        predict([str(photos)], checkpoint=checkpoint, output="out", workers=0)
    assert names_of(read("out")[0]) == ["a.png", "b.PNG"]
    assert pictures_of("out") == ["a.jpg", "b.jpg"]


def test_memory_that_is_not_enough(photos, checkpoint, monkeypatch):
    def refuse(detector, images):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")

    monkeypatch.setattr(Detector, "detect_batch", refuse)
    with pytest.raises(SystemExit, match=r"^error: out of memory: take fewer or smaller images.*CUDA out of memory"):
        predict([str(photos)], checkpoint=checkpoint, output="out", workers=0)
    assert read("out")[1] == []


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "give one of --checkpoint FILE, or --model NAME --weights FILE"),
        ({"model": "fasterrcnn_resnet50_fpn"}, "--model needs --weights"),
        ({"model": "resnet18", "weights": "DEFAULT"}, "'resnet18' is not one of torchvision's detectors"),
        ({"device": "tpu9"}, "--device tpu9: "),
        ({"device": "cuda:99"}, "--device cuda:99: "),
        ({"checkpoint": "nothing.ckpt"}, r"nothing\.ckpt: no such file"),
        ({"output": "photos/a.png"}, r"photos/a\.png"),
        ({"output": "photos/a.png/out"}, r"photos/a\.png"),
    ],
)
def test_a_mistake_is_a_sentence(photos, checkpoint, options, reason):
    options = {"checkpoint": checkpoint} | options if "output" in options or "device" in options else options
    flaw_of_the_flags = "--" in reason
    with refused(reason, code=2 if flaw_of_the_flags else 1):
        predict(["photos"], **options)
    assert not Path("runs").exists()


def test_a_checkpoint_and_a_model_are_not_both_taken(photos, checkpoint):
    for options in ({"model": "fasterrcnn_resnet50_fpn", "weights": "DEFAULT"}, {"weights": "w.pth"}):
        with refused("give --checkpoint, or --model with --weights, not both"):
            predict(["photos"], checkpoint=checkpoint, **options)


def test_stock_and_swapped_detect_the_same(photos, checkpoint):
    for crop in ("affine", "roi_align"):
        assert predict([str(photos)], checkpoint=checkpoint, output=crop, crop=crop, workers=0) == 0
        assert read(crop)[0]["crop"] == crop
    ours, theirs = (read(crop)[1] for crop in ("affine", "roi_align"))
    assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-3)


# ---- the scores of a report


def write_report(path, checkpoint, points, *, weights=None, **about):
    weights = load_checkpoint(checkpoint).digest() if weights is None else weights
    about = {"weights": weights, "time": "2030-01-02T03:04:05+00:00"} | about
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
def run(home, checkpoint):
    """A checkpoint in a run's folder."""
    path = home / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(Path(checkpoint).read_bytes())
    return str(path)


def test_auto_takes_each_classs_score_of_the_last_report_of_these_weights(photos, run, capsys):
    assert predict([str(photos)], checkpoint=run, output="every", min_score=0) == 0
    every, results = read("every")
    by_class = {i: sorted(one["score"] for one in results if one["category_id"] == i) for i in IDS}
    # Exactly a detection's own score, which counts; and a class that has none, so that the overall one is taken.
    overall = by_class[31][len(by_class[31]) // 2]
    least = {7: 0.9, 2: by_class[2][-10], 31: None}
    home = Path(run).parent.parent
    write_report(home / "eval-val" / "report.json", run, points_of(least.values(), overall))
    write_report(home / "eval-old" / "report.json", run, points_of([0, 0, 0]), time="2029-12-31")
    write_report(home / "eval-other" / "report.json", run, points_of([0, 0, 0]), weights="sha256:0", time="2031")
    capsys.readouterr()
    assert predict([str(photos)], checkpoint=run, output="out", min_score="auto") == 0
    said = capsys.readouterr().out
    least[31] = overall
    low, high = min(least.values()), max(least.values())
    assert f"the report of 2030-01-02T03:04:05+00:00: scores from {low:.3f} to {high:.3f}, by class on, where F" in said
    found, all_of_them = read("out")
    assert found["categories"] == [
        {"id": i, "name": name, "min_score": least[i]} for i, name in zip(IDS, NAMES, strict=True)
    ]
    assert found["min_score"] == min(least.values())
    assert all_of_them == results
    for one, other in zip(found["images"], every["images"], strict=True):
        assert one["detections"] == [d for d in other["detections"] if d["score"] >= least[d["category_id"]]]
    kept = [d["category_id"] for image in found["images"] for d in image["detections"]]
    assert (kept.count(2), kept.count(31)) == (10, (len(by_class[31]) + 1) // 2)
    # What is drawn is what is listed.
    image = load_checkpoint(run).detect(photos / "a.png", min_score=0)
    listed = found["images"][0]["detections"]
    target = {
        "boxes": torch.tensor([d["box"] for d in listed]).reshape(-1, 4),
        "labels": torch.tensor([IDS.index(d["category_id"]) + 1 for d in listed], dtype=torch.int64),
        "scores": torch.tensor([d["score"] for d in listed]),
    }
    content = io.BytesIO()
    draw(image.image, target, NAMES, min_score=0).save(content, "JPEG", quality=90)
    assert Path("out", "pictures", "a.jpg").read_bytes() == content.getvalue()


def test_auto_finds_the_report_of_a_saved_folder_in_runs(photos, checkpoint, capsys):
    load_checkpoint(checkpoint).save_pretrained("saved")
    write_report(Path("runs", "eval-saved-val", "report.json"), checkpoint, points_of([0.8] * 3))
    assert predict([str(photos)], checkpoint="saved", output="out", min_score="auto", pictures=False) == 0
    assert "scores from 0.800 on, where F1 was highest" in capsys.readouterr().out
    assert min(d["score"] for image in read("out")[0]["images"] for d in image["detections"]) >= 0.8


def test_auto_goes_by_the_names_of_the_classes(photos, checkpoint):
    """The report is of data with other ids, one of which is another class's of the detector."""
    points = points_of([0.1, 0.2, 0.3], ids=[IDS[2], IDS[0], 99])
    write_report(Path("runs", "eval", "report.json"), checkpoint, points)
    assert predict(["photos/a.png"], checkpoint=checkpoint, output="out", min_score="auto") == 0
    assert [one["min_score"] for one in read("out")[0]["categories"]] == [0.1, 0.2, 0.3]


def test_auto_of_a_detector_without_categories_goes_by_the_order_of_the_classes(photos, checkpoint, monkeypatch):
    detector = load_checkpoint(checkpoint)
    detector.category_ids = [None] * 3
    monkeypatch.setattr(predicting, "load_source", lambda *given: (detector, "weights"))
    write_report(Path("runs", "eval", "report.json"), checkpoint, points_of([0.1, 0.2, 0.3], ids=[3, 4, 9]))
    assert predict(["photos/a.png"], output="out", min_score="auto") == 0
    assert [one["min_score"] for one in read("out")[0]["categories"]] == [0.1, 0.2, 0.3]
    write_report(Path("runs", "eval", "report.json"), checkpoint, points_of([0.1, 0.2], ids=[3, 4]))
    with pytest.raises(SystemExit, match="the weights have 3 classes, the data has 2"):
        predict(["photos/a.png"], min_score="auto")


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (None, r"the report of 2030-\S+ has no scores to take; run tools/eval\.py again, or give a score"),
        (points_of([None] * 3, None), r"says that nothing was found right, so no score is best; give one"),
        ([], "is damaged: operating_points: "),
        (7, "is damaged: operating_points: "),
        ({"by_class": points_of([0.1] * 3)["by_class"]}, "is damaged: operating_points: KeyError 'mean'"),
        ({"mean": {}, "by_class": points_of([0.1] * 3)["by_class"]}, "is damaged: operating_points: KeyError 'score'"),
        ({"mean": {"score": 0.5}, "by_class": [{"id": 7}]}, "is damaged: operating_points: KeyError 'name'"),
        ({"mean": {"score": 0.5}, "by_class": [{"id": [], "name": NAMES[0], "score": 0.1}]}, "is damaged: "),
        (points_of([0.1, "0.2", 0.3]), "is damaged: operating_points: ValueError a score must be a number from 0 to 1"),
        (points_of([0.1, 1.2, 0.3]), "is damaged: "),
        (points_of([0.1, float("nan"), 0.3]), "is damaged: "),
        (points_of([0.1, True, 0.3]), "is damaged: "),
        (points_of([0.1, 0.2, 0.3], "0.5"), "is damaged: "),
    ],
)
def test_auto_without_a_score_is_a_sentence(photos, run, points, reason):
    write_report(Path(run).parent.parent / "eval-val" / "report.json", run, points)
    with pytest.raises(SystemExit, match=rf"^error: --min_score auto: .*{reason}") as stop:
        predict(["photos"], checkpoint=run, min_score="auto", output="out")
    assert "\n" not in stop.value.code
    assert not Path("out").exists()


def test_auto_without_a_report(photos, run):
    for weights in (None, "sha256:0"):
        if weights is not None:
            write_report(
                Path(run).parent.parent / "eval-val" / "report.json", run, points_of([0.5] * 3), weights=weights
            )
        with pytest.raises(
            SystemExit, match=r"tools/eval\.py has not scored these weights .*run/ and runs/ .*run it fi"
        ):
            predict(["photos"], checkpoint=run, min_score="auto")


# ---- the tool


def run_tool(*arguments, code=""):
    """tools/predict.py in a process of its own, after some code."""
    tools = str(REPOSITORY / "tools")
    call = f"sys.path.insert(0, {tools!r})\nrunpy.run_path({tools!r} + '/predict.py', run_name='__main__')"
    script = f"import sys, runpy\n{code}\nsys.argv[0] = 'predict.py'\n{call}"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.png", "--batch-size", "0"],
        ["a.png", "--workers", "-1"],
        ["a.png", "--min-score", "nan"],
        ["a.png", "--min-score", "2"],
        ["a.png", "--min_score", "automatic"],
        ["a.png", "--max_pixels", "0"],
        ["a.png", "--batch-size", "x"],
        ["a.png", "--crop", "x"],
        ["a.png", "--unknown"],
    ],
)
def test_a_wrong_command_line_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert len(said) == 1 or not arguments  # else it begins with how to use it


def test_the_tool_hands_everything_on(monkeypatch):
    given = {}
    monkeypatch.setattr(predicting, "predict", lambda images, **options: given.update(options, images=images) or 0)
    assert main(["a.png", "b", "--checkpoint", "c"]) == 0
    assert given == {
        "images": ["a.png", "b"],
        "checkpoint": "c",
        "model": None,
        "weights": None,
        "crop": None,
        "refine": None,
        "output": None,
        "min_score": 0.5,
        "annotations": None,
        "pictures": True,
        "batch_size": 8,
        "workers": 2,
        "orientation": "upright",
        "max_pixels": None,
        "device": None,
    }
    main(["a", "--no-pictures", "--min-score", "0", "--batch-size", "3", "--workers", "0", "--output", "o"])
    assert (given["pictures"], given["min_score"], given["batch_size"], given["workers"]) == (False, 0, 3, 0)


def test_options_are_spelled_with_underscores_and_taken_with_hyphens(monkeypatch):
    given = {}
    monkeypatch.setattr(predicting, "predict", lambda images, **options: given.update(options, images=images) or 0)
    hyphens = ["--min-score=auto", "--no-pictures", "--batch-size", "3", "--max-pixels", "9"]
    for arguments in (hyphens, [a.replace("-", "_").replace("__", "--") for a in hyphens]):
        given.clear()
        main(["--output", "x-y", *arguments, "--", "a-b.png", "--c-d.png"])
        assert (given["images"], given["output"]) == (["a-b.png", "--c-d.png"], "x-y")
        assert (given["min_score"], given["pictures"], given["batch_size"]) == ("auto", False, 3)
        assert given["max_pixels"] == 9


@pytest.mark.slow
def test_the_tool_from_a_shell(home, checkpoint):
    write_image(home / "in" / "a.png")
    (home / "in" / "b.png").write_text("no image")
    result = run_tool("in", "--checkpoint", checkpoint, "--device", "cpu", "--output", "out")
    assert result.returncode == 3, result.stderr
    assert "skipped: in/b.png" in result.stderr
    assert "Traceback" not in result.stderr
    assert names_of(read("out")[0]) == ["a.png"]


def test_a_refinement_is_on_unless_it_is_switched_off(checkpoint, photos):
    detector = load_checkpoint(checkpoint)
    refined(detector.model)
    detector.save_pretrained("refined")

    def found(folder, source, *flags):
        main([str(photos / "a.png"), "--checkpoint", source, "--output", folder, "--workers", "0", *flags])
        return json.loads(Path(folder, "detections.json").read_text())

    before, after = found("before", checkpoint), found("after", "refined")
    assert found("on", "refined", "--refine", "on") == after
    assert found("off", "refined", "--refine", "off") == before
    assert [one["bbox"] for one in before] != [one["bbox"] for one in after]
    with refused("--refine off: the detector has no refinement"):
        found("none", checkpoint, "--refine", "off")
    with refused("--refine: invalid choice"):
        found("both", "refined", "--refine", "both")
