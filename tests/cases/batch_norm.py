"""The cases of batch norm and of mean-only batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from tests.cases.case import EVERY, HALVES, Case, Tensors, expanded, scale_shift, transposed


def batch_norm_tensors(
    x: Callable[[], Tensor],
    residual: bool = False,
    affine: bool = True,
    frozen: bool = False,
    parameters: Any = None,
) -> Callable[[torch.dtype], Tensors]:
    def make(dtype: torch.dtype) -> Tensors:
        value = x()
        value = (
            torch.empty_like(value, dtype=dtype).copy_(value)
            if value.is_contiguous()
            else value.to(dtype)
        )
        C = value.size(1)
        kind = parameters or dtype
        tensors: Tensors = {
            "x": value.requires_grad_(),
            "weight": None,
            "bias": None,
            "residual": None,
        }
        if affine:
            tensors.update(scale_shift(C, kind, not frozen))
        if residual:
            tensors["residual"] = torch.randn_like(value).requires_grad_()
        tensors["running_mean"] = torch.randn(C).to(kind)
        tensors["running_var"] = (torch.rand(C) + 0.5).to(kind)
        return tensors

    return make


def batch_norm_pair(training: bool, activation: str | None = None) -> dict[str, Any]:
    def ours(x, weight, bias, residual, running_mean, running_var):  # type: ignore[no-untyped-def]
        return functional.batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            activation=activation,
            residual=residual,
        )

    def torchs(x, weight, bias, residual, running_mean, running_var):  # type: ignore[no-untyped-def]
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
        y = y if residual is None else y + residual
        return y if activation is None else reference.ACTIVATIONS[activation].value(y)

    return {"ours": ours, "torchs": torchs}


def constant_channels() -> Tensor:
    x = torch.randn(4, 3, 5, 5)
    x[:, 1] = 7.25
    return x


def outlier() -> Tensor:
    x = torch.randn(4, 3, 6, 6)
    x[0, :, 0, 0] = 1e4
    return x


BATCH_NORM_INPUTS: dict[str, Callable[[], Tensor]] = {
    "nchw": lambda: torch.randn(4, 6, 8, 8) * 3 + 1,
    "nchw-31": lambda: torch.randn(3, 5, 31),
    "nchw-32": lambda: torch.randn(3, 5, 32),
    "nchw-33": lambda: torch.randn(3, 5, 33),
    "nchw-7x7": lambda: torch.randn(4, 5, 7, 7),
    "nhwc": lambda: (torch.randn(3, 16, 4, 5) * 2 - 1).to(memory_format=torch.channels_last),
    "nhwc-odd": lambda: torch.randn(3, 7, 5, 3).to(memory_format=torch.channels_last),
    "ncdhw": lambda: torch.randn(2, 3, 4, 3, 4),
    "ndhwc": lambda: torch.randn(2, 8, 3, 2, 4).to(memory_format=torch.channels_last_3d),
    "nlc": lambda: torch.randn(3, 12, 16).transpose(1, 2),
    "nc": lambda: torch.randn(33, 24),
    "nc-wide": lambda: torch.randn(8, 130),
    "sliced-channels": lambda: torch.randn(3, 9, 4, 8)[:, 2:7],
    "sliced-rows": lambda: torch.randn(3, 4, 8, 6)[:, :, ::2],
    "constant": constant_channels,
    "outlier": outlier,
    "one-sample": lambda: torch.randn(1, 3, 4, 4),
}
OFFSET = {"offset-1e4": lambda: torch.randn(4, 3, 8, 8) + 1e4}


def batch_norm_cases() -> Iterator[Case]:
    for name, x in BATCH_NORM_INPUTS.items():
        dtypes = EVERY if name in ("nchw", "nhwc", "nlc", "nc") else (torch.float32,)
        for mode, training in (("train", True), ("eval", False)):
            yield Case(
                "batch_norm",
                f"{name}-{mode}",
                **batch_norm_pair(training),
                make=batch_norm_tensors(x),
                dtypes=dtypes,
            )
    for name, x in OFFSET.items():  # a half type cannot hold a deviation of 1 at 1e4
        yield Case("batch_norm", name, **batch_norm_pair(True), make=batch_norm_tensors(x))
    for activation in NAMES:
        for name in ("nchw", "nhwc"):
            make = batch_norm_tensors(BATCH_NORM_INPUTS[name], residual=True)
            yield Case(
                "batch_norm",
                f"{name}-residual-{activation}",
                **batch_norm_pair(True, activation),
                make=make,
            )
    silu = batch_norm_pair(True, "silu")
    silu_eval = batch_norm_pair(False, "silu")
    x = BATCH_NORM_INPUTS["nchw"]
    yield Case("batch_norm", "silu", **silu, make=batch_norm_tensors(x), dtypes=EVERY)
    yield Case(
        "batch_norm", "silu-residual-eval", **silu_eval, make=batch_norm_tensors(x, residual=True)
    )
    yield Case("batch_norm", "frozen", **silu, make=batch_norm_tensors(x, frozen=True))
    yield Case("batch_norm", "frozen-eval", **silu_eval, make=batch_norm_tensors(x, frozen=True))
    yield Case(
        "batch_norm", "no-affine", **batch_norm_pair(True), make=batch_norm_tensors(x, affine=False)
    )
    fp32 = batch_norm_tensors(x, parameters=torch.float32)
    yield Case("batch_norm", "fp32-parameters", **batch_norm_pair(True), make=fp32, dtypes=HALVES)
    for name, dy in (("expanded", expanded), ("transposed", transposed)):
        for layout in ("nchw", "nhwc"):
            make = batch_norm_tensors(BATCH_NORM_INPUTS[layout])
            yield Case("batch_norm", f"{layout}-{name}-dy", **silu, make=make, dy=dy)


def mean_only_cases() -> Iterator[Case]:
    def make_from(x: Callable[[], Tensor]) -> Callable[[torch.dtype], Tensors]:
        def make(dtype: torch.dtype) -> Tensors:
            value = x().to(dtype)
            C = value.size(1)
            bias = torch.randn(C).to(dtype).requires_grad_()
            return {
                "x": value.requires_grad_(),
                "bias": bias,
                "running_mean": torch.randn(C).to(dtype),
            }

        return make

    for training in (True, False):

        def ours(x, bias, running_mean, training=training):  # type: ignore[no-untyped-def]
            return functional.mean_only_batch_norm(x, running_mean, bias, training)

        def torchs(x, bias, running_mean, training=training):  # type: ignore[no-untyped-def]
            shape = (1, -1, *[1] * (x.dim() - 2))
            mean = x.mean([0, *range(2, x.dim())]) if training else running_mean
            if training:
                running_mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
            return x - mean.view(shape) + bias.view(shape)

        for name in ("nchw", "nchw-7x7", "nhwc", "nlc", "nc", "sliced-rows"):
            dtypes = EVERY if name == "nchw" else (torch.float32,)
            mode = "train" if training else "eval"
            yield Case(
                "mean_only",
                f"{name}-{mode}",
                ours,
                torchs,
                make_from(BATCH_NORM_INPUTS[name]),
                dtypes=dtypes,
            )
