"""Where the results of a run go: a folder of its own, beside those of earlier runs."""

import re
from pathlib import Path


def run_folder(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def unused_folder(folder: Path) -> Path:
    """``folder`` if no run is there, else ``folder-N`` with the number after the highest one that was used."""
    numbers = _used_numbers(folder)
    return _numbered(folder, max(numbers) + 1) if numbers else folder


def newest_folder(folder: Path) -> Path:
    """The last run of that name: the highest of ``folder``, ``folder-2``, ... that holds something."""
    numbers = _used_numbers(folder)
    return _numbered(folder, max(numbers)) if numbers else folder


def _used_numbers(folder: Path) -> list[int]:
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    named = [path for path in siblings if re.fullmatch(rf"{re.escape(folder.name)}(-\d{{1,6}})?", path.name)]
    numbers = [1 if path.name == folder.name else int(path.name.rpartition("-")[2]) for path in named]
    return [number for number, path in zip(numbers, named) if path.is_dir() and any(path.iterdir())]


def _numbered(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
