"""Autocast gives the dtypes that torch's layers give; mixed dtypes are accepted where they make
sense.

What CUDA's autocast does is decided before any kernel: fake CUDA tensors show it on a CPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnorm
from fastnorm import functional
from tests.conftest import AVAILABLE

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
everywhere = pytest.mark.parametrize("backend", ["auto", *AVAILABLE], indirect=True)

# each: ours, torch's
PAIRS = {
    "batch_norm": (lambda: fastnorm.BatchNorm1d(8), lambda: nn.BatchNorm1d(8)),
    "layer_norm": (lambda: fastnorm.LayerNorm(8), lambda: nn.LayerNorm(8)),
    "gelu": (lambda: fastnorm.GELU(), lambda: nn.GELU()),
    "gelu_tanh": (lambda: fastnorm.GELU("tanh"), lambda: nn.GELU("tanh")),
    "silu": (lambda: fastnorm.SiLU(), lambda: nn.SiLU()),
    "selu": (lambda: fastnorm.SELU(), lambda: nn.SELU()),
    "weight_norm": (
        lambda: fastnorm.weight_norm(nn.Linear(8, 8)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    ),
}
LIKE_TORCH = {
    "rtol": 2e-2,  # a rounding of bf16 at the end, and one where torch rounds in between
    "atol": 2e-2,
}


def run(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_autocast_as_torchs_layer(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    ours, torchs = (make().to(device) for make in PAIRS[name])
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 8, device=device).to(dtype)
    with torch.autocast(device, torch.bfloat16):
        found, expected = run(ours, x), run(torchs, x)
        # a matrix product around the layer is autocast as ever
        assert (ours(x) @ x.T).dtype == (torchs(x) @ x.T).dtype == torch.bfloat16
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        torch.testing.assert_close(found[key], value, **LIKE_TORCH)


def cuda_calls(x: Tensor, w: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "layer_norm": (functional.layer_norm(x, (8,), w, w), F.layer_norm(x, (8,), w, w)),
        "gelu": (functional.gelu(x), F.gelu(x)),
        "silu": (functional.silu(x), F.silu(x)),
        "selu": (functional.selu(x), F.selu(x)),
        "weight_norm": (
            functional.weight_norm(x, x.new_empty(2, 1)),
            torch._weight_norm(x, x.new_empty(2, 1), 0),
        ),
    }


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_autocast_as_torchs_functions(dtype: torch.dtype, backend: str) -> None:
    on = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            x, w = torch.empty(2, 8, device="cuda", dtype=dtype), torch.empty(8, device="cuda")
            for name, (ours, torchs) in cuda_calls(x, w).items():
                assert ours.dtype == torchs.dtype, name
            assert functional.layer_norm(x, (8,), w, w).dtype == torch.float32
            opted_in = functional.layer_norm(x, (8,), w, w, autocast="input")
            assert opted_in.dtype == dtype
            # autocast leaves batch norm alone
            assert functional.batch_norm(x, w, w, w, w, training=True).dtype == dtype
    finally:
        torch.set_autocast_enabled("cuda", on)


@everywhere
def test_the_opt_in_is_an_argument_of_the_layer(backend: str) -> None:
    layer = fastnorm.LayerNorm(8, autocast="input")
    assert "autocast='input'" in repr(layer)
    x = torch.randn(4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'input'"):
        fastnorm.LayerNorm(8, autocast="bf16")


@pytest.mark.parametrize("backend", AVAILABLE, indirect=True)
def test_the_opt_in_rounds_what_autocast_would_round(backend: str, device: str) -> None:
    """Half in the kernel is the fp32 output rounded, but for the order of the arithmetic in fp32;
    gradients are of the same dy."""
    torch.manual_seed(0)
    x, w, dy = (torch.randn(6, 16, device=device).bfloat16() for _ in range(3))
    w = w[0].float()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        statistics: Tensor
        y, statistics, _ = torch.ops.fastnorm.layer_norm_forward(
            x, None, w, w, 1, 1e-5, "identity", dtype, False
        )
        dx, dweight, dbias = torch.ops.fastnorm.layer_norm_backward(
            x, dy.to(dtype), None, w, w, statistics, 1, "identity", [True, True, True]
        )
        found.append((y.bfloat16(), dx, dweight, dbias))
    for rounded_outside, rounded_inside in zip(*found, strict=True):
        # one step of bf16, where a difference in the last place of fp32 lies on its boundary
        torch.testing.assert_close(rounded_inside, rounded_outside, rtol=2**-7, atol=1e-6)


@everywhere
@pytest.mark.parametrize("dtype", HALVES)
def test_half_input_beside_fp32_parameters(dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(6, 8).to(dtype)
    for layer in (fastnorm.BatchNorm1d(8), fastnorm.LayerNorm(8)):
        found, exact = run(layer, x), run(layer, x.float())
        assert found["y"].dtype == found["dx"].dtype == dtype
        assert found["weight"].dtype == found["bias"].dtype == torch.float32
        torch.testing.assert_close(found["y"].float(), exact["y"], **LIKE_TORCH)


@everywhere
def test_bf16_parameters_beside_fp32_statistics(backend: str) -> None:
    layer = fastnorm.BatchNorm1d(8).bfloat16()
    twin = nn.BatchNorm1d(8)
    for name in ("running_mean", "running_var"):
        layer._buffers[name] = dict(twin.named_buffers())[name].clone()
    x = torch.randn(6, 8).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.running_var.dtype == torch.float32
    torch.testing.assert_close(y.float(), twin(x.float()), **LIKE_TORCH)
    torch.testing.assert_close(layer.running_var, twin.running_var, rtol=1e-5, atol=1e-6)
    layer.cpu()
    with pytest.raises(RuntimeError, match=r"dtype|type"):  # what torch says of the same on a CPU
        F.batch_norm(x.cpu(), layer.running_mean, layer.running_var, layer.weight, layer.bias, True)
