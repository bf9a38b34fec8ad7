"""The HTML page of an evaluation: whole, safe against names, self-contained."""

import base64
import copy
import io
import random
import re
import tomllib
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from detector.evaluation import page
from detector.evaluation.page import MARKS, confusion_table, encode_jpeg
from detector.evaluation.report import Report
from detector.text import clean, short

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


def make_report(classes=3, images=40, seed=0, names=None):
    """A report as an evaluation writes it, all numbers drawn by chance."""
    draw = random.Random(seed)
    names = [f"class {i}" for i in range(1, classes + 1)] if names is None else names
    scores = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "AP90")
    matrix = [[draw.choice((0, 0, 0, 1, 2, 5)) for _ in range(classes + 1)] for _ in range(classes + 1)]
    for i in range(classes):
        matrix[i][i] = draw.randrange(20, 1500)
    matrix[-1][-1] = 0

    def curve(strictness=1.0):
        end = draw.uniform(0.6, 0.99)
        return [max(0.0, (1 - (i / 100) ** 4) * strictness) if i / 100 < end else 0.0 for i in range(101)]

    stages = ("decode and transform", "backbone", "RPN", "crop", "head", "post-processing")
    times = [draw.uniform(2, 300) for _ in stages]
    times.append(sum(times))
    return {
        "about": {
            "model": "fasterrcnn_resnet50_fpn",
            "crop": "affine",
            "refinement": "2 looks, 5 climbs",
            "data": "data/bccd",
            "split": "val",
            "images": images,
            "objects": 12345,
            "detections": 67890,
            "time": "2026-02-03T04:05:06+00:00",
            "command": "python tools/eval.py --checkpoint runs/bccd/last.ckpt \\\n  --root 'my  data' --split val",
            "evaluator": "pycocotools 2.0.11",
            "device": "cpu, 2 threads",
            "versions": {"torch": "2.15.0", "torchvision": "0.29.0"},
        },
        "scores": {key: draw.random() for key in scores},
        "by_iou": [{"iou": 0.5 + 0.05 * i, "AP": 0.9 * (1 - (i / 10) ** 2)} for i in range(10)],
        "by_size": [
            {"size": "small", "range": "area below 32 x 32 pixels", "objects": 1410, "AP": 0.25, "AR": 0.375},
            {"size": "medium", "range": "area from 32 x 32 to 96 x 96", "objects": 20, "AP": None, "AR": None},
            {"size": "large", "range": "area above 96 x 96 pixels", "objects": 3, "AP": 0.75, "AR": 1},
        ],
        "by_class": [
            {"id": i, "name": name}
            | {key: draw.randrange(5000) for key in COUNTS}
            | {key: draw.random() for key in KEYS}
            for i, name in enumerate(names, start=1)
        ],
        "operating_points": {
            "iou": 0.5,
            "mean": {"score": 0.4375, "precision": 0.8125, "recall": 0.75, "f1": 0.78},
            "by_class": [
                {"id": i, "name": name, "objects": draw.randrange(5000), "score": draw.random()}
                | {key: draw.random() for key in ("precision", "recall", "f1")}
                for i, name in enumerate(names, start=1)
            ],
            "curves": {
                "score": [i / 100 for i in range(101)],
                "mean": {"precision": [*curve()[:-1], None], "recall": curve(), "f1": curve()},
                "by_class": {
                    name: {"precision": [*curve()[:-1], None], "recall": curve(), "f1": curve()} for name in names
                },
            },
        },
        "proposals": {
            "kept": 1000,
            "rows": [{"at": at} | {key: draw.random() for key in KEYS[6:]} for at in (100, 300, 1000)],
        },
        "refinement": {
            when: {
                "scores": {key: draw.random() for key in scores},
                "by_iou": [{"iou": 0.5 + 0.05 * i, "AP": draw.random()} for i in range(10)],
            }
            for when in ("before", "after")
        },
        "losses": {"loss": 0.91234, "loss_classifier": 0.41, "loss_box_reg": 0.35, "loss_objectness": 0.0061},
        "curves": {
            "recall": [i / 100 for i in range(101)],
            "mean": {"0.50": curve(), "0.75": curve(0.8), "0.90": curve(0.3)},
            "by_class": {name: curve(draw.uniform(0.2, 1)) for name in names},
        },
        "confusion": {"names": names, "matrix": matrix, "min_score": 0.5, "iou": 0.5},
        "images": [
            {"id": 500 + i, "file_name": f"BloodImage_{i:05}.jpg", "objects": draw.randrange(30)}
            | {key: draw.randrange(9) for key in ("found", "missed", "confused", "false")}
            | {"f1": i / images}
            for i in range(images)
        ],
        "speed": {
            "images": 50,
            "rows": [
                {"stage": stage, "ms": ms, "low": ms * 0.9, "high": ms * 1.3, "images_per_second": 1000 / ms}
                for stage, ms in zip((*stages, "total"), times)
            ],
        },
        "notes": ["Crowds are left out of the confusion matrix."],
    }


