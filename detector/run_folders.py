"""Folders of runs: a new run gets a new number."""

import re
from pathlib import Path


def run_folder(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def unused_folder(folder: Path) -> Path:
    """Return ``folder`` if it holds no run, else ``folder-N``, with N one above the highest number in use."""
    return _numbered(folder, 1)


def newest_folder(folder: Path) -> Path:
    """Return the folder with the highest number among ``folder``, ``folder-2``, ... that holds a run."""
    return _numbered(folder, 0)


def _numbered(folder: Path, more: int) -> Path:
    folder = folder if folder.name not in ("", "..") else folder.resolve()  # "." has no name
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    named = [path for path in siblings if re.fullmatch(rf"{re.escape(folder.name)}(-\d{{1,6}})?", path.name)]
    used = [path.name for path in named if path.is_dir() and any(path.iterdir())]
    number = max((1 if name == folder.name else int(name.rpartition("-")[2]) for name in used), default=0) + more
    return folder if number <= 1 else folder.with_name(f"{folder.name}-{number}")
