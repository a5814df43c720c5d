"""A pruned model that is changed from outside: the right result, or an error at the first use that names `remove`."""

import copy
import gc

import pytest
import torch
from helpers import assert_held, convnet, import_transformers, masks_of, mlp
from torch import nn
from torch.nn.utils import parametrize, prune

import torch_sap
from torch_sap import SAP, layer_unstructured, remove

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams"),
]
FIRST_REMOVE = r"torch_sap\.remove\(model\)"
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def pruned():
    model = mlp()
    layer_unstructured(model, eta_r=0.3)
    return model


def zeros(tensor):
    return int((tensor == 0).sum())


def train(model, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def assert_plain(model):
    """Check that nothing of a mask is left, and that the model can be called, trained and pruned."""
    assert not any(name.endswith(("_orig", "_mask")) for name in model.state_dict())
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not any(isinstance(hook, prune.BasePruningMethod) for hook in hooks)
    model(X)


# ---- a layer was replaced


class Float8Like(nn.Linear):
    """As torchao's training layers: another class with the same Parameters, and without the hooks."""

    @classmethod
    def of(cls, layer):
        new = cls(layer.in_features, layer.out_features)
        new.weight, new.bias = layer.weight, layer.bias
        return new


REPLACED = {
    "another layer": lambda layer: nn.Linear(9, 4),
    "other classes": lambda layer: nn.Linear(9, 7),
    "half of its rows": lambda layer: nn.Sequential(nn.Linear(9, 4)),
    "the same Parameters": Float8Like.of,
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_layer(name):
    model = pruned()
    model(X)
    model[3] = REPLACED[name](model[3])
    with pytest.raises(RuntimeError, match=rf"3\.weight was replaced, and 3\S*weight is dense; call {FIRST_REMOVE}"):
        model(X)
    copied = copy.deepcopy(model)
    layer_unstructured(copied, gamma=0)  # what the message says
    train(copied)
    assert_held(copied)
    assert_plain(remove(model))
    assert zeros(model[0].weight) > 0


@pytest.mark.parametrize("name", ["identity", "wrapped", "moved", "new beside it", "one less"])
def test_layers_may_be_taken_away_wrapped_and_moved(name):
    model = pruned()
    masks = masks_of(model)
    if name == "identity":
        model[3] = nn.Identity()
    elif name == "wrapped":
        model[3] = nn.Sequential(model[3], nn.Dropout(0.0))
    elif name == "moved":
        model = nn.Sequential(model)
        layer_unstructured(model, gamma=0)
        model[0] = nn.Sequential(*model[0])
    elif name == "new beside it":
        model.append(nn.Linear(4, 3))
    else:
        del model[3]
    train(model)
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            assert any(torch.equal(module.weight_mask, mask) for mask in masks.values())
            assert zeros(module.weight[~module.weight_mask]) == zeros(module.weight_mask)
    assert_plain(remove(model))


def test_a_layer_with_the_parameter_of_one_that_is_gone():
    """Pruned as a pair, so that nothing watches the model: the gradient finds out."""
    model = mlp()
    layer_unstructured([(model[3], "weight")])
    model[3] = Float8Like.of(model[3])
    gc.collect()
    loss = model(X).sum()
    with pytest.raises(RuntimeError, match=FIRST_REMOVE):
        loss.backward()


# ---- a parameter was replaced


def test_another_parameter_of_the_same_shape_is_pruned():
    for name in ("weight", "weight_orig"):
        model = pruned()
        model(X)
        setattr(model[0], name, nn.Parameter(torch.randn(9, 6)))
        train(model)
        assert_held(model)
        assert list(remove(model).state_dict()) == list(mlp().state_dict())


def grow(layer, how, rows):
    new = torch.randn(rows, 9)
    if how == "data":
        layer.weight.data = new
    else:
        setattr(layer, how, nn.Parameter(new))
    layer.bias = nn.Parameter(torch.zeros(rows))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("how", ["weight", "weight_orig", "data"])
def test_a_parameter_of_another_shape(how, rows):
    model = pruned()
    model(X)
    grow(model[3], how, rows)
    with pytest.raises(
        RuntimeError, match=rf"3\.weight must keep its shape \(4, 9\).*\({rows}, 9\); call {FIRST_REMOVE}"
    ):
        model(X)
    assert_plain(remove(model))
    assert model[3].weight.shape == (rows, 9)
    assert zeros(model[3].weight) == 0
    assert zeros(model[0].weight) > 0


def test_one_row_is_not_broadcast():
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 1))
    layer_unstructured(model, eta_r=0.3)
    model(X)
    grow(model[1], "data", 20)
    with pytest.raises(RuntimeError, match=r"1\.weight must keep its shape \(1, 9\)"):
        model(X)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied):
    transformers = import_transformers()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 24}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation="eager"
    )
    model, tokens = transformers.LlamaForCausalLM(config), torch.arange(8)[None]
    layer_unstructured(model)
    masks = masks_of(model)
    model(tokens)
    model.resize_token_embeddings(30, mean_resizing=False)
    with pytest.raises(RuntimeError, match=FIRST_REMOVE):
        model(tokens)
    assert remove(model)(tokens).logits.shape[-1] == 30
    query = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(query == 0, ~masks["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("name", ["weight", "weight_orig"])
def test_a_parametrization_of_a_pruned_weight(name):
    """PyTorch refuses the name before pruning; that of the Parameter takes it away from its mask."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = pruned()
    if name == "weight":
        with pytest.raises(ValueError, match="does not have a parameter"):
            parametrize.register_parametrization(model[0], name, Doubled())
        train(model)
        assert_held(model)
    else:
        parametrize.register_parametrization(model[0], name, Doubled())
        with pytest.raises(RuntimeError, match=FIRST_REMOVE):
            model(X)


# ---- quantization


def quantization():
    return pytest.importorskip("torch.ao.quantization")


@pytest.mark.parametrize("first", ["called", "not called"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_quantization_aware_training_keeps_the_zeros(inplace, whole, first):
    model = mlp()
    layer_unstructured(model if whole else [(model[0], "weight"), (model[3], "weight")], eta_r=0.3)
    masks = masks_of(model)
    if first == "called":
        model(X)
    model.train().qconfig = quantization().get_default_qat_qconfig("x86")
    model = quantization().prepare_qat(model, inplace=inplace)
    gc.collect()
    train(model, 3)
    assert type(model[0]) is not nn.Linear
    assert_held(model)
    assert all(torch.equal(masks_of(model)[name], mask) for name, mask in masks.items())
    layer_unstructured(model, eta_r=0.5)
    train(model)
    assert_held(model)
    assert zeros(model[0].weight) > zeros(masks["0.weight"])
    assert_plain(remove(model))


def test_remove_right_after_quantization_aware_training_was_prepared():
    model = pruned()
    masks = masks_of(model)
    model.train().qconfig = quantization().get_default_qat_qconfig("x86")
    quantization().prepare_qat(model, inplace=True)
    model[0].weight.data.add_(1)
    assert_plain(remove(model))
    assert torch.equal(model[0].weight == 0, ~masks["0.weight"])


def dynamic(model):
    return quantization().quantize_dynamic(model, {nn.Linear})


def static(model):
    model.eval().qconfig = quantization().get_default_qconfig("x86")
    quantization().prepare(model, inplace=True)
    return quantization().convert(model, inplace=True)


@pytest.mark.parametrize("convert", [dynamic, static])
def test_a_quantized_model(convert):
    model = pruned()
    masks = masks_of(model)
    quantized = convert(copy.deepcopy(model).eval())
    with pytest.raises(RuntimeError, match=rf"Linear\) that uses 0\.weight.*{FIRST_REMOVE}"):
        quantized[0](X)
    copied = copy.deepcopy(quantized)
    with pytest.raises(RuntimeError, match=FIRST_REMOVE):
        copied(X)
    for each in (quantized, copied):
        remove(each)
        assert not each[0]._forward_pre_hooks
    assert not quantized[0].weight().dequantize()[~masks["0.weight"]].any()
    if convert is dynamic:
        quantized(X)


def test_fx_quantization_computes_with_the_zeros():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    model = pruned().eval()
    masks = masks_of(model)
    prepared = quantize_fx.prepare_fx(model, quantization().get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    converted = quantize_fx.convert_fx(prepared)
    assert not converted.get_submodule("3").weight().dequantize()[~masks["3.weight"]].any()
    converted(X)


def test_fused_modules():
    model, inputs = convnet().eval(), torch.randn(2, 2, 6, 6)
    layer_unstructured(model, eta_r=0.3)
    expected, mask = model(inputs), model[0].weight_mask.clone()
    alone = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(alone(inputs), model[1](model[0](inputs)))
    assert_held(alone)
    fused = quantization().fuse_modules(model, ["0", "1", "2"])
    with pytest.raises(RuntimeError, match=FIRST_REMOVE):
        fused(inputs)
    torch.testing.assert_close(remove(fused)(inputs), expected)
    assert torch.equal(fused[0][0].weight == 0, ~mask)


class Wrapped(torch.Tensor):
    """As torchao's tensors: a class with a dispatch of its own, whose values are in another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(function))


CONVERTED = {
    "a tensor of torchao's kind": (lambda: Wrapped(torch.ones(9, 6, dtype=torch.int8)), "Wrapped"),
    "integers": (lambda: torch.ones(9, 6, dtype=torch.int8), "torch.int8"),
    "complex": (lambda: torch.ones(9, 6, dtype=torch.complex64), "torch.complex64"),
    "sparse": (lambda: torch.ones(9, 6).to_sparse(), "torch.sparse_coo"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(9, 6), 0.1, 0, torch.qint8), "torch.qint8"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_weight_that_became_another_kind_of_tensor(name):
    make, kind = CONVERTED[name]
    model = pruned()
    model(X)
    model[0].weight = nn.Parameter(make(), requires_grad=False)
    with pytest.raises(TypeError, match=rf"0\.weight must be .*{kind}.*{FIRST_REMOVE}"):
        model(X)
    remove(model)
    assert not any(key.endswith("_orig") for key, _ in model.named_parameters())
    with pytest.raises(TypeError, match=rf"weight must be .*{kind}"):
        layer_unstructured([(model[0], "weight")])


def test_a_kind_of_parameter_is_named():
    class Int8Params(nn.Parameter):
        pass

    layer = nn.Linear(6, 9)
    layer.weight = Int8Params(torch.ones(9, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight must be a real floating-point tensor.*torch\.int8 \(Int8Params\)"):
        layer_unstructured(nn.Sequential(layer))


# ---- offloading


@pytest.mark.parametrize("how", ["cpu", "cpu, buffers too", "disk", "some of it"])
def test_an_offloaded_model(how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = pruned().eval()
    expected = model(X)
    if how == "disk":
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    elif how == "some of it":
        places = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    else:
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers="buffers" in how)
    advice = rf"call accelerate\.hooks\.remove_hook_from_submodules\(model\), then {FIRST_REMOVE}"
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"weight must not be offloaded .*{advice}"):
        model(X)
    with pytest.raises(RuntimeError, match=advice):
        remove(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(remove(model)(X), expected)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)


# ---- tracing


class Reads(nn.Module):
    """A model that reads a weight without calling its module."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, inputs):
        return self.head(nn.functional.linear(inputs, self.inner.weight))


@pytest.mark.parametrize("kept", [True, False])
def test_a_trace_of_fx_leaves_the_mask_behind(kept):
    torch.manual_seed(0)
    model = Reads()
    layer_unstructured(model, eta_r=0.3)
    masks, graph = masks_of(model), torch.fx.symbolic_trace(model)
    assert not hasattr(graph.inner, "weight_mask")
    if not kept:
        del model
        gc.collect()
        with pytest.raises(RuntimeError, match=rf"inner\.weight .*traced.*{FIRST_REMOVE}"):
            train(graph)
        return
    train(graph)  # the model masks the gradients of its Parameters, and restores their zeros after steps
    assert torch.count_nonzero(graph.inner.weight_orig[~masks["inner.weight"]]) == 0
    assert torch.count_nonzero(graph.head.weight[~masks["head.weight"]]) == 0


# ---- swapped tensors


def gradients_are_masked(model):
    model.zero_grad()
    model(X.to(model[0].weight.dtype)).square().mean().backward()
    gradients = [(module.weight.grad, module.weight_mask) for module in (model[0], model[3])]
    return all(gradient.any() and not gradient[~mask].any() for gradient, mask in gradients)


@pytest.mark.parametrize("called", [True, False])
def test_a_conversion_that_swaps_tensors(called):
    model = pruned()
    if called:
        assert gradients_are_masked(model)
        model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        assert gradients_are_masked(model)
        model.zero_grad()
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(seen.append)
    assert gradients_are_masked(model)
    assert seen == [model[0].weight]
    train(model)
    assert_held(model)


def test_an_average_swapped_in_and_out():
    model = pruned()
    average = copy.deepcopy(model)
    average[0].weight.data.add_(0.1)
    for _ in range(2):
        for one, other in zip(model.parameters(), average.parameters(), strict=True):
            torch.utils.swap_tensors(one, other)
        for each in (model, average):
            assert gradients_are_masked(each)
            each.zero_grad()
            assert_held(each)
    for each in (model, average):
        train(each)
        assert_held(each)
        assert "_torch_sap_mark" not in vars(remove(each)[0].weight)


def test_stateless_calls_and_checkpointing():
    model = pruned().eval()
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(model, (values, dict(model.named_buffers())), (X,)).square().mean()

    assert not torch.func.grad(loss)(values)["0.weight_orig"][~model[0].weight_mask].any()
    for reentrant in (True, False):
        model.zero_grad()
        torch.utils.checkpoint.checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
        assert not model[0].weight.grad[~model[0].weight_mask].any()


# ---- remove


def test_remove_completes_what_lost_its_hooks():
    for library in (lambda model: layer_unstructured(model, eta_r=0.3), None):
        model = mlp()
        if library is None:
            prune.l1_unstructured(model[0], "weight", amount=0.5)
        else:
            library(model)
        mask = model[0].weight_mask.bool().clone()
        for module in model.modules():
            module._forward_pre_hooks.clear()
        with torch.no_grad():
            model[0].weight_orig.add_(1)
        assert_plain(remove(model))
        assert torch.equal(model[0].weight == 0, ~mask)
        assert set(model.state_dict()) == set(mlp().state_dict())


def test_remove_takes_hooks_of_pytorch_off_what_they_do_not_find():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    new = nn.Linear(6, 9)
    for hook in model[0]._forward_pre_hooks.values():
        new.register_forward_pre_hook(hook)
    model[0] = new
    assert_plain(remove(model))


def test_a_pruner_goes_on_after_quantization_aware_training_was_prepared():
    model = mlp()
    sap = SAP(model, rewind="none", eta_r=0.1)
    sap.step()
    model.train().qconfig = quantization().get_default_qat_qconfig("x86")
    quantization().prepare_qat(model, inplace=True)
    train(model)
    before = zeros(model[0].weight)
    sap.step()
    assert zeros(model[0].weight) > before
    train(model)
    assert_held(model)
    found = torch_sap.summary(model)
    assert found.total - found.remaining == sum(zeros(mask) for mask in masks_of(model).values())
