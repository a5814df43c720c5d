"""Imports only go down: a line per layer, and no cycle. Public names have docstrings, new tensors a device."""

import ast
from pathlib import Path

import pytest

import torch_sap

PACKAGE = Path(torch_sap.__file__).parent

LAYERS = (  # from the bottom to the top: a module imports from its own layer and from those above it in this list
    ("arguments",),
    ("decide",),
    ("distributed",),
    ("masks",),
    ("records", "files", "inspect", "methods"),
    ("functional", "stopping", "progress"),
    ("iterate", "iterative", "scores"),
    ("public", "__init__"),
    ("integrations", "cli", "__main__"),
)
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def layer_of(name):
    found = [number for number, layer in enumerate(LAYERS) if name.partition(".")[0] in layer]
    assert len(found) == 1, f"{name} must belong to one layer"
    return found[0]


def imports_of(name):
    """The modules of torch_sap that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_sap":
            base = node.module.removeprefix("torch_sap").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else base if base in MODULES else f"{base}.__init__".removeprefix(".")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_only_go_down(name):
    assert not {imported for imported in imports_of(name) if layer_of(imported) > layer_of(name)}


def test_nothing_imports_an_integration_or_the_command_line():
    for name in MODULES:
        for imported in imports_of(name):
            folder = imported.partition(".")[0]
            assert folder not in ("integrations", "cli") or name.startswith((folder, "__main__")), (name, imported)


def test_there_is_no_cycle():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a cycle: {[*path[path.index(name) :], name]}"
        if name not in done:
            path.append(name)
            for imported in imports_of(name):
                visit(imported)
            done.add(path.pop())

    for name in MODULES:
        visit(name)


def test_public_names_are_documented_and_few():
    assert len(torch_sap.__all__) <= 25
    for name in torch_sap.__all__:
        assert getattr(torch_sap, name).__doc__, name


FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"tensor", "zeros"}


@pytest.mark.parametrize("name", MODULES)
def test_a_new_tensor_names_its_device(name):
    """Otherwise torch.set_default_device decides where it is."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{factory}" for factory in FACTORIES}:
            assert "device" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)
