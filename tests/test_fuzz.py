"""Random models, and random sequences of what people do with them. After each the invariants of a pruned model hold.

FUZZ_EXAMPLES=10000 python -m pytest -m slow tests/test_fuzz.py     more examples, other ones in each run
"""

import copy
import io
import math
import os
import pickle

import numpy as np
import pytest
import torch
from fuzz_machine import InOrder, by_parameter, weights_of
from fuzzing import Attention, Reader, Recurrent, Tied, build, rules
from helpers import FUNCTIONS, SCOPES, assert_unchanged, snapshot
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.nn.utils import prune

import torch_sap

FOREIGN = {
    "l1": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "random": lambda module: prune.random_unstructured(module, "weight", 0.3),
    "ln": lambda module: prune.ln_structured(module, "weight", 0.3, n=2, dim=0),
    "PQILayer": lambda module: torch_sap.PQILayer.apply(module, "weight", eta_r=0.2),
    "PQIGlobal": lambda module: torch_sap.PQIGlobal.apply(module, "weight", eta_r=0.2),
    "PQINeuron": lambda module: torch_sap.PQINeuron.apply(module, "weight", eta_r=0.2),
}


class Pruning(InOrder):
    """What may happen to a model."""

    # what is pruned

    @rule(scope=st.sampled_from(SCOPES), arguments=rules())
    def prune(self, scope, arguments):
        names = list(by_parameter(self.model))
        expected = self.expect(scope, arguments, names)
        report = FUNCTIONS[scope](self.model, **arguments)
        assert [tensor.name for tensor in report.tensors] == names
        self.compare(report, expected)
        self.learn(self.form, "ours")
        self.unguarded.clear()

    @rule(scope=st.sampled_from(SCOPES), arguments=rules(), data=st.data())
    def prune_pairs(self, scope, arguments, data):
        groups = by_parameter(self.model)
        names = data.draw(st.lists(st.sampled_from(sorted(groups)), min_size=1, max_size=3, unique=True), label="names")
        found = weights_of(self.model)
        paths = [path for name in names for path in groups[name]]
        before = [weight.detach().clone() for _, _, weight, _ in found.values()]
        self.unguarded.update(path for path in paths if self.form[path] != "ours")
        FUNCTIONS[scope]((found[path][:2] for path in paths), **arguments)
        self.learn(paths, "ours")
        for (path, (_, _, weight, _)), old in zip(found.items(), before, strict=True):
            assert path in paths or torch.equal(weight, old), f"{path} was not to be pruned"

    @rule(scope=st.sampled_from(SCOPES), arguments=rules(), data=st.data())
    def prune_but_for(self, scope, arguments, data):
        groups = by_parameter(self.model)
        left = data.draw(st.sampled_from(sorted(groups)), label="left out")
        if len(groups) == 1:
            return
        before = {path: weight.detach().clone() for path, (_, _, weight, _) in weights_of(self.model).items()}
        FUNCTIONS[scope](self.model, exclude=left, **arguments)
        self.learn([path for name in groups if name != left for path in groups[name]], "ours")
        for path in groups[left]:
            assert torch.equal(weights_of(self.model)[path][2], before[path])

    @rule(scope=st.sampled_from(SCOPES), data=st.data())
    def is_refused(self, scope, data):
        """A weight that is not finite: nothing changes at all."""
        found = weights_of(self.model)
        candidates = [
            path for path, (_, _, weight, mask) in found.items() if weight.numel() and (mask is None or mask.any())
        ]
        if not candidates:
            return
        path = data.draw(st.sampled_from(candidates), label="path")
        _, _, weight, mask = found[path]
        place = tuple((torch.ones_like(weight) if mask is None else mask).nonzero()[-1].tolist())
        value = weight[place].item()
        with torch.no_grad():
            weight[place] = data.draw(st.sampled_from([math.nan, math.inf]), label="value")
        before = snapshot(self.model)
        with pytest.raises(ValueError, match=path.rpartition(".")[2]):
            FUNCTIONS[scope](self.model)
        assert_unchanged(self.model, before)
        with torch.no_grad():
            weight[place] = value

    @rule(how=st.sampled_from(sorted(FOREIGN)), data=st.data())
    def prune_by_a_foreign_method(self, how, data):
        found, groups = weights_of(self.model), by_parameter(self.model)
        inside = {
            id(inner)
            for outer in self.model.modules()
            if isinstance(outer, (Attention, Reader, Recurrent, Tied))
            for inner in outer.modules()
        }
        candidates = [
            name
            for name, (module, own, weight, _) in found.items()
            if own == "weight"
            and len(groups.get(name, ())) == 1
            and id(module) not in inside
            and weight.is_contiguous()
            and weight.numel()
        ]
        path = data.draw(st.sampled_from(candidates), label="path") if candidates else None
        if path:
            FOREIGN[how](found[path][0])
            self.learn([path], "foreign")
            self.foreign_before = True

    # what rewinds

    @rule(scope=st.sampled_from(SCOPES), arguments=rules(), rewind=st.sampled_from(["init", "none"]))
    def make_a_stepper(self, scope, arguments, rewind):
        self.sap = torch_sap.SAP(self.model, scope=scope, rewind=rewind, **arguments)
        self.start_state = {name: tensor.detach().clone() for name, tensor in self.state()}
        self.learn(self.form, "ours")
        self.unguarded.clear()

    @precondition(lambda self: self.sap is not None)
    @rule()
    def step_and_rewind(self):
        before = {path: weight.detach().clone() for path, (_, _, weight, _) in weights_of(self.model).items()}
        rounds = len(self.sap.history)
        names = list(by_parameter(self.model))
        expected = self.expect(self.sap.scope, self.sap.rule.to_dict(), names)
        found = self.sap.step({"metric": 1.0})
        assert len(self.sap.history) == rounds + 1
        assert found is self.sap.history[-1]
        self.learn(self.form, "ours")
        for name, mask in expected[0].items():
            if all(
                group.c.sum() == sum(record.c for record in expected[1][key])
                for key, group in found.groups.items()
                if key in expected[1]
            ):
                np.testing.assert_array_equal(weights_of(self.model)[name][3].numpy(), mask, err_msg=name)
        rewinds = self.sap._rewind_point is not None
        for name, tensor in self.state():
            if rewinds or name in before:
                old = (self.start_state if rewinds else before)[name].to(tensor.dtype)
                mask = self.masks.get(name)
                assert torch.equal(tensor.detach(), old if mask is None else old.masked_fill(~mask, 0)), name

    # what writes, copies and takes away

    @rule(value=st.sampled_from([1.0, -0.0, math.nan]), data=st.data())
    def write(self, value, data):
        """Into a pruned weight, at pruned entries; the next forward, or the next pruning, knows nothing of it."""
        ours = [path for path in self.pruned_as("ours") if path not in self.unguarded]
        if not ours:
            return
        path = data.draw(st.sampled_from(ours), label="path")
        _, _, weight, mask = weights_of(self.model)[path]
        training = self.model.training
        expected = self.model.eval()().detach()
        with torch.no_grad():
            weight[~mask] = value
        after = data.draw(st.sampled_from(["forward", "prune", "remove"]), label="next")
        if after == "remove":
            self.remove(expected)
            self.model.eval()
        elif after == "prune":
            self.model.train(training)
            self.prune(data.draw(st.sampled_from(SCOPES)), {"gamma": 0.0})
            self.model.eval()
        np.testing.assert_array_equal(self.model().detach(), expected)
        self.model.train(training)

    @precondition(lambda self: not self.is_foreign())  # PyTorch's mechanism cannot be copied after a forward
    @rule(pickled=st.booleans())
    def copy(self, pickled):
        old, before = self.model, snapshot(self.model)
        self.model = pickle.loads(pickle.dumps(old)) if pickled else copy.deepcopy(old)
        assert torch.equal(self.model.eval()(), old.eval()())
        old.train()
        self.model.train()
        torch_sap.global_unstructured(copy.deepcopy(self.model), eta_r=1.0)
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
        for name, parameter in other.named_parameters():  # after to(dtype)
            parameter.data = parameter.data.to(dict(self.state())[name].dtype)
        for name, buffer in other.named_buffers():
            buffer.data = buffer.data.to(dict(self.state())[name].dtype)
        found = weights_of(other)
        masked = [path for path, form in self.form.items() if form != "plain"]
        if len(masked) == len(found):
            torch_sap.layer_unstructured(other, gamma=0)
        elif masked:
            torch_sap.layer_unstructured([found[path][:2] for path in masked], gamma=0)
            self.unguarded.update(masked)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other.eval()(), self.model.eval()())
        for path, mask in self.masks.items():
            self.form[path] = "ours" if self.form[path] != "plain" else "plain"
            if self.form[path] == "ours":
                assert torch.equal(weights_of(other)[path][3], mask)
        self.model, self.sap = other.train(), None
        self.follow()

    @rule(assign=st.booleans(), seed=st.integers(0, 9))
    def load_a_dense_state(self, assign, seed):
        """All weights are replaced; masks are those of the state, and their zeros are put into what was loaded."""
        assign &= len(by_parameter(self.model)) == len(self.form)  # PyTorch makes two Parameters of a shared one then
        torch.manual_seed(seed)
        state = {
            key: value
            if value.dtype is torch.bool or key.endswith("_mask") or not value.is_floating_point()
            else torch.rand_like(value) + 0.1
            for key, value in self.model.state_dict().items()
        }
        shared = {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            state[key] = shared.setdefault(id(value), state[key])
        self.model.load_state_dict(state, assign=assign)
        if assign:
            self.sap = None
            self.follow()

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def convert(self, dtype):
        self.model.to(dtype)
        self.model.zero_grad()
        self.optimizer = None

    @rule()
    def remove(self, expected=None):
        expected = self.model.eval()().detach() if expected is None else expected
        assert torch_sap.remove(self.model) is self.model
        assert torch.equal(self.model(), expected)
        self.model.train()
        found = weights_of(self.model)
        for path, mask in self.masks.items():
            if self.form[path] != "plain":
                assert torch.count_nonzero(found[path][2][~mask]) == 0
        self.form = dict.fromkeys(self.form, "plain")
        self.masks, self.sap = {}, None
        self.unguarded.clear()
        assert not prune.is_pruned(self.model)
        if not self.foreign_before:
            assert list(self.model.state_dict()) == self.keys
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in self.model.modules())

    @rule(data=st.data())
    def remove_one(self, data):
        groups = by_parameter(self.model)
        names = [name for name, paths in groups.items() if all(self.form[path] != "plain" for path in paths)]
        if not names:
            return
        for path in groups[data.draw(st.sampled_from(names), label="name")]:
            module, name, _, _ = weights_of(self.model)[path]
            prune.remove(module, name)
            self.form[path] = "plain"
            assert torch.count_nonzero(weights_of(self.model)[path][2][~self.masks.pop(path)]) == 0
        self.sap = None


def run(examples, steps, **how):
    run_state_machine_as_test(
        Pruning, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, **how)
    )


def test_sequences_of_operations():
    run(25, 8)


@pytest.mark.slow
def test_a_thousand_sequences_of_operations():
    """The same thousand in every run; FUZZ_EXAMPLES asks for a number of new ones."""
    examples = os.environ.get("FUZZ_EXAMPLES")
    run(int(examples or 1000), 10, derandomize=examples is None, print_blob=True)
