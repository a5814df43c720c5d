"""Pruning that decides how much: the PQ Index and Sparsity-informed Adaptive Pruning for PyTorch.

Source: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023 (arXiv 2302.05601).
"""

from torch_sap.decide.bounds import prune_count, retention_bound
from torch_sap.decide.measures import gini_index, pq_index
from torch_sap.files.sparse import load_sparse, save_sparse
from torch_sap.functional import global_unstructured, layer_unstructured, neuron_unstructured, remove
from torch_sap.inspect.summary import LayerSummary, Summary, summary
from torch_sap.inspect.verify import Verification, VerifiedWeight, verify
from torch_sap.integrations.torch_pruning import Shrunk, shrink
from torch_sap.iterate.baselines import LotteryTicket, OneShot
from torch_sap.iterative import SAP, iterative_sap, sap_rounds
from torch_sap.masks.parameters import prunable_parameters
from torch_sap.methods import PQIGlobal, PQILayer, PQINeuron
from torch_sap.records.history import History
from torch_sap.records.report import PruningReport
from torch_sap.records.round import Round
from torch_sap.stopping import Collapse, NothingLeft, StoppingRule, TargetDensity, WithinTolerance

__version__ = "0.1.0"

__all__ = [
    "SAP",
    "Collapse",
    "History",
    "LayerSummary",
    "LotteryTicket",
    "NothingLeft",
    "OneShot",
    "PQIGlobal",
    "PQILayer",
    "PQINeuron",
    "PruningReport",
    "Round",
    "Shrunk",
    "StoppingRule",
    "Summary",
    "TargetDensity",
    "Verification",
    "VerifiedWeight",
    "WithinTolerance",
    "gini_index",
    "global_unstructured",
    "iterative_sap",
    "layer_unstructured",
    "load_sparse",
    "neuron_unstructured",
    "pq_index",
    "prunable_parameters",
    "prune_count",
    "remove",
    "retention_bound",
    "sap_rounds",
    "save_sparse",
    "shrink",
    "summary",
    "verify",
]
