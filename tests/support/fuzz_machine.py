"""What the fuzz tests know of a model and of its masks, and the invariants that hold after every operation."""

import copy

import numpy as np
import reference
import torch
from fuzzing import build, trees
from helpers import SCOPES
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn
from torch.nn.utils import prune

import torch_sap


class OfOthers(torch.optim.SGD):
    """An optimizer that torch_sap knows nothing of: what its momentum makes of zeros has to be undone."""


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-4),
    "of others": lambda parameters: OfOthers(parameters, lr=0.02, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, eps=1e-4),
}


def weights_of(model):
    """From the dotted path before pruning to the module, the name, the Parameter and the mask; a path a holder."""
    found = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        masks = dict(module.named_buffers(recurse=False))
        for now, parameter in own.items():
            name = now.removesuffix("_orig")
            if "weight" in name and parameter.dim() > 1:
                found[f"{path}.{name}"] = (module, name, parameter, masks.get(name + "_mask"))
    return found


def by_parameter(model):
    """From the first path of each Parameter to all its holders in weights_of."""
    groups = {}
    for path, (_, _, parameter, _) in weights_of(model).items():
        groups.setdefault(id(parameter), []).append(path)
    return {paths[0]: paths for paths in groups.values()}


def methods_of(module, name):
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name
    ]


class Machine(RuleBasedStateMachine):
    """A model, what is known of its masks, and what has to hold all the time."""

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

    def pruned_as(self, form):
        return sorted(path for path, known in self.form.items() if known == form)

    def is_foreign(self):
        return "foreign" in self.form.values()

    def state(self):
        """Parameters and buffers by their names before pruning, without masks."""
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if not name.endswith("_mask"):
                yield name.removesuffix("_orig"), tensor

    def expect(self, scope, arguments, names):
        """The reference's masks and records for the weights as they are."""
        found = weights_of(self.model)
        holders = {name: [found[path] for path in by_parameter(self.model)[name]] for name in names}
        masks = {
            name: np.logical_and.reduce(
                [np.ones(of_one[0][2].shape, bool), *(m.bool().numpy() for *_, m in of_one if m is not None)]
            )
            for name, of_one in holders.items()
        }
        weights = {name: of_one[0][2].detach().double().numpy() * masks[name] for name, of_one in holders.items()}
        transposed = {
            name: module.groups
            for name, ((module, *_), *_) in holders.items()
            if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        }
        weights = {name: np.nan_to_num(weight) for name, weight in weights.items()}
        return reference.prune(weights, masks, scope, transposed=transposed, **arguments)

    def compare(self, report, expected):
        masks, records = expected
        found = weights_of(self.model)
        exact = True
        for name, of_group in records.items():
            group = report.groups[name]
            alive = group.d > 0
            wanted = [record for record in of_group if record.d]
            assert group.d[alive].tolist() == [record.d for record in wanted]
            np.testing.assert_allclose(group.index[alive], [record.index for record in wanted], rtol=0, atol=1e-10)
            for c, record in zip(group.c[alive], wanted, strict=True):
                if c != record.c:  # the two round I differently, which shows where d - r is a whole number
                    share = report.hyperparameters["gamma"] * (record.d - record.r)
                    limit = min(share, report.hyperparameters["beta"] * record.d)
                    assert abs(c - record.c) == 1, name
                    assert abs(limit - round(limit)) < 1e-6, f"{name}: {c} pruned, not {record.c}"
                    exact = False
        for name, mask in masks.items():
            now = found[name][3].numpy()
            if exact:
                np.testing.assert_array_equal(now, mask, err_msg=name)
        assert report.remaining == sum(int(found[name][3].sum()) for name in masks)
        assert report.pruned == sum(int(group.c.sum()) for group in report.groups.values())

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
            assert len(methods_of(module, name)) == (mask is not None), path
            if mask is not None:
                assert torch.equal(mask.bool(), self.masks[path]), path
            if self.form[path] == "ours":
                assert mask.dtype is torch.bool
                assert getattr(module, name) is weight
                assert torch.count_nonzero(weight.detach()[~mask]) == 0, path

    @invariant()
    def nothing_grows(self):
        groups = by_parameter(self.model)
        for path, (module, _, weight, _) in weights_of(self.model).items():
            tensors = len(list(module.named_parameters(recurse=False, remove_duplicate=False)))
            for kind in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
                assert len(getattr(module, kind)) <= tensors, (path, kind)
            assert len(module._forward_pre_hooks) <= tensors + 1
            assert len(module._forward_hooks) <= 1
            holders = max((len(paths) for paths in groups.values() if path in paths), default=1)
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                assert len(getattr(weight, kind, None) or ()) <= holders, (path, kind)


class Training(Machine):
    """Training by optimizers that live on while the model is pruned."""

    @rule(how=st.sampled_from(sorted(OPTIMIZERS)), steps=st.integers(1, 2))
    def train(self, how, steps):
        if self.optimizer is None:
            self.optimizer = OPTIMIZERS[how](self.model.parameters())
        for _ in range(steps):
            dense = None if self.is_foreign() else torch_sap.remove(copy.deepcopy(self.model))
            self.optimizer.zero_grad()
            output = self.model()
            output.tanh().sum().backward()
            found = weights_of(self.model)
            for path in self.pruned_as("ours"):
                _, _, weight, mask = found[path]
                assert weight.grad is None or torch.count_nonzero(weight.grad[~mask]) == 0, path
            if dense is not None:
                dense.zero_grad()
                other = dense()
                assert torch.equal(output, other), "the pruned model computes what the dense one with zeros does"
                other.tanh().sum().backward()
                for path, (_, _, weight, _) in weights_of(dense).items():
                    mask, grad = self.masks.get(path), found[path][2].grad
                    if grad is not None:
                        kept = slice(None) if mask is None else mask
                        assert torch.equal(grad[kept], weight.grad[kept]), path
            self.optimizer.step()
        assert all(parameter.isfinite().all() for parameter in self.model.parameters())


class InOrder(Training):
    """What shows only in an order that chance seldom brings. The steps are rules of the machine."""

    @rule(how=st.sampled_from(sorted(OPTIMIZERS)), scope=st.sampled_from(SCOPES), steps=st.integers(1, 2))
    def prune_between_steps(self, how, scope, steps):
        """The optimizer has momentum of the entries that are pruned then; the invariants look right after its step."""
        self.optimizer = None
        self.train(how, steps)
        self.prune(scope, {"eta_r": 1.0})
        self.train(how, 1)

    @rule(scope=st.sampled_from(SCOPES), rewind=st.sampled_from(["init", "none"]))
    def rewind_after_training(self, scope, rewind):
        self.make_a_stepper(scope, {"eta_r": 1.0}, rewind)
        for _ in range(2):
            self.optimizer = None
            self.train("sgd", 1)
            self.step_and_rewind()

    @rule(scope=st.sampled_from(SCOPES), pickled=st.booleans())
    def train_a_copy(self, scope, pickled):
        self.prune(scope, {"eta_r": 1.0})
        if not self.is_foreign():
            self.copy(pickled)
            self.train("sgd", 2)
