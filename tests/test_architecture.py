"""The floors of the package: imports go down, never up or in a circle, and none hides within a function."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "detector"
# From the ground up. Below them all lie the single modules beside them: errors, text, files, ...
FLOORS = ("crop", "rcnn", "refinement", "data", "models", "pretrained", "evaluation", "training", "tools")
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


# Modules above their own floor that a function may import when it is called.
LAZY = {
    "detector.pretrained.detector": {
        "detector.evaluation.running",
        "detector.evaluation.scoring",
        "detector.tools.source",
    },
}


def imports(module: str, within: type[ast.AST] = ast.Module) -> dict[str, ast.stmt]:
    """The modules of the package that one imports, wherever in its text, with the statement that does."""
    found: dict[str, ast.stmt] = {}
    outer = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, within)]
    for node in (inner for one in outer for inner in ast.walk(one)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide what they name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module): node for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name: node for alias in node.names}
    return {name: node for name, node in found.items() if name.split(".")[0] == "detector"}


def floor(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return FLOORS.index(part) + 1 if part in FLOORS else 0


def test_every_folder_is_a_floor():
    folders = {path.parent.name for path in MODULES.values()} - {PACKAGE.name}
    assert folders == set(FLOORS)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"detector"}))  # the roof, which shows what lies below
def test_imports_go_down(module):
    for imported in imports(module).keys() - LAZY.get(module, set()):
        assert imported != "detector", f"{module} imports the roof"
        assert floor(imported) <= floor(module), f"{module} imports {imported}, which lies above it"


def test_no_imports_in_a_circle():
    # A package that is imported from stands for all that its __init__ imports.
    graph = {module: imports(module).keys() - LAZY.get(module, set()) for module in MODULES}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", sorted(module for module in MODULES if not module.startswith("detector.tools.")))
def test_no_import_hides_in_a_function(module):
    """Tools read their flags before they import torch, which takes seconds."""
    assert imports(module, within=ast.FunctionDef).keys() <= LAZY.get(module, set())


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("test_*.py")), ids=lambda path: path.stem)
def test_no_test_imports_another(path):
    modules = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if module.startswith("test_")]


def thirds(module: str) -> set[str]:
    """The packages of others that a module imports anywhere."""
    nodes = list(ast.walk(ast.parse(MODULES[module].read_text())))
    names = [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name for name in names if name.split(".")[0] not in {"detector", *sys.stdlib_module_names}}


def test_lightning_is_imported_on_the_last_two_floors_only():
    users = [m for m in MODULES if any(name.startswith(("lightning", "jsonargparse")) for name in thirds(m))]
    assert {m.split(".")[1] for m in users} == {"training", "tools"}


def test_the_crop_needs_torch_and_its_operators_alone():
    of_crop = set().union(*(thirds(m) for m in MODULES if m.startswith("detector.crop")))
    assert {name for name in of_crop if not name.startswith(("torch.", "torchvision.ops"))} == {"torch"}
