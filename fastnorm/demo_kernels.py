"""The second half of the demo: a small layer of each family on Triton kernels, held to fp64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastnorm

# Ours may be this many times as far from fp64 as torch is. Two orders of summation differ by that
# much, a wrong formula by far more. The floor is one rounding of fp32, for where torch is exact.
ALLOWED = 2.0
FLOOR = 2.0**-23


def agrees(ours: float, torchs: float) -> bool:
    """Whether a distance from fp64 is one that rounding explains, given torch's own; NaN is not."""
    return ours <= ALLOWED * torchs + FLOOR


def layers() -> dict[str, Callable[[], nn.Module]]:
    """A small layer of each family, by name."""
    return {
        "BatchNorm2d + SiLU": lambda: fastnorm.BatchNormAct2d(5, activation="silu"),
        "MeanOnlyBatchNorm2d": lambda: fastnorm.MeanOnlyBatchNorm2d(5),
        "LayerNorm + GELU": lambda: fastnorm.LayerNorm(7, activation="gelu"),
        "weight_norm(Linear)": lambda: fastnorm.weight_norm(nn.Linear(7, 3)),
        "GELU": fastnorm.GELU,
        "Swish": fastnorm.Swish,
    }


def _numbers(
    build: Callable[[], nn.Module], backend: str, dtype: torch.dtype, device: str
) -> Tensor:
    """Output, every gradient and every buffer of one layer on one input, in one vector."""
    torch.manual_seed(0)
    layer = build().to(device, dtype)
    x = torch.randn(4, 5, 7, 7).to(device, dtype).requires_grad_()
    with fastnorm.backend(backend):
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel(), device=device, dtype=dtype).view_as(y))
    tensors = [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    return torch.cat([t.detach().double().flatten() for t in tensors if t is not None])


def check_layers(device: str) -> bool:
    """Hold each family's Triton kernels, both ways, to fp64 beside torch's own functions."""
    good = True
    print(f"{'layer':24}{'ours from fp64':>16}{'torch from fp64':>17}")
    for name, build in layers().items():
        exact = _numbers(build, "auto", torch.float64, device)
        ours, torchs = (
            ((_numbers(build, backend, torch.float32, device) - exact).norm() / exact.norm()).item()
            for backend in ("triton", "auto")
        )
        fine = agrees(ours, torchs)
        good = good and fine
        print(f"{name:24}{ours:16.1e}{torchs:17.1e}{'' if fine else '  DIFFERS'}")
    return good


def check_kernels(device: str) -> bool:
    """check_layers on the GPU, or interpreted: a process chooses that before its first kernel."""
    if device == "cuda":
        print("\nEvery family's Triton kernels on the GPU:")
        return check_layers(device)
    if importlib.util.find_spec("triton") is None:
        print("\nTriton is not installed here: its kernels are not shown. pip install triton")
        return True
    print("\nEvery family's Triton kernels, interpreted on the CPU:", flush=True)
    command = [sys.executable, "-m", "fastnorm", "demo", "--layers"]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode == 0
