"""CUDA graphs: nothing waits for the GPU, and warm-up is paid for by saved statistics."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnorm.ops import launch
from tests.conftest import AVAILABLE
from tests.layers import (
    TRACKING,
    assert_same,
    every_layer,
    everywhere,
    make_input,
    make_layer,
    needs_gpu,
    step,
    torch_warns,
)

pytestmark = [
    torch_warns,
    # make_graphed_callables warms up on a stream of its own and keeps that graph: torch says so of
    # its own call, at the first backward of a process
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning"),
]

# what makes the host wait for a device, or a size depend on data
WAITS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "unique2",
    "masked_select",
)


KERNELS = [name for name in AVAILABLE if name != "reference"]
with_kernels = pytest.mark.parametrize("backend", ["auto", *KERNELS], indirect=True)


class NeverWait(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op._schema.name.split("::")[-1] not in WAITS, f"{op} waits for the device"
        return op(*args, **(kwargs or {}))


@everywhere
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_layer
def test_forward_and_backward_never_wait(
    name: str, training: bool, backend: str, device: str
) -> None:
    if backend == "auto" and name.endswith("cumulative") and training:
        pytest.skip('under "auto" a CPU runs torch\'s batch norm, which reads the count of batches')
    layer, x = make_layer(name, device).train(training), make_input(name, device=device)
    with NeverWait():
        y = layer(x)
        y.backward(torch.ones_like(y))


def test_counters_are_made_where_no_memory_pool_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    # reduce-overhead warms up in a pool of the calling thread, and refuses what stays in it
    monkeypatch.setattr(launch, "_arenas", {})
    monkeypatch.setattr(launch, "_outgrown", [])
    threads, zeros = [], torch.zeros

    def noted(*sizes: Any, **options: Any) -> Tensor:
        threads.append(threading.get_ident())
        return zeros(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", noted)
    x = torch.empty(3)
    first = launch.counters(x, 8)
    assert launch.counters(x, 8) is first and not first.any()
    larger = launch.counters(x, first.numel() + 1)
    assert larger.numel() > first.numel() and not larger.any()
    assert len(threads) == 2 and threading.get_ident() not in threads
    assert launch._outgrown[0] is first  # a launch before may still be at it


def test_the_guard_sees_what_torchs_own_layer_does() -> None:
    with NeverWait(), pytest.raises(AssertionError, match="waits"):
        nn.BatchNorm2d(4, momentum=None)(torch.randn(2, 4, 3, 3))


def graphed_from(layer: nn.Module, x: Tensor) -> Any:
    """As docs/compatibility.md has it: warm-up and capture run the layer on `x`, so its buffers are
    put back afterwards, in place."""
    kept = {name: value.clone() for name, value in layer.named_buffers()}
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    for name, value in layer.named_buffers():
        value.copy_(kept[name])
    return graphed


@needs_gpu
@with_kernels
@every_layer
def test_make_graphed_callables(name: str, backend: str) -> None:
    layer = make_layer(name, "cuda")
    twin, xs = copy.deepcopy(layer), [make_input(name, device="cuda") for _ in range(3)]
    graphed = graphed_from(layer, xs[0].detach().clone().requires_grad_())
    for x in xs:
        assert_same(step(graphed, layer, x), step(twin, twin, x))


@needs_gpu
@with_kernels
@pytest.mark.parametrize("name", TRACKING)
def test_warm_up_moves_statistics_and_restoring_them_mends_it(name: str, backend: str) -> None:
    layer = make_layer(name, "cuda")
    before = {key: value.clone() for key, value in layer.named_buffers()}
    x = make_input(name, device="cuda")
    torch.cuda.make_graphed_callables(layer, (x,))
    assert layer.num_batches_tracked > 0
    layer.reset_running_stats()  # type: ignore[operator]
    graphed_from(layer, x)
    for key, value in layer.named_buffers():
        assert torch.equal(value, before[key])


@needs_gpu
@with_kernels
@every_layer
def test_reduce_overhead(name: str, backend: str) -> None:
    layer = make_layer(name, "cuda")
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # run, record, replay, replay
        torch.compiler.cudagraph_mark_step_begin()
        x = make_input(name, device="cuda")
        assert_same(step(compiled, layer, x), step(twin, twin, x))
