"""Command lines made from typed functions, and what all tools have in common."""

import inspect
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from support.commands import refused
from support.tiny_training import REPOSITORY

from detector import tools
from detector.errors import ModelError, exit_on_user_error
from detector.tools.cli import flag_names, make_parser, run_tool, underscored
from detector.tools.training_cli import main as train
from detector.training.failures import Interrupted

TOOLS = {"check": tools.check, "eval": tools.evaluate, "export": tools.export, "predict": tools.predict}


def sample(
    files: Sequence[str],
    *,
    source: str | None = None,
    refine: Literal["on", "off"] | None = None,
    min_score: ClosedUnitInterval | Literal["auto"] = 0.5,
    limit: PositiveInt | None = None,
    workers: NonNegativeInt = 2,
    skip: bool = False,
    draw: bool = True,
    sizes: tuple[int, int] | None = None,
) -> dict:
    """Return the options.

    Examples:
        100 % as it is

    Args:
        files: Input files.
        source: Where from, in
            two lines.
        refine: One.
        min_score: Two.
        limit: Three.
        workers: Four, 100 %.
        skip: Five.
        draw: Six.
        sizes: Seven.

    Returns:
        Hidden.
    """
    if source == "bad":
        raise ModelError("wrong", setting="model.source", value=source, hints=["lower {workers}", "set {momentum}"])
    return dict(locals())


def called(*arguments):
    """The options that a command line gives the function."""
    results = []
    assert run_tool(sample, arguments, exit_code=lambda result: results.append(result) or 5) == 5
    return results[0]


def test_values_and_defaults():
    parameters = inspect.signature(sample).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters} | {"files": ["a", "b"]}
    assert called("a", "b") == defaults
    given = ["a", "b", "--min-score=auto", "--limit", "3", "--sizes=[1, 2]", "--refine=off", "--source", "x-y"]
    found = called(*given)
    assert found == defaults | {"min_score": "auto", "limit": 3, "sizes": [1, 2], "refine": "off", "source": "x-y"}
    assert type(found["limit"]) is int


@pytest.mark.parametrize(
    "flags", [["--skip", "--no-draw"], ["--skip=true", "--draw=false"], ["--skip", "true", "--draw", "false"]]
)
def test_switches(flags):
    options = called(*flags, "a")
    assert (options["files"], options["skip"], options["draw"]) == (["a"], True, False)


def test_hyphens_are_kept_in_values_and_files():
    assert underscored(["--a-b=c-d", "-x-y", "--output=a-b"]) == ["--a_b=c-d", "-x-y", "--output=a-b"]
    assert underscored(["--a-b", "--", "--c-d"]) == ["--a_b", "--", "--c-d"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--skip=1", "--skip: .* 1"),
        ("--min_score=2", "--min_score: .* 2"),
        ("--min_score=nan", "--min_score: .*nan"),
        ("--limit=0", "--limit: .* 0"),
        ("--limit=many", "--limit: .*many"),
        ("--workers=-1", "--workers: .*-1"),
        ("--refine=twice", "--refine: .*on or off.*twice"),
        ("--sizes=[1,x]", "--sizes: .*int.*x"),
        ("--sizes=[1]", "--sizes: .*2 elements"),
        ("--workers", "--workers"),
        ("--unknown-flag", "--unknown_flag"),
        ("--limi=3", "--limi=3"),
        ("--config c.yaml", "--config: .*c.yaml"),
        ("--source=bad --limit=x", "--limit"),
    ],
)
def test_wrong_flags_are_named_in_one_line(flags, words):
    with refused(words):
        called("a", *flags.split())


def test_an_empty_command_line_prints_the_description(capsys):
    with pytest.raises(SystemExit) as stop:
        called()
    assert stop.value.code == 2
    assert "100 % as it is" in capsys.readouterr().err


def test_errors_name_the_flags_of_the_tool():
    with refused(r"--source 'bad': wrong: lower --workers$", code=1):
        called("a", "--source=bad")
    flag_of = flag_names(make_parser(sample))
    assert (flag_of("refinement.limit"), flag_of("limit.other"), flag_of("momentum")) == ("--limit", None, None)
    error = ModelError("wrong", setting="limit", value=3, hints=["lower {workers}"])
    assert str(error) == "limit 3: wrong: lower workers"


