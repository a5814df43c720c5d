"""Names that the examples in docstrings use, and a folder for the files that they write."""

import pytest
import torch
from torch import nn

import torch_sap


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=nn, **{name: getattr(torch_sap, name) for name in torch_sap.__all__})


@pytest.fixture(autouse=True)
def _folder_of_examples(request):
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
