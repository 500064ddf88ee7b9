"""Every op as the benchmarks know it: its tensors, torch's expression for it, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.activations import ACTIVATIONS, EPILOGUES, Function
from benchmarks.problems import DTYPES, Problem
from fastnorm import functional
from fastnorm.ops.weight_norm.group import weight_norm_group

Tensors = dict[str, Tensor]

# the generator of HiFi-GAN V1: v of every weight-normed layer
HIFIGAN = (
    (512, 80, 7),
    *((512 >> i, 256 >> i, 16 if i < 2 else 4) for i in range(4)),
    *((c, c, k) for c in (256, 128, 64, 32) for k in (3, 7, 11) for _ in range(6)),
    (1, 32, 7),
)


@dataclass(frozen=True)
class Op:
    """`torch` and `ours` make, for a problem, a function of the tensors that `tensors` makes.

    `split` names the dimension along which the op falls into independent parts, per tensor: an
    oracle in fp64 is computed part by part. A tensor that it does not name is whole in every part,
    and its gradient is the sum over them.
    """

    variants: tuple[str, ...]
    layouts: tuple[str, ...]
    tensors: Callable[[Problem, str], Tensors]
    torch: Callable[[Problem], Function]
    ours: Callable[[Problem], Function]
    split: Mapping[str, int] = field(default_factory=dict)


def _dense(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers of that shape [N, C, ...] in that layout; neither centred nor of unit
    variance."""
    if layout in ("nhwc", "nlc"):  # channels adjacent
        memory = (shape[0], *shape[2:], shape[1])
        x = torch.randn(memory, dtype=dtype, device=device).mul_(1.5).add_(0.5)
        return x.movedim(-1, 1)
    return torch.randn(shape, dtype=dtype, device=device).mul_(1.5).add_(0.5)


def _scale_shift(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensors:
    weight = torch.rand(shape, dtype=dtype, device=device) + 0.5
    bias = torch.randn(shape, dtype=dtype, device=device)
    return {"weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


# batch norm: half types with fp32 parameters, as autocast gives them


def _batch_norm_tensors(problem: Problem, device: str) -> Tensors:
    dtype, C = DTYPES[problem.dtype], problem.shape[1]
    x = _dense(problem.shape, problem.layout, dtype, device)
    tensors = {"x": x.requires_grad_(), **_scale_shift((C,), torch.float32, device)}
    if problem.variant.startswith("residual"):
        tensors["residual"] = torch.randn_like(x).requires_grad_()
    tensors["running_mean"] = torch.zeros(C, device=device)
    tensors["running_var"] = torch.ones(C, device=device)
    return tensors


def _finish(variant: str) -> tuple[bool, str]:
    """(whether a residual is added, the activation) of a variant such as "residual+relu"."""
    parts = variant.split("+")
    return "residual" in parts, next((p for p in parts if p not in ("plain", "residual")), "")


def _batch_norm_torch(problem: Problem) -> Function:
    has_residual, name = _finish(problem.variant)
    activation: Function = EPILOGUES.get(name, lambda y: y)

    def run(x, weight, bias, running_mean, running_var, residual=None):  # type: ignore[no-untyped-def]
        y = F.batch_norm(x, running_mean, running_var, weight, bias, True)
        return activation(y.add_(residual) if has_residual else y)

    return run


def _batch_norm_ours(problem: Problem) -> Function:
    name = _finish(problem.variant)[1] or None

    def run(x, weight, bias, running_mean, running_var, residual=None):  # type: ignore[no-untyped-def]
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, True, activation=name, residual=residual
        )

    return run


# mean-only batch norm


def _mean_only_tensors(problem: Problem, device: str) -> Tensors:
    tensors = _batch_norm_tensors(problem, device)
    return {name: tensors[name] for name in ("x", "bias", "running_mean")}


def _mean_only_torch(problem: Problem) -> Function:
    shape = (1, -1, *[1] * (len(problem.shape) - 2))
    others = [0, *range(2, len(problem.shape))]

    def run(x, bias, running_mean):  # type: ignore[no-untyped-def]
        mean = x.mean(others, dtype=bias.dtype)
        running_mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
        return x - (mean - bias).view(shape).to(x.dtype)

    return run


def _mean_only_ours(problem: Problem) -> Function:
    def run(x, bias, running_mean):  # type: ignore[no-untyped-def]
        return functional.mean_only_batch_norm(x, running_mean, bias, True)

    return run


# layer norm: parameters of x's dtype, because torch takes no other on CUDA; but of fp32, as
# autocast leaves them, in FP32_WEIGHTS, and without gradients in FROZEN

FP32_WEIGHTS, FROZEN = "fp32_weights", "frozen"


def _layer_norm_tensors(problem: Problem, device: str) -> Tensors:
    dtype = DTYPES[problem.dtype]
    if problem.layout == "nchw":  # an image [N, C, H, W], of which the rows are the channels
        N, *image, C = problem.shape
        x = _dense((N, C, *image), "nchw", dtype, device).movedim(1, -1)
    else:
        x = _dense(problem.shape, "rows", dtype, device)
    dims = 3 if problem.variant == "last3" else 1
    wide = torch.float32 if problem.variant == FP32_WEIGHTS else dtype
    parameters = _scale_shift(problem.shape[-dims:], wide, device)
    tensors = {"x": x.requires_grad_(), **parameters}
    if problem.variant == FROZEN:
        tensors |= {name: t.detach() for name, t in parameters.items()}
    if problem.variant == "residual":
        tensors["residual"] = torch.randn_like(x).requires_grad_()
    return tensors


def _layer_norm_torch(problem: Problem) -> Function:
    activation = EPILOGUES.get(problem.variant)

    def run(x, weight, bias, residual=None):  # type: ignore[no-untyped-def]
        if residual is None:  # in the parameters' type, as torch's layer runs under autocast
            y = F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias).to(x.dtype)
            return activation(y) if activation else y
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias), total

    return run


