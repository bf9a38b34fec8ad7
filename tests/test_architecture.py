"""The layers of the package: imports go down, never up or in a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import detector

PACKAGE = Path(__file__).parents[1] / "detector"
# From the ground up. Below them lie the single modules beside them: errors, text, files, ...
LAYERS = ("crop", "rcnn", "refinement", "data", "models", "pretrained", "evaluation", "training", "tools")
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
# Modules that functions of others may import when they are called. Functions of the tools may import any.
LAZY = {
    "detector.crop.triton_sampler": {"detector.crop.triton_kernels"},
    "detector.pretrained.detector": {
        "detector.evaluation.running",
        "detector.evaluation.scoring",
    },
}


def imports(module: str, within: type[ast.AST] = ast.Module) -> set[str]:
    """The modules that one imports anywhere within nodes of a kind."""
    found = set()
    outer = [node for node in ast.walk(TREES[module]) if isinstance(node, within)]
    for node in (inner for one in outer for inner in ast.walk(one)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide what they name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of this package that one imports, except the lazy ones."""
    return {name for name in imports(module) if name.split(".")[0] == "detector"} - LAZY.get(module, set())


def run(code: str) -> str:
    """Return the output of a fresh process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def layer(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return LAYERS.index(part) + 1 if part in LAYERS else 0


def test_imports_go_down():
    assert {path.parent.name for path in MODULES.values()} - {PACKAGE.name} == set(LAYERS)
    for module in set(MODULES) - {"detector"}:  # the package itself, which imports from all layers
        for imported in own_imports(module):
            assert imported != "detector", f"{module} imports the package itself"
            assert layer(imported) <= layer(module), f"{module} imports {imported}, which lies above it"


def test_no_imports_in_a_circle():
    # A package that is imported from stands for all that its __init__ imports.
    TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


def test_no_import_hides_in_a_function():
    for module in MODULES:
        if not module.startswith("detector.tools"):  # these read their flags before they import torch
            hidden = {name for name in imports(module, within=ast.FunctionDef) if name.startswith("detector")}
            assert hidden <= LAZY.get(module, set()), module


def test_no_test_imports_another():
    for path in Path(__file__).parent.rglob("test_*.py"):
        modules = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [module for module in modules if module.startswith("test_")], path


def test_packages_of_others():
    for module in MODULES:
        others = {name.split(".")[0] for name in imports(module)} - {"detector", *sys.stdlib_module_names}
        if layer(module) < LAYERS.index("training"):
            assert not others & {"lightning", "jsonargparse"}, module
        if layer(module) == LAYERS.index("crop") + 1:
            # Triton is only on some machines, so only the module that needs it may import it.
            optional = {"triton"} if module == "detector.crop.triton_kernels" else set()
            assert others <= {"torch", "torchvision"} | optional, module


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("detector.tools.training_cli, detector.tools.browse", ["torch", "lightning"]),
        (
            "detector.crop, detector.rcnn, detector.refinement",
            ["lightning", "jsonargparse", "pycocotools", "timm", "detector.crop.triton_kernels"],
        ),
        ("detector.tools.source, detector.evaluation, detector.pretrained.onnx_export", ["lightning"]),
    ],
)
def test_what_is_imported_at_runtime(imported, heavy):
    assert run(f"import sys, {imported}; print([name for name in {heavy} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("first", ["detector", "detector.tools.evaluate", "detector.tools.training_cli"])
def test_tools_are_functions_whichever_module_is_imported_first(first):
    names = "check, evaluate, export, predict, refine, train"
    code = f"import {first}; from detector.tools import {names}; from detector.training.run import train as same"
    assert run(f"{code}; print(train is same, {{type(tool).__name__ for tool in ({names})}})") == "True {'function'}"


@pytest.mark.parametrize("name", detector.__all__)
def test_public_names_are_documented(name):
    assert getattr(detector, name).__doc__
