"""What summary and verify share: examples of all kinds, whole weights, and a model that stays exactly as it was."""

import pytest
import torch
from helpers import assert_unchanged, bits, mlp, snapshot
from torch import nn
from weighted import vector

import torch_sap
from torch_sap import summary, verify

each_check = pytest.mark.parametrize("check", [summary, verify])


class Restless(nn.Module):
    """Changes all that a forward can change, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("latest", torch.full((1,), float("nan")))
        self.register_buffer("late", None)
        self.cache = None

    def forward(self, x):
        self.calls += 1
        self.late = x.mean(0)
        self.register_buffer("new", x.mean(1))
        self.latest = x.mean().view(1)
        self.cache = x
        return self.dropout(self.norm(self.linear(x))) + torch.rand_like(x)


@each_check
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_exactly_as_it_was(check, fails):
    model = Restless().train()
    model.dropout.eval()
    torch_sap.layer_unstructured(model)
    model(vector()).sum().backward()
    model.cache = model.late = None
    del model.new
    gradients = [bits(parameter.grad) for parameter in model.parameters()]
    before, calls, rng = snapshot(model), model.calls, torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            check(model, torch.ones(3, 5))
    else:
        check(model, torch.ones(3, 8))
    assert torch.equal(torch.get_rng_state(), rng)
    assert_unchanged(model, before)
    assert model.cache is model.late is None
    assert not hasattr(model, "new")
    assert model.calls is calls
    assert all(torch.equal(bits(p.grad), g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_modules_of_torchscript_get_their_mode_back():
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Dropout()))
    torch_sap.layer_unstructured(model)
    verify(model.train(), vector())
    assert [module.training for module in model] == [True, True]


@each_check
def test_examples_are_tensors_arguments_or_keywords(check):
    model = nn.MultiheadAttention(8, 2)
    torch_sap.layer_unstructured(model)
    query, key = vector(), vector()
    by_position = check(model, (query, key, key))
    assert by_position == check(model, {"query": query, "key": key, "value": key})
    assert check(nn.Linear(8, 8), vector()) if check is summary else by_position.effective


@pytest.fixture
def one_process(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs the package torch with gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@each_check
@pytest.mark.usefixtures("one_process")
def test_the_module_inside_data_parallel_runs_the_example(check):
    parallel = nn.parallel.DistributedDataParallel(mlp())
    torch_sap.layer_unstructured(parallel)
    parallel.forward = None  # it exchanges buffers, and waits for the other processes
    found = check(parallel, torch.randn(3, 6))
    assert [weight.name for weight in (found.tensors if check is summary else found.weights)] == [
        "0.weight",
        "3.weight",
    ]


@each_check
@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_refused(check):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Linear(8, 8)
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, init_device_mesh("cpu", (1,)), [Shard(0)]))
    torch_sap.layer_unstructured(model)
    with pytest.raises(NotImplementedError, match=r"weight is sharded \(a DTensor\), but .* needs whole weights"):
        check(model, vector())
