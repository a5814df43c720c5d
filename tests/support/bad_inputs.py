"""The table of bad inputs: calls, the error that each must raise, to the letter, and the names in the calls.

python tests/support/bad_inputs.py     writes docs/results/bad_inputs.csv, which docs/bad-inputs.md shows
"""

import csv
import io
import json
import math
from pathlib import Path

import torch
from helpers import fit, mlp, snapshot
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap.decide.bounds import Hyperparameters
from torch_sap.integrations.torch_pruning import shrink
from torch_sap.records.round import Round
from torch_sap.stopping import Collapse, NothingLeft, StoppingRule, TargetDensity, WithinTolerance

try:
    from torch_sap.integrations.lightning import SAPCallback
except ImportError:
    SAPCallback = None

TABLE = Path(__file__).parents[2] / "docs" / "results" / "bad_inputs.csv"

# ruff: noqa: E501  # one line per row
# fmt: off
CASES = {
    'Measures and counts': [
        ('pq_index([1.0, 2.0])', 'TypeError', 'w must be a tensor, got list'),
        ('pq_index(tensor([1, 2]))', 'TypeError', 'w must be a real floating-point tensor (float16, bfloat16, float32, float64), got torch.int64'),
        ('pq_index(tensor([1.0, nan]))', 'ValueError', 'weights must be finite, but w of shape (2,) has NaN entries'),
        ('pq_index(ones(3), p=1.0, q=0.5)', 'ValueError', 'p must be smaller than q, got p=1.0, q=0.5'),
        ('pq_index(ones(3), p=0)', 'ValueError', 'p must be positive, got p=0'),
        ('pq_index(ones(3), q=inf)', 'ValueError', 'q must be finite, got q=inf'),
        ('pq_index(ones(3), p="half")', 'TypeError', "p must be a real number, got 'half'"),
        ('pq_index(ones(2, 3), dim=2)', 'IndexError', 'dim must be a dimension of w, of shape (2, 3), got dim=2'),
        ('pq_index(ones(2, 3), dim="rows")', 'TypeError', "dim must be an int or None, got dim='rows'"),
        ('pq_index(ones(2, 3), mask=ones(3, 2))', 'ValueError', 'mask must have the shape of w, (2, 3), got (3, 2)'),
        ('pq_index(ones(2, 3), mask=[True])', 'TypeError', 'mask must be a tensor or None, got list'),
        ('gini_index([1.0])', 'TypeError', 'w must be a tensor, got list'),
        ('gini_index(tensor([inf]))', 'ValueError', 'weights must be finite, but w of shape (1,) has infinite entries'),
        ('gini_index(ones(3), dim=1)', 'IndexError', 'dim must be a dimension of w, of shape (3,), got dim=1'),
        ('gini_index(ones(3), mask=ones(2))', 'ValueError', 'mask must have the shape of w, (3,), got (2,)'),
        ('retention_bound(0.5, 100, p=2.0)', 'ValueError', 'p must be smaller than q, got p=2.0, q=1.0'),
        ('retention_bound(0.5, 100, eta_r=-1)', 'ValueError', 'eta_r must not be negative, got eta_r=-1'),
        ('retention_bound("0.5", 100)', 'TypeError', "index must be a real number, or an array or tensor of them, got '0.5'"),
        ('retention_bound(2.0, 100)', 'ValueError', 'index must not be larger than 1, got index=2.0'),
        ('retention_bound(0.5, -1)', 'ValueError', 'd must not be negative, got d=-1'),
        ('prune_count(0.5, 100, beta=2)', 'ValueError', 'beta must lie in [0, 1], got beta=2'),
        ('prune_count(0.5, 100, gamma=-1)', 'ValueError', 'gamma must not be negative, got gamma=-1'),
        ('prune_count(1.5, 100)', 'ValueError', 'index must not be larger than 1, got index=1.5'),
        ('prune_count(0.5, "many")', 'TypeError', "d must be a real number, or an array or tensor of them, got 'many'"),
        ('prune_count(0.5, -3)', 'ValueError', 'd must not be negative, got d=-3'),
        ('prune_count(ones(2), -ones(2))', 'ValueError', 'd must not be negative, got d=tensor([-1., -1.])'),
        ('retention_bound(ones(2) / 2, ones(3))', 'ValueError', 'd must be one number or have the shape of index, (2,), got (3,)'),
        ('prune_count(ones(2) / 2, ones(3))', 'ValueError', 'd must be one number or have the shape of index, (2,), got (3,)'),
        ('prune_count([0.5, 0.5], [3, 3, 3])', 'ValueError', 'd must be one number or have the shape of index, (2,), got (3,)'),
        ('retention_bound(0.5, inf)', 'ValueError', 'd must be finite, got d=inf'),
        ('prune_count(0.5, nan)', 'ValueError', 'd must be finite, got d=nan'),
        ('prune_count(-inf, 5)', 'ValueError', 'index must be finite or NaN (not defined), got index=-inf'),
        ('pq_index(ones(2).to_sparse())', 'TypeError', 'w must be a dense tensor, got torch.sparse_coo; call its to_dense() first'),
        ('pq_index(ones(2, device="meta"))', 'ValueError', 'w must have values, but it is on the meta device'),
        ('gini_index(ones(2, device="meta"))', 'ValueError', 'w must have values, but it is on the meta device'),
    ],
    "Pruning methods for PyTorch's functions": [
        ('Hyperparameters(p=-1)', 'ValueError', 'p must be positive, got p=-1'),
        ('PQIGlobal.apply(layer, "wieght")', 'AttributeError', "'Linear' object has no attribute 'wieght'"),
        ('PQIGlobal.apply(layer, "weight", p=3.0)', 'ValueError', 'p must be smaller than q, got p=3.0, q=1.0'),
        ('PQILayer(beta=1.5)', 'ValueError', 'beta must lie in [0, 1], got beta=1.5'),
        ('PQILayer.apply(with_nan[0], "weight")', 'ValueError', 'weights must be finite, but weight of shape (9, 6) has NaN entries'),
        ('PQINeuron(dim=0.5)', 'TypeError', 'dim must be an int, got 0.5'),
        ('PQINeuron.apply(layer, "weight", dim=2)', 'IndexError', 'dim must be a dimension of weight, of shape (9, 6), got dim=2'),
        ('PQINeuron.apply(layer, "bias")', 'ValueError', 'bias must have more than one dimension to have rows, got shape (9,)'),
        ('PQILayer.apply(integers, "weight")', 'TypeError', 'weight must be a real floating-point tensor (float16, bfloat16, float32, float64), got torch.int32'),
        ('prune.global_unstructured([(layer, "weight")], pruning_method=PQILayer)', 'TypeError', 'Only "unstructured" PRUNING_TYPE supported for the `pruning_method`. Found method <class \'torch_sap.methods.PQILayer\'> of type global'),
        ('PQILayer.apply(None, "weight")', 'TypeError', 'module must be a torch.nn.Module, got NoneType'),
        ('PQILayer.apply(layer, None)', 'TypeError', 'name must be the name of a parameter, got None'),
        ('PQILayer.apply(layer, "weight", importance_scores=3)', 'TypeError', 'importance_scores must be a tensor or None, got int'),
    ],
    'Whole models': [
        ('global_unstructured(None)', 'TypeError', 'model must be a torch.nn.Module or an iterable of (module, name) pairs, got NoneType'),
        ('global_unstructured([])', 'ValueError', 'model must have a parameter to prune, but the iterable of (module, name) pairs is empty'),
        ('global_unstructured(model.parameters())', 'TypeError', 'each pair must be (module, name), got a Parameter; pass the model itself'),
        ('neuron_unstructured([(layer, "bias")])', 'ValueError', '0.bias must have more than one dimension to have rows, got shape (9,); leave it out, or take another scope'),
        ('global_unstructured([layer])', 'TypeError', 'each pair must be (module, name), got Linear(in_features=6, out_features=9, bias=True)'),
        ('global_unstructured([(layer, "wieght")])', 'ValueError', "name must be a parameter of the module, got 'wieght' for Linear"),
        ('global_unstructured(model, p=2.0)', 'ValueError', 'p must be smaller than q, got p=2.0, q=1.0'),
        ('global_unstructured(pruned, beta=-0.1)', 'ValueError', 'beta must lie in [0, 1], got beta=-0.1'),
        ('layer_unstructured(nn.ReLU())', 'ValueError', "model must have a parameter to prune (more than one dimension and 'weight' in its name), but ReLU has none"),
        ('layer_unstructured(with_nan)', 'ValueError', 'weights must be finite, but 0.weight of shape (9, 6) has NaN entries'),
        ('layer_unstructured(integers)', 'TypeError', 'weight must be a real floating-point tensor (float16, bfloat16, float32, float64), got torch.int32'),
        ('layer_unstructured(model, exclude="heads")', 'ValueError', "exclude must match a parameter with more than one dimension, but 'heads' matches none of: 0.weight, 3.weight"),
        ('layer_unstructured(model, exclude=3)', 'TypeError', 'exclude must be a pattern or an iterable of patterns, got 3'),
        ('layer_unstructured(nn.LazyLinear(3))', 'ValueError', 'weight must have values, but it is on the meta device or not initialized yet'),
        ('neuron_unstructured(model, importance_scores=ones(9, 6))', 'TypeError', 'importance_scores must be a dict from (module, name) to a tensor, or a callable that returns one, got Tensor'),
        ('neuron_unstructured(model, importance_scores={(model[0], "weight"): ones(6, 9)})', 'ValueError', "importance_scores of 0.weight must have the parameter's shape (9, 6), got (6, 9)"),
        ('neuron_unstructured(model, importance_scores={(layer, "weight"): ones(9, 6)})', 'ValueError', "importance_scores must belong to parameters that are pruned, got one for (Linear(in_features=6, out_features=9, bias=True), 'weight')"),
        ('neuron_unstructured(pruned, gamma=nan)', 'ValueError', 'gamma must be finite, got gamma=nan'),
        ('neuron_unstructured(model, eta_r="none")', 'TypeError', "eta_r must be a real number, got 'none'"),
        ('global_unstructured([(model[0], "weight")], exclude="0")', 'ValueError', 'exclude needs a model; choose among the (module, name) pairs yourself'),
        ('remove([layer])', 'TypeError', 'model must be a torch.nn.Module, got list'),
        ('prunable_parameters("model")', 'TypeError', 'model must be a torch.nn.Module, got str'),
        ('prunable_parameters(model, exclude=["0", "x*"])', 'ValueError', "exclude must match a parameter with more than one dimension, but 'x*' matches none of: 0.weight, 3.weight"),
        ('verify(model, ones(2, 6))', 'ValueError', 'model must have a pruned weight, but no mask and no weight of it has a zero; prune it first'),
        ('verify(pruned, ones(2, 7))', 'RuntimeError', 'mat1 and mat2 shapes cannot be multiplied (2x7 and 6x9)'),
        ('verify(layer, "x")', 'ValueError', 'model must have a pruned weight, but no mask and no weight of it has a zero; prune it first'),
        ('verify("m", 0)', 'TypeError', 'model must be a torch.nn.Module, got str'),
        ('global_unstructured(model, importance_scores={(model[3], "weight"): ones(4, 9) * nan})', 'ValueError', 'importance_scores must be finite, but 3.weight of shape (4, 9) has NaN entries'),
        ('global_unstructured(model, importance_scores={(model[3], "weight"): ones(4, 9) * 1j})', 'TypeError', 'importance_scores of 3.weight must be a real floating-point tensor (float16, bfloat16, float32, float64), got torch.complex64'),
        ('global_unstructured(model, importance_scores=lambda model: {(model[0], "weight"): ones(9, 6)})', 'ValueError', 'importance_scores must return a tensor for each parameter that is pruned, but none for 3.weight; add it, or exclude the parameter'),
        ('layer_unstructured(model, importance_scores={(model[0], "weight"): ones(9, 6, device="meta")})', 'ValueError', 'importance_scores of 0.weight must have values, but it is on the meta device'),
    ],
    'Iterative pruning': [
        ('SAP(model, scope="row")', 'ValueError', "scope must be one of 'global', 'layer', 'neuron', got scope='row'"),
        ('SAP(model, rewind="start")', 'ValueError', 'rewind must be "init", "none" or a state_dict, got rewind=\'start\''),
        ('SAP(model, rewind=3)', 'TypeError', 'rewind must be "init", "none" or a state_dict of tensors, got 3'),
        ('SAP(model, rewind={"0.weight": ones(9, 6)})', 'ValueError', "rewind must be a state_dict of the model, but lacks 0.bias, 1.bias, 1.num_batches_tracked, 1.running_mean, 1.running_var, and 3 more and has unknown nothing"),
        ('SAP(model, rewind={**model.state_dict(), "0.weight": ones(6, 9)})', 'ValueError', 'rewind must be a state_dict of the model, but 0.weight has shape (6, 9), not (9, 6)'),
        ('SAP(model, optimizer=torch.optim.SGD(layer.parameters()))', 'ValueError', 'optimizer must hold parameters of the model, but holds none of them: make it from model.parameters()'),
        ('SAP(model, optimizer="adam")', 'TypeError', 'optimizer must be a torch.optim.Optimizer, got str'),
        ('SAP(model, scheduler=LambdaLR(torch.optim.SGD(model.parameters()), float))', 'ValueError', 'scheduler must come with its optimizer, whose learning rates are set back too, got optimizer=None'),
        ('SAP(model, optimizer=torch.optim.SGD(model.parameters()), scheduler=0.1)', 'TypeError', 'scheduler must have state_dict and load_state_dict, or be a list of such, got float'),
        ('sap.attach(optimizer=torch.optim.SGD(layer.parameters()))', 'ValueError', 'optimizer must hold parameters of the model, but holds none of them: make it from model.parameters()'),
        ('sap.attach(optimizer=torch.optim.SGD(sap.model.parameters()), scheduler=LambdaLR(torch.optim.SGD(layer.parameters()), float))', 'ValueError', 'scheduler must belong to the optimizer, but this LambdaLR moves the learning rates of another one: pass the optimizer that it was made with'),
        ('sap.load_state_dict(other_masks)', 'ValueError', "state must belong to the masks of the model, but 0.weight has 48 entries left here, 54 in the state: load the model's state first, of the same moment"),
        ('SAP(with_nan)', 'ValueError', 'weights must be finite, but 0.weight of shape (9, 6) has NaN entries'),
        ('SAP(model, q=inf)', 'ValueError', 'q must be finite, got q=inf'),
        ('SAP(3)', 'TypeError', 'model must be a torch.nn.Module, got int'),
        ('SAP(model, exclude="*")', 'ValueError', "model must have a parameter to prune (more than one dimension and 'weight' in its name), but Sequential has none with exclude='*'"),
        ('sap.step("90 %")', 'TypeError', "metrics must give None, a number or a mapping from names to numbers, got '90 %'"),
        ('sap.step({"accuracy": "high"})', 'TypeError', "metrics must give None, a number or a mapping from names to numbers, got {'accuracy': 'high'}"),
        ('sap.step(eval_fn=0.9)', 'TypeError', 'eval_fn must be callable or None, got 0.9'),
        ('sap.record([0.9])', 'TypeError', 'metrics must give None, a number or a mapping from names to numbers, got [0.9]'),
        ('unrewound.set_rewind_point()', 'ValueError', 'rewind must not be "none" for set_rewind_point'),
        ('sap.load_state_dict({})', 'ValueError', 'state must be a state_dict of a torch_sap pruner in format 3'),
        ('sap.load_state_dict(other_settings)', 'ValueError', 'state must come from a pruner with the same settings, but they differ: beta: 0.9 here, 0.5 in the state'),
        ('sap.load_state_dict(other_model)', 'ValueError', 'state must come from a pruner with the same settings, but they differ: tensors.0.weight: [9, 6] here, [2, 3] in the state; tensors.3.weight: [4, 9] here, nothing in the state'),
        ('sap.load_state_dict({**sap.state_dict(), "history": {}})', 'ValueError', 'history must have format 1 of torch_sap, got None'),
        ('iterative_sap(model, None)', 'TypeError', 'train_fn must be callable, got None'),
        ('iterative_sap(model, train_fn, iterations=-1)', 'ValueError', 'iterations must not be negative, got iterations=-1'),
        ('iterative_sap(model, train_fn, iterations=1.0)', 'TypeError', 'iterations must be an int, got 1.0'),
        ('iterative_sap(model, train_fn, eval_fn=1)', 'TypeError', 'eval_fn must be callable or None, got 1'),
        ('iterative_sap(model, train_fn, callback="print")', 'TypeError', "callback must be callable or None, got 'print'"),
        ('iterative_sap(model, train_fn, epochs=3)', 'TypeError', "SAP() got an unexpected keyword argument 'epochs'"),
        ('iterative_sap(model, lambda model: "good")', 'TypeError', "train_fn must give None, a number or a mapping from names to numbers, got 'good'"),
        ('iterative_sap(model, raising)', 'RuntimeError', 'the training failed'),
        ('iterative_sap(sap, 3)', 'TypeError', 'train_fn must be callable, got 3'),
        ('LotteryTicket(model, ratio=1.5)', 'ValueError', 'ratio must lie in [0, 1], got ratio=1.5'),
        ('LotteryTicket(model, ratio="20 %")', 'TypeError', "ratio must be a real number, got '20 %'"),
        ('OneShot(model, ratio=-0.1)', 'ValueError', 'ratio must lie in [0, 1], got ratio=-0.1'),
        ('OneShot(model, scope="tensor")', 'ValueError', "scope must be one of 'global', 'layer', 'neuron', got scope='tensor'"),
        ('SAP(model, gini="yes")', 'TypeError', "gini must be True or False, got 'yes'"),
        ('sap.load_state_dict({**sap.state_dict(), "settings": 3})', 'ValueError', 'state must be a state_dict of a torch_sap pruner in format 3'),
        ('sap.load_state_dict({**sap.state_dict(), "kept": 3})', 'ValueError', 'state must be a state_dict of a torch_sap pruner in format 3'),
        ('sap.load_state_dict({"format": 3})', 'ValueError', 'state must be a state_dict of a torch_sap pruner in format 3'),
        ('iterative_sap(sap, train_fn, scope="layer", gini=True)', 'TypeError', 'settings must be given to the pruner when it is made, got scope, gini here'),
    ],
    'History': [
        ('History.from_dict({"format": 99})', 'ValueError', 'history must have format 1 of torch_sap, got 99'),
        ('History.from_dict([])', 'ValueError', "history must have format 1 of torch_sap, got 'list'"),
        ('History.from_json(of_others)', 'ValueError', 'history must have format 1 of torch_sap, got None'),
        ('history.plot(figure, metric="loss")', 'ValueError', "metric 'loss' must be recorded in every round, but round 0 lacks it (round 0 has ['accuracy']); return it from train_fn or eval_fn"),
        ('History().plot(figure)', 'ValueError', 'history must have a round to be drawn, but it is empty'),
        ('history.to_json("no/such/folder/history.json")', 'FileNotFoundError', "[Errno 2] No such file or directory: 'no/such/folder/history.json'"),
        ('History.from_dict({"format": 1})', 'ValueError', 'history must hold a list of rounds, got None; it is damaged or not from torch_sap'),
        ('History.from_dict({"format": 1, "rounds": [{}]})', 'ValueError', "round must be what Round.to_dict wrote, but is not or is damaged: no 'number'"),
        ('History.from_dict({"format": 1, "rounds": [], "returned": "last"})', 'ValueError', "history must hold the number of the returned round or None, got 'last'"),
        ('History.from_json(truncated)', 'ValueError', 'path must be a file that History.to_json wrote, but FOLDER/truncated.json is damaged: Unterminated string starting at: line 1 column 27 (char 26)'),
        ('History.from_json(3)', 'TypeError', 'path must be the path of a file, got 3'),
        ('History([1, 2])', 'TypeError', 'rounds must hold Round (torch_sap.records.round), got 1'),
        ('History(3)', 'TypeError', 'rounds must be an iterable of Round, got 3'),
        ('history.append(3)', 'TypeError', 'rounds must hold Round (torch_sap.records.round), got 3'),
        ('Round.from_dict({})', 'ValueError', "round must be what Round.to_dict wrote, but is not or is damaged: no 'number'"),
        ('Round.from_dict(None)', 'ValueError', "round must be what Round.to_dict wrote, but is not or is damaged: expected mapping, got NoneType"),
        ('history.plot(3)', 'TypeError', 'path must be the path of a file, got 3'),
        ('history.plot(folder)', 'IsADirectoryError', 'path must be the path of a file, but FOLDER is a folder; name a file in it'),
        ('history.plot(figure, phases=["good"])', 'ValueError', "phases must hold regularization, compression, collapse or None, got 'good'"),
        ('history.to_json(folder)', 'IsADirectoryError', 'path must be the path of a file, but FOLDER is a folder; name a file in it'),
        ('history.to_csv(None)', 'TypeError', 'path must be the path of a file, got None'),
    ],
    'Stopping rules': [
        ('TargetDensity(1.5)', 'ValueError', 'density must lie in [0, 1], got density=1.5'),
        ('TargetDensity("half")', 'TypeError', "density must be a real number, got 'half'"),
        ('WithinTolerance(-0.1)', 'ValueError', 'tolerance must not be negative, got tolerance=-0.1'),
        ('WithinTolerance(0.1, mode="up")', 'ValueError', "mode must be one of 'max', 'min', got mode='up'"),
        ('WithinTolerance(0.1, patience=0)', 'ValueError', 'patience must be 1 or more, got patience=0'),
        ('Collapse(noise=0.2)', 'ValueError', 'noise and significant must be 0 <= noise <= significant, got 0.2 and 0.05'),
        ('iterative_sap(model, train_fn, progress="bar")', 'TypeError', "progress must be True or False, got 'bar'"),
        ('iterative_sap(model, train_fn, stop=0.5)', 'TypeError', 'stop must be a StoppingRule or several, got 0.5'),
        ('iterative_sap(model, train_fn, stop=[NothingLeft(), StoppingRule])', 'TypeError', "stop must be a StoppingRule or several, got <class 'torch_sap.stopping.StoppingRule'>"),
        ('iterative_sap(model, lambda model: 0.9, stop=WithinTolerance(0.1, metric="f1"))', 'ValueError', "metric 'f1' must be recorded in every round, but round 0 lacks it (round 0 has ['metric']); return it from train_fn or eval_fn"),
        ('iterative_sap(model, lambda model: {"loss": 0.9}, stop=WithinTolerance(0.1))', 'ValueError', "metric must be named where it is not clear by what to judge, but round 0 has ['loss']; pass metric= one of them, and mode=\"min\" where a smaller one is better"),
        ('iterative_sap(model, lambda model: {"top1": 0.9, "top5": 0.99}, stop=Collapse())', 'ValueError', "metric must be named where it is not clear by what to judge, but round 0 has ['top1', 'top5']; pass metric= one of them, and mode=\"min\" where a smaller one is better"),
        ('iterative_sap(model, train_fn, stop=WithinTolerance(0.1))', 'ValueError', "metric 'accuracy' must be recorded in every round, but round 0 lacks it (round 0 has none); return it from train_fn or eval_fn"),
        ('iterative_sap(sap, raising, stop=WithinTolerance(0.1, metric="f1"))', 'ValueError', "metric 'f1' must be recorded in every round, but round 0 lacks it (round 0 has ['accuracy']); return it from train_fn or eval_fn"),
        ('history.phases(metric="f1")', 'ValueError', "metric 'f1' must be recorded in every round, but round 0 lacks it (round 0 has ['accuracy']); return it from train_fn or eval_fn"),
        ('history.phases(mode="up")', 'ValueError', "mode must be one of 'max', 'min', got mode='up'"),
        ('Collapse(noise="a")', 'TypeError', "noise must be a real number, got 'a'"),
        ('history.phases(noise=nan)', 'ValueError', 'noise must be finite, got noise=nan'),
    ],
    'Checkpoints': [
        ('iterative_sap(model, train_fn, checkpoint=3)', 'TypeError', 'checkpoint must be the path of a file, got 3'),
        ('iterative_sap(model, train_fn, checkpoint=".")', 'IsADirectoryError', 'checkpoint must be the path of a file, but . is a folder; name a file in it'),
        ('iterative_sap(model, train_fn, stop="never")', 'TypeError', "stop must be a StoppingRule or several, got 'never'"),
        ('iterative_sap(model, train_fn, checkpoint="no/such/folder/run.ckpt")', 'FileNotFoundError', "[Errno 2] the checkpoint could not be written (No such file or directory); if there was one before, it is still there, and the run resumes from it when it is called again: 'no/such/folder/run.ckpt'"),
        ('iterative_sap(model, train_fn, checkpoint=of_others)', 'ValueError', "checkpoint must be a file that torch_sap wrote, but 'FOLDER/others.json' is not or is damaged: File is not a zip file. Nothing was loaded. Move it away to start over, or pass another path"),
        ('iterative_sap(model, train_fn, checkpoint=truncated)', 'ValueError', "checkpoint must be a file that torch_sap wrote, but 'FOLDER/truncated.json' is not or is damaged: File is not a zip file. Nothing was loaded. Move it away to start over, or pass another path"),
    ],
    'Files of sparse models': [
        ('dense_state_dict({})', 'TypeError', 'model must be a torch.nn.Module, got dict'),
        ('save_sparse(3, figure)', 'TypeError', 'model must be a torch.nn.Module, got int'),
        ('load_sparse(model, "no.safetensors")', 'FileNotFoundError', 'No such file or directory: no.safetensors'),
        ('save_sparse(model, figure, what="masks")', 'ValueError', 'model must have masks to save, but no tensor of it is pruned; prune it first'),
        ('save_sparse(pruned, figure, what="bits")', 'ValueError', "what must be one of 'model', 'masks', got what='bits'"),
        ('load_sparse(3, of_others)', 'TypeError', 'model must be a torch.nn.Module, got int'),
        ('load_sparse(model, of_others, what=None)', 'ValueError', "what must be one of 'model', 'masks', got what=None"),
        ('save_sparse(model, None)', 'TypeError', 'path must be the path of a file, got None'),
        ('save_sparse(model, folder)', 'IsADirectoryError', 'path must be the path of a file, but FOLDER is a folder; name a file in it'),
        ('load_sparse(model, folder)', 'IsADirectoryError', 'path must be the path of a file, but FOLDER is a folder; name a file in it'),
        ('load_sparse(model, None)', 'TypeError', 'path must be the path of a file, got None'),
    ],
    'Summary and shrinking': [
        ('summary(3)', 'TypeError', 'model must be a torch.nn.Module, got int'),
        ('shrink(3, ones(1, 6))', 'TypeError', 'model must be a torch.nn.Module, got int'),
    ],
    'Lightning': [
        ('SAPCallback(0)', 'ValueError', 'epochs_per_round must be 1 or more, got epochs_per_round=0'),
        ('SAPCallback(2.5)', 'TypeError', 'epochs_per_round must be an int, got 2.5'),
        ('SAPCallback(3, rewind=3)', 'ValueError', 'rewind must be "init", "none" or a number of epochs from 1 to epochs_per_round - 1 = 2, got rewind=3'),
        ('SAPCallback(3, scope="row")', 'ValueError', "scope must be one of 'global', 'layer', 'neuron', got scope='row'"),
        ('SAPCallback(3, beta=2)', 'ValueError', 'beta must lie in [0, 1], got beta=2'),
        ('SAPCallback(3, exclude=3)', 'TypeError', 'exclude must be a pattern or an iterable of patterns, got 3'),
    ],
}
# fmt: on


