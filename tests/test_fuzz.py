"""Random sequences of what people do with random models. The invariants of a pruned model hold after every step.

FUZZ_EXAMPLES=10000 python -m pytest -m slow tests/test_fuzz.py     more examples, different ones in each run
"""

import copy
import io
import math
import os
import pickle

import numpy as np
import pytest
import reference
import torch
from fuzzing import Inner, build, rules, trees
from helpers import FUNCTIONS, SCOPES, assert_unchanged, snapshot
from hypothesis import settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.nn.utils import prune

import torch_sap

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-4),
    "of others": lambda parameters: type("Own", (torch.optim.SGD,), {})(parameters, lr=0.02, momentum=0.9),
}
FOREIGN = {
    "l1": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "ln": lambda module: prune.ln_structured(module, "weight", 0.3, n=2, dim=0),
    "PQILayer": lambda module: torch_sap.PQILayer.apply(module, "weight", eta_r=0.2),
    "PQINeuron": lambda module: torch_sap.PQINeuron.apply(module, "weight", eta_r=0.2),
}
scopes = st.sampled_from(SCOPES)


ALL = "*weight*"
"""Lookup tables, too."""


def weights_of(model):
    """Module, name, Parameter and mask of each holder of a weight, by its dotted path before pruning."""
    found = {}
    for path, module in model.named_modules():
        masks = dict(module.named_buffers(recurse=False))
        for now, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = now.removesuffix("_orig")
            if "weight" in name and parameter.dim() > 1:
                found[f"{path}.{name}"] = (module, name, parameter, masks.get(name + "_mask"))
    return found


def by_parameter(model):
    """All holders of each Parameter, by the first of them."""
    groups = {}
    for path, (_, _, parameter, _) in weights_of(model).items():
        groups.setdefault(id(parameter), []).append(path)
    return {paths[0]: paths for paths in groups.values()}


