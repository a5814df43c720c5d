"""save_sparse and load_sparse: every bit comes back, in the form that was saved, in the documented layout."""

import copy
import math

import pytest
import torch
from helpers import FUNCTIONS, SCOPES, assert_held, assert_unchanged, bits, convnet, mask_of, masks_of, mlp, snapshot
from timm_training import make
from torch import nn
from torch.nn.utils import prune

import torch_sap
from torch_sap import load_sparse, remove, save_sparse

safetensors = pytest.importorskip("safetensors")


class Attention(nn.Module):
    """Weights under names of all kinds, two of them one tensor."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(9, 8), nn.LSTM(8, 8, num_layers=2)
        self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.lstm(self.embedding(x))[0]
        return self.head(self.attention(x, x, x)[0])


def conv_of_all_kinds():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 6, 2, groups=2)
    )


MODELS = {
    "mlp": mlp,
    "half": lambda: mlp(torch.float16),
    "bfloat16": lambda: mlp(torch.bfloat16),
    "double": lambda: mlp(torch.float64),
    "convolutions": conv_of_all_kinds,
    "channels_last": lambda: conv_of_all_kinds().to(memory_format=torch.channels_last),
    "attention": Attention,
    "eva": lambda: make("eva"),
}
each_model = pytest.mark.parametrize("kind", MODELS)


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert sorted(ours) == sorted(theirs)  # PyTorch's methods put weight_orig behind bias
    for name, value in ours.items():
        assert value.dtype is theirs[name].dtype
        assert torch.equal(bits(value), bits(theirs[name])), name


@each_model
@pytest.mark.parametrize("before", ["dense", "pruned", "pruned otherwise"])
def test_a_pruned_model_comes_back_bit_for_bit(kind, before, tmp_path):
    model = MODELS[kind]()
    torch_sap.layer_unstructured(model, gamma=2.0)
    saved = snapshot(model)
    save_sparse(model, tmp_path / "model.safetensors")
    assert_unchanged(model, saved)
    other = MODELS[kind]()
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.fill_(1.0)
    if before == "pruned":
        torch_sap.layer_unstructured(other)
    elif before == "pruned otherwise":
        module, name = torch_sap.prunable_parameters(other)[0]
        prune.custom_from_mask(module, name, torch.rand_like(getattr(module, name)) > 0.5)
    assert load_sparse(other, tmp_path / "model.safetensors") is other
    assert_same(other, model)
    assert_held(other)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_loaded_model_trains_and_is_pruned_further_like_the_saved_one(scope, tmp_path):
    model = convnet()
    FUNCTIONS[scope](model, gamma=2.0)
    save_sparse(model, tmp_path / "model.safetensors")
    other = load_sparse(convnet(), tmp_path / "model.safetensors")
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            each(torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        FUNCTIONS[scope](each)
    assert_same(other, model)
    assert_held(other)


def test_weights_read_without_their_module_are_held_after_loading(tmp_path):
    model = make("eva")
    nn.init.normal_(model.head.weight)  # timm's zeros would make every output 0
    torch_sap.global_unstructured(model)
    save_sparse(model, tmp_path / "model.safetensors")
    other = load_sparse(make("eva"), tmp_path / "model.safetensors").eval()
    images = torch.randn(2, 3, 32, 32)
    expected = other(images)
    with torch.no_grad():
        for module, name in torch_sap.prunable_parameters(other):
            getattr(module, name)[~getattr(module, name + "_mask")] = 7.0
    assert torch.equal(other(images), expected)
    assert expected.any()


def test_negative_zero_nan_infinity_and_subnormals(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    torch_sap.layer_unstructured(model)
    with torch.no_grad():
        kept = model[0].weight_mask.nonzero()[:5]
        for place, value in zip(kept, [-0.0, 0.0, math.nan, -math.inf, 1e-42], strict=True):
            model[0].weight[tuple(place)] = value
        model[1].bias[0] = -0.0
    save_sparse(model, tmp_path / "model.safetensors")
    assert_same(load_sparse(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), tmp_path / "model.safetensors"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["masked", "removed"])
def test_zeros_of_pytorchs_masks_take_no_place(how, dtype, tmp_path):
    """Half of them are -0.0."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 64)).to(dtype)
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.9)
        assert torch.signbit(layer.weight[layer.weight == 0]).any()
    ours = copy_of_zeros(model, dtype)
    if how == "removed":
        remove(model)
    save_sparse(model, tmp_path / "a.safetensors")
    save_sparse(ours, tmp_path / "b.safetensors")
    assert abs((tmp_path / "a.safetensors").stat().st_size - (tmp_path / "b.safetensors").stat().st_size) < 100
    found = load_sparse(copy_of_zeros(model, dtype), tmp_path / "a.safetensors")
    for layer, same in ((model[0], found[0]), (model[2], found[2])):
        assert torch.equal(same.weight, layer.weight)
        assert not torch.signbit(same.weight[same.weight == 0]).any()