def Picture(kind, entry, image):  # noqa: N802
    return page.Picture(kind, entry, *encode_jpeg(image))


def render_page(report, pictures):
    return page.render_page(Report.from_dict({"segm": None, "keypoints": None} | report), list(pictures))


def make_empty_report():
    """Of a split without images and classes, from a results file."""
    report = make_report(classes=0, images=0)
    report["about"] |= {"images": 0, "objects": 0, "detections": 0, "split": None, "crop": None}
    report["scores"] = dict.fromkeys(report["scores"])
    report["by_iou"] = [row | {"AP": None} for row in report["by_iou"]]
    report["by_size"] = [row | {"objects": 0, "AP": None, "AR": None} for row in report["by_size"]]
    report["curves"] = {"recall": report["curves"]["recall"], "mean": {}, "by_class": {}}
    report["operating_points"] |= {"mean": None, "curves": {"score": [], "mean": {}, "by_class": {}}}
    return report | {"proposals": None, "refinement": None, "losses": None, "speed": None, "notes": []}


def make_pictures(report, size=(1600, 1000)):
    entries = report["images"]
    images = [Image.new("RGB", size, color) for color in ("#335577", "#775533")]
    return [Picture("worst", entries[0], images[0]), Picture("best", entries[-1], images[1])]


