"""fastnorm.weight_norm_ in torch: checkpoints, copies, threads, transforms, compilation, DDP."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.modules.weight_norm import running
from fastnorm.modules.weight_norm_group import group_of
from tests.conftest import AVAILABLE
from tests.weight_norm_models import Model, assert_same_gradients, counted_calls, twins

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),
]
everywhere = pytest.mark.parametrize("backend", ["auto", *AVAILABLE])


@pytest.fixture
def x():
    return torch.randn(2, 3, 6)


@pytest.fixture
def calls(monkeypatch):
    return counted_calls(monkeypatch)


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    assert running.calls == []


@everywhere
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_and_a_checkpointed_model(backend, reentrant, x):
    alone, grouped = twins()

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            m = self.model
            x = m.first(x)
            x = checkpoint(
                lambda x: m.up(torch.relu(m.twice(x))).square(), x, use_reentrant=reentrant
            )
            return m.last(x.mean(2))

    with fastnorm.backend(backend):
        for model in (Checkpointed(alone), fastnorm.weight_norm_(Checkpointed(grouped))):
            model(x).sum().backward()
            whole = checkpoint(model.model, x.requires_grad_(), use_reentrant=reentrant)
            whole.sum().backward()
    assert_same_gradients(alone, grouped)


def test_the_backward_of_changed_parameters_is_an_error_as_torchs(x):
    _, model = twins()
    with fastnorm.backend("reference"):
        for context in (lambda: torch.autograd.graph.save_on_cpu(), torch.enable_grad):
            with context():
                y = model(x).sum()
            with torch.no_grad():
                model.first.parametrizations.weight.original1.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


def test_deepcopy_pickle_and_removal(x, calls):
    _, model = twins()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.last.parametrizations.weight.original0.mul_(2)
    with fastnorm.backend("reference"):
        assert not torch.equal(twin(x), model(x))
        assert calls == [("_forward", 5)] * 2
        assert all(module in set(twin.modules()) for module, _ in group_of(twin).layers)
        layer = copy.deepcopy(model.last)  # without the model
        torch.testing.assert_close(layer.weight, model.last.weight)
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(model)  # as torch's
        expected = model(x)
        parametrize.remove_parametrizations(model.up, "weight")
        calls.clear()
        torch.testing.assert_close(model(x), expected)
        assert calls == [("_forward", 4)]
        for module in (model.first, model.twice, model.unused, model.last):
            fastnorm.remove_weight_norm(module)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    assert set(model.state_dict()) == {
        f"{name}.{kind}" for name, _ in model.named_children() for kind in ("weight", "bias")
    }


def test_loads_a_checkpoint_of_the_layers_alone(x):
    alone, grouped = twins()
    with torch.no_grad():
        for p in alone.parameters():
            p.add_(0.1)
    grouped.load_state_dict(alone.state_dict())
    torch.testing.assert_close(grouped(x), alone(x))
    twin = Model().requires_grad_(False)
    twin = fastnorm.weight_norm_(twin)
    twin.load_state_dict(alone.state_dict(), assign=True)
    torch.testing.assert_close(twin(x), alone(x))


def test_restore_takes_the_group_off(x):
    model = Model(parametrizations.weight_norm)
    hooks = [len(h) for h in (model._forward_pre_hooks, model._forward_hooks)]
    expected = model(x)
    fastnorm.weight_norm_(model)
    report = fastnorm.restore_(model)
    assert report.changed == 6
    assert "weight norm group" in str(report)
    assert [len(h) for h in (model._forward_pre_hooks, model._forward_hooks)] == hooks
    assert not model._forward_hooks_always_called
    assert type(model.last.parametrizations.weight[0]) is parametrizations._WeightNorm
    torch.testing.assert_close(model(x), expected)


def test_threads_have_weights_of_their_own(x):
    _, model = twins()
    wait, go = threading.Barrier(2, timeout=30), []

    def meet(module, inputs):
        wait.wait()  # both are in the middle of their forward
        go.append(running.calls[-1].weights)

    model.up.register_forward_pre_hook(meet)

    def infer():
        with torch.inference_mode():
            model(x)

    thread = threading.Thread(target=infer)
    thread.start()
    y = model(x)
    thread.join()
    y.sum().backward()
    assert len(go) == 2 and go[0] is not go[1]


def test_functional_call_and_transforms(x):
    alone, grouped = twins()
    values = {name: p.detach() * 1.5 for name, p in alone.named_parameters()}

    def loss(model, values):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    for backend in ("auto", "reference"):
        with fastnorm.backend(backend):
            torch.testing.assert_close(loss(grouped, values), loss(alone, values))
            one = torch.func.grad(lambda v: loss(grouped, v))(values)
            other = torch.func.grad(lambda v: loss(alone, v))(values)
        for name in values:
            torch.testing.assert_close(one[name], other[name])


def test_initialisation_from_data_sees_what_it_changes():
    torch.manual_seed(0)
    alone = nn.Sequential(*(fastnorm.weight_norm(nn.Linear(6, 6)) for _ in range(3)))
    grouped = fastnorm.weight_norm_(copy.deepcopy(alone))
    x = torch.randn(64, 6) * 3 + 1
    for model in (alone, grouped):
        torch.manual_seed(1)
        assert fastnorm.data_dependent_init_(model, x) == ["0", "1", "2"]
    torch.testing.assert_close(grouped(x), alone(x))
    torch.testing.assert_close(grouped(x).std(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("part", ["whole", "layer"])
def test_compiled_code_computes_each_weight_alone(backend, part, x, calls):
    alone, grouped = twins()
    torch.compiler.reset()
    with fastnorm.backend(backend):
        if part == "whole":
            compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
        else:  # inside a forward that is not compiled
            grouped.twice.compile(fullgraph=True, backend="aot_eager")
            compiled = grouped
        for _ in range(2):
            for model in (alone, compiled):
                model.zero_grad()
                model(x).square().sum().backward()
    assert_same_gradients(alone, grouped)
    if part == "whole":
        assert calls == []


# what torch.jit says of every check of a shape
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_exported_and_traced_programs_hold_torchs_operators(backend, x):
    alone, grouped = twins()
    with fastnorm.backend(backend):
        program = torch.export.export(grouped, (x,))
        assert not any("fastnorm" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), alone(x))
        traced = torch.jit.trace(grouped, (x,))
        assert "fastnorm::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), alone(x))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# of g where its strides are those of torch.norm_except_dim: torch's own weight norm has it too
@pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")
@pytest.mark.usefixtures("one_rank")
def test_distributed_data_parallel_leaves_unused_layers_alone(x):
    alone, grouped = twins()
    with fastnorm.backend("reference"):
        for module in (alone, grouped):
            model = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
            for _ in range(2):
                model(x).square().sum().backward()
    assert_same_gradients(alone, grouped)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("grouped", ["units", "model"])
def test_fully_sharded_units_are_grouped_each(grouped, calls):
    alone = nn.Sequential(
        *(nn.Sequential(*(fastnorm.weight_norm(nn.Linear(4, 4)) for _ in "ab")) for _ in "ab")
    )
    model = copy.deepcopy(alone)
    for part in model if grouped == "units" else [model]:
        fastnorm.weight_norm_(part)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    with fastnorm.backend("reference"):
        for m in (alone, model):
            m(torch.ones(2, 4)).square().sum().backward()
    # when the whole model's forward begins, the parameters are sharded: each layer does it alone
    forwards = [count for op, count in calls if op == "_forward"]
    assert forwards == ([2, 2] if grouped == "units" else [])
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
def test_a_vocoder(backend, calls):
    transformers = pytest.importorskip("transformers")
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=32,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 5],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
    )
    alone = transformers.SpeechT5HifiGan(config)
    alone.apply_weight_norm()
    grouped = fastnorm.weight_norm_(copy.deepcopy(alone))
    x = torch.randn(1, 4, 8)
    with fastnorm.backend(backend):
        for model in (alone, grouped):
            model(x).square().sum().backward()
    assert_same_gradients(alone, grouped)
    if backend != "auto":
        assert calls == [("_forward", 20), ("_backward", 20)]
