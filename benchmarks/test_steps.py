"""A training step of a small model on the CPU, before and after `replace_` and `fuse_`."""

from collections.abc import Callable

import pytest
import torch

import fastnorm
from fastnorm.demo import own_resnet

X = torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("provider", ["torch", "fastnorm"])
def test_training_step(benchmark: Callable[[Callable[[], float]], float], provider: str) -> None:
    torch.manual_seed(0)
    model = own_resnet()
    if provider == "fastnorm":
        fastnorm.replace_(model)
        assert fastnorm.fuse_(model).changed > 0

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(X).square().mean()
        loss.backward()
        return float(loss.detach())

    assert 0 < benchmark(step) < 100
