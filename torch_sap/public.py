"""The public names of the package, which :mod:`torch_sap` loads when one of them is first used."""

from torch_sap.decide.bounds import prune_count, retention_bound
from torch_sap.decide.measures import gini_index, pq_index
from torch_sap.files.sparse import load_sparse, save_sparse
from torch_sap.functional import global_unstructured, layer_unstructured, neuron_unstructured, remove
from torch_sap.inspect.summary import summary
from torch_sap.inspect.verify import verify
from torch_sap.iterate.pruner import SAP, LotteryTicket, OneShot
from torch_sap.iterative import iterative_sap
from torch_sap.masks import averages as _averages  # noqa: F401 - makes averages follow the masks of their model
from torch_sap.masks.parameters import prunable_parameters
from torch_sap.masks.plain import dense_state_dict
from torch_sap.methods import PQIGlobal, PQILayer, PQINeuron
from torch_sap.records.history import History

__all__ = [
    "SAP",
    "History",
    "LotteryTicket",
    "OneShot",
    "PQIGlobal",
    "PQILayer",
    "PQINeuron",
    "dense_state_dict",
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
    "save_sparse",
    "summary",
    "verify",
]
