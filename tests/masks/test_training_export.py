"""torch.export, ONNX, torch.jit.trace and torch.func of timm models, pruned and after remove."""

import copy
import io

import pytest
import torch
from helpers import lookup, masked_by_hand, masks_of, value_of, weight_names
from timm_training import SHAPE, batches, each_kind, each_kind_some_slow, make, momentum, plain_step, twins
from timm_training import Hand as NoHand
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_sap import layer_unstructured, prunable_parameters, remove

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

each_state = pytest.mark.parametrize("state", ["pruned", "removed"])


def trained(kind, state):
    """A pruned and trained model in evaluation, inputs for it, and what it makes of them."""
    model, inputs = make(kind), torch.randn(SHAPE)
    layer_unstructured(model, eta_r=0.3)
    optimizer = momentum(model)
    for batch in batches(2):
        plain_step(model, optimizer, batch, NoHand(model))
    expected = model.eval()(inputs).detach()
    if state == "removed":
        remove(model)
    else:
        write_at_pruned_entries(model)
    return model, inputs, expected


def write_at_pruned_entries(model):
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            value_of(model, name).masked_fill_(~mask, 7.0)


def assert_linked(model):
    for name in weight_names(model):
        module, own = lookup(model, name)
        assert getattr(module, own) is dict(model.named_parameters()).get(name + "_orig", getattr(module, own))
        assert isinstance(getattr(module, own), torch.nn.Parameter)


@each_kind_some_slow
@each_state
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch.export.load in PyTorch 2.9
def test_torch_export(kind, state):
    model, inputs, expected = trained(kind, state)
    program = torch.export.export(model, (inputs,), strict=False)
    assert torch.equal(program.module()(inputs), expected)
    assert_linked(model)
    assert torch.equal(model(inputs), expected)
    torch.testing.assert_close(program.run_decompositions({}).module()(inputs), expected)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(inputs), expected)
    for name in weight_names(model) if state == "removed" else ():
        assert torch.equal(program.state_dict[name], value_of(model, name))


@each_kind_some_slow
@each_state
@pytest.mark.filterwarnings("ignore")  # of onnxscript and of the exporter
def test_onnx(kind, state, tmp_path):
    """The file computes what the model does; after remove its weights are the plain ones, with exact zeros."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, inputs, expected = trained(kind, state)
    try:
        torch.onnx.export(model, (inputs,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    except Exception:  # PyTorch's exporter translates neither bool masks nor, in 2.5, batch-norm: no file, no wrong one
        if (state == "pruned" and TORCH < (2, 13)) or TORCH < (2, 6):
            assert not (tmp_path / "model.onnx").exists()
            assert_linked(model)
            return
        raise
    stored = onnx.load(tmp_path / "model.onnx")
    found = ReferenceEvaluator(stored).run(None, {stored.graph.input[0].name: inputs.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
    assert_linked(model)
    arrays = {value.name: onnx.numpy_helper.to_array(value) for value in stored.graph.initializer}
    if state == "removed":
        assert not any("mask" in name or "orig" in name for name in arrays)
        for name in weight_names(model):
            zeros = int((value_of(model, name) == 0).sum())
            found = [
                int((array == 0).sum()) for array in arrays.values() if array.size == value_of(model, name).numel()
            ]
            assert 0 < zeros <= max(found), f"{name}: batch-norm that is folded into it may only add zeros"


@each_kind
@each_state
@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_jit_trace(kind, state):
    model, inputs, expected = trained(kind, state)
    traced = torch.jit.trace(model, inputs)
    torch.testing.assert_close(traced(inputs), expected)
    assert_linked(model)


def renamed(tensors, masks):
    return {name + "_orig" * (name in masks): tensor for name, tensor in tensors.items()}


def by_present_names(model, given, inputs):
    return functional_call(model, renamed(given, masks_of(model)), inputs)


def by_instance_attributes(model, given, inputs):
    """Plain tensors in the dict of a module, and no Parameter of the name: what tensordict's to_module does."""
    places = [lookup(model, name) for name in renamed(given, masks_of(model))]
    kept = [module._parameters.pop(own) for module, own in places]
    for (module, own), value in zip(places, given.values(), strict=True):
        module.__dict__[own] = value
    try:
        return model(inputs)
    finally:
        for (module, own), parameter in zip(places, kept, strict=True):
            del module.__dict__[own]
            module._parameters[own] = parameter


