"""Problems of host time as layers, with what a module's call costs: torch's, where it has one, and
ours, on the tensors of the problem."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastnorm
from benchmarks.calls import Call, of_leaves
from benchmarks.ops import OPS, Tensors
from benchmarks.problems import HOST, Problem
from fastnorm.modules.weight_norm import weight_norm

Layers = tuple[Callable[[], nn.Module] | None, Callable[[], nn.Module]]  # torch's, ours

_ACTIVATIONS: dict[str, Layers] = {
    "relu": (partial(nn.ReLU, inplace=True), nn.ReLU),
    "gelu": (nn.GELU, fastnorm.GELU),
    "gelu_tanh": (partial(nn.GELU, "tanh"), partial(fastnorm.GELU, "tanh")),
    "gelu_sigmoid": (None, partial(fastnorm.GELU, "sigmoid")),
    "silu": (nn.SiLU, fastnorm.SiLU),
    "selu": (nn.SELU, fastnorm.SELU),
    "swish": (None, fastnorm.Swish),
}


def wanted(problem: Problem) -> bool:
    """Whether a problem is measured as a layer: where nothing is but host time."""
    return set(problem.modes) <= set(HOST)


def _batch_norms(problem: Problem) -> Layers:
    C, dims = problem.shape[1], max(1, len(problem.shape) - 2)
    plain = f"BatchNorm{dims}d"
    if problem.variant == "plain":
        return partial(getattr(nn, plain), C), partial(getattr(fastnorm, plain), C)
    ours = getattr(fastnorm, f"BatchNormAct{dims}d")

    def theirs() -> nn.Module:
        activation, _ = _ACTIVATIONS[problem.variant]
        assert activation is not None, "in no suite"
        return nn.Sequential(getattr(nn, plain)(C), activation())

    return theirs, partial(ours, C, activation=problem.variant)


def _layers(problem: Problem) -> Layers:
    if problem.op == "batch_norm":
        return _batch_norms(problem)
    if problem.op == "mean_only_batch_norm":
        name = f"MeanOnlyBatchNorm{max(1, len(problem.shape) - 2)}d"
        return None, partial(getattr(fastnorm, name), problem.shape[1])
    if problem.op == "layer_norm":
        assert problem.variant == "plain", "in no suite"
        return partial(nn.LayerNorm, problem.shape[-1]), partial(
            fastnorm.LayerNorm, problem.shape[-1]
        )
    return _ACTIVATIONS[problem.variant]


def _given(layer: nn.Module, tensors: Tensors) -> None:
    """Make parameters and buffers of a layer these tensors, for autograd too."""
    norm = layer[0] if isinstance(layer, nn.Sequential) else layer
    for name, t in tensors.items():
        if name in norm._parameters:
            norm._parameters[name] = t  # type: ignore[assignment]  # a leaf, which is no Parameter
        elif name in norm._buffers:
            norm._buffers[name] = t


def _weight(problem: Problem, tensors: Tensors, ours: bool) -> Call:
    """The weight of a weight-normed layer, as its forward reads it."""
    layer, dim = nn.Module(), int(problem.variant.removeprefix("dim"))
    layer.weight = nn.Parameter(tensors["v0"].detach())
    make: Any = weight_norm if ours else torch.nn.utils.parametrizations.weight_norm
    make(layer, "weight", dim)
    originals: Any = layer.parametrizations["weight"]  # type: ignore[index]  # a ModuleDict
    for name, tensor in (("original0", tensors["g0"]), ("original1", tensors["v0"])):
        originals._parameters[name] = tensor
    return of_leaves(lambda: layer.weight, tensors)


def bind(problem: Problem, tensors: Tensors, ours: bool) -> Call:
    """A problem's layer, bound to its tensors. Where torch has none it is torch's expression."""
    if problem.op == "weight_norm":
        return _weight(problem, tensors, ours)
    make = _layers(problem)[ours]
    if make is None:
        return of_leaves(partial(OPS[problem.op].torch(problem), **tensors), tensors)
    layer = make()
    layer.to(tensors["x"].device)
    _given(layer, tensors)
    x: Tensor = tensors["x"]
    return of_leaves(partial(layer, x), tensors)
