"""The documents: their examples and commands run, and the files that they name exist."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.tiny_detector import tiny_checkpoint
from support.tiny_training import TINY

from detector.data.digits import write_digits

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"": ["README"], "configs/": ["README"], "tools/": ["README"]}
FOLDERS[".github/"] = ["MEASUREMENTS", "CONTRIBUTING", "CHANGELOG"]
DOCUMENTS = {
    f"{folder}{name}.md": (REPOSITORY / folder / f"{name}.md").read_text()
    for folder, names in FOLDERS.items()
    for name in names
}
README = DOCUMENTS["README.md"]
CONTRIBUTING = DOCUMENTS[".github/CONTRIBUTING.md"]
EXAMPLES = [
    pytest.param(code, id=f"{name}-{re.search(r'from detector.* import (.*)', code)[1]}")
    for name, text in DOCUMENTS.items()
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
]
TOOLS = sorted({*re.findall(r"python tools/(\w+)\.py", "".join(DOCUMENTS.values()))})
# Of other programs than ours: pip, torchrun, ruff, and scripts beside the documents.
OTHERS = {
    "--no-deps",
    "--wheel-dir",
    "--nproc-per-node",
    "--help",
    "--size",
    "--batch",
    "--val_images",
    "--time",
    "--table",
}
OF_OUR_TESTS = ("--config", "--data.generate", "--model.refinement", "--model.box_gradient")
# The README's commands run in a second each with these.
ON_CPU = ["--workers=0", "--device=cpu"]
SMALL = {
    "train": [
        *(flag for flag in TINY if not flag.startswith(OF_OUR_TESTS)),
        *("--model.detector.weights=null", "--model.optimizer.milestones=[]", "--trainer.precision=32-true"),
        "--trainer.max_steps=1",
    ],
    "eval": ON_CPU,
    "predict": ON_CPU,
}


def commands(text: str) -> list[str]:
    """The lines of the shell examples, each as one."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return "".join(blocks).replace("\\\n", "").splitlines()


def run_tool(name: str, arguments: list[str], patch: pytest.MonkeyPatch) -> int:
    """The exit code of ``python tools/NAME.py``, in this process, which has torch already."""
    path = REPOSITORY / "tools" / f"{name}.py"
    patch.syspath_prepend(path.parent)
    patch.setattr(sys, "argv", [str(path), *arguments])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


