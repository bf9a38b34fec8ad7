"""The command that checks a data set: its exit codes and flags."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.annotation_files import added, boxed, scattered, write, write_splits

from detector.tools.check import main

TOOL = Path(__file__).parents[2] / "tools" / "check.py"


@pytest.fixture
def tool(capsys):
    """The command in this process: its exit code, and what it printed."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_exit_codes(tmp_path, tool):
    path = write(tmp_path, added("categories", id=8, name="Hündin"))
    command = [sys.executable, TOOL, path, "--images", tmp_path / "images"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    fine = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert fine.stdout.splitlines()[-1] == "nothing wrong, 1 note in 2 images with 3 annotations of 3 categories"
    write(tmp_path, boxed(1, 2, 0, 3))
    code, printed, _ = tool(path)
    assert code == 1
    assert "1 warning: empty boxes\n" in printed
    assert "--images DIR" in printed
    path.write_text(path.read_text()[:-30])
    code, printed, error = tool(path, "--images", tmp_path / "images", "--quick")
    assert (code, error) == (2, "")
    assert printed.splitlines()[-1] == "1 error"


def test_anchors_come_from_a_training_configuration_and_from_flags(tmp_path, tool):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(scattered(lambda x, y, *_: (x, y, 30, 30))))
    config = tmp_path / "config.yaml"
    settings = "{name: timm/x, min_size: 480, max_size: 640, anchor_sizes: [9, 10, 11, 12, 13], score_threshold: 1e-3}"
    config.write_text(f"model: {{detector: {settings}}}")
    code, printed, _ = tool(path)
    assert code == 0
    assert "anchors" not in printed
    code, printed, _ = tool(path, "--config", config)
    assert code == 0
    assert "[9, 10, 11, 12, 13]" in printed
    (flag,) = re.findall(r'--model\.detector\.anchor_sizes "\[(.*)\]"', printed)
    assert "anchors" not in tool(path, "--config", config, "--anchor_sizes", f"[{flag}]")[1]
    assert "[7, 8, 9]" in tool(path, "--aspect_ratios", "[7,8,9]")[1]
    config.write_text("model: {}")
    assert "anchors" not in tool(path, "--config", config)[1]


def test_splits_are_compared(tmp_path, tool):
    val, images, train, train_images = write_splits(tmp_path)
    code, printed, _ = tool(val, "--images", images, "--other", train, "--other_images", train_images)
    assert code == 1
    assert printed.startswith("1 warning: images that the other split has, too\n")
    for arguments in (["--images", images], ["--images", images, "--other_images", train_images, "--quick"]):
        code, printed, _ = tool(val, "--other", train, *arguments)
        assert code == 0
        assert "--other_images" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *((["--config", f"{name}.yaml"], f"{name}.yaml") for name in ("none", "list", "broken", "binary")),
        (["--config", "wrong.yaml"], "anchor_sizes"),
        (["--min_size", "0"], "--min_size"),
        (["--aspect_ratios", "[nan, 1, 2]"], "--aspect_ratios"),
        (["--other_images", "images"], "--other_images"),
        (["--anchor_sizes", "1"], "--anchor_sizes"),
        (["--workers", "0"], "--workers"),
        (["--examples", "-1"], "--examples"),
    ],
)
def test_mistakes_in_the_command_line(tmp_path, monkeypatch, tool, arguments, named):
    monkeypatch.chdir(tmp_path)
    wrong = b"model: {detector: {anchor_sizes: [1]}}"
    for name, content in {"list": b"[1, 2]", "broken": b"a: [", "binary": b"\xff\x00", "wrong": wrong}.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    code, printed, error = tool(write(tmp_path), *arguments)
    assert (code, printed) == (2, "")
    assert named in error