class Sequences(RuleBasedStateMachine):
    """A model, what is known of its masks, what may happen to it, and what holds all the time."""

    @initialize(tree=trees())
    def start(self, tree):
        self.tree = tree
        self.model = build(tree)
        self.keys = list(self.model.state_dict())
        self.form = dict.fromkeys(weights_of(self.model), "plain")
        self.masks = {}
        self.foreign_before = False  # PyTorch's methods move a parameter to the end of its module
        self.unguarded = set()  # read without a call, and pruned as a pair: documented as not covered
        self.sap = None
        self.follow()

    def follow(self):
        """From here on these Parameter objects have to stay."""
        self.parameters = {path: weight for path, (_, _, weight, _) in weights_of(self.model).items()}
        self.optimizer = None

    def learn(self, paths, form):
        """Remember the masks that a pruning has left; they only lose entries."""
        found = weights_of(self.model)
        for path in paths:
            mask = found[path][3].bool().clone()
            assert not (mask & ~self.masks.get(path, torch.tensor(True))).any(), f"{path}: a pruned entry came back"
            self.masks[path], self.form[path] = mask, form

    def values(self):
        return {path: weight.detach().clone() for path, weight in self.parameters.items()}

    def state(self):
        """Parameters and buffers by their names before pruning, without masks."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if not name.endswith("_mask"):
                yield name.removesuffix("_orig"), tensor

    def expect(self, scope, arguments):
        """The reference's masks and records for the weights as they are."""
        found, weights, masks, transposed = weights_of(self.model), {}, {}, {}
        for name, paths in by_parameter(self.model).items():
            module, _, weight, _ = found[path := paths[0]]
            held = [found[path][3].bool().numpy() for path in paths if found[path][3] is not None]
            masks[name] = np.logical_and.reduce([np.ones(weight.shape, bool), *held])
            weights[name] = np.nan_to_num(weight.detach().double().numpy() * masks[name])
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                transposed[path] = module.groups
        return reference.prune(weights, masks, scope, transposed=transposed, **arguments)

    def compare(self, groups, arguments, expected):
        masks, records = expected
        exact = True
        for name, of_group in records.items():
            group, wanted = groups[name], [record for record in of_group if record.d]
            alive = group.d > 0
            assert group.d[alive].tolist() == [record.d for record in wanted]
            np.testing.assert_allclose(group.index[alive], [record.index for record in wanted], rtol=0, atol=1e-10)
            for c, found in zip(group.c[alive], wanted, strict=True):
                if c != found.c:  # the two round I differently, which shows where the limit is a whole number
                    limit = min(arguments.get("gamma", 1.0) * (found.d - found.r), arguments.get("beta", 0.9) * found.d)
                    assert abs(c - found.c) == 1, name
                    assert abs(limit - round(limit)) < 1e-6, name
                    exact = False
        for name, mask in masks.items() if exact else ():
            np.testing.assert_array_equal(weights_of(self.model)[name][3].numpy(), mask, err_msg=name)

    # What holds

    @invariant()
    def the_form_is_that_of_pytorch(self):
        firsts = {module: path for path, module in self.model.named_modules()}
        keys = []
        for key in self.keys:
            path, _, name = key.rpartition(".")
            first = f"{firsts[self.model.get_submodule(path)]}.{name}"  # of a module that is at two places
            keys += [key] if self.form.get(first, "plain") == "plain" else [key + "_orig", key + "_mask"]
        assert sorted(self.model.state_dict()) == sorted(keys)
        for path, (module, name, weight, mask) in weights_of(self.model).items():
            assert weight is self.parameters[path], f"{path}: another Parameter"
            assert (mask is None) == (self.form[path] == "plain")
            methods = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
            assert sum(method._tensor_name == name for method in methods) == (mask is not None), path
            if mask is not None:
                assert torch.equal(mask.bool(), self.masks[path]), path
            if self.form[path] == "ours":
                assert mask.dtype is torch.bool
                assert getattr(module, name) is weight
                assert torch.count_nonzero(weight.detach()[~mask]) == 0, path

    @invariant()
    def nothing_grows(self):
        for path, (module, _, weight, _) in weights_of(self.model).items():
            tensors = len(list(module.named_parameters(recurse=False, remove_duplicate=False)))
            of_module = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks")
            for kind in (*of_module, "_forward_pre_hooks"):
                assert len(getattr(module, kind)) <= tensors + 1, (path, kind)
            assert len(module._forward_hooks) <= 1
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                assert len(getattr(weight, kind, None) or ()) <= 2, (path, kind)  # a tied weight has two holders

    # What prunes

    @rule(scope=scopes, arguments=rules)
    def prune(self, scope, arguments):
        expected = self.expect(scope, arguments)
        report = FUNCTIONS[scope](self.model, include=ALL, **arguments)
        assert [tensor.name for tensor in report.tensors] == list(by_parameter(self.model))
        self.compare(report.groups, arguments, expected)
        found = weights_of(self.model)
        assert report.remaining == sum(int(found[tensor.name][3].sum()) for tensor in report.tensors)
        self.learn(self.form, "ours")
        self.unguarded.clear()

    @rule(scope=scopes, arguments=rules, as_pairs=st.booleans(), data=st.data())
    def prune_a_part(self, scope, arguments, as_pairs, data):
        groups, found, before = by_parameter(self.model), weights_of(self.model), self.values()
        chosen = data.draw(st.sampled_from(sorted(groups)), label="chosen")
        if as_pairs:
            paths = groups[chosen]
            self.unguarded.update(path for path in paths if self.form[path] != "ours")
            FUNCTIONS[scope]((found[path][:2] for path in paths), **arguments)
        elif len(groups) > 1:
            paths = [path for name in groups if name != chosen for path in groups[name]]
            FUNCTIONS[scope](self.model, include=ALL, exclude=chosen, **arguments)
        else:
            return
        self.learn(paths, "ours")
        for path, value in self.values().items():
            assert path in paths or torch.equal(value, before[path]), f"{path} was not to be pruned"

    @rule(how=st.sampled_from(sorted(FOREIGN)), data=st.data())
    def prune_by_a_foreign_method(self, how, data):
        groups = by_parameter(self.model)
        inside = {id(m) for outer in self.model.modules() if isinstance(outer, Inner) for m in outer.modules()}
        able = [
            path
            for path, (module, name, weight, _) in weights_of(self.model).items()
            if name == "weight" and len(groups.get(path, ())) == 1 and id(module) not in inside
            if weight.is_contiguous() and weight.numel()
        ]
        if able:
            path = data.draw(st.sampled_from(able), label="path")
            FOREIGN[how](weights_of(self.model)[path][0])
            self.learn([path], "foreign")
            self.foreign_before = True

    @rule(scope=scopes, arguments=rules, rewind=st.sampled_from(["init", "none"]))
    def make_a_stepper(self, scope, arguments, rewind):
        self.sap = torch_sap.SAP(self.model, scope=scope, rewind=rewind, include=ALL, **arguments)
        self.of_sap = (scope, arguments, rewind)
        self.start_state = {name: tensor.detach().clone() for name, tensor in self.state()}
        self.learn(self.form, "ours")
        self.unguarded.clear()

    @precondition(lambda self: self.sap is not None)
    @rule(trained=st.booleans())
    def step_and_rewind(self, trained):
        if trained:
            self.optimizer = None
            self.train("sgd", 1)
        before, (scope, arguments, rewind), rounds = self.values(), self.of_sap, len(self.sap.history)
        expected = self.expect(scope, arguments)
        found = self.sap.step({"metric": 1.0})
        assert len(self.sap.history) == rounds + 1
        assert found is self.sap.history[-1]
        self.compare(found.groups, arguments, expected)
        self.learn(self.form, "ours")
        for name, tensor in self.state():
            if rewind == "init" or name in before:
                old = (self.start_state if rewind == "init" else before)[name].to(tensor.dtype)
                mask = self.masks.get(name)
                assert torch.equal(tensor.detach(), old if mask is None else old.masked_fill(~mask, 0)), name

    # What trains, writes, copies, and removes

    @rule(how=st.sampled_from(sorted(OPTIMIZERS)), steps=st.integers(1, 2))
    def train(self, how, steps):
        if self.optimizer is None:
            self.optimizer = OPTIMIZERS[how](self.model.parameters())
        for _ in range(steps):
            dense = None if "foreign" in self.form.values() else torch_sap.remove(copy.deepcopy(self.model))
            self.optimizer.zero_grad()
            output = self.model()
            output.tanh().sum().backward()
            found = weights_of(self.model)
            for path, form in self.form.items():
                _, _, weight, mask = found[path]
                assert form != "ours" or weight.grad is None or torch.count_nonzero(weight.grad[~mask]) == 0, path
            if dense is not None:
                dense.zero_grad()
                other = dense()
                assert torch.equal(output, other), "the pruned model computes what the dense one with zeros does"
                other.tanh().sum().backward()
                for path, (_, _, weight, _) in weights_of(dense).items():
                    mask, grad = self.masks.get(path, ...), found[path][2].grad
                    assert grad is None or torch.equal(grad[mask], weight.grad[mask]), path
            self.optimizer.step()
        assert all(parameter.isfinite().all() for parameter in self.model.parameters())

    @rule(how=st.sampled_from(sorted(OPTIMIZERS)), scope=scopes)
    def prune_between_steps(self, how, scope):
        """The optimizer has momentum of entries that are pruned then."""
        self.optimizer = None
        self.train(how, 2)
        self.prune(scope, {"eta_r": 1.0})
        self.train(how, 1)

    @rule(value=st.sampled_from([1.0, -0.0, math.nan]), after=st.integers(0, 2), data=st.data())
    def write(self, value, after, data):
        """Into a pruned weight, at pruned entries; the next forward, pruning, or removal restores the zeros."""
        ours = [path for path, form in self.form.items() if form == "ours" and path not in self.unguarded]
        if not ours:
            return
        _, _, weight, mask = weights_of(self.model)[data.draw(st.sampled_from(ours), label="path")]
        expected = self.model.eval()().detach()
        self.model.train()
        with torch.no_grad():
            weight[~mask] = value
        if after == 1:
            self.remove(expected)
        elif after == 2:
            self.prune("layer", {"gamma": 0.0})
        np.testing.assert_array_equal(self.model.eval()().detach(), expected)
        self.model.train()

    @precondition(
        lambda self: "foreign" not in self.form.values()
    )  # PyTorch's mechanism cannot be copied after a forward
    @rule(pickled=st.booleans())
    def copy(self, pickled):
        old, before = self.model, snapshot(self.model)
        self.model = pickle.loads(pickle.dumps(old)) if pickled else copy.deepcopy(old)
        assert torch.equal(self.model.eval()(), old.eval()())
        old.train(), self.model.train()
        torch_sap.global_unstructured(copy.deepcopy(self.model), include=ALL, eta_r=1.0)
        before["training"] = [True] * len(before["training"])
        assert_unchanged(old, before)
        self.sap = None
        self.follow()

    @rule()
    def save_and_load(self):
        """Into a new model that has masks of ones at the same weights."""
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        other = build(self.tree)
        found = weights_of(other)
        masked = [path for path, form in self.form.items() if form != "plain"]
        if len(masked) == len(found):
            torch_sap.layer_unstructured(other, include=ALL, gamma=0)
        elif masked:
            torch_sap.layer_unstructured([found[path][:2] for path in masked], gamma=0)
            self.unguarded.update(masked)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other.eval()(), self.model.eval()())
        self.form.update(dict.fromkeys(masked, "ours"))
        self.model, self.sap = other.train(), None
        self.follow()

    @rule(assign=st.booleans())
    def load_a_dense_state(self, assign):
        """All weights are replaced; the zeros of the masks stay."""
        assign &= len(by_parameter(self.model)) == len(self.form)  # PyTorch makes two Parameters of a shared one then
        made, state = {}, {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            is_value = value.is_floating_point() and not key.endswith("_mask")
            state[key] = made.setdefault(id(value), torch.rand_like(value) + 0.1 if is_value else value).detach()
        self.model.load_state_dict(state, assign=assign)
        if assign:
            self.sap = None
            self.follow()

    @rule()
    def remove(self, expected=None):
        expected = self.model.eval()().detach() if expected is None else expected
        assert torch_sap.remove(self.model) is self.model
        assert torch.equal(self.model.eval()(), expected)
        self.model.train()
        for path, mask in self.masks.items():
            assert self.form[path] == "plain" or not self.values()[path][~mask].any(), path
        self.form, self.masks, self.sap = dict.fromkeys(self.form, "plain"), {}, None
        self.unguarded.clear()
        if not self.foreign_before:
            assert list(self.model.state_dict()) == self.keys
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in self.model.modules())


def run(examples, steps, **how):
    found = settings(max_examples=examples, stateful_step_count=steps, deadline=None, **how)
    stateful.run_state_machine_as_test(Sequences, settings=found)


def test_sequences_of_operations():
    run(25, 8)


@pytest.mark.slow
def test_a_thousand_sequences_of_operations():
    examples = os.environ.get("FUZZ_EXAMPLES")
    run(int(examples or 1000), 10, derandomize=examples is None, print_blob=True)
