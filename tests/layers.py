"""One of every layer of ours, with an input: what the tests of torch's surroundings iterate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.conftest import AVAILABLE, DEVICE

# no size is one of the batch sizes of the tests: Dynamo takes equal sizes for one
PLANES, ROWS = (3, 4, 6, 2), (3, 2, 8)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_norm_1d": (lambda: fastnorm.BatchNorm1d(4), (3, 4)),
    "batch_norm_2d": (lambda: fastnorm.BatchNorm2d(4), PLANES),
    "batch_norm_3d": (lambda: fastnorm.BatchNorm3d(4), (3, 4, 2, 6, 2)),
    "batch_norm_cumulative": (lambda: fastnorm.BatchNorm2d(4, momentum=None), PLANES),
    "batch_norm_untracked": (lambda: fastnorm.BatchNorm2d(4, track_running_stats=False), PLANES),
    "batch_norm_act": (lambda: fastnorm.BatchNormAct2d(4, activation="silu"), PLANES),
    "mean_only": (lambda: fastnorm.MeanOnlyBatchNorm2d(4), PLANES),
    "mean_only_cumulative": (lambda: fastnorm.MeanOnlyBatchNorm2d(4, momentum=None), PLANES),
    "layer_norm": (lambda: fastnorm.LayerNorm(8), ROWS),
    "layer_norm_act": (lambda: fastnorm.LayerNorm((2, 8), activation="gelu"), ROWS),
    "gelu": (lambda: fastnorm.GELU(), ROWS),
    "gelu_tanh": (lambda: fastnorm.GELU("tanh"), ROWS),
    "gelu_sigmoid": (lambda: fastnorm.GELU("sigmoid"), ROWS),
    "silu": (lambda: fastnorm.SiLU(), ROWS),
    "silu_inplace": (lambda: nn.Sequential(nn.Linear(8, 8), fastnorm.SiLU(inplace=True)), ROWS),
    "selu": (lambda: fastnorm.SELU(), ROWS),
    "swish": (lambda: fastnorm.Swish(1.5, num_parameters=4), PLANES),
    "weight_norm": (lambda: fastnorm.weight_norm(nn.Linear(8, 6)), ROWS),
    "weight_norm_scalar": (lambda: fastnorm.weight_norm(nn.Linear(8, 6), dim=None), ROWS),
}
# those that keep statistics of the batches they have seen
TRACKING = [
    name for name, (make, _) in LAYERS.items() if any("running" in n for n in make().state_dict())
]
every_layer = pytest.mark.parametrize("name", LAYERS)
# under "auto" a CPU runs torch's own function; what our layers do around it is tested there too
everywhere = pytest.mark.parametrize("backend", ["auto", *AVAILABLE], indirect=True)
# of torch.jit and Dynamo, about their own code
torch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def make_layer(name: str, device: str = DEVICE) -> nn.Module:
    """In fp64: only a wrong formula can then differ by more than rounding."""
    return LAYERS[name][0]().to(device, torch.float64).train()


def make_input(name: str, N: int = 3, device: str = DEVICE) -> Tensor:
    shape = (N, *LAYERS[name][1][1:])
    return (torch.randn(shape, dtype=torch.float64, device=device) * 2 + 1).requires_grad_()


def step(call: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward of ``call``."""
    module.zero_grad()
    xs = [x.detach().clone().requires_grad_() for x in inputs]
    y = call(*xs)
    # of one sign: where a bias's sum cancels, its relative error would measure luck
    y.backward(torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    found = {"y": y.detach()} | {f"dx{i}": x.grad for i, x in enumerate(xs) if x.grad is not None}
    found |= {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: value.clone() for name, value in module.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = False) -> None:
    assert found.keys() == expected.keys()
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-9, "atol": 1e-11}
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
