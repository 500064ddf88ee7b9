"""The cases of activations and of Swish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from tests.cases.batch_norm import BATCH_NORM_INPUTS
from tests.cases.case import EVERY, Case, Tensors, one_sided


def activation_cases() -> Iterator[Case]:
    def make(dtype: torch.dtype) -> Tensors:
        return {"x": (torch.randn(769) * 3).to(dtype).requires_grad_()}

    for name in NAMES:
        ours = lambda x, name=name: functional.activation(x, name)  # noqa: E731
        torchs = lambda x, name=name: reference.ACTIVATIONS[name].value(x)  # noqa: E731
        yield Case("activation", name, ours, torchs, make, EVERY)


def swish_case(
    name: str, x: Callable[[], Tensor], betas: int | None, dtypes: Any = (torch.float32,)
) -> Case:
    """One beta, or where `betas` is None one per channel."""

    def make(dtype: torch.dtype) -> Tensors:
        value = x().to(dtype)
        beta = (torch.rand(betas or value.size(1)) + 0.5).to(dtype)
        return {"x": value.requires_grad_(), "beta": beta.requires_grad_()}

    def torchs(x: Tensor, beta: Tensor) -> Tensor:
        return x * torch.sigmoid(
            (beta if beta.numel() == 1 else beta.view(-1, *[1] * (x.dim() - 2))) * x
        )

    ours = lambda x, beta: functional.swish(x, beta)  # noqa: E731
    return Case("swish", name, ours, torchs, make, dtypes, one_sided)


def swish_cases() -> Iterator[Case]:
    yield swish_case("scalar", lambda: torch.randn(1000), 1, EVERY)
    yield swish_case("scalar-odd", lambda: torch.randn(7, 33), 1)
    for name in ("nchw", "nchw-7x7", "nhwc", "nc", "nlc"):
        dtypes = EVERY if name == "nchw" else (torch.float32,)
        yield swish_case(name, BATCH_NORM_INPUTS[name], None, dtypes)
