"""The one table of cases: for every op what we call, what torch would, and on which tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from fastnorm.ops.weight_norm.group import weight_norm_group

Tensors = dict[str, Tensor | None]
HALVES = (torch.float16, torch.bfloat16)
EVERY = (torch.float64, torch.float32, *HALVES)


@dataclass(frozen=True)
class Case:
    """`ours(**tensors)` against `torchs(**tensors)`; a tensor that requires no gradient is a
    buffer, compared as left."""

    op: str
    name: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    make: Callable[[torch.dtype], Tensors]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    dy: Callable[[Tensor], Tensor] = field(default=torch.randn_like)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def scale_shift(size: int, dtype: torch.dtype, grad: bool = True) -> Tensors:
    return {
        "weight": (torch.rand(size) + 0.5).to(dtype).requires_grad_(grad),
        "bias": torch.randn(size).to(dtype).requires_grad_(grad),
    }


# gradients that are not what the kernel would like


def expanded(y: Tensor) -> Tensor:
    return torch.ones((), dtype=y.dtype).expand(y.shape)


def transposed(y: Tensor) -> Tensor:
    return torch.randn(y.shape[::-1]).to(y.dtype).permute(*range(y.dim() - 1, -1, -1))


def one_sided(y: Tensor) -> Tensor:
    """For gradients that are one long sum: with a sum that cancels, the relative error would
    measure luck."""
    return torch.rand(y.shape).to(y.dtype) + 0.5


# batch norm


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


# layer norm


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


# weight norm, activations


def weight_norm_cases() -> Iterator[Case]:
    # the last is long enough for several blocks per norm
    for shape in ((6, 5), (8, 4, 3), (33, 49), (3, 770), (5,), (1100, 8)):
        for dim in (None, *range(len(shape))):

            def make(dtype: torch.dtype, shape=shape, dim=dim) -> Tensors:  # type: ignore[no-untyped-def]
                v = (torch.rand(shape) + 0.1).to(dtype)
                g = torch.norm_except_dim(v.float(), 2, -1 if dim is None else dim).to(dtype) * 1.5
                return {"v": v.requires_grad_(), "g": g.requires_grad_()}

            def ours(v, g, dim=dim):  # type: ignore[no-untyped-def]
                return functional.weight_norm(v, g, dim)

            def torchs(v, g, dim=dim):  # type: ignore[no-untyped-def]
                return torch._weight_norm(v, g, -1 if dim is None else dim)

            dtypes = EVERY if shape == (8, 4, 3) else (torch.float32,)
            yield Case(
                "weight_norm",
                f"{'x'.join(map(str, shape))}-dim={dim}",
                ours,
                torchs,
                make,
                dtypes,
                one_sided,
            )
    yield weight_norm_group_case()


def weight_norm_group_case() -> Case:
    """Layers of several sizes in one call; of all but the first, the mean."""
    sizes = (
        ((6, 5), 0),
        ((7, 40), 1),
        ((2, 9000), 0),
        ((1200, 8), 1),
        ((30, 3, 70), 1),
        ((5, 9), -1),
    )
    dims = [dim for _, dim in sizes]

    def make(dtype: torch.dtype) -> Tensors:
        tensors: Tensors = {}
        for i, (shape, dim) in enumerate(sizes):
            v = (torch.rand(shape) + 0.1).to(dtype)
            name = str(i or "")
            tensors[f"v{name}"] = v.requires_grad_()
            g = torch.norm_except_dim(v.detach().float(), 2, dim).to(dtype) * 1.5
            tensors[f"g{name}"] = g.requires_grad_()
        return tensors

    def sum_of(w: list[Tensor]) -> Tensor:
        return w[0] + sum(x.mean() for x in w[1:])

    def ours(**tensors: Tensor) -> Tensor:
        values = list(tensors.values())
        return sum_of(weight_norm_group(values[::2], values[1::2], dims, [None] * len(dims)))

    def torchs(**tensors: Tensor) -> Tensor:
        values = list(tensors.values())
        every = zip(values[::2], values[1::2], dims, strict=True)
        return sum_of([torch._weight_norm(v, g, dim) for v, g, dim in every])

    return Case(
        "weight_norm", "group", ours, torchs, make, (torch.float64, torch.float32), one_sided
    )


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


CASES = [
    *batch_norm_cases(),
    *mean_only_cases(),
    *layer_norm_cases(),
    *weight_norm_cases(),
    *activation_cases(),
    *swish_cases(),
]