@cache
def flags(name: str) -> set[str]:
    """Return the flags in the help of a tool."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as text:
        assert run_tool(name, ["--help"], patch) == 0
    found = set(re.findall(r"--[a-z][\w.]*\w", text.getvalue()))
    return found | {flag.replace("--", "--no_") for flag in re.findall(r"(--\w+) {true,false}", text.getvalue())}


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path, monkeypatch, capsys):
    # Without a network, and small.
    code = code.replace('weights="DEFAULT"', "weights=None, weights_backbone=None, min_size=320, max_size=320")
    if "FOLDER" in code:
        pytest.importorskip("sklearn")
        write_digits(tmp_path / "FOLDER", splits={"train": 3, "val": 2})
        code = code.replace("workers=2", "min_size=96, max_size=96, workers=0")
        code = code.replace("max_epochs=12", 'max_steps=1, accelerator="cpu"')
    elif run := re.search(r"runs/\w+", code):
        path = tmp_path / run[0] / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(tiny_checkpoint(), path)
        Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    if "watch_box_gradient" in code:
        ratios = re.findall(r"'ratio': ([\d.]+)", capsys.readouterr().out)
        assert [float(ratio) > 0 for ratio in ratios] == [True, True]


def test_the_readmes_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("timm")
    write_digits(tmp_path / "FOLDER", splits={"train": 4, "val": 2})
    for path in (tmp_path / "photos" / "a.jpg", tmp_path / "more" / "b.jpg"):
        path.parent.mkdir()
        Image.new("RGB", (80, 60), "red").save(path)
    monkeypatch.chdir(tmp_path)
    done = []
    for line in commands(README):
        if line.startswith("pip install"):  # the two that take minutes: the quickstart, and these tests
            continue
        python, path, *arguments = shlex.split(line)
        assert python == "python"
        name = Path(path).stem
        if name == "export":
            pytest.importorskip("onnxruntime")
        arguments = [re.sub("^configs/", f"{REPOSITORY}/configs/", argument) for argument in arguments]
        assert run_tool(name, [*arguments, *SMALL.get(name, [])], monkeypatch) == 0, line
        done.append(name)
    assert done == ["check", "train", "eval", "predict", "export"]
    assert (tmp_path / "runs" / "mine" / "eval-val" / "report.html").is_file()
    assert len(list((tmp_path / "found" / "pictures").iterdir())) == 2
    assert (tmp_path / "detector.onnx").is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_are_those_of_a_tool(document):
    text = DOCUMENTS[document].replace("\\\n", "")
    for name, arguments in re.findall(r"python tools/(\w+)\.py([^`\n&]*)", text):
        assert set(re.findall(r"--[a-z][\w.]*\w", arguments)) <= flags(name), name
    if not document.endswith("CHANGELOG.md"):  # which names those that are gone
        known = {flag.replace("-", "_") for flag in set().union(*map(flags, TOOLS), OTHERS)}
        assert {flag.replace("-", "_") for flag in re.findall(r"--[a-z][\w.-]*\w", text)} <= known


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name):
    text, folder = DOCUMENTS[name], (REPOSITORY / name).parent
    for target in re.findall(r"\]\(([^):]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = folder / path if path else REPOSITORY / name
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for path in re.findall(r"(?<![\w/-])((?:configs|tools|tests|\.github|\.ci)/[\w./-]*\w)", text):
        assert (REPOSITORY / path).exists(), path


def test_the_readme_is_a_page():
    assert len(README.splitlines()) < 150


def test_the_map_names_every_module_and_no_other():
    written = CONTRIBUTING.split("## The map")[1].split("\n## ")[0]
    floors = re.findall(r"^- `(\w+)`:(.*?)(?=^- `|\n\n)", written, flags=re.MULTILINE | re.DOTALL)
    named = {f"{floor}/{name}" for floor, text in floors for name in re.findall(r"`(\w+)`", text)}
    named |= set(re.findall(r"`(\w+)`", written.rpartition("\n\nModules for all layers")[2]))
    package = REPOSITORY / "detector"
    modules = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    assert named == {module for module in modules if not module.endswith("__init__")}


def test_speed_tables_and_the_plot_are_the_benchmark_tools_own(tmp_path):
    assets = REPOSITORY / ".github" / "assets"
    (tmp_path / "benchmark.json").write_text((assets / "benchmark.json").read_text())
    subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "benchmark.py", "--render", tmp_path / "benchmark.json"], check=True
    )
    report = (tmp_path / "benchmark.md").read_text()
    assert report == (assets / "benchmark.md").read_text()
    measured = DOCUMENTS[".github/MEASUREMENTS.md"].split("## Speed of the crop")[1]
    for speed in (README.split("## Speed")[1].split("\n## ")[0], measured.split("\n## ")[0]):
        rows = [line for line in speed.splitlines() if line.startswith("|") and "---" not in line]
        assert len(rows) >= 5
        assert not [row for row in rows if row not in report]


def test_console_scripts_can_be_called():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        tool = (REPOSITORY / "tools" / f"{name.removeprefix('affine-crop-')}.py").read_text()
        assert f"from {module} import {function}\n" in tool
        assert callable(getattr(importlib.import_module(module), function))


def test_the_oldest_dependencies_are_those_of_pyproject():
    command = [sys.executable, REPOSITORY / ".github" / "oldest.py"]
    oldest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert len(oldest) == len(set(oldest)) == len(re.findall(r'"[\w\[\],-]+>=[\d.]+"', text)) - 1  # but setuptools
    (version,) = re.findall(r'"torch>=([.0-9]+)"', text)
    assert f"torch=={version}" in oldest
