"""What a call of the CUDA path does in Python, its launch stubbed out: counted, since a time would
depend on the machine. benchmarks/test_host.py measures it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastnorm
from benchmarks import host
from fastnorm import dispatch, functional
from fastnorm.ops.extension import extension

# what a call must not ask for again: signatures, the environment, the device, modules
ONCE = {
    "signature",
    "getenv",
    "get_device_properties",
    "current_device",
    "current_stream",
    "import_module",
    "_lazy_init",
    "backends",
    "_check_once",
}


def calls_of(function: Callable[[], Any]) -> Counter[str]:
    """Names of the Python functions that a call enters."""
    entered: Counter[str] = Counter()

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            entered[frame.f_code.co_name] += 1

    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(None)
    return entered


emulated = pytest.mark.skipif(
    not dispatch.emulating(), reason="needs the CUDA kernels compiled for a CPU: g++, and no GPU"
)

# entered in the second call, forward with gradient; a check made twice, or a search by nn.Module
# for each parameter, goes beyond
MOST = {"batch_norm": 29, "layer_norm": 20, "activation": 17}


@emulated
@pytest.mark.parametrize("layer", host.LAYERS, ids=lambda layer: f"{layer.op}-{layer.variant}")
def test_a_call_asks_for_nothing_twice(layer: host.Layer) -> None:
    with host.launches_stubbed_out():
        call = host.call_of(layer.ours, layer.shape)
        call()
        entered = calls_of(call)
    assert not ONCE & set(entered), entered
    assert entered["__getattr__"] <= 8, "nn.Module's search for attributes"
    assert entered["_check_name"] + entered["check_name"] <= 1
    assert sum(entered.values()) <= MOST[layer.op], entered


def test_the_dispatcher_is_entered_where_somebody_listens() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: Counter[str] = Counter()

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen[op._schema.name] += 1
            return op(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    x = torch.randn(4, 8)
    with fastnorm.backend("reference"), Listener():
        fastnorm.functional.silu(x)
    assert seen["fastnorm::activation_forward"] == 1
    with fastnorm.backend("reference"):
        y = fastnorm.functional.silu(x.as_subclass(Subclass))
    assert isinstance(y, Subclass)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), nn.functional.silu(x))


@emulated
@pytest.mark.cuda
def test_stubbed_out_launches_run_nothing_and_later_ones_do() -> None:
    x = torch.randn(4, 8)
    with host.launches_stubbed_out():
        engine = extension().engine
        before = engine.launches
        functional.silu(x)
        assert engine.launches == before
    with fastnorm.backend("cuda"):
        torch.testing.assert_close(functional.silu(x), nn.functional.silu(x))
    assert engine.launches == before + 1
