"""The page of promises names tests that exist, and the library does none of what SECURITY.md rules out."""

import ast
import re
from pathlib import Path

import pytest

import torch_sap

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text(encoding="utf-8")
PROMISES = re.split(r"^- ", PAGE, flags=re.MULTILINE)[1:]
FORBIDDEN_MODULES = {"marshal", "shelve", "subprocess", "socket", "urllib", "http", "requests", "ctypes"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise[:60])
def test_every_promise_names_tests_that_exist(promise):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", promise)
    assert named, "a promise without a test"
    for file, name in named:
        (path,) = TESTS.rglob(file)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)), (file, name)


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def runs_code(node):
    """Whether a piece of the library could run what a file or a text holds."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
        return node.attr != "UnpicklingError"  # which torch.load(weights_only=True) raises
    if isinstance(node, ast.ImportFrom) and node.module == "pickle":
        return True
    if not isinstance(node, ast.Call):
        return False
    called, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
    return called in FORBIDDEN_CALLS or (called == "torch.load" and options.get("weights_only") != "True")


@pytest.mark.parametrize("path", sorted(Path(torch_sap.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_pickle_no_network_no_process_no_code_from_text(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not {name.partition(".")[0] for name in imported(node)} & FORBIDDEN_MODULES
        assert not runs_code(node), ast.unparse(node)


@pytest.mark.parametrize(
    "code", ["pickle.load(file)", "torch.load(file)", "torch.load(file, weights_only=False)", "eval(x)"]
)
def test_what_would_be_found(code):
    assert runs_code(ast.parse(code, mode="eval").body) or runs_code(ast.parse(code, mode="eval").body.func)
