"""Files are written whole or not at all: after errors, on a full disk, and when the process is killed."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.disk import BREAK, fail

from detector import files
from detector.files import link_atomically, write_atomically, write_json

# The module alone: what else the package imports takes seconds, and is not what is killed here.
ALONE = f"""
import importlib.util, os, resource, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path, content = Path(sys.argv[1]), sys.argv[2].encode()
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def run_alone(code, *arguments):
    return subprocess.run([sys.executable, "-c", ALONE + code, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    return path


def assert_only(path, content):
    assert path.read_bytes() == content
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"new", bytes(range(256)) * 1000])
def test_a_file_is_written_and_replaced(tmp_path, content):
    path = tmp_path / "last.ckpt"
    write_atomically(path, content)
    assert_only(path, content)
    write_atomically(path, b"newer")
    assert_only(path, b"newer")


def test_json(tmp_path):
    write_json(tmp_path / "scores.json", {"AP": 0.5, "name": "é"}, indent=1)
    assert (tmp_path / "scores.json").read_bytes() == b'{\n "AP": 0.5,\n "name": "\\u00e9"\n}'
    with pytest.raises(TypeError):
        write_json(tmp_path / "scores.json", {"AP": object()})
    assert b"0.5" in (tmp_path / "scores.json").read_bytes()


@pytest.mark.parametrize("call", BREAK)
def test_a_failure_leaves_the_old_file_and_no_other(old, monkeypatch, call):
    new = old.with_name("new.ckpt")
    with monkeypatch.context() as patch:
        BREAK[call](patch)
        for path in (old, new):
            with pytest.raises(OSError, match=rf"No space left on device.*{path.name}"):
                write_atomically(path, b"a new one")
    assert_only(old, b"old")
    write_atomically(old, b"a new one")
    assert_only(old, b"a new one")
    with pytest.raises(FileNotFoundError):
        write_atomically(old.parent / "nowhere" / "last.ckpt", b"new")


@pytest.mark.skipif(os.name != "posix", reason="no folder can be synced")
def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(old, monkeypatch):
    """A power cut cannot be tried; the order of the calls decides what it leaves."""
    calls = []
    replace, fsync = os.replace, os.fsync

    def recording_fsync(file):
        status = os.fstat(file)
        kind = "folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes"
        calls.append(f"sync {kind}")
        fsync(file)

    def recording_replace(source, path):
        calls.append("replace")
        replace(source, path)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_atomically(old, b"new content")
    assert calls == ["sync 11 bytes", "replace", "sync folder"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("moment", "content"),
    [
        (f"os.fsync = lambda file: {KILL}", b"old"),
        (f"os.replace = lambda source, path: {KILL}", b"old"),
        (f"move = os.replace; os.replace = lambda *paths: (move(*paths), {KILL})", b"a new one"),
    ],
    ids=["before the content is on the disk", "before the move", "after the move"],
)
def test_a_killed_process_leaves_the_old_or_the_new_file(old, moment, content):
    done = run_alone(f"{moment}\nfiles.write_atomically(path, content)", old, "a new one")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert old.read_bytes() == content
    write_atomically(old, b"shorter")  # whatever else it left
    assert_only(old, b"shorter")


def test_a_left_over_unfinished_file_does_not_hinder(old, monkeypatch):
    with monkeypatch.context() as patch:  # as a killed process leaves it: nothing is tidied up
        patch.setattr(os, "replace", fail)
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(OSError, match="No space"):
            write_atomically(old, b"much longer than what follows")
    assert len(list(old.parent.iterdir())) == 2
    write_atomically(old, b"new")
    assert_only(old, b"new")


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up(old):
    done = run_alone(
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "files.write_atomically(path, content * 5_000)\n"  # fits to the byte
        "try:\n"
        "    files.write_atomically(path, content * 5_001)\n"
        "except OSError as error:\n"
        "    print(type(error).__name__, error.errno)",
        old,
        "full",
    )
    assert done.stdout.split() == ["OSError", str(errno.EFBIG)], done.stderr
    assert_only(old, b"full" * 5_000)


@pytest.fixture
def best(tmp_path):
    path = tmp_path / "best.ckpt"
    write_atomically(path, b"best")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_a_second_name_until_one_is_written(best, there):
    last = best.with_name("last.ckpt")
    if there:
        write_atomically(last, b"old")
    link_atomically(best, last)
    assert contents(best.parent) == {"best.ckpt": b"best", "last.ckpt": b"best"}
    assert last.samefile(best)
    write_atomically(last, b"later")
    assert contents(best.parent) == {"best.ckpt": b"best", "last.ckpt": b"later"}
    link_atomically(best, last)
    write_atomically(best, b"better")
    assert contents(best.parent) == {"best.ckpt": b"better", "last.ckpt": b"best"}


@pytest.mark.parametrize("error", [PermissionError(errno.EPERM, "no links here"), OSError(errno.EMLINK, "too many")])
def test_a_copy_where_there_are_no_links(best, monkeypatch, error):
    def no_links(source, path):
        raise error

    monkeypatch.setattr(os, "link", no_links)
    last = best.with_name("last.ckpt")
    for content in (b"best", b"better"):
        write_atomically(best, content)
        link_atomically(best, last)
        assert contents(best.parent) == {"best.ckpt": content, "last.ckpt": content}
        assert not last.samefile(best)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_process_killed_while_it_links_leaves_the_old_file(best):
    last = best.with_name("last.ckpt")
    write_atomically(last, b"old")
    with pytest.raises(FileNotFoundError):
        link_atomically(best.with_name("none.ckpt"), last)
    done = run_alone(f"os.replace = lambda *paths: {KILL}\nfiles.link_atomically(path, Path(sys.argv[2]))", best, last)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (best.read_bytes(), last.read_bytes()) == (b"best", b"old")
    write_atomically(last, b"later")  # the unfinished link is a second name of best.ckpt
    assert contents(best.parent) == {"best.ckpt": b"best", "last.ckpt": b"later"}
    for _ in range(2):
        link_atomically(best, last)
        assert contents(best.parent) == {"best.ckpt": b"best", "last.ckpt": b"best"}


@pytest.mark.parametrize("links", [True, False])
def test_a_failed_link_leaves_the_old_file_and_no_other(best, monkeypatch, links):
    last = best.with_name("last.ckpt")
    write_atomically(last, b"old")
    monkeypatch.setattr(os, "replace", fail)
    if not links:
        monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="No space"):
        link_atomically(best, last)
    assert contents(best.parent) == {"best.ckpt": b"best", "last.ckpt": b"old"}
