"""Activations on ATen's own kernels: the oracle everywhere, the implementation where there is no
GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


class Activation(NamedTuple):
    """A function by value and gradient: ``value(z)``, and ``gradient(dy, z)`` = dy * slope(z)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _beta(z: Tensor) -> Tensor:
    return torch.full((1,), 1.702, dtype=torch.float64, device=z.device)


def gelu_sigmoid(z: Tensor) -> Tensor:
    return swish(z, _beta(z))


def _gelu_sigmoid_gradient(dy: Tensor, z: Tensor) -> Tensor:
    dz, _ = swish_backward(z, dy, _beta(z), [True, False])
    assert dz is not None
    return dz


# the one list of activations of this language; triton.py and csrc/activation.cuh have theirs, under
# the same names
ACTIVATIONS = {
    "identity": Activation(lambda z: z.clone(), lambda dy, z: dy.clone()),
    "relu": Activation(F.relu, lambda dy, z: aten.threshold_backward(dy, z, 0)),
    "relu6": Activation(F.relu6, lambda dy, z: aten.hardtanh_backward(dy, z, 0, 6)),
    "leaky_relu": Activation(
        F.leaky_relu, lambda dy, z: aten.leaky_relu_backward(dy, z, 0.01, False)
    ),
    "elu": Activation(F.elu, lambda dy, z: aten.elu_backward(dy, 1, 1, 1, False, z)),
    "selu": Activation(
        F.selu, lambda dy, z: aten.elu_backward(dy, SELU_ALPHA, SELU_SCALE, 1, False, z)
    ),
    "gelu": Activation(F.gelu, lambda dy, z: aten.gelu_backward(dy, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dy, z: aten.gelu_backward(dy, z, approximate="tanh"),
    ),
    "gelu_sigmoid": Activation(gelu_sigmoid, _gelu_sigmoid_gradient),
    "silu": Activation(F.silu, lambda dy, z: aten.silu_backward(dy, z)),
    "hardswish": Activation(F.hardswish, lambda dy, z: aten.hardswish_backward(dy, z)),
    "mish": Activation(F.mish, lambda dy, z: aten.mish_backward(dy, z)),
    "tanh": Activation(torch.tanh, lambda dy, z: aten.tanh_backward(dy, torch.tanh(z))),
    "sigmoid": Activation(torch.sigmoid, lambda dy, z: aten.sigmoid_backward(dy, torch.sigmoid(z))),
}


def activation_forward(x: Tensor, name: str) -> Tensor:
    return ACTIVATIONS[name].value(x)


def activation_forward_(x: Tensor, y: Tensor, name: str) -> None:
    y.copy_(ACTIVATIONS[name].value(x))


def activation_backward(x: Tensor, dy: Tensor, name: str) -> Tensor:
    return ACTIVATIONS[name].gradient(dy, x)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type that x is computed in: fp32, fp64 for fp64."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the type that it is computed in."""
    return x.to(wide_dtype(x))


def channelwise(beta: Tensor, x: Tensor) -> Tensor:
    """beta in the type of computation, shaped to broadcast over x."""
    beta = beta.to(wide(x).dtype)
    return beta.reshape(()) if beta.numel() == 1 else beta.view(-1, *[1] * (x.dim() - 2))


def swish(x: Tensor, beta: Tensor) -> Tensor:
    z = wide(x)
    return (z * torch.sigmoid(channelwise(beta, x) * z)).to(x.dtype)


def swish_forward(x: Tensor, beta: Tensor) -> Tensor:
    return swish(x, beta)


def swish_backward(
    x: Tensor, dy: Tensor, beta: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    z, g, b = wide(x), wide(dy), channelwise(beta, x)
    s = torch.sigmoid(b * z)
    dx = (g * s * (1 + b * z * (1 - s))).to(x.dtype) if needs[0] else None
    dbeta = (
        (g * z * z * s * (1 - s)).sum_to_size(b.shape).reshape(beta.shape).to(beta.dtype)
        if needs[1]
        else None
    )
    return dx, dbeta