def write_table():
    """The rows as CSV. Calls and messages are in backticks, as the page shows them as code."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["topic", "call", "error", "message"])
    for topic, cases in CASES.items():
        for call, error, message in cases:
            marks = "``" if "`" in message else "`"
            writer.writerow([topic, f"`{call}`", error, f"{marks}{message}{marks}"])
    return file.getvalue()


def raising(model):
    """A training that changes weights and fails."""
    with torch.no_grad():
        model[0].weight.add_(1)
    raise RuntimeError("the training failed")


def make_world(folder):
    """The names in the calls, new for each call."""
    world = {name: getattr(torch_sap, name) for name in torch_sap.__all__}
    world |= {"nn": nn, "torch": torch, "prune": prune, "tensor": torch.tensor, "ones": torch.ones}
    world |= {"nan": math.nan, "inf": math.inf, "shrink": shrink, "Round": Round}
    world |= {rule.__name__: rule for rule in (Collapse, NothingLeft, StoppingRule, TargetDensity, WithinTolerance)}
    world |= {"Hyperparameters": Hyperparameters, "SAPCallback": SAPCallback}
    model, pruned, with_nan, integers = mlp(), mlp(), mlp(), nn.Module()
    torch_sap.layer_unstructured(pruned)
    fit(pruned, torch.optim.SGD(pruned.parameters(), lr=0.1), (5, 6), steps=1)
    with torch.no_grad():
        with_nan[0].weight[1, 2] = math.nan
    integers.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int32), requires_grad=False)
    world |= {"model": model, "layer": nn.Linear(6, 9), "pruned": pruned, "with_nan": with_nan, "integers": integers}
    sap, other = torch_sap.SAP(mlp()), torch_sap.SAP(nn.Sequential(nn.Linear(3, 2)))
    sap.step({"accuracy": 0.9})
    world |= {"sap": sap, "unrewound": torch_sap.SAP(mlp(), rewind="none"), "history": sap.history}
    world |= {"other_settings": torch_sap.SAP(mlp(), beta=0.5).state_dict(), "other_model": other.state_dict()}
    world |= {"other_masks": torch_sap.SAP(mlp()).state_dict(), "LambdaLR": torch.optim.lr_scheduler.LambdaLR}
    world |= {"train_fn": lambda model: None, "raising": raising}
    names = {"whole": "history.json", "truncated": "truncated.json", "of_others": "others.json"}
    files = {name: folder / file for name, file in names.items()}
    sap.history.to_json(files["whole"])
    files["truncated"].write_text(files["whole"].read_text()[:30])
    files["of_others"].write_text(json.dumps({"accuracy": 1.0}))
    world |= {name: str(path) for name, path in files.items()}
    return world | {"figure": str(folder / "figure.png"), "folder": str(folder)}


def state_of(world, folder):
    """All that a refused call must leave unchanged: models with gradients, histories, steppers, files."""
    found = {}
    for name, value in world.items():
        stepper = value if isinstance(value, torch_sap.SAP) else None
        model = stepper.model if stepper else value
        if isinstance(model, nn.Module):
            found[name] = snapshot(model)
            found[name]["values"] = {key: bits.tolist() for key, bits in found[name]["values"].items()}
            found[name]["grads"] = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        history = stepper.history if stepper else value
        if isinstance(history, torch_sap.History):
            found[name + " rounds"] = history.to_dict()
        if stepper:
            point = stepper.state_dict()["rewind_point"] or {}
            found[name + " rewind point"] = {key: value.tolist() for key, value in point.items()}
    return found | {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    TABLE.write_text(write_table(), encoding="utf-8")