each_call = pytest.mark.parametrize("call", [by_present_names, by_instance_attributes])


@each_kind
@each_call
def test_a_call_computes_with_the_given_tensors_where_the_masks_are_true(kind, call):
    model, dense = twins(kind)
    model.eval(), dense.eval()
    layer_unstructured(model, eta_r=0.3)
    masks, inputs = masks_of(model), torch.randn(SHAPE)
    given = {name: torch.randn_like(value) / 10 for name, value in dense.named_parameters()}
    masked = {name: value * masks.get(name, torch.ones(())) for name, value in given.items()}
    before = {name: value.clone() for name, value in given.items()}
    names = list(model.state_dict())
    assert torch.equal(call(model, given, inputs), functional_call(dense, masked, inputs))
    assert all(torch.equal(value, before[name]) for name, value in given.items()), "they are left as they are"
    assert_linked(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert torch.equal(model(inputs), masked_by_hand(dense, masks)(inputs))


@each_kind
def test_tensors_under_the_names_of_before_are_refused(kind):
    """They would be left out silently: a state kept from before the pruning, or a torchrl loss made before it."""
    model, inputs = make(kind).eval(), torch.randn(SHAPE)
    given = {name: value.detach() * 2 for name, value in model.named_parameters()}
    layer_unstructured(model, eta_r=0.3)
    expected, names, masks = model(inputs), weight_names(model), masks_of(model)
    by_its_name = functional_call(model, renamed(given, masks), inputs)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"must not be replaced by a plain tensor .*\.weight_orig, its name"):
            functional_call(model, given, inputs)
        assert torch.equal(functional_call(model, renamed(given, masks), inputs), by_its_name), (
            "what the error asks for"
        )
        assert torch.equal(model(inputs), expected)
        assert_linked(model)
    with pytest.raises(RuntimeError, match="must not be replaced by a plain tensor"):
        functional_call(model, given, inputs)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(model(inputs), expected)
    remove(model)
    assert weight_names(model) == names
    functional_call(model, given, inputs)


def test_a_plain_tensor_left_in_a_pruned_layer_is_removed():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8))
    layer_unstructured(model, eta_r=0.3)
    mask = model[0].weight_mask.clone()
    model[0].weight = torch.ones(8, 6)
    with pytest.raises(RuntimeError, match=r"0\.weight must not be replaced by a plain tensor"):
        model(torch.ones(1, 6))
    remove(model)
    assert torch.equal(model[0].weight != 0, mask)


class Student(torch.nn.Module):
    """Calls its part with the values of a teacher, then with its own."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        self.teacher = None

    def forward(self, inputs):
        return torch.stack([functional_call(self.part, self.teacher, inputs), self.part(inputs)])


def eager(model, inputs):
    return model(inputs)


def with_given_values(model, inputs):
    return functional_call(model, {name: value.detach() for name, value in model.named_parameters()}, inputs)


def compiled(model, inputs):
    return torch.compile(model, backend="eager")(inputs)


def exported(model, inputs):
    return torch.export.export(model, (inputs,), strict=False).module()(inputs)


@pytest.mark.parametrize("around", [eager, with_given_values, compiled, exported])
@pytest.mark.parametrize("root", ["model", "part"])
@pytest.mark.filterwarnings("ignore:The tensor attribute")  # torch.export, of the teacher's
@pytest.mark.filterwarnings(
    "ignore:(Attempted to insert a get_attr|Node .* does not reference)"
)  # the same in PyTorch 2.5
def test_a_call_inside_of_a_forward(around, root):
    model, inputs = Student(), torch.randn(4, 6)
    dense = copy.deepcopy(model)
    layer_unstructured(model if root == "model" else model.part, eta_r=0.3)
    masks = masks_of(model.part)
    assert not any(mask.all() for mask in masks.values())
    model.teacher = {name: torch.randn_like(value) for name, value in model.part.named_parameters()}
    given = {name: value.clone() for name, value in model.teacher.items()}
    masked_by_hand(dense.part, masks)
    dense.teacher = {}
    for name, value in given.items():
        plain = name.removesuffix("_orig")
        dense.teacher[plain] = value * masks.get(plain, torch.ones(()))
    expected = dense(inputs)
    for _ in range(2):
        torch.testing.assert_close(around(model, inputs), expected)
        assert_linked(model.part)
        assert torch.equal(model(inputs), expected)
        assert all(torch.equal(value, given[name]) for name, value in model.teacher.items()), (
            "they are left as they are"
        )


class ReadsItsLayer(torch.nn.Module):
    """Calls a layer in one place and reads its weight in another, and before that calls it with a teacher's."""

    def __init__(self, teacher):
        super().__init__()
        self.net, self.teacher = torch.nn.ModuleDict({"layer": torch.nn.Linear(8, 8, bias=False)}), teacher

    def forward(self, inputs):
        layer = self.net["layer"]
        taught = functional_call(layer, {"weight_orig": self.teacher}, inputs)
        return taught, torch.nn.functional.linear(layer(inputs), layer.weight)


