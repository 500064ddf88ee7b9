"""Synchronised batch norm: on 2, 3 and 4 ranks, equal to one process with the whole batch; and as a
layer and a conversion in one process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

import fastnorm
from fastnorm.functional import sync_batch_norm
from tests.batch_norm_twins import outcome, results, same_state, torch_warns, twins
from tests.distributed import Collectives, parametrize
from tests.distributed import outcome as outcome_of_ranks
from tests.distributed_sync import BACKENDS


@parametrize("tests.distributed_sync_values", "tests.distributed_sync_layer")
def test_every_rank(module: str, ranks: int, name: str) -> None:
    wrong = outcome_of_ranks(module, ranks, name)
    assert not wrong, wrong


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


# the layer


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_one_process_is_batch_norm(backend: str) -> None:
    """Also in a group of one: nobody is asked, and torch's errors are raised."""
    x, r = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    theirs, ours = twins(nn.BatchNorm1d)
    fastnorm.convert_sync_batchnorm(ours)
    for expected, found in zip(results(theirs, x), results(ours, x), strict=True):
        torch.testing.assert_close(found, expected)
    ours.activation = "silu"
    torch.testing.assert_close(ours(x, r), F.silu(theirs(x) + r))
    same_state(theirs, ours)
    one = torch.randn(1, 5, dtype=torch.float64)
    assert outcome(lambda: ours(one)) == outcome(lambda: theirs(one))
    same_state(theirs, ours)


def test_group_of_one_asks_nobody(world: dist.ProcessGroup) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    for group in (None, world):
        theirs, ours = twins(nn.BatchNorm1d)
        fastnorm.convert_sync_batchnorm(ours, group)
        with Collectives() as collectives:
            found = results(ours, x)
        assert collectives.take() == {}
        for expected, mine in zip(results(theirs, x), found, strict=True):
            torch.testing.assert_close(mine, expected)


def test_a_destroyed_group_is_said(world: dist.ProcessGroup) -> None:
    layer = fastnorm.SyncBatchNorm(5, process_group=world)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="process_group does not exist any more"):
        layer(torch.randn(3, 5))
    assert layer.num_batches_tracked == 0
    assert layer.eval()(torch.randn(3, 5)).shape == (3, 5)
    layer.train().process_group = None
    assert layer(torch.randn(3, 5)).shape == (3, 5)


def test_it_is_a_batch_norm_that_ddp_accepts_on_a_cpu() -> None:
    layer = fastnorm.SyncBatchNorm(4, eps=1e-3, activation="silu")
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert repr(layer).startswith("SyncBatchNorm(4, eps=0.001,")
    assert repr(layer).endswith("activation='silu')")
    state = nn.BatchNorm2d(4).state_dict()
    assert list(layer.state_dict()) == list(state)
    layer.load_state_dict(state)
    with torch.device("meta"):
        empty = fastnorm.SyncBatchNorm(4, dtype=torch.bfloat16)
    assert empty.weight.is_meta
    assert empty.to_empty(device="cpu").running_var.dtype == torch.bfloat16
    assert fastnorm.SyncBatchNorm(4, affine=False, track_running_stats=False).state_dict() == {}


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(3, 4)
    not_a_group = r"must be a torch.distributed.ProcessGroup or None, got (str|list): make one with"
    with pytest.raises(TypeError, match=not_a_group):
        fastnorm.SyncBatchNorm(4, process_group="nccl")
    with pytest.raises(TypeError, match=not_a_group):
        fastnorm.convert_sync_batchnorm(nn.BatchNorm1d(4), [0, 1])
    with pytest.raises(TypeError, match=not_a_group):
        sync_batch_norm(x, None, None, process_group="gloo")
    with pytest.raises(ValueError, match="unknown activation 'swoosh': choose one of identity,"):
        fastnorm.SyncBatchNorm(4, activation="swoosh")
    with pytest.raises(ValueError, match="unknown activation 'swoosh': choose one of identity,"):
        sync_batch_norm(x, None, None, activation="swoosh")
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        fastnorm.SyncBatchNorm(4)(torch.randn(4))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        fastnorm.SyncBatchNorm(0)(torch.randn(3, 0))
    with pytest.raises(TypeError, match=r"changes a torch.nn.Module in place, got Tensor"):
        fastnorm.convert_sync_batchnorm(x)  # type: ignore[arg-type]


