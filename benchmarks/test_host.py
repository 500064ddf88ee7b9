"""Host time of a call, ours beside torch's: on a CPU, `auto` may cost 5 us more. And the
Python part of the CUDA backend, its launches stubbed out: benchmarks/host.py has the limits.
`make bench`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm.functional as ours
from benchmarks import host

X = torch.randn(2, 8, 4, 4)
PARAMETER = torch.ones(8, requires_grad=True)
ROW = torch.ones(4, requires_grad=True)
V = torch.randn(8, 4, requires_grad=True)
G = torch.ones(8, 1, requires_grad=True)

CALLS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "batch_norm": (
        lambda: F.batch_norm(X, None, None, PARAMETER, PARAMETER, True),
        lambda: ours.batch_norm(X, None, None, PARAMETER, PARAMETER, True),
    ),
    "layer_norm": (
        lambda: F.layer_norm(X, (4,), ROW, ROW),
        lambda: ours.layer_norm(X, (4,), ROW, ROW),
    ),
    "weight_norm": (lambda: torch._weight_norm(V, G, 0), lambda: ours.weight_norm(V, G)),
    "gelu": (lambda: F.gelu(X), lambda: ours.gelu(X)),
    "silu": (lambda: F.silu(X), lambda: ours.silu(X)),
}


@pytest.mark.parametrize("provider", ["torch", "fastnorm"])
@pytest.mark.parametrize("name", CALLS)
def test_host_time(
    benchmark: Callable[[Callable[[], Any]], Tensor], name: str, provider: str
) -> None:
    theirs, mine = CALLS[name]
    torch.testing.assert_close(benchmark(mine if provider == "fastnorm" else theirs), theirs())


@pytest.fixture
def stubbed() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("needs the CUDA kernels compiled for a CPU, and this process has a GPU's")
    with host.launches_stubbed_out():
        yield


@pytest.mark.parametrize("provider", ["torch", "fastnorm"])
@pytest.mark.parametrize("layer", host.LAYERS, ids=lambda layer: f"{layer.op}-{layer.variant}")
def test_host_time_of_the_cuda_path(
    benchmark: Callable[[Callable[[], Tensor]], Tensor],
    layer: host.Layer,
    provider: str,
    stubbed: None,
) -> None:
    call = host.call_of(layer.ours if provider == "fastnorm" else layer.torchs, layer.shape)
    assert benchmark(call).requires_grad
