import ast
from pathlib import Path

import pytest

import torch_sap

PACKAGE = Path(torch_sap.__file__).parent

# From the bottom to the top: a module imports from those before it only.
ORDER = [
    "selection.__init__",
    "selection.bounds",
    "selection.host",
    "selection.keys",
    "selection.histogram",
    "selection.collective",
    "selection.sums",
    "selection.device",
    "selection.exact",
    "selection.sieve",
    "selection.across",
    "selection.groups",
    "selection.measures",
    "selection.step",
    "selection.streaming",
    "selection.agreement",
    "masks.__init__",
    "masks.interrupts",
    "masks.fsdp",
    "masks.parameters",
    "masks.zeros",
    "masks.stamps",
    "masks.gradients",
    "masks.optimizers",
    "masks.linking",
    "masks.standardised",
    "masks.masking",
    "masks.holding",
    "masks.guarding",
    "masks.reparametrised",
    "masks.receiving",
    "masks.verification",
    "records",
    "methods",
    "functional",
    "iteration.__init__",
    "iteration.randomness",
    "iteration.checkpoint",
    "iteration.rewinding",
    "iteration.plots",
    "iteration.rounds",
    "iteration.phases",
    "iteration.history",
    "iteration.metrics",
    "iteration.stopping",
    "iteration.stepper",
    "iteration.resuming",
    "iteration.baselines",
    "iterative",
    "shipping.__init__",
    "shipping.bitmask",
    "shipping.held",
    "shipping.tensor_files",
    "shipping.sparse_saving",
    "shipping.sparse_loading",
    "shipping.macs",
    "shipping.summaries",
    "shipping.channels",
    "shipping.shrinking",
    "__init__",
    "integrations.__init__",
    "integrations.lightning",
    "integrations.tensorboard",
    "cli.__init__",
    "cli.checkpoint_files",
    "cli.page_cache",
    "cli.checkpoint_reading",
    "cli.checkpoint_zip",
    "cli.checkpoint_writing",
    "cli.checkpoint_pruning",
    "cli.scanning",
    "cli.report",
    "cli.commands",
    "cli.main",
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
