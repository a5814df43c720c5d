"""No test is skipped but for a missing package or GPU."""

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


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_a_skip_says_which_package_or_device_it_needs(path):
    for reason in reasons(ast.parse(path.read_text(encoding="utf-8"))):
        needs = (reason or "").removeprefix("needs ")
        assert needs != reason
        assert needs.startswith(
            ("a GPU", "gloo", "lightning", "the package", "the version of timm", "a timm", "torch.distributed.fsdp")
        ), reason
