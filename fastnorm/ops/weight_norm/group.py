"""Weight norm of many layers at once: one op, one autograd node, on CUDA C++ one launch."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm import dispatch
from fastnorm.ops.registry import applied, by_formula, differentiable_backward, register
from fastnorm.ops.weight_norm import check, normalized_dim, reference, weight_norm

# the outputs, and what the ops look like to torch


def forward_outputs(
    v: list[Tensor], g: list[Tensor], dim: list[int], eps: list[float]
) -> tuple[list[Tensor], Tensor]:
    dtypes = [reference.promoted(v, g) for v, g in zip(v, g, strict=True)]
    # without the way through autograd, which for parameters costs as much as the rest
    with torch._C._AutoDispatchBelowAutograd():
        w = [
            torch.empty_like(v, dtype=dtype, memory_format=torch.contiguous_format)
            for v, dtype in zip(v, dtypes, strict=True)
        ]
    # the norms of all layers, one behind the other
    return w, v[0].new_empty(sum(map(Tensor.numel, g)), dtype=reference.wide(dtypes[0]))


def backward_outputs(
    v: list[Tensor],
    g: list[Tensor],
    norm: Tensor,
    dw: list[Tensor],
    begin: list[int],
    dim: list[int],
    eps: list[float],
    needs_v: list[bool],
    needs_g: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    form = torch.contiguous_format
    return (
        [torch.empty_like(x, memory_format=form) for x in itertools.compress(v, needs_v)],
        [torch.empty_like(x, memory_format=form) for x in itertools.compress(g, needs_g)],
    )


_forward = register(
    "weight_norm",
    "weight_norm_group_forward",
    "(Tensor[] v, Tensor[] g, int[] dim, float[] eps) -> (Tensor[], Tensor)",
    forward_outputs,
)
_backward = register(
    "weight_norm",
    "weight_norm_group_backward",
    "(Tensor[] v, Tensor[] g, Tensor norm, Tensor[] dw, int[] begin, int[] dim, float[] eps,"
    " bool[] needs_v, bool[] needs_g) -> (Tensor[], Tensor[])",
    backward_outputs,
)


class WeightNormGroupFunction(torch.autograd.Function):
    """Every w = g * v / ||v||; a layer whose w was not used gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, dim: list[int], eps: list[float], way: str, *v_and_g: Tensor
    ) -> tuple[Tensor, ...]:
        v, g = list(v_and_g[: len(dim)]), list(v_and_g[len(dim) :])
        w, norm = _forward.by[way](v, g, dim, eps)
        ctx.dim, ctx.eps = dim, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*v, *g, norm)
        needs = ctx.needs_input_grad[3:]
        if not all(needs):
            each = zip(w, needs, needs[len(dim) :], strict=False)
            ctx.mark_non_differentiable(*(w for w, *needed in each if not any(needed)))
        return tuple(w)

    @staticmethod
    def backward(ctx: Any, *dw: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(dw)
        *v_and_g, norm = ctx.saved_tensors
        v, g = v_and_g[:count], v_and_g[count:]
        used = [i for i in range(count) if dw[i] is not None]
        given: list[Any] = [dw[i] for i in used]
        gradients: list[Tensor | None] = [None] * (2 * count)
        if by_formula(*given):
            for i, gradient in zip(used, given, strict=True):
                dim, eps = reference.alone(ctx.dim[i], ctx.eps[i])
                gradients[i], gradients[count + i] = differentiable_backward(
                    lambda v, g, dim=dim, eps=eps: reference.composite(v, g, dim, eps),
                    (v[i], g[i]),
                    gradient,
                )
        elif used:
            begin = list(itertools.accumulate((x.numel() for x in g), initial=0))
            needs = ctx.needs_input_grad[3:]
            dv, dg = _backward(
                [v[i] for i in used],
                [g[i] for i in used],
                norm,
                [x.contiguous() for x in given],
                *([values[i] for i in used] for values in (begin, ctx.dim, ctx.eps)),
                [needs[i] for i in used],
                [needs[count + i] for i in used],
            )
            for i, x in zip((i for i in used if needs[i]), dv, strict=True):
                gradients[i] = x
            for i, x in zip((i for i in used if needs[count + i]), dg, strict=True):
                gradients[count + i] = x
        return None, None, None, *gradients


_apply = applied(WeightNormGroupFunction)


class Part(NamedTuple):
    """Layers that one call computes, and what it takes."""

    layers: list[int]
    dim: list[int]
    eps: list[float]
    elements: int


class Parts(NamedTuple):
    """How the layers of a group are computed."""

    empty: list[int]  # layers
    calls: list[Part]


@functools.lru_cache(maxsize=64)
def _parts(
    v_shapes: tuple[torch.Size, ...],
    g_shapes: tuple[torch.Size, ...],
    v_dtypes: tuple[torch.dtype, ...],
    g_dtypes: tuple[torch.dtype, ...],
    dims: tuple[int | None, ...],
    epsilons: tuple[float | None, ...],
) -> Parts:
    """What sizes and dtypes decide, once they are found right."""
    parts = Parts([], [])
    of: dict[torch.dtype, list[tuple[int, int, float, int]]] = {}  # by the type of computation
    layers = zip(v_shapes, g_shapes, v_dtypes, g_dtypes, dims, epsilons, strict=True)
    for i, (v_shape, g_shape, v_dtype, g_dtype, dim, eps) in enumerate(layers):
        if v_shape.numel() == 0:
            parts.empty.append(i)
            continue
        v = torch.empty(v_shape, dtype=v_dtype, device="meta")
        g = torch.empty(g_shape, dtype=g_dtype, device="meta")
        own = normalized_dim(v.dim(), dim)
        check(v, g, own)
        wide = reference.wide(reference.promoted(v, g))
        place = reference.WHOLE if own is None else own
        of.setdefault(wide, []).append((i, place, eps or 0.0, v.numel()))
    for members in of.values():
        indices, places, bounds, elements = map(list, zip(*members, strict=True))
        parts.calls.append(Part(indices, places, bounds, sum(elements)))
    return parts


_SHAPE, _DTYPE, _DEVICE = map(operator.attrgetter, ("shape", "dtype", "device"))


def weight_norm_group(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    eps: Sequence[float | None],
) -> list[Tensor]:
    """:func:`weight_norm` of every (v, g, dim, eps), whose tensors are on one device.

    One call and one autograd node where a kernel of ours serves; each by itself where torch's own
    function does. Layers that are computed in fp64 and those in fp32 make two calls.
    """
    devices = set(map(_DEVICE, itertools.chain(v, g)))
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"expected all layers on the same device, and they are on {names}")
    return on_one_device(v, g, dim, eps)