def _layer_norm_ours(problem: Problem) -> Function:
    name = problem.variant if problem.variant in EPILOGUES else None

    def run(x, weight, bias, residual=None):  # type: ignore[no-untyped-def]
        return functional.layer_norm(
            x, weight.shape, weight, bias, activation=name, residual=residual,
            return_sum=residual is not None,
        )  # fmt: skip

    return run


# weight norm


def weight_norm_layers(problem: Problem) -> list[tuple[tuple[int, ...], int]]:
    """(shape of v, dim) of every weight of the problem: one, or those of a whole generator."""
    if problem.variant == "hifigan":
        return [(shape, 0) for shape in HIFIGAN]
    return [(problem.shape, int(problem.variant.removeprefix("dim")))]


def _weight_norm_tensors(problem: Problem, device: str) -> Tensors:
    dtype = DTYPES[problem.dtype]
    tensors: Tensors = {}
    for i, (shape, dim) in enumerate(weight_norm_layers(problem)):
        lengths = tuple(n if j == dim else 1 for j, n in enumerate(shape))
        v = torch.randn(shape, dtype=dtype, device=device)
        g = torch.rand(lengths, dtype=dtype, device=device) + 0.5
        tensors |= {f"v{i}": v.requires_grad_(), f"g{i}": g.requires_grad_()}
    return tensors


def _each_weight(function: Function) -> Callable[[Problem], Function]:
    def make(problem: Problem) -> Function:
        dims = [dim for _, dim in weight_norm_layers(problem)]

        def run(**tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                function(tensors[f"v{i}"], tensors[f"g{i}"], dim) for i, dim in enumerate(dims)
            )

        return run

    return make


def _weight_norm_ours(problem: Problem) -> Function:
    """A generator's layers in one call, as fastnorm.weight_norm_ makes it; else one layer."""
    if problem.variant != "hifigan":
        return _each_weight(functional.weight_norm)(problem)
    dims = [dim for _, dim in weight_norm_layers(problem)]

    def run(**tensors: Tensor) -> tuple[Tensor, ...]:
        v, g = ([tensors[f"{name}{i}"] for i in range(len(dims))] for name in "vg")
        return tuple(weight_norm_group(v, g, dims, [None] * len(dims)))

    return run


# activations


def _activation_tensors(problem: Problem, device: str) -> Tensors:
    x = _dense(problem.shape, problem.layout, DTYPES[problem.dtype], device).requires_grad_()
    if problem.variant not in ("swish", "swish_channels"):
        return {"x": x}
    betas = problem.shape[1] if problem.variant == "swish_channels" else 1
    beta = torch.rand(betas, device=device) + 0.7
    return {"x": x, "beta": beta.requires_grad_()}


def _positional(function: Function) -> Function:
    return lambda **tensors: function(*tensors.values())


_PLANES = {"x": 1, "residual": 1, "y0": 1} | dict.fromkeys(
    ("weight", "bias", "running_mean", "running_var"), 0
)
OPS: dict[str, Op] = {
    "batch_norm": Op(
        ("plain", *EPILOGUES, "residual", "residual+relu", "residual+silu"),
        ("nchw", "nhwc", "nlc", "rows"),
        _batch_norm_tensors, _batch_norm_torch, _batch_norm_ours, _PLANES,
    ),
    "mean_only_batch_norm": Op(
        ("plain",), ("nchw", "nhwc", "nlc", "rows"),
        _mean_only_tensors, _mean_only_torch, _mean_only_ours, _PLANES,
    ),
    "layer_norm": Op(
        ("plain", "last3", "residual", FP32_WEIGHTS, FROZEN, *EPILOGUES), ("rows", "nchw"),
        _layer_norm_tensors, _layer_norm_torch, _layer_norm_ours,
        {"x": 0, "residual": 0, "y0": 0, "y1": 0},
    ),
    "weight_norm": Op(
        ("dim0", "dim1", "dim2", "hifigan"), ("flat",), _weight_norm_tensors,
        _each_weight(torch._weight_norm), _weight_norm_ours,
    ),
    "activation": Op(
        tuple(ACTIVATIONS), ("flat", "nchw", "nhwc"), _activation_tensors,
        lambda problem: _positional(ACTIVATIONS[problem.variant][0]),
        lambda problem: _positional(ACTIVATIONS[problem.variant][1]),
        {"x": 0, "y0": 0},
    ),
}  # fmt: skip
