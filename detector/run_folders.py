"""Where the results of a run go: a folder of its own, beside those of earlier runs."""

import re
from pathlib import Path


def run_folder(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def unused_folder(folder: Path) -> Path:
    """Return ``folder`` if no run is there, else ``folder-N`` with the number after the highest one that was used."""
    return _numbered(folder, _last_number(folder) + 1)


def newest_folder(folder: Path) -> Path:
    """Return the last run of that name: the highest of ``folder``, ``folder-2``, ... that holds something."""
    return _numbered(folder, _last_number(folder))


def _last_number(folder: Path) -> int:
    """Return the highest number of the runs of that name that hold something; 0 if there is none."""
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    named = [path for path in siblings if re.fullmatch(rf"{re.escape(folder.name)}(-\d{{1,6}})?", path.name)]
    used = [path.name for path in named if path.is_dir() and any(path.iterdir())]
    return max((1 if name == folder.name else int(name.rpartition("-")[2]) for name in used), default=0)


def _numbered(folder: Path, number: int) -> Path:
    return folder if number <= 1 else folder.with_name(f"{folder.name}-{number}")