def test_a_weight_that_is_read_after_an_inner_call():
    teacher, given, inputs = torch.randn(8, 8), torch.randn(8, 8), torch.randn(2, 8)
    model = ReadsItsLayer(teacher)
    layer_unstructured(model, eta_r=0.3)
    mask = model.net["layer"].weight_mask
    for _ in range(2):
        taught, twice = functional_call(model, {"net.layer.weight_orig": given}, inputs)
        torch.testing.assert_close(taught, inputs @ (teacher * mask).T)
        torch.testing.assert_close(twice, inputs @ (given * mask).T @ (given * mask).T)
        own = model.net["layer"].weight
        torch.testing.assert_close(model(inputs)[1], inputs @ own.T @ own.T)


class Reads(torch.nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8, bias=False)

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.layer.weight)


def test_an_inner_call_of_a_module_that_reads_a_weight():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Reads()

        def forward(self, inputs):
            return functional_call(self.part, {"layer.weight_orig": teacher}, inputs), self.part(inputs)

    teacher, inputs, model = torch.randn(8, 8), torch.randn(2, 8), Outer()
    layer_unstructured(model, eta_r=0.3)
    mask, own = model.part.layer.weight_mask, model.part.layer.weight
    for _ in range(2):
        taught, student = model(inputs)
        torch.testing.assert_close(taught, inputs @ (teacher * mask).T)
        torch.testing.assert_close(student, inputs @ own.T)
        assert model.part.layer.weight is own


def test_compiled_calls_with_given_tensors():
    model, inputs = torch.nn.Sequential(torch.nn.Linear(6, 8)), torch.randn(4, 6)
    layer_unstructured(model, eta_r=0.3)
    given = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    weight = given["0.weight_orig"].clone()
    call = torch.compile(lambda given, inputs: functional_call(model, given, inputs), backend="eager")
    expected = inputs @ (weight * model[0].weight_mask).T + given["0.bias"]
    torch.testing.assert_close(call(given, inputs), expected)
    assert torch.equal(given["0.weight_orig"], weight)
    assert_linked(model)


@each_kind
def test_gradients_of_each_sample(kind):
    """torch.func.grad and vmap over functional_call give masked gradients."""
    model, dense = twins(kind)
    layer_unstructured(model, eta_r=0.3)
    masks, found = masks_of(model), []
    masked_by_hand(dense, masks)

    def loss(parameters, model, inputs):
        return functional_call(model, parameters, (inputs[None],)).square().sum()

    for each in (model.eval(), dense.eval()):
        parameters = {name: value.detach() for name, value in each.named_parameters()}
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernels
            found.append(vmap(grad(loss), (None, None, 0))(parameters, each, batches(1)[0]))
    for name, expected in found[1].items():
        ours = found[0][name + "_orig" * (name in masks)]
        torch.testing.assert_close(ours, expected * masks.get(name, torch.ones(())))
    assert_linked(model)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("how", ["functional_call", "export"])
@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export, of what it puts back itself
def test_a_call_that_fails_leaves_the_model_as_it_was(how, pairs):
    model, inputs = make("vit").eval(), torch.randn(SHAPE)
    layer_unstructured(prunable_parameters(model) if pairs else model, eta_r=0.3)
    expected, names = model(inputs), weight_names(model)
    broken = model.norm.register_forward_hook(fail)
    given = {name: value.detach() for name, value in model.named_parameters()}
    with pytest.raises(ArithmeticError, match="broken"):
        functional_call(model, given, inputs) if how == "functional_call" else torch.export.export(
            model, (inputs,), strict=False
        )
    broken.remove()
    assert torch.equal(model(inputs), expected)
    assert_linked(model)
    remove(model)
    assert weight_names(model) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def fail(*_):
    raise ArithmeticError("broken")
