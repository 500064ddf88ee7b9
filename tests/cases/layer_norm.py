"""The cases of layer norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from tests.cases.case import EVERY, Case, Tensors, expanded, scale_shift, transposed


def layer_norm_pair(activation: str | None = None) -> dict[str, Any]:
    def ours(x, weight, bias, residual):  # type: ignore[no-untyped-def]
        shape = x.shape[-1:] if weight is None else weight.shape
        return functional.layer_norm(
            x, shape, weight, bias, activation=activation, residual=residual
        )

    def torchs(x, weight, bias, residual):  # type: ignore[no-untyped-def]
        shape = x.shape[-1:] if weight is None else weight.shape
        y = F.layer_norm(x if residual is None else x + residual, shape, weight, bias)
        return y if activation is None else reference.ACTIVATIONS[activation].value(y)

    return {"ours": ours, "torchs": torchs}


def layer_norm_tensors(
    x: Callable[[], Tensor], dims: int = 1, affine: bool = True, residual: bool = False
) -> Callable[[torch.dtype], Tensors]:
    def make(dtype: torch.dtype) -> Tensors:
        value = x().to(dtype)
        tensors: Tensors = {
            "x": value.requires_grad_(),
            "weight": None,
            "bias": None,
            "residual": None,
        }
        if affine:
            shape = value.shape[-dims:]
            parameters = scale_shift(shape.numel(), dtype)
            tensors.update(
                {
                    k: p.detach().view(shape).requires_grad_()
                    for k, p in parameters.items()
                    if p is not None
                }
            )
        if residual:
            tensors["residual"] = torch.randn_like(value).requires_grad_()
        return tensors

    return make


def layer_norm_cases() -> Iterator[Case]:
    for N in (1, 31, 32, 33, 49, 128):
        dtypes = EVERY if N in (33, 128) else (torch.float32,)
        yield Case(
            "layer_norm",
            f"N={N}",
            **layer_norm_pair(),
            make=layer_norm_tensors(lambda N=N: torch.randn(7, N)),
            dtypes=dtypes,
        )
    yield Case(
        "layer_norm",
        "N=769-mean-1000",
        **layer_norm_pair(),
        make=layer_norm_tensors(lambda: torch.randn(5, 769) + 1000),
    )
    yield Case(
        "layer_norm",
        "long",
        **layer_norm_pair(),
        make=layer_norm_tensors(lambda: torch.randn(3, 20_000)),
    )
    yield Case(
        "layer_norm",
        "two-dims",
        **layer_norm_pair(),
        make=layer_norm_tensors(lambda: torch.randn(3, 4, 6, 10), dims=2),
    )
    yield Case(
        "layer_norm",
        "no-affine",
        **layer_norm_pair(),
        make=layer_norm_tensors(lambda: torch.randn(4, 64), affine=False),
    )
    yield Case(
        "layer_norm",
        "nhwc-view",
        **layer_norm_pair(),
        make=layer_norm_tensors(lambda: torch.randn(2, 24, 3, 4).permute(0, 2, 3, 1)),
    )
    yield Case(
        "layer_norm",
        "sliced",
        **layer_norm_pair(),
        make=layer_norm_tensors(lambda: torch.randn(9, 80)[:, 7:71]),
    )
    yield Case(
        "layer_norm",
        "expanded-dy",
        **layer_norm_pair("silu"),
        make=layer_norm_tensors(lambda: torch.randn(9, 40)),
        dy=expanded,
    )
    yield Case(
        "layer_norm",
        "transposed-dy",
        **layer_norm_pair(),
        make=layer_norm_tensors(lambda: torch.randn(9, 40)),
        dy=transposed,
    )
    for activation in NAMES:
        make = layer_norm_tensors(lambda: torch.randn(6, 72), residual=True)
        yield Case("layer_norm", f"residual-{activation}", **layer_norm_pair(activation), make=make)