def copy_of_zeros(model, dtype):
    """A dense model with the same weights, all zeros +0.0."""
    made = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 64)).to(dtype)
    with torch.no_grad():
        for layer, same in ((model[0], made[0]), (model[2], made[2])):
            same.weight.copy_(layer.weight.masked_fill(layer.weight == 0, 0))
    return made


def test_only_zeros_are_left_out_of_a_tensor_without_a_mask(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    special = torch.tensor([-0.0, 1e-42, -1e-42, math.nan, math.inf, -math.inf, torch.finfo(torch.float32).tiny])
    with torch.no_grad():
        model[0].weight.zero_().view(-1)[: len(special)] = special
    save_sparse(model, tmp_path / "a.safetensors")
    found = load_sparse(nn.Sequential(nn.Linear(64, 64)), tmp_path / "a.safetensors")
    special[0] = 0.0
    assert torch.equal(bits(found[0].weight.view(-1)[: len(special)]), bits(special))
    assert (tmp_path / "a.safetensors").stat().st_size < 64 * 64 * 4 / 4


def test_tensors_of_few_entries(tmp_path):
    def few():
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
        model.register_buffer("number", torch.zeros(()))
        model.register_buffer("one", torch.zeros(()).expand(1).clone())
        model.register_buffer("none", torch.zeros(0, 3))
        return model

    model = few()
    torch_sap.layer_unstructured(model)
    model.one = torch.ones(()).expand(1)
    for layer, left in zip(model, (0, 1), strict=True):
        layer.weight_mask.view(-1)[left:] = False
        layer(torch.ones(1, layer.in_features))  # a forward restores the zeros
    save_sparse(model, tmp_path / "model.safetensors")
    other = load_sparse(few(), tmp_path / "model.safetensors")
    assert torch.equal(other.one, model.one)
    for each in (model, other):
        del each.one  # of a stride that the comparison of bits does not take
    assert_same(other, model)


def test_tensors_that_are_not_pruned_stay_so(tmp_path):
    model = convnet()
    torch_sap.layer_unstructured(model, exclude="3")
    save_sparse(model, tmp_path / "model.safetensors")
    other = load_sparse(convnet(), tmp_path / "model.safetensors")
    assert_same(other, model)
    assert not hasattr(other[3], "weight_mask")
    everywhere = convnet()
    torch_sap.layer_unstructured(everywhere)
    load_sparse(everywhere, tmp_path / "model.safetensors")
    assert everywhere[3].weight_mask.all()
    assert torch.equal(everywhere[3].weight, model[3].weight)


def test_a_dense_model_is_stored_as_it_is(tmp_path):
    model = Attention()
    save_sparse(model, tmp_path / "model.safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {"head.weight"}
    other = Attention()
    load_sparse(other, tmp_path / "model.safetensors")
    assert_same(other, model)
    assert not prune.is_pruned(other)
    assert other.head.weight is other.embedding.weight


def test_a_removed_model_is_as_small_and_comes_back_plain(tmp_path):
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100))
    torch_sap.layer_unstructured(model, eta_r=2.0)
    save_sparse(model, tmp_path / "pruned.safetensors")
    remove(model)
    with torch.no_grad():
        model[0].weight.view(-1)[0] = math.nan
    save_sparse(model, tmp_path / "removed.safetensors")
    sizes = [(tmp_path / name).stat().st_size for name in ("pruned.safetensors", "removed.safetensors")]
    assert sizes[1] == pytest.approx(sizes[0], abs=16)
    other = load_sparse(nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100)), tmp_path / "removed.safetensors")
    assert_same(other, model)
    assert not prune.is_pruned(other)


def test_models_pruned_by_pytorch_with_float_masks_and_biases(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    prune.random_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[0], "bias", amount=0.5)
    save_sparse(model, tmp_path / "model.safetensors")
    other = load_sparse(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), tmp_path / "model.safetensors")
    assert torch.equal(other[0].bias_mask, model[0].bias_mask.bool())
    assert torch.equal(other[0].weight, model[0].weight_orig * model[0].weight_mask)
    removed = remove(model).state_dict()  # with -0.0 where PyTorch's product is
    assert all(torch.equal(value, removed[name]) for name, value in remove(other).state_dict().items())


def test_names_that_share_a_tensor_only_in_the_model_or_only_in_the_file(tmp_path):
    tied, apart = Attention(), Attention()
    apart.head.weight = nn.Parameter(apart.head.weight.detach() + 1)
    for model in (tied, apart):
        torch_sap.layer_unstructured(model, include="embedding")
    save_sparse(tied, tmp_path / "tied.safetensors")
    save_sparse(apart, tmp_path / "apart.safetensors")
    load_sparse(apart, tmp_path / "tied.safetensors")
    assert torch.equal(apart.head.weight, tied.head.weight)
    before = snapshot(tied)
    with pytest.raises(ValueError, match=r"embedding.weight and head.weight are one tensor in the model, but two in"):
        load_sparse(tied, tmp_path / "apart.safetensors")
    assert_unchanged(tied, before)


