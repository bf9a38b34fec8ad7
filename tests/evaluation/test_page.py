"""The HTML page of a report: all numbers, safe against hostile names, self-contained."""

import base64
import copy
import io
import re
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.evaluation import Predictions, Report, page
from detector.evaluation.page import render_page
from detector.evaluation.pictures import MARKS, Picture
from detector.evaluation.scoring import evaluate_coco
from detector.evaluation.truth import index_coco

DASH = "–"  # noqa: RUF001
COUNTS = ("objects", "objects_small", "objects_medium", "objects_large")
KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "ARs", "ARm", "ARl")
HOSTILE = [
    "<script>alert(1)</script>",
    "$x$ and $\\frac{1}{",
    "</svg></table><img src=x>",
    '"quotes" \'and\' onerror="x" &amp;',
    "two\nlines\tand\x00control\x1b[31m",
    "\u202eright to left\u200f \u0645\u0631\u062d\u0628\u0627",
    "emoji 🦄👩\u200d🔬 and \U00013000 and 漢字",
    "half a surrogate \ud800",
    "{{ 7 * 7 }}{% raw %}",
    "y" * 5000,
]
ABOUT = {
    **{"model": "fasterrcnn_resnet50_fpn", "crop": "affine", "refinement": "2 iterations, 5 ascent steps"},
    **{"data": "data/bccd", "split": "val", "time": "2026-02-03T04:05:06+00:00", "device": "cpu, 2 threads"},
    "command": "python tools/eval.py --checkpoint runs/bccd/last.ckpt \\\n  --root 'my  data' --split val",
    "versions": {"torch": "2.15.0", "torchvision": "0.29.0"},
}


