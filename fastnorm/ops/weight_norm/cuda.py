"""Weight norm on the CUDA extension (csrc/weight_norm.cu): one launch for any number of layers."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor

from fastnorm.ops import launch
from fastnorm.ops.extension import extension
from fastnorm.ops.weight_norm import backward_outputs, forward_outputs, group
from fastnorm.ops.weight_norm.reference import WHOLE, canonical

_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")


# a tuple of each fact, made by map, and not one of each layer: it is looked up at every call
@functools.lru_cache(maxsize=4096)
def _plan(
    shapes: tuple[torch.Size, ...],
    dim: tuple[int, ...],
    eps: tuple[float, ...],
    v_dtypes: tuple[torch.dtype, ...],
    g_dtypes: tuple[torch.dtype, ...],
    processors: int,
) -> Any:
    """The extension's plan for layers of these v's; dim WHOLE: one norm of all; eps 0: none."""
    sizes = [
        (*canonical(shape, dim), eps, v if dim == WHOLE else torch.promote_types(v, g), v, g)
        for shape, dim, eps, v, g in zip(shapes, dim, eps, v_dtypes, g_dtypes, strict=True)
    ]
    return extension().WeightNormPlan(sizes, processors)


def _plan_of(
    v: list[Tensor], g: list[Tensor], dim: list[int], eps: list[float]
) -> tuple[Any, Tensor | None, Tensor | None]:
    """The plan, and the workspace and counters that it asks for."""
    plan = _plan(
        tuple(map(_SHAPE, v)),
        tuple(dim),
        tuple(eps),
        tuple(map(_DTYPE, v)),
        tuple(map(_DTYPE, g)),
        launch.processors(v[0].get_device()),
    )
    if not plan.counters:
        return plan, None, None
    partials = torch.empty(plan.partials, dtype=torch.float64, device=v[0].device)
    return plan, partials, launch.counters(v[0], plan.counters)


def _all(outputs: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Every layer's output, of which there are only those that are needed."""
    found = iter(outputs)
    return [next(found) if needed else None for needed in needs]


def _forward(
    v: list[Tensor],
    g: list[Tensor],
    dim: list[int],
    eps: list[float],
    w: list[Tensor],
    norm: Tensor,
) -> None:
    plan, partials, counters = _plan_of(v, g, dim, eps)
    begin = list(itertools.accumulate((x.numel() for x in g[:-1]), initial=0))
    extension().weight_norm_forward(plan, w, v, g, norm, begin, partials, counters)


def _backward(
    v: list[Tensor],
    g: list[Tensor],
    norm: Tensor,
    dw: list[Tensor],
    begin: list[int],
    dim: list[int],
    eps: list[float],
    needs_v: list[bool],
    needs_g: list[bool],
    dv: list[Tensor],
    dg: list[Tensor],
) -> None:
    plan, partials, counters = _plan_of(v, g, dim, eps)
    extension().weight_norm_backward(
        plan, _all(dv, needs_v), _all(dg, needs_g), v, g, norm, begin, dw, partials, counters,
    )  # fmt: skip


@launch.fills(forward_outputs)
def weight_norm_forward(
    v: Tensor, g: Tensor, dim: int | None, eps: float | None, w: Tensor, norm: Tensor
) -> None:
    _forward([v], [g], [WHOLE if dim is None else dim], [eps or 0.0], [w], norm)


@launch.fills(backward_outputs)
def weight_norm_backward(
    v: Tensor,
    g: Tensor,
    norm: Tensor,
    dw: Tensor,
    dim: int | None,
    eps: float | None,
    needs: list[bool],
    dv: Tensor | None,
    dg: Tensor | None,
) -> None:
    _backward(
        [v],
        [g],
        norm,
        [dw],
        [0],
        [WHOLE if dim is None else dim],
        [eps or 0.0],
        needs[:1],
        needs[1:],
        [] if dv is None else [dv],
        [] if dg is None else [dg],
    )


weight_norm_group_forward = launch.fills(group.forward_outputs)(_forward)
weight_norm_group_backward = launch.fills(group.backward_outputs)(_backward)
