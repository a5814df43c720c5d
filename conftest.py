"""Names that the examples in docstrings use."""

import pytest
import torch
from torch import nn

import torch_sap


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=nn, **{name: getattr(torch_sap, name) for name in torch_sap.__all__})