def test_errors_of_the_system_name_the_file(tmp_path):
    (tmp_path / "file").touch()
    with refused(f"{tmp_path}/file: file exists$", code=1), exit_on_user_error():
        (tmp_path / "file").mkdir()


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        called("--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Return the options.\n\nExamples:\n    100 % as it is\n" in said
    assert "Hidden" not in said
    assert "files [files ...]" in said
    assert re.search(r"Four, 100 %. \(.*default:\s+2\)", said)


def test_flags_from_a_file_and_to_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = "source: 5\nskip: true\nmin_score: 0.25\nlimit: null\nworkers: 0\nrefine: off\nsizes: [3, 4]\n"
    (tmp_path / "a.yaml").write_text(content)
    given = ["a", "--config", "a.yaml", "--workers=1"]
    options = called(*given)
    expected = {"source": "5", "skip": True, "min_score": 0.25, "limit": None, "workers": 1, "sizes": [3, 4]}
    assert expected.items() <= options.items()
    assert options["refine"] == "off"  # which YAML reads as false
    with pytest.raises(SystemExit) as stop:
        called(*given, "--print_config")
    assert stop.value.code == 0
    (tmp_path / "b.yaml").write_text(capsys.readouterr().out)
    assert called("a", "--config=b.yaml") == options
    for content, words in ((b"[1]", ""), (b"a: [", "line 1"), (b"\xff", "utf-8"), (b"some: 1", "some")):
        (tmp_path / "a.yaml").write_bytes(content)
        with refused(words):
            called(*given)


def ended(error, capsys):
    """The exit code and the last words of a tool that raises an error."""
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise error
    return (stop.value.code, capsys.readouterr().err) if isinstance(stop.value.code, int) else (1, stop.value.code)


def test_an_interrupted_training_says_how_to_resume(monkeypatch, capsys):
    arguments = ["--config", "a b.yaml", "--ckpt-path", "a b", "--ckpt_path=x y"]
    monkeypatch.setattr(sys, "argv", ["tools/train.py", *arguments])
    assert ended(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    command = "interrupted; to resume: python tools/train.py --config 'a b.yaml' --ckpt_path last.ckpt\n"
    assert ended(Interrupted(Path("last.ckpt")), capsys) == (130, command)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert ended(Interrupted(Path("last.ckpt")), capsys)[1].endswith("the same command with --ckpt_path last.ckpt\n")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA error: out of memory"), RuntimeError("DataLoader worker (pid 7) is killed")],
    ids=str,
)
def test_out_of_memory_is_a_user_error(error, capsys):
    code, said = ended(error, capsys)
    assert code == 1
    assert re.match(r"error: .*out of memory.*lower batch_size", said)
    with pytest.raises(RuntimeError, match="a bug"), exit_on_user_error():
        raise RuntimeError("a bug")


def run(name, *arguments, **environment):
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture
def without_torch(tmp_path):
    """A search path where torch and Lightning cannot be imported."""
    for name in ("torch", "lightning"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('imported')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}


@pytest.mark.parametrize("name", [*TOOLS, "refine"])
def test_command_lines_are_read_before_torch(name, without_torch):
    done = run(name, "--help", **without_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python tools/{name}.py " in done.stdout
    assert "exit code" in done.stdout.lower()
    done = run(name, "x.json", "--unknown-flag", **without_torch)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("name", ["train", "browse"])
def test_a_training_refuses_before_torch(name, without_torch):
    done = run(name, **without_torch)
    assert done.returncode == 2
    assert f"python tools/{name}.py --config" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--data.rooot", "x", "did you mean --data.root"),
        ("--data.augmentation", "[RandomHorizontalFlop]", "--data.augmentation: .*RandomHorizontalFlop'$"),
        ("--model.refinement", "{iteration: 3}", "--model.refinement: .*iteration'$"),
        ("--model.refinement", "{box_gradient: {crap: 1}}", "--model.refinement.box_gradient: .*crap'$"),
        ("--model.optimizer", "{lrr: 3}", "--model: .*optimizer.lrr'$"),
        ("--model.refinement.iterations", "two", "--model.refinement.iterations: .*integer, got two$"),
        ("--model.refinement.iterations", "101", "refinement.iterations 101"),
        ("--model.refinement.box_gradient", "{crop: 2}", "box_gradient.crop"),
    ],
)
def test_wrong_settings_of_a_training_are_named(tmp_path, flag, value, words):
    with refused(words, code=1 if value in ("101", "{crop: 2}") else 2):
        train(
            [
                f"--data.root={tmp_path}",
                f"--run_dir={tmp_path / 'run'}",
                "--config",
                str(REPOSITORY / "configs" / "bccd.yaml"),
                flag,
                value,
            ]
        )


@pytest.mark.slow
def test_flags_of_a_training():
    done = run("train", "--config", str(REPOSITORY / "configs" / "bccd.yaml"), "--run-dir=a-b", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "\nrun_dir: a-b\n" in done.stdout
    done = run("train", "--config", str(REPOSITORY / "configs" / "bccd.yaml"), "--model.crop=x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --model.crop: ")
    done = run("train", "--config", "nothing.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_shared_flags_have_one_help_text():
    texts = defaultdict(set)
    for function in (tools.evaluate, tools.export, tools.predict, tools.refine):
        for action in make_parser(function)._actions:
            texts[action.dest].add(action.help)
    for name in ("checkpoint", "model", "weights", "crop", "root", "dataset", "orientation", "device"):
        assert len(texts[name]) == 1, name
