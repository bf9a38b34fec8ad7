"""The README's examples run, the files that it names exist, and nothing was left to be filled in."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_detector import tiny_checkpoint

from detector.digits import write_digits

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.search(r"from detector\S* import (\w+)", code).group(1))
def test_example_runs(code, tmp_path, monkeypatch, capsys):
    # Without a network, and small.
    code = code.replace('weights="DEFAULT"', "weights=None, weights_backbone=None, min_size=320, max_size=320")
    if "FOLDER" in code:
        pytest.importorskip("sklearn")
        write_digits(tmp_path / "FOLDER", splits={"train": 3, "val": 2})
        code = code.replace("workers=2", "min_size=96, max_size=96, workers=0")
        code = code.replace("max_epochs=12", 'max_steps=1, accelerator="cpu"')
    if "runs/bccd" in code:
        path = tmp_path / "runs" / "bccd" / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(tiny_checkpoint(), path)
        Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    if "swap_crop_head" in code:
        ratios = re.findall(r"'ratio': ([\d.]+)", capsys.readouterr().out)
        assert len(ratios) == 2
        assert all(float(ratio) > 0 for ratio in ratios)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


def test_nothing_is_left_to_be_filled_in():
    for path in (REPOSITORY / "README.md", *(REPOSITORY / "configs").glob("*.yaml")):
        holes = set(re.findall(r"\b[A-Z]{2,}_[A-Z]+\b", path.read_text())) - {"DETECTOR_DATA", "BCCD_Dataset"}
        assert not holes, (path, holes)


def test_named_files_exist():
    for path in re.findall(r"(?:configs|tools|\.github/assets)/[\w.]+\.(?:yaml|py|png|jpg)", README):
        assert (REPOSITORY / path).is_file(), path


def test_the_speed_table_and_the_plot_are_the_benchmark_tools_own(tmp_path):
    assets = REPOSITORY / ".github" / "assets"
    (tmp_path / "benchmark.json").write_text((assets / "benchmark.json").read_text())
    subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "benchmark.py", "--render", tmp_path / "benchmark.json"], check=True
    )
    report = (tmp_path / "benchmark.md").read_text()
    assert report == (assets / "benchmark.md").read_text()
    speed = README.split("## Speed")[1].split("\n## ")[0]
    rows = [line for line in speed.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) > 10
    for row in rows:
        assert row in report, row
    assert "`python tools/benchmark.py`" in speed
    assert report.startswith("`python tools/benchmark.py`\n")
