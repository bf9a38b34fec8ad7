"""The oldest dependencies that pyproject.toml allows, as constraints for pip.

python .github/oldest.py > oldest.txt
pip install -e ".[test]" -c oldest.txt
"""

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
    if requirement.startswith(f"{project['name']}["):  # its own extras, which stand in the list themselves
        continue
    name, version = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement).groups()
    print(f"{name}=={version}")
