"""Weight norm on ATen's own kernel: the oracle everywhere, the implementation where there is no
GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

aten = torch.ops.aten
WHOLE = -1  # in a list of dims: one norm for the whole tensor; every other dim is from 0 on


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of computation: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted(v: Tensor, g: Tensor) -> torch.dtype:
    """torch.result_type of floating-point v and g, which Dynamo cannot trace in torch.export."""
    if v.dtype == g.dtype or g.dim() == 0:
        return v.dtype
    return torch.promote_types(v.dtype, g.dtype)


def canonical(shape: torch.Size, dim: int | None) -> tuple[int, int, int]:
    """The sizes of a weight as [A, K, B], a norm over A and B for each of K; None and WHOLE are one
    norm."""
    if dim is None or dim == WHOLE:
        return 1, 1, shape.numel()
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _norm(v: Tensor, dim: int | None) -> Tensor:
    others = [i for i in range(v.dim()) if i != dim]
    if not others:  # to vector_norm an empty list means every dim
        return v.abs()
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim is not None)
    return norm


def composite(v: Tensor, g: Tensor, dim: int | None, eps: float | None) -> Tensor:
    """w as differentiable torch functions, any number of times (torch's own double backward forgets
    d||v||/dv)."""
    dtype = promoted(v, g)
    v, g = v.to(wide(dtype)), g.to(wide(dtype))
    norm = _norm(v, dim)
    if eps is not None:
        # the norm of a clamped row is taken of ones: the derivatives of ||v|| at 0 are NaN from the
        # second on
        short = norm.detach() < eps
        norm = torch.where(short, eps, _norm(torch.where(short, 1.0, v), dim))
    return (v * (g / norm)).to(dtype).contiguous()


def _rows(x: Tensor, dim: int | None) -> Tensor:
    """x with everything that one norm is taken over in one row: [K, rest]."""
    return x.reshape(1, -1) if dim is None else x.movedim(dim, 0).reshape(x.size(dim), -1)


def _unrows(rows: Tensor, like: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        return rows.view(like.shape)
    moved = like.movedim(dim, 0).shape
    return rows.view(moved).movedim(0, dim).contiguous()


def weight_norm_forward(
    v: Tensor, g: Tensor, dim: int | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    dtype = promoted(v, g)
    rows, scale = _rows(v.to(wide(dtype)), dim).contiguous(), g.to(wide(dtype)).reshape(-1, 1)
    w, norm = aten._weight_norm_interface(rows, scale, 0)
    if eps is not None:
        w = torch.where(norm < eps, scale / eps * rows, w)
    return _unrows(w, v, dim).to(dtype), norm.reshape(g.shape)


def weight_norm_backward(
    v: Tensor,
    g: Tensor,
    norm: Tensor,
    dw: Tensor,
    dim: int | None,
    eps: float | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    dtype = norm.dtype
    rows, drows = _rows(v.to(dtype), dim).contiguous(), _rows(dw.to(dtype), dim).contiguous()
    scale, length = g.to(dtype).reshape(-1, 1), norm.reshape(-1, 1)
    dv, dg = aten._weight_norm_interface_backward(drows, rows, scale, length, 0)
    if eps is not None:
        dv = torch.where(length < eps, scale / eps * drows, dv)
        dg = torch.where(length < eps, (drows * rows).sum(1, keepdim=True) / eps, dg)
    return (
        _unrows(dv, v, dim).to(v.dtype) if needs[0] else None,
        dg.reshape(g.shape).to(g.dtype) if needs[1] else None,
    )


def alone(dim: int, eps: float) -> tuple[int | None, float | None]:
    """dim and eps out of a group's lists, as the op of one weight takes them."""
    return None if dim == WHOLE else dim, eps or None


def weight_norm_group_forward(
    v: list[Tensor], g: list[Tensor], dim: list[int], eps: list[float]
) -> tuple[list[Tensor], Tensor]:
    found = [
        weight_norm_forward(v, g, *alone(dim, eps))
        for v, g, dim, eps in zip(v, g, dim, eps, strict=True)
    ]
    return [w for w, _ in found], torch.cat([norm.reshape(-1) for _, norm in found])


def weight_norm_group_backward(
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
    found = [
        weight_norm_backward(
            v[i], g[i], norm_of(norm, begin[i], g[i]), dw[i], *alone(dim[i], eps[i]), list(needs)
        )
        for i, needs in enumerate(zip(needs_v, needs_g, strict=True))
    ]
    return (
        [dv for dv, _ in found if dv is not None],
        [dg for _, dg in found if dg is not None],
    )


def norm_of(norm: Tensor, begin: int, g: Tensor) -> Tensor:
    """A layer's norms out of a group's, as a view of g's shape."""
    return norm[begin : begin + g.numel()].view(g.shape)