def make_report(classes=3, images=4, names=None):
    """The report of detections close to the objects, a few of another class, with all sections of boxes."""
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(1, classes + 1)] if names is None else names
    data = {
        "images": [
            {"id": 500 + i, "file_name": f"Blood_{i:05}.jpg", "width": 400, "height": 300} for i in range(images)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "annotations": [],
    }
    results = []
    for number in range(max(images, classes) if images and names else 0):
        category, image_id = 1 + number % len(names), 500 + number % images
        box = [*rng.uniform(0, 200, 2).tolist(), *rng.uniform(10, 90, 2).tolist()]
        ids = {"image_id": image_id, "category_id": category}
        area = {"area": box[2] * box[3], "iscrowd": 0}
        data["annotations"].append({"id": number + 1, "bbox": box, **ids, **area})
        wrong = 1 + int(rng.integers(len(names))) if number % 5 == 4 else category
        moved = (np.array(box) + rng.normal(size=4) * 2).tolist()
        results.append({**ids, "category_id": wrong, "bbox": moved, "score": float(rng.uniform(0.4, 1))})
    proposals = [one | {"score": -i} for i, one in enumerate(results)]
    found = Predictions([image["id"] for image in data["images"]], results, proposals=proposals, kept_proposals=1000)
    found.losses = Counter({"loss_classifier": 0.41, "loss_box_reg": 0.35, "loss_objectness": 0.0061})
    found.unrefined = [one | {"bbox": data["annotations"][i]["bbox"]} for i, one in enumerate(results)]
    report = evaluate_coco(index_coco(data), found, about=ABOUT, notes=["A note about crowds."]).report
    stages = zip(("decode and transform", "backbone", "total"), (1.5, 1200.25, 1201.75))
    rows = [
        {"stage": name, "ms": ms, "low": ms - 1, "high": 2 * ms, "images_per_second": 1e3 / ms} for name, ms in stages
    ]
    report.speed = {"images": 50, "rows": rows}
    return report


def make_pictures(report):
    pictures = []
    for kind, entry in (("worst", report.images[0]), ("best", report.images[-1])):
        file = io.BytesIO()
        Image.new("RGB", (960, 600), "#335577").save(file, "JPEG")
        uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        pictures.append(Picture(kind, entry, page.Markup(uri), 960, 600))
    return pictures


class Reader(HTMLParser):
    """Checks that tags balance, and collects texts, tags, ids and rows of tables."""

    VOID = {"meta", "img", "br", "link", "input", "hr", "col"}  # noqa: RUF012

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.texts, self.rows = [], set(), [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def check(html):
    """Every page must be well-formed, load nothing, run nothing, and show no undefined value."""
    html.encode()
    reader = Reader(html)
    assert len(reader.ids) == len(set(reader.ids))
    assert not reader.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for key, value in reader.attributes:
        assert not key.startswith("on"), key
        if key in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            assert value.startswith(("data:image/jpeg;base64,", "#")), value
        if value and value.startswith("#") and "href" in key:
            assert value[1:] in reader.ids
        assert "://" not in (value or "") or key.startswith("xmlns"), value
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", html))
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", reader.text)
    return reader


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def report():
    return make_report(images=60)


@pytest.fixture(scope="module")
def html(report):
    return render_page(report, make_pictures(report))


@pytest.fixture(scope="module")
def reader(html):
    return check(html)


def test_page_is_self_contained(html, reader):
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in reader.attributes
    assert html.count("<style") == 1  # matplotlib's own would apply to the whole page
    assert "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    plots = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert plots.count("<svg") == 5
    assert ("currentColor" in plots, "#000000" in plots, "DejaVu" in plots) == (True, False, False)


def test_every_number_of_the_tables(report, html, reader):
    rows = {tuple(" ".join(cell.split()) for cell in row) for row in reader.rows}

    def three(row, keys):
        return tuple(DASH if row[key] is None else f"{row[key]:.3f}" for key in keys)

    for key in report.scores:
        assert [row for row in rows if row[:2] == (key, *three(report.scores, [key]))]
    for row in report.by_iou:
        assert (f"{row['iou']:.2f}", *three(row, ["AP"])) in rows
    for row in report.by_class:
        assert (row["name"], str(row["id"]), *(f"{row[key]:,}" for key in COUNTS), *three(row, KEYS)) in rows
    for row in report.operating_points["by_class"]:
        measures = three(row, ("precision", "recall", "f1"))
        assert (row["name"], f"{row['objects']:,}", str(row["score"]), *measures) in rows
    for row in report.by_size:
        assert (row["size"], f"{row['objects']:,}", *three(row, ("AP", "AR")), row["range"]) in rows
    for row in report.proposals["rows"]:
        assert (f"{row['at']:,}", *three(row, KEYS[6:])) in rows
    for key, value in report.losses.items():
        assert (key, f"{value:.4f}") in rows
    for row in report.speed["rows"]:
        times = [f"{row[key]:,.1f}" for key in ("ms", "low", "high", "images_per_second")]
        assert (row["stage"], *times) in rows
    for row in report.images[:50]:
        counts = [str(row[key]) for key in ("id", "objects", "found", "missed", "confused", "false")]
        assert (row["file_name"], *counts, f"{row['f1']:.3f}") in rows
    assert html.count("Blood_") == 50 + 2 * 2  # the worst 50; each picture's name is a caption and a text
    names, matrix = report.confusion["names"], report.confusion["matrix"]
    assert ("", *names, "missed") in rows
    for name, counts in zip([*names, "false detections"], matrix):
        last = "" if name == "false detections" else f"{counts[-1]:,}"
        assert (name, *(f"{cell:,}" for cell in counts[:-1]), last) in rows
    for name in ("AP", "AP50", "AP75", "AP90"):
        before, after = (report.refinement[when]["scores"][name] for when in ("before", "after"))
        difference = f"{after - before:+.3f}" if after != before else "0.000"
        assert (name, f"{before:.3f}", f"{after:.3f}", difference) in rows


def test_facts_notes_and_best_threshold(report, html, reader):
    best = report.operating_points["mean"]
    facts = [*(ABOUT[name] for name in ("model", "data", "time", "refinement")), "pycocotools", "torch 2.15.0"]
    for text in (*facts, "60 images", *report.notes, f"from a score of {best['score']} on"):
        assert text in reader.text
    assert ABOUT["command"].replace("'", "&#39;") in html  # with its line break and its spaces
    for kind, mark in MARKS.items():
        assert f"border-color: {mark.color}" in html or f"--mark: {mark.color}" in html, kind
    assert html.count("stroke-dasharray: 1,") == 1
    anchors = re.findall(r'<li><a href="#(\w+)">', html)
    assert anchors == [anchor for anchor in re.findall(r'<h2 id="(\w+)">', html) if anchor != "how"]
    assert len(anchors) == 12


def test_hostile_text_is_text_everywhere(monkeypatch):
    report = make_report(classes=len(HOSTILE), images=len(HOSTILE), names=HOSTILE)
    for row, name in zip(report.images, HOSTILE):
        row["file_name"] = name
    for row, name in zip(report.speed["rows"], HOSTILE):
        row["stage"] = name
    report.by_size[0] |= {"size": HOSTILE[2], "range": HOSTILE[0]}
    report.notes = HOSTILE
    report.losses |= dict.fromkeys(HOSTILE, 0.25)
    pictures = [Picture("worst", entry, page.Markup("data:image/jpeg;base64,"), 8, 8) for entry in report.images]
    plots = page.make_plots(report)
    monkeypatch.setattr(page, "make_plots", lambda report: plots)  # slow, and the same for both
    fields = ("model", "crop", "data", "split", "command", "time", "device", "evaluator")
    for names in (HOSTILE, HOSTILE[5:] + HOSTILE[:5]):
        report.about |= dict(zip(fields, names)) | {"versions": dict.fromkeys(names, names[0])}
        html = render_page(report, pictures)
        reader = check(html)
        assert {tag.lower() for tag in re.findall(r"<(\w+)", html)} <= reader.tags
        assert not [c for c in html if c in "\x00\x1b\u202e\u200f\u200d" or "\ud800" <= c <= "\udfff"]
        assert "49" not in reader.text.partition(" images")[0][:5000]
    for text in ("<script>alert(1)</script>", "$x$ and $\\frac{1}{", "two lines and control [31m", "y" * 59 + "…"):
        assert text in reader.text
    assert max(len(row[0]) for row in reader.rows if row[0].startswith("yyy")) == 60


def test_undefined_numbers_are_dashes(report):
    report = copy.deepcopy(report)
    report.scores |= {"APs": None, "ARs": float("nan")}
    report.by_class[0] |= dict.fromkeys(KEYS)
    report.by_iou[-1]["AP"] = None
    report.about |= {"crop": None, "split": None}
    report.operating_points["mean"]["score"] = -1e200  # outside of the plot
    report.proposals["rows"][0]["ARs"] = None
    report.losses["loss_objectness"] = None
    report.speed["rows"][0] |= dict.fromkeys(("ms", "low", "high", "images_per_second"))
    html = render_page(report, [])
    rows = check(html).rows
    assert [row[1] for row in rows if row[0] in ("APs", "ARs")] == [DASH] * 2
    assert next(row for row in rows if row[0] == "class 1" and len(row) > 9)[6:] == [DASH] * len(KEYS)
    assert "stroke-dasharray: 1," not in html  # the vertical line at the highest F1
    assert f"<dt>crop</dt><dd>{DASH}</dd>" in html


@pytest.mark.parametrize("classes", [1, 8, 21])
def test_any_number_of_classes(classes):
    report = make_report(classes)
    report.curves["by_class"] = {f"class {i}": [i / classes] * 101 for i in range(1, classes + 1)}
    html = render_page(report, [])
    reader = check(html)
    shown = [row[1] for row in reader.rows if len(row) == 6 + len(KEYS) and re.fullmatch(r"[0-9]+", row[1])]
    assert shown == [str(number) for number in range(1, classes + 1)]
    legend = html.split("<h3>By class, at IoU 0.50")[1].split("</ul>")[0]
    drawn = [int(number) for number in re.findall(r"<bdi>class (\d+)</bdi>", legend)]
    assert drawn == {1: [1], 8: list(range(1, 9)), 21: [21, 20, 19, 18, 17, 5, 4, 3, 2, 1]}[classes]
    assert legend.count('class="dashed"') == {1: 0, 8: 3, 21: 5}[classes]
    assert ('class="matrix"' in html) == (classes <= 20)
    assert ("detected as" in html) == (classes > 20)


def test_sections_without_data():
    report = make_report(classes=0, images=0)
    report.refinement = report.losses = report.speed = report.proposals = None
    html = render_page(report, [])
    check(html)
    assert re.findall(r'<h2 id="(\w+)">', html) == ["how", "scores"]
    assert not re.search("<svg|<img|before and after|dotted</b>", html)
    assert len(re.findall("<li>No ", html)) == 5


def test_the_same_page_again_whatever_the_matplotlibrc(report, html):
    import matplotlib as mpl

    with mpl.rc_context({"xtick.major.size": 20, "font.size": 30}):
        assert render_page(Report.from_dict(copy.deepcopy(report.to_dict())), make_pictures(report)) == html
        assert mpl.rcParams["font.size"] == 30


def test_pictures_open_without_a_script_and_more_are_folded(report, html, reader, monkeypatch):
    """The browser's own popover handles Escape and focus."""
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]*)" width="960" height="600" alt="([^"]+)"', html)
    assert len(uris) == html.count("data:image/jpeg") == 2
    assert Image.open(io.BytesIO(base64.b64decode(uris[0][0]))).size == (960, 600)
    entry = report.images[0]
    counts = f"{entry['found']} found, {entry['missed']} missed, {entry['confused']} confused, {entry['false']} false"
    assert f"id {entry['id']}: {counts}" in reader.text
    opened = re.findall(r'<button type="button" popovertarget="([\w-]+)"[^>]*><img ', html)
    assert opened == re.findall(r'<div class="picture" id="([\w-]+)" popover>', html) == ["worst-1", "best-1"]
    monkeypatch.setattr(page, "make_plots", lambda report: {})
    worst, best = make_pictures(report)
    html = render_page(report, [worst] * 8 + [best] * 6)
    check(html)
    (folded,) = re.findall(r"<details>(.*?)</details>", html, flags=re.DOTALL)
    assert re.findall(r' id="([\w-]+)" popover', folded) == ["worst-7", "worst-8"]


def test_the_template_is_in_the_package_data():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'"detector\.evaluation" = .*"(\*|page)\.html"', text)
    assert Path(page.__file__).with_name("page.html").is_file()