class Reader(HTMLParser):
    """Checks that tags balance and gathers what the tests ask for."""

    VOID = {"meta", "img", "br", "link", "input", "hr", "col"}  # noqa: RUF012

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.texts, self.rows = [], set(), [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag, attributes):
        self.note(tag, attributes)

    def handle_starttag(self, tag, attributes):
        self.note(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> was never opened"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def note(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.ids += [value for key, value in attributes if key == "id"]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def check(html):
    """What every page must be; returns its reader."""
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
    return make_report()


@pytest.fixture(scope="module")
def html(report):
    return render_page(report, make_pictures(report))


def test_page_is_whole_and_loads_nothing(html):
    reader = check(html)
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in reader.attributes
    assert {"svg", "table", "img", "caption", "nav"} <= reader.tags
    assert html.count("<svg") == 11
    assert html.count("<style") == 1  # matplotlib's own would be the whole page's
    assert "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)


def test_plots_take_the_colour_and_the_font_of_the_page(html):
    plots = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "currentColor" in plots
    assert "#000000" not in plots
    assert "DejaVu" not in plots
    assert "<text" in plots


def test_every_number_of_the_tables_is_there(report, html):
    rows = {tuple(" ".join(cell.split()) for cell in row) for row in check(html).rows}

    def three(row, keys):
        return tuple("–" if row[key] is None else f"{row[key]:.3f}" for key in keys)  # noqa: RUF001

    for key, value in report["scores"].items():
        assert [row for row in rows if row[:2] == (key, f"{value:.3f}")]
    for row in report["by_class"]:
        assert (row["name"], str(row["id"]), *(f"{row[key]:,}" for key in COUNTS), *three(row, KEYS)) in rows
    for row in report["operating_points"]["by_class"]:
        numbers = three(row, ("precision", "recall", "f1"))
        assert (row["name"], f"{row['objects']:,}", str(row["score"]), *numbers) in rows
    for row in report["by_size"]:
        assert (row["size"], f"{row['objects']:,}", *three(row, ("AP", "AR")), row["range"]) in rows
    for row in report["proposals"]["rows"]:
        assert (f"{row['at']:,}", *three(row, KEYS[6:])) in rows
    for key, value in report["losses"].items():
        assert (key, f"{value:.4f}") in rows
    for row in report["speed"]["rows"]:
        times = [f"{row[key]:,.1f}" for key in ("ms", "low", "high")]
        assert (row["stage"], *times, f"{row['images_per_second']:.1f}") in rows
    for row in report["images"]:
        counts = [str(row[key]) for key in ("id", "objects", "found", "missed", "confused", "false")]
        assert (row["file_name"], *counts, f"{row['f1']:.3f}") in rows
    names, matrix = report["confusion"]["names"], report["confusion"]["matrix"]
    assert ("", *names, "missed") in rows
    for name, counts in zip(names, matrix):
        assert (name, *(f"{cell:,}" for cell in counts)) in rows
    assert ("false detections", *(f"{cell:,}" for cell in matrix[-1][:-1]), "") in rows


def test_the_facts_and_the_plots_numbers_are_there(report, html):
    reader = check(html)
    about = report["about"]
    for value in (about["model"], about["data"], about["time"], about["evaluator"], "torch 2.15.0", "12,345", "67,890"):
        assert value in reader.text
    assert about["command"].replace("'", "&#39;") in html  # with its line break and its spaces
    for row in report["by_iou"]:
        assert f">{row['AP']:.3f}</text>" in html
    for row in report["by_size"]:
        assert row["AP"] is None or f">{row['AP']:.3f}</text>" in html
    assert report["notes"][0] in reader.text


def test_the_order_is_that_of_the_contents(html):
    anchors = re.findall(r'<li><a href="#(\w+)">', html)
    assert anchors == [anchor for anchor in re.findall(r'<h2 id="(\w+)">', html) if anchor != "how"]
    assert anchors[0] == "scores"
    assert anchors[-1] == "images"
    assert len(anchors) == 12


def test_hostile_text_is_text_everywhere():
    report = make_report(classes=len(HOSTILE), images=len(HOSTILE), names=HOSTILE)
    for row, name in zip(report["images"], HOSTILE):
        row["file_name"] = name
    for row, name in zip(report["by_size"], (HOSTILE[6], "$x$", "</svg>")):
        row |= {"size": name, "range": HOSTILE[0]}
    report["speed"] |= {"device": HOSTILE[2], HOSTILE[3]: 1}
    for row, name in zip(report["speed"]["rows"], HOSTILE):
        row["stage"] = name
    report["notes"] = HOSTILE
    report["losses"] |= dict.fromkeys(HOSTILE, 0.25)
    # A picture a name, so that each one is in attributes too.
    picture = Image.new("RGB", (8, 8))
    pictures = [Picture("worst", entry, picture) for entry in report["images"]]
    fields = ("model", "crop", "data", "split", "command", "time", "device", "evaluator")
    for names in (HOSTILE, HOSTILE[5:] + HOSTILE[:5]):
        report["about"] |= dict(zip(fields, names)) | {"versions": dict.fromkeys(names, names[0])}
        html = render_page(report, pictures)
        reader = check(html)
        for tag in re.findall(r"<(\w+)", html):
            assert tag.lower() in reader.tags  # nothing that a parser sees otherwise
        assert not [c for c in html if c in "\x00\x1b\u202e\u200f\u200d" or "\ud800" <= c <= "\udfff"]
        assert "49" not in short(reader.text.partition(" images")[0], 5000)
    assert "<script>alert(1)</script>" in reader.text
    assert "$x$ and $\\frac{1}{" in reader.text
    assert ">$x$</text>" in re.sub("<!--.*?-->", "", html)  # a label in a plot
    assert ">&lt;/svg&gt;</text>" in html
    assert "two lines and control [31m" in reader.text
    assert "y" * 59 + "…" in reader.text
    row = next(row for row in reader.rows if row[0].startswith("yyy"))
    assert len(row[0]) == 60


def test_cleaning_of_names():
    assert clean("a\r\n\tb\u2028c") == "a b c"
    assert clean("\u202ea\u200fb\ufeff") == "ab"
    assert clean("\udc80") == "\ufffd"
    assert clean("naïve 漢字 🦄") == "naïve 漢字 🦄"
    assert short("abcdef", 6) == "abcdef"
    assert short("abcdefg", 6) == "abcde…"


def test_what_there_is_none_of_is_a_dash(report):
    report = copy.deepcopy(report)
    report["scores"] |= {"APs": None, "ARs": float("nan")}
    report["by_class"][0] |= dict.fromkeys(KEYS)
    report["by_iou"][-1]["AP"] = None
    report["about"] |= {"crop": None, "split": None}
    report["curves"]["by_class"]["class 1"] = [None] * 101
    report["curves"]["mean"]["0.90"] = [None] * 101
    report["proposals"]["rows"][0]["ARs"] = None
    report["losses"]["loss_objectness"] = None
    report["speed"]["rows"][0] |= dict.fromkeys(("ms", "low", "high", "images_per_second"))
    html = render_page(report, [])
    rows = check(html).rows
    assert [row[1] for row in rows if row[0] in ("APs", "ARs")] == ["–"] * 2  # noqa: RUF001
    assert next(row for row in rows if row[0] == "class 1" and len(row) > 9)[6:] == ["–"] * len(KEYS)  # noqa: RUF001
    assert ">–</text>" in html  # noqa: RUF001
    assert html.split("<h3>By class, at IoU 0.50")[1].split("</ul>")[0].count("<li>") == 2  # a curve of nothing is none
    assert "<dt>crop</dt><dd>–</dd>" in html  # noqa: RUF001


@pytest.mark.parametrize("classes", [1, 10, 11, 20, 21, 80, 1000])
def test_any_number_of_classes(classes):
    report = make_report(classes)
    html = render_page(report, [])
    reader = check(html)
    shown = [row[1] for row in reader.rows if len(row) == 6 + len(KEYS) and re.fullmatch(r"0\.\d{3}", row[-1])]
    assert shown == [str(number) for number in range(1, classes + 1)]
    assert len(html) < 3_000_000
    legend = re.findall(r"<bdi>(class \d+)</bdi></li>\n", html.split("<h3>By class, at IoU 0.50")[1].split("</ul>")[0])
    assert len(legend) == min(classes, 10)
    said = f"Of {classes:,} classes the 5 with the highest AP50" in html
    assert said == (classes > 10)
    said = f"the {classes - 20:,} others are added up" in html
    assert said == (classes > 20)
    assert ("The most frequent confusions" in html) == (classes > 20)


def test_best_and_worst_curves():
    report = make_report(12)
    report["curves"]["by_class"] = {f"class {i}": [i / 12] * 101 for i in (3, 1, 12, 2, 4, 5, 6, 7, 8, 9, 10, 11)}
    legend = render_page(report, []).split("<h3>By class, at IoU 0.50")[1].split("</ul>")[0]
    assert re.findall(r"class (\d+)", legend) == ["12", "11", "10", "9", "8", "5", "4", "3", "2", "1"]
    assert legend.count("dashed") == 5


def test_confusions_of_many_classes():
    names = [f"class {i}" for i in range(30)]
    matrix = [[0] * 31 for _ in range(31)]
    for i in range(30):
        matrix[i][i] = 100
        matrix[i][30] = matrix[30][i] = 1
    for i in range(5, 25):  # these 20 have most confusions
        matrix[i][29 - i] = 7 + i
    matrix[29][28] = 2
    table = confusion_table({"names": names, "matrix": matrix})
    assert table["names"] == [*names[5:25], "other classes"]
    assert table["others"] == 10
    assert sum(map(sum, table["matrix"])) == sum(map(sum, matrix))
    assert table["matrix"][0][0] == 100
    assert table["matrix"][0][19] == 12
    assert table["matrix"][0][-1] == 1
    assert table["matrix"][20] == [0] * 20 + [1002, 10]
    assert table["matrix"][21] == [1] * 20 + [10, 0]
    assert table["totals"][0] == 113
    assert table["pairs"][0] == ("class 24", "class 5", 31)
    assert len(table["pairs"]) == 20
    few = confusion_table({"names": names[:3], "matrix": [row[:4] for row in matrix[:4]]})
    assert few["names"] == names[:3]
    assert few["others"] == 0


def test_what_the_refinement_did_is_a_table_and_two_curves(report, html):
    before, after = (report["refinement"][when]["scores"] for when in ("before", "after"))
    for name in ("AP", "AP50", "AP75", "AP90"):
        difference = f"{after[name] - before[name]:+.3f}"
        numbers = (f"{before[name]:.3f}", f"{after[name]:.3f}", difference)
        cells = [f"{name}</th>", *(f"<td>{one}</td>" for one in numbers)]
        assert re.search(r"\s*".join(map(re.escape, cells)), html)
    section = html[html.index('id="refinement"') : html.index('id="curves"')]
    assert section.count("<svg") == 1
    assert re.findall("<bdi>(before|after)</bdi>", section) == ["before", "after"]
    assert "2 looks, 5 climbs" in html
    assert "<b>dotted</b>: where the box was before" in html
    plain = render_page(report | {"refinement": None}, [])
    assert "<b>dotted</b>" not in plain
    assert 'id="refinement"' not in plain
    assert "before and after" not in plain


def test_nothing_at_all():
    report = make_empty_report()
    html = render_page(report, [])
    reader = check(html)
    assert re.findall(r'<h2 id="(\w+)">', html) == ["how", "scores"]
    assert "<svg" not in html
    assert "No pictures: no images were given, or none asked for." in reader.text
    assert "No losses" not in reader.text  # the notes say why, if there is a reason
    assert "<img" not in html
    assert "No threshold: no object was found." in reader.text


def test_zero_counts_without_classes(report):
    report = report | {"by_class": [], "confusion": {**report["confusion"], "names": [], "matrix": [[0]]}}
    assert "confusion" not in check(render_page(report, [])).ids


def test_same_page_again(report, html):
    assert render_page(copy.deepcopy(report), make_pictures(report)) == html


def test_the_users_matplotlibrc_is_not_the_pages(report, html):
    import matplotlib as mpl

    with mpl.rc_context({"xtick.major.size": 20, "font.size": 30}):
        assert render_page(report, make_pictures(report)) == html
        assert mpl.rcParams["font.size"] == 30


def test_pictures_are_scaled_and_inside(report, html):
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]*)" width="(\d+)" height="(\d+)" alt="([^"]+)"', html)
    assert len(uris) == 2
    for uri, width, height, _ in uris:
        picture = Image.open(io.BytesIO(base64.b64decode(uri)))
        assert picture.format == "JPEG"
        assert picture.size == (int(width), int(height)) == (960, 600)
    color = Image.open(io.BytesIO(base64.b64decode(uris[0][0]))).getpixel((9, 9))
    assert max(abs(a - b) for a, b in zip(color, (0x33, 0x55, 0x77))) < 4
    entry = report["images"][0]
    caption = f"id {entry['id']}: {entry['found']} found, {entry['missed']} missed, {entry['confused']} confused, "
    assert caption + f"{entry['false']} false" in Reader(html).text
    assert html.index("<h3>Worst</h3>") < html.index("<h3>Best</h3>")


def test_small_pictures_of_any_mode_stay_small(report):
    images = (Image.new("RGBA", (30, 90)), Image.new("L", (2000, 10)))
    html = render_page(report, [Picture("best", report["images"][0], image) for image in images])
    assert re.findall(r'width="(\d+)" height="(\d+)" alt', html) == [("30", "90"), ("960", "5")]
    assert "<h3>Worst</h3>" not in html
    assert images[1].size == (2000, 10)  # the caller's picture is as it was


def test_pictures_open_without_a_script_and_are_inside_once(report, html):
    """The browser's own popover: Escape and focus are its business. Here it is seen when it is closed as well."""
    opened = re.findall(r'<button type="button" popovertarget="([\w-]+)"[^>]*><img ', html)
    assert opened == re.findall(r'<div class="picture" id="([\w-]+)" popover>', html) == ["worst-1", "best-1"]
    assert re.search(r"\.picture \{ display: block; position: static;", html)
    assert re.search(r"\.picture:popover-open \{ position: fixed;[^}]*overflow: auto;", html)
    # never smaller than its own pixels, of which the labels are 15 high
    assert 'style="--width: 960px; --ratio: 960 / 600"' in html
    assert ".picture:popover-open button { width: max(var(--width)," in html
    assert ".place { width: min(100%, var(--width), 32rem * var(--ratio));" in html  # however narrow, not a mile long
    assert html.count("data:image/jpeg") == 2


def test_more_pictures_are_folded_away(report):
    picture = Image.new("RGB", (8, 8))
    pictures = (
        Picture(kind, report["images"][0], picture) for kind, n in (("worst", 8), ("best", 6)) for _ in range(n)
    )
    html = render_page(report, pictures)  # one at a time, as they are drawn
    check(html)
    assert html.count("<details>") == 1
    assert "<summary>2 more of the worst</summary>" in html
    folded = html.split("<details>")[1].split("</details>")[0]
    assert re.findall(r' id="([\w-]+)" popover', folded) == ["worst-7", "worst-8"]


def test_every_mark_is_explained_without_its_colour(html):
    text = check(html).text
    for mark in MARKS.values():
        assert mark.meaning in text
        assert f"border-color: {mark.color}" in html or f"--mark: {mark.color}" in html
    for words in ("false: name", "missed: name", "is: other"):
        assert words in text
    assert len({(mark.stroke, mark.caption) for mark in MARKS.values()}) == len(MARKS)


def test_the_best_threshold_is_told_and_drawn(report, html):
    text = check(html).text
    assert "F1 is highest from a score of 0.4375 on: precision 0.812, recall 0.750, F1 0.780." in text
    assert "tools/predict.py --min_score auto" in text
    svg = re.search(r'<svg[^>]*aria-label="All classes together, over the score threshold".*?</svg>', html, re.DOTALL)
    assert len(re.findall("stroke-dasharray: 1,", svg[0])) == 1
    assert "F1 is highest, 0.780, from a score of 0.4375 on." in text
    report = copy.deepcopy(report)
    report["operating_points"]["mean"]["score"] = -1e200  # of a results file: nowhere on the plot
    assert "stroke-dasharray: 1," not in "".join(re.findall("<svg.*?</svg>", render_page(report, []), re.DOTALL))


def test_a_table_that_is_cut_hints_that_it_scrolls(html):
    style = html.split("<style>")[1].split("</style>")[0]
    shadows = re.search(r"\.scroll \{[^}]*background-attachment: ([^;]*);", style)[1]
    assert shadows.count("local") == 5  # the covers move with the content
    assert shadows.count("scroll") == 4
    assert re.search(r"@media \(max-width: 60rem\) \{ caption span::after \{ content: \"[^\"]*it scrolls", style)
    assert html.count("<table") == html.count('<div class="scroll" tabindex="0"') == html.count("<caption><span>")


def test_fifty_worst_images():
    html = render_page(make_report(images=3000), [])
    assert "The 50 worst of 3,000 images" in html
    assert len(re.findall(r"BloodImage_\d+", html)) == 50


def test_the_template_is_installed_too():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["detector.evaluation"]
    template = Path(page.__file__).with_name("page.html")
    assert template.is_file()
    assert any(template.match(pattern) for pattern in patterns)
