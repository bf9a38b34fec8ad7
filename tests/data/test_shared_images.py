"""Files that two splits share, by content."""

import os

import pytest

from detector.data import shared_images
from detector.data.shared_images import equal_files


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def test_equal_files_are_found_whatever_they_are_called(tmp_path):
    middle = bytes(range(250)) * 40
    a = write(tmp_path / "a", same=b"1" + middle, end=b"1" + middle + b"2", size=b"123", empty=b"", twice=b"xy")
    b = write(
        tmp_path / "b", other=b"1" + middle, end=b"2" + middle + b"2", size=b"124", none=b"", twice=b"xy", again=b"xy"
    )
    expected = {a[0]: b[0], a[3]: b[3], a[4]: b[4]}
    # By comparing each with each.
    assert list(expected) == [one for one in a if any(one.read_bytes() == other.read_bytes() for other in b)]
    assert equal_files(a, b) == expected
    assert equal_files(iter(a + a), iter(b)) == expected
    assert equal_files([], b) == equal_files(a, []) == {}
    assert equal_files(a[:1], a) == {a[0]: a[0]}  # two splits of one folder


def test_what_is_no_file_is_passed_over(tmp_path):
    (path,) = write(tmp_path / "a", x=b"x")
    os.mkfifo(tmp_path / "pipe")
    odd = [
        tmp_path,
        tmp_path / "gone",
        tmp_path / "nul\0",
        tmp_path / "\ud800",
        tmp_path / "pipe",
        tmp_path / ("l" * 999),
    ]
    assert equal_files([*odd, path], [*odd, path]) == {path: path}


@pytest.mark.parametrize("step", ["_middle", "_digest"])
def test_only_what_may_be_equal_is_read(tmp_path, monkeypatch, step):
    read = []
    original = getattr(shared_images, step)
    monkeypatch.setattr(shared_images, step, lambda path: read.append(path) or original(path))
    head = bytes(9000)
    a = write(tmp_path / "a", short=b"1", bitmap=head + b"1" + head, same=b"2345")
    b = write(tmp_path / "b", long=b"12", bitmap=head + b"2" + head, same=b"2345")
    assert equal_files(a, b) == {a[2]: b[2]}
    assert read == ([a[1], a[2], b[1], b[2]] if step == "_middle" else [a[2], b[2]])
