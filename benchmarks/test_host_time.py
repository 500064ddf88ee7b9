"""Host time of one call, forward with gradient, torch's layer beside ours: `make bench`.

A tiny tensor, so that the call costs more than the work. On a CPU ours is torch's own function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastnorm

LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "torch.BatchNorm2d": (lambda: torch.nn.BatchNorm2d(8), (2, 8, 4, 4)),
    "fastnorm.BatchNorm2d": (lambda: fastnorm.BatchNorm2d(8), (2, 8, 4, 4)),
    "torch.LayerNorm": (lambda: torch.nn.LayerNorm(32), (4, 32)),
    "fastnorm.LayerNorm": (lambda: fastnorm.LayerNorm(32), (4, 32)),
    "torch.GELU": (lambda: torch.nn.GELU(), (128,)),
    "fastnorm.GELU": (lambda: fastnorm.GELU(), (128,)),
    "torch.SiLU": (lambda: torch.nn.SiLU(), (128,)),
    "fastnorm.SiLU": (lambda: fastnorm.SiLU(), (128,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_host_time(benchmark: Any, name: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape, requires_grad=True)
    y = benchmark(layer, x)
    assert y.shape == x.shape
    assert y.requires_grad
