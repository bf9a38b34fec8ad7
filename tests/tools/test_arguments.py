"""What the command lines have in common: help, spelling, shared flags, mistakes, files of flags."""

import os
import subprocess
import sys
from collections import defaultdict

import pytest
from support.commands import refused
from support.tiny_training import REPOSITORY

from detector.tools import check, export, predict
from detector.tools import eval as evaluate
from detector.tools.arguments import underscored

TOOLS = {"check": check, "eval": evaluate, "export": export, "predict": predict}


def run_tool(name, *arguments, **environment):
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture
def without_torch(tmp_path):
    """A search path where torch and Lightning cannot be imported."""
    for name in ("torch", "lightning"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('imported')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}


@pytest.mark.parametrize("name", TOOLS)
def test_help_is_there_before_torch(name, without_torch):
    done = run_tool(name, "--help", **without_torch)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python tools/{name}.py " in done.stdout
    assert "exit code: 0 " in done.stdout
    for action in TOOLS[name].make_parser()._actions:
        assert all(option in done.stdout for option in action.option_strings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "browse"])
def test_help_of_a_training(name):
    done = run_tool(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "--data.root" in done.stdout


@pytest.mark.slow
def test_a_training_takes_hyphens_as_well():
    done = run_tool("train", "--config", str(REPOSITORY / "configs" / "bccd.yaml"), "--run-dir=a-b", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "\nrun_dir: a-b\n" in done.stdout


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("flag", ["--unknown-flag", "--workers=many", "--batch_size=0"])
def test_a_wrong_flag_is_one_line_before_torch(name, flag, without_torch):
    done = run_tool(name, "x.json", flag, **without_torch)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_shared_flags_have_one_help_text():
    """But for what a tool adds to it behind a semicolon or a comma, such as the default."""
    texts = defaultdict(set)
    for module in TOOLS.values():
        for action in module.make_parser()._actions:
            for option in action.option_strings:
                texts[option].add(action.help.replace(",", ";").split(";")[0])
    own = {"--annotations", "--images", "--config"}  # of the images' ids, of one file; of a training
    assert {option for option, said in texts.items() if len(said) > 1} <= own


def test_hyphens_in_the_names_of_flags_do_as_well():
    given = ["--batch-size", "3", "--skip-broken=true", "--min-score", "0.3", "--root=a-b", "--split", "x-y"]
    options = evaluate.make_parser().read(given)
    assert (options.batch_size, options.skip_broken, options.min_score) == (3, True, 0.3)
    assert (options.root, options.split) == ("a-b", "x-y")
    assert underscored(["--a-b=c-d", "-x-y", "--output=a-b"]) == ["--a_b=c-d", "-x-y", "--output=a-b"]
    assert underscored(["--a-b", "--", "--c-d"]) == ["--a_b", "--", "--c-d"]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--skip_broken=1", "--skip_broken must be true or false, got 1"),
        ("--min_score=2", r"--min_score must be from 0 to 1, got 2\.0"),
        ("--min_score=nan", "--min_score must be from 0 to 1, got nan"),
        ("--limit=0", "--limit must be at least 1, got 0"),
        ("--workers=-1", "--workers must be at least 0, got -1"),
        ("--crop=x", "--crop: invalid choice: 'x'"),
        ("--workers", "--workers: expected one argument"),
    ],
)
def test_what_a_flag_cannot_be(flag, words):
    with refused(words):
        evaluate.make_parser().read([flag])


def test_flags_from_a_file_and_to_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("root: data\nskip_broken: true\nmin_score: 0.25\nlimit: null\nworkers: 0\n")
    given = ["--workers=1", "--config", "a.yaml"]
    options = evaluate.make_parser().read(given)
    assert (options.root, options.skip_broken, options.min_score) == ("data", True, 0.25)
    assert (options.limit, options.workers) == (None, 1)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*given, "--print_config"])
    assert stop.value.code == 0
    (tmp_path / "b.yaml").write_text(capsys.readouterr().out)
    assert evaluate.make_parser().read(["--config=b.yaml"]) == options
    for content, words, code in (
        ("[1]", r"a\.yaml: must be a dict of flags", 1),
        ("a: [", r"a\.yaml: not valid YAML", 1),
        ("some: 1", "unrecognized arguments: --some=1", 2),
        ("workers: []", r"--workers: invalid integer value: '\[\]'", 2),
    ):
        (tmp_path / "a.yaml").write_text(content)
        with refused(words, code=code):
            evaluate.make_parser().read(given)


def test_flags_in_a_file_of_an_earlier_version(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("checkpoint: x\nflip: false\nsizes: null\nlimit: 3\n")
    assert evaluate.make_parser().read(["--config=a.yaml"]).limit == 3
    (tmp_path / "b.yaml").write_text("checkpoint: x\nsizes: [320]\n")
    with refused(r"b\.yaml: sizes \[320\]: this version has no test-time augmentation"):
        evaluate.make_parser().read(["--config=b.yaml"])


def test_a_training_without_arguments_shows_its_usage():
    for module in ("train", "browse"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; from detector.tools.{module} import main; sys.exit(main([]))"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        assert done.returncode == 2
        assert f"python tools/{module}.py --config" in done.stderr
        assert done.stderr.endswith("error: no arguments were given; --help lists them\n")