def test_data_parallel_wrappers_are_not_in_the_names(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(mlp())
        torch_sap.layer_unstructured(parallel)
        save_sparse(parallel, tmp_path / "model.safetensors")
    finally:
        torch.distributed.destroy_process_group()
    assert_same(load_sparse(mlp(), tmp_path / "model.safetensors"), parallel.module)


@each_model
def test_masks_alone(kind, tmp_path):
    model, other = MODELS[kind](), MODELS[kind]()
    torch_sap.layer_unstructured(model, gamma=2.0)
    save_sparse(model, tmp_path / "masks.safetensors", what="masks")
    save_sparse(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.fill_(1.0)
    again = copy.deepcopy(other)
    assert load_sparse(other, tmp_path / "masks.safetensors", what="masks") is other
    load_sparse(again, tmp_path / "model.safetensors", what="masks")
    assert_same(again, other)
    assert_held(other)
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, mask_of(other, name))
        module, own = other.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        assert torch.equal(getattr(module, own) == 1.0, mask)
    size = (tmp_path / "masks.safetensors").stat().st_size
    entries = sum(mask.numel() for mask in masks_of(model).values())
    assert size < entries / 8 + 2**14


def test_loaded_masks_replace_others(tmp_path):
    model, other = mlp(), mlp()
    torch_sap.layer_unstructured(model, exclude="3")
    torch_sap.neuron_unstructured(other, eta_r=0.5)
    save_sparse(model, tmp_path / "masks.safetensors", what="masks")
    values = {name: mask & mask_of(other, name) for name, mask in masks_of(model).items()}
    load_sparse(other, tmp_path / "masks.safetensors", what="masks")
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, mask_of(other, name))
        module = other.get_submodule(name.rpartition(".")[0])
        assert torch.equal(module.weight != 0, values[name])


def test_bytes_on_disk(tmp_path):
    """Values, one bit per weight, 8 bytes per row, and the shape: nothing else but the header."""
    model = nn.Sequential(nn.Linear(100, 30), nn.Conv2d(3, 8, 3, bias=False))
    report = torch_sap.layer_unstructured(model, eta_r=1.0)
    save_sparse(model, tmp_path / "model.safetensors")
    stored = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(stored[:8], "little")
    rows = 30 * (math.ceil(100 / 8) + 8) + 8 * (math.ceil(27 / 8) + 8)
    assert len(stored) - header == 4 * report.remaining + rows + 2 * 16 + 4 * 30


def test_the_layout_is_the_documented_one(tmp_path):
    model = nn.Sequential(nn.Linear(10, 3, bias=False))
    torch_sap.layer_unstructured(model, gamma=2.0)
    save_sparse(model, tmp_path / "model.safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    mask, weight = model[0].weight_mask, model[0].weight.detach()
    assert set(found) == {"0.compressed", "0.bitmask", "0.shape", "0.row_offsets"}
    assert found["0.shape"].tolist() == [3, 10]
    assert torch.equal(found["0.compressed"], weight[mask])
    assert found["0.row_offsets"].tolist() == [0, int(mask[0].sum()), int(mask[:2].sum())]
    for row in range(3):
        places = [8 * byte + bit for byte in range(2) for bit in range(8) if found["0.bitmask"][row, byte] >> bit & 1]
        assert places == mask[row].nonzero().flatten().tolist()


def test_parameters_that_share_memory(tmp_path):
    def make():
        model, memory = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4, 4)
        for layer, part in zip(model, memory, strict=True):
            layer.weight = nn.Parameter(part)
        model[1].bias = nn.Parameter(model[0].bias.detach())
        return model

    model, other = make(), make()
    save_sparse(model, tmp_path / "model.safetensors")
    assert_same(load_sparse(other, tmp_path / "model.safetensors"), model)


def test_files_have_the_usual_permissions(tmp_path):
    save_sparse(mlp(), tmp_path / "model.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_expanded_buffer_is_refused_and_nothing_is_changed(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(6, 6))
        model.register_buffer("position", torch.arange(6).expand(3, 6))
        return model

    model = make()
    torch_sap.layer_unstructured(model)
    save_sparse(model, tmp_path / "file.safetensors")
    other = make()
    with pytest.raises(ValueError, match="position must have memory of its own for each entry"):
        load_sparse(other, tmp_path / "file.safetensors")
    assert list(other.state_dict()) == ["position", "0.weight", "0.bias"]
    other.position = other.position.clone()
    assert torch.equal(load_sparse(other, tmp_path / "file.safetensors")[0].weight, model[0].weight)


class OwnMask(nn.Linear):
    weight_mask = None


def test_a_layer_with_its_own_mask_is_refused_and_nothing_is_changed(tmp_path):
    model, other = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6), OwnMask(6, 6))
    torch_sap.layer_unstructured(model)
    save_sparse(model, tmp_path / "file.safetensors")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"1\.weight needs the names weight_orig and weight_mask in its layer"):
        load_sparse(other, tmp_path / "file.safetensors")
    assert_unchanged(other, before)
    other(torch.ones(1, 6))
