"""Activations as the benchmarks know them: by themselves, and behind a norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

Function = Callable[..., Any]

SIGMOID_SLOPE = 1.702  # of GELU's third form: x * sigmoid(1.702 * x)


def _swish(x: Tensor, beta: Tensor) -> Tensor:
    """As people write it, with one beta for all or one for each channel."""
    beta = beta.to(x.dtype)
    if beta.numel() > 1:
        beta = beta.view(-1, *[1] * (x.dim() - 2))
    return x * torch.sigmoid(beta * x)


def gelu_sigmoid(x: Tensor) -> Tensor:
    """As people write it: torch has no function for it."""
    return x * torch.sigmoid(SIGMOID_SLOPE * x)


def _kernelbench_88(x: Tensor) -> Tensor:
    """GELU as KernelBench's MinGPT writes it."""
    inner = x + 0.044715 * torch.pow(x, 3.0)
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * inner))


_GELU_TANH = partial(functional.gelu, approximate="tanh")
ACTIVATIONS: dict[str, tuple[Function, Function]] = {  # torch's, ours
    "gelu": (F.gelu, functional.gelu),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), _GELU_TANH),
    "gelu_sigmoid": (gelu_sigmoid, partial(functional.gelu, approximate="sigmoid")),
    "silu": (F.silu, functional.silu),
    "selu": (F.selu, functional.selu),
    "swish": (_swish, functional.swish),
    "swish_channels": (_swish, functional.swish),
    # as the problem of that number writes it, which is what its runner times
    "kernelbench_25": (lambda x: x * torch.sigmoid(x), functional.silu),
    "kernelbench_88": (_kernelbench_88, _GELU_TANH),
}
# every activation that folds into a norm, as torch has it behind one: in place where models write
# it so, and where its gradient can be had from its output (silu and gelu save their input)
EPILOGUES: dict[str, Function] = {
    "relu": F.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "leaky_relu": F.leaky_relu_,
    "elu": F.elu_,
    "selu": F.selu_,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_sigmoid": gelu_sigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}
# measured behind a norm for what they cost over the norm alone, which is a question to us alone:
# others' times of them would fill every mean with fusions that few people need
RARE = frozenset(EPILOGUES) - {"relu", "relu6", "silu", "gelu"}
