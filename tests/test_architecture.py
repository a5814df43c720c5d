import ast
from pathlib import Path

import pytest

import torch_sap

PACKAGE = Path(torch_sap.__file__).parent

# From the bottom to the top: a module imports from those before it only.
ORDER = [
    "bounds",
    "randomness",
    "interrupts",
    "host",
    "keys",
    "histogram",
    "collective",
    "sums",
    "selection",
    "sieve",
    "across",
    "groups",
    "measures",
    "step",
    "streaming",
    "agreement",
    "fsdp",
    "parameters",
    "zeros",
    "stamps",
    "gradients",
    "optimizers",
    "linking",
    "standardised",
    "masking",
    "guarding",
    "reparametrised",
    "records",
    "methods",
    "functional",
    "checkpoint",
    "receiving",
    "verify",
    "rewinding",
    "plots",
    "rounds",
    "phases",
    "history",
    "metrics",
    "stopping",
    "stepper",
    "resuming",
    "iterative",
    "baselines",
    "bitmask",
    "held",
    "tensor_files",
    "sparse_saving",
    "sparse_loading",
    "macs",
    "summary",
    "channels",
    "shrinking",
    "checkpoint_files",
    "checkpoint_reading",
    "checkpoint_zip",
    "checkpoint_pruning",
    "scanning",
    "report",
    "__init__",
    "integrations.__init__",
    "integrations.lightning",
    "integrations.tensorboard",
    "commands",
    "cli",
    "__main__",
]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_sap"):
            yield node.module.removeprefix("torch_sap.")


def test_every_module_has_a_place():
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert sorted(ORDER) == sorted(".".join(path.parts) for path in paths)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_downwards(name):
    below = ORDER[: ORDER.index(name)]
    assert set(imports_of(PACKAGE / f"{name.replace('.', '/')}.py")) <= set(below)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= 300


def test_public_names_are_documented():
    for name in torch_sap.__all__:
        assert getattr(torch_sap, name).__doc__, name