def on_one_device(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    eps: Sequence[float | None],
) -> list[Tensor]:
    """:func:`weight_norm_group` of tensors whose devices have been looked at."""
    empty, calls = _parts(
        tuple(map(_SHAPE, v)),
        tuple(map(_SHAPE, g)),
        tuple(map(_DTYPE, v)),
        tuple(map(_DTYPE, g)),
        tuple(dim),
        tuple(eps),
    )
    found = {i: weight_norm(v[i], g[i], dim[i], eps[i]) for i in empty}
    for part in calls:
        one = [v[i] for i in part.layers]
        other = [g[i] for i in part.layers]
        if _each_alone(one, part.elements):
            found |= {i: weight_norm(v[i], g[i], dim[i], eps[i]) for i in part.layers}
        else:
            every = _together(_without_gaps(one), _without_gaps(other), part.dim, part.eps)
            found |= dict(zip(part.layers, every, strict=True))
    return [found[i] for i in range(len(v))]


def _without_gaps(tensors: list[Tensor]) -> list[Tensor]:
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [x.contiguous() for x in tensors]


def _together(
    v: list[Tensor], g: list[Tensor], dim: list[int], eps: list[float]
) -> Sequence[Tensor]:
    way = _forward.way(v, g)
    if not torch.is_grad_enabled():
        w: list[Tensor] = _forward.by[way](v, g, dim, eps)[0]
        return w
    every: tuple[Tensor, ...] = _apply[way](dim, eps, way, *v, *g)
    return every


def _each_alone(v: list[Tensor], elements: int) -> bool:
    """Whether torch's own function serves these layers, or the smallest of them where each takes a
    launch."""
    if dispatch.select("weight_norm", v[0]) == "cuda":
        return dispatch.way("weight_norm", v[0], elements=elements) is None
    return any(dispatch.way("weight_norm", x) is None for x in v)
