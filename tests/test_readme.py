"""The README's examples run, the files that it names exist, and nothing was left to be filled in."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "code", EXAMPLES, ids=lambda code: re.search(r"import (\w+)", code.split("detector ")[1]).group(1)
)
def test_example_runs(code):
    # Without a network, and small.
    code = code.replace('weights="DEFAULT"', "weights=None, weights_backbone=None, min_size=96, max_size=96")
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


def test_nothing_is_left_to_be_filled_in():
    for path in (REPOSITORY / "README.md", *(REPOSITORY / "configs").glob("*.yaml")):
        holes = set(re.findall(r"\b[A-Z]{2,}_[A-Z]+\b", path.read_text())) - {"DETECTOR_DATA", "BCCD_Dataset"}
        assert not holes, (path, holes)


def test_named_files_exist():
    for path in re.findall(r"(?:configs|tools|\.github/assets)/[\w.]+\.(?:yaml|py|png)", README):
        assert (REPOSITORY / path).is_file(), path