def test_copies_share_the_group_which_is_not_pickled(world: dist.ProcessGroup) -> None:
    model = nn.Sequential(fastnorm.SyncBatchNorm(4, activation="relu"))
    twin = pickle.loads(pickle.dumps(model))
    same_state(model, twin)
    assert twin[0].activation == "relu"
    model[0].process_group = world
    assert copy.deepcopy(model)[0].process_group is world
    with pytest.raises(TypeError, match="ProcessGroup"):
        pickle.dumps(model)


def test_update_bn_finds_it() -> None:
    batches = [torch.randn(6, 5, dtype=torch.float64) + i for i in range(3)]
    model = nn.Sequential(fastnorm.SyncBatchNorm(5, dtype=torch.float64))
    swa_utils.update_bn(batches, model)
    torch.testing.assert_close(model[0].running_mean, torch.stack(batches).mean((0, 1)))


@torch_warns
def test_programs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), fastnorm.SyncBatchNorm(4))
    x = torch.randn(5, 3)
    traced = torch.fx.symbolic_trace(model)  # also in training: the layer is taken whole
    assert traced.get_submodule("1") is model[1]
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))
    graph = torch.export.export(model, (x,)).graph
    assert "fastnorm" not in str(graph)  # such programs run where this package is not installed
    with pytest.raises(RuntimeError, match=r"TorchScript has no collectives.*restore_\(model\)"):
        torch.jit.script(model)


# the conversion


def test_convert_takes_torchs_and_ours_as_they_are(world: dist.ProcessGroup) -> None:
    layers = (
        nn.BatchNorm1d(4, eps=1e-3, momentum=None),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm3d(4, track_running_stats=False),
        nn.SyncBatchNorm(4, dtype=torch.float64),
        fastnorm.BatchNorm1d(4).eval(),
        fastnorm.BatchNormAct2d(4, activation="silu"),
        fastnorm.BatchNormAct3d(4, activation="relu").requires_grad_(False),
        fastnorm.SyncBatchNorm(4, activation="gelu"),
    )
    model = nn.ModuleDict({str(i): nn.Sequential(layer) for i, layer in enumerate(layers)})
    before = copy.deepcopy(model)
    state = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    called: list[nn.Module] = []
    layers[0].register_forward_hook(lambda module, inputs, y: called.append(module))
    assert fastnorm.convert_sync_batchnorm(model) is model
    for i, layer in enumerate(layers):
        twin = before[str(i)][0]
        assert model[str(i)][0] is layer
        assert type(layer) is fastnorm.SyncBatchNorm
        assert layer.process_group is None
        for name in ("eps", "momentum", "affine", "track_running_stats", "training"):
            assert getattr(layer, name) == getattr(twin, name)
        assert layer.activation == getattr(twin, "activation", None)
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == state
    assert not any(p.requires_grad for p in layers[6].parameters())
    layers[0](torch.randn(3, 4))
    assert called == [layers[0]]
    # again, with a group; then without, which leaves each its own
    for group in (world, None):
        fastnorm.convert_sync_batchnorm(model, group)
        assert all(layer.process_group is world for layer in layers)
    fastnorm.restore_(model)
    for i, layer in enumerate(layers[:4]):
        assert type(layer) is type(before[str(i)][0])
        assert vars(layer).keys() == vars(before[str(i)][0]).keys()


def test_convert_keeps_the_group_of_torchs_layer(world: dist.ProcessGroup) -> None:
    layer = nn.SyncBatchNorm(4, process_group=world)
    assert fastnorm.convert_sync_batchnorm(layer) is layer
    assert type(layer) is fastnorm.SyncBatchNorm
    assert layer.process_group is world


class Own(nn.BatchNorm1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def bound() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


REFUSED = {
    "mean-only": (lambda: fastnorm.MeanOnlyBatchNorm1d(4), "mean-only batch norm has no synchroni"),
    "lazy": (lambda: nn.LazyBatchNorm1d(), "a lazy layer: run a batch through the model first"),
    "own forward": (lambda: Own(4), "has a forward of its own, which would be lost"),
    "bound": (bound, "a forward is bound to this instance"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(4)),
        "parametrized",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_convert_refuses_what_would_keep_its_own_statistics(case: str) -> None:
    make, reason = REFUSED[case]
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(make()))
    with pytest.raises(ValueError, match=rf"cannot convert 1\.0 \(.*{reason}"):
        fastnorm.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
