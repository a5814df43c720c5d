"""No test is skipped but for a missing package or GPU, or a PyTorch that is too old."""

import ast
from pathlib import Path

import pytest


def reasons(tree):
    """The texts of pytest.skip and of skipif; importorskip and others name a module themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "pytest.skip",
            "pytest.mark.skipif",
            "pytest.mark.skip",
        ):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            reason = given.get("reason", node.args[0] if node.args else None)
            yield reason.value if isinstance(reason, ast.Constant) else None


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_a_skip_says_which_package_or_device_it_needs(path):
    for reason in reasons(ast.parse(path.read_text(encoding="utf-8"))):
        needs = (reason or "").removeprefix("needs ")
        assert needs != reason
        assert needs.startswith(("a GPU", "the package ", "PyTorch 2.", "Linux")), reason


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_what_is_imported_or_skipped_is_an_optional_package(path):
    """An error in torch_sap's own import is no reason to skip."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            assert not ast.literal_eval(node.args[0]).startswith("torch_sap")
