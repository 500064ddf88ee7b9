"""Weight norm: a weight as a direction v and a length g."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from fastnorm import dispatch
from fastnorm.ops.registry import applied, by_formula, differentiable_backward, register
from fastnorm.ops.weight_norm import reference


def normalized_dim(ndim: int, dim: int | None) -> int | None:
    """dim as 0 <= dim < ndim, None for the whole tensor (None or -1, as in torch's weight norm);
    IndexError if out."""
    dim = -1 if dim is None else operator.index(dim)
    if ndim == 0:
        raise IndexError(f"Dimension specified as {dim} but tensor has no dimensions")
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], "
            f"but got {dim}): give one of these, or None (or -1) for one norm of the whole tensor"
        )
    if dim == -1:
        return None
    return dim % ndim


def norm_shape(v: Tensor, dim: int | None) -> tuple[int, ...]:
    """The shape of g: v's with ones everywhere but at ``dim`` (normalised); () for the whole
    tensor."""
    if dim is None:
        return ()
    shape = [1] * v.dim()
    shape[dim] = v.size(dim)
    return tuple(shape)


def check(v: Tensor, g: Tensor, dim: int | None) -> None:
    """The errors of a v and g that do not fit; dim is normalised."""
    if not (v.is_floating_point() and g.is_floating_point()):
        wrong = g.dtype if v.is_floating_point() else v.dtype
        raise NotImplementedError(
            f'"weight_norm" not implemented for {wrong}: give floating-point tensors'
        )
    if g.shape != norm_shape(v, dim):
        raise RuntimeError(
            f"expected g of shape {list(norm_shape(v, dim))} for v of shape {list(v.shape)} and "
            f"dim={dim}, got {list(g.shape)}"
        )
    if v.device != g.device:
        raise RuntimeError(f"v is on {v.device}, g on {g.device}: expected both on the same device")


# the outputs, and what an op of this family looks like to torch


def forward_outputs(
    v: Tensor, g: Tensor, dim: int | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    dtype = reference.promoted(v, g)
    w = torch.empty_like(v, dtype=dtype, memory_format=torch.contiguous_format)
    return w, torch.empty_like(
        g, dtype=reference.wide(dtype), memory_format=torch.contiguous_format
    )


def backward_outputs(
    v: Tensor,
    g: Tensor,
    norm: Tensor,
    dw: Tensor,
    dim: int | None,
    eps: float | None,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    form = torch.contiguous_format
    return (
        torch.empty_like(v, memory_format=form) if needs[0] else None,
        torch.empty_like(g, memory_format=form) if needs[1] else None,
    )


_forward = register(
    "weight_norm",
    "weight_norm_forward",
    "(Tensor v, Tensor g, int? dim, float? eps) -> (Tensor, Tensor)",
    forward_outputs,
)
_backward = register(
    "weight_norm",
    "weight_norm_backward",
    "(Tensor v, Tensor g, Tensor norm, Tensor dw, int? dim, float? eps, bool[2] needs)"
    " -> (Tensor?, Tensor?)",
    backward_outputs,
)


class WeightNormFunction(torch.autograd.Function):
    """w = g * v / ||v||; saves v, g and the norm."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, g: Tensor, dim: int | None, eps: float | None, way: str
    ) -> Tensor:
        w, norm = _forward.by[way](v, g, dim, eps)
        ctx.dim, ctx.eps = dim, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, g, norm)
        return w  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dw: Tensor | None) -> tuple[Tensor | None, ...]:
        if dw is None:  # what torch gives no gradient gets none from us
            return (None,) * 5
        v, g, norm = ctx.saved_tensors
        if by_formula(dw):
            dv, dg = differentiable_backward(
                lambda v, g: reference.composite(v, g, ctx.dim, ctx.eps), (v, g), dw
            )
        else:
            dv, dg = _backward(
                v, g, norm, dw.contiguous(), ctx.dim, ctx.eps, list(ctx.needs_input_grad[:2])
            )
        return dv, dg, None, None, None


_apply = applied(WeightNormFunction)


def _mend_double_backward(w: Tensor, v: Tensor, g: Tensor, dim: int | None) -> None:
    """Let the node that made w give gradients that are right to differentiate (create_graph)."""

    def gradients(found: Any, received: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        return differentiable_backward(
            lambda v, g: reference.composite(v, g, dim, None), (v, g), received[0]
        )

    assert w.grad_fn is not None
    w.grad_fn.register_hook(gradients)


def _native(v: Tensor, g: Tensor, dim: int | None, eps: float | None) -> Tensor:
    # torch's kernel knows no eps and one dtype; torch.func and forward AD do not see through it
    if eps is not None or v.dtype != g.dtype or dispatch.transformed():
        return reference.composite(v, g, dim, eps)
    w = torch._weight_norm(v, g, -1 if dim is None else dim)
    # its double backward takes the norm for a constant where it is fused (first and last dim)
    fused = (dim == 0 or dim == v.dim() - 1) and (v.is_cpu or v.is_cuda)
    if fused and w.requires_grad and not torch.compiler.is_compiling():
        _mend_double_backward(w, v, g, dim)
    return w


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0, eps: float | None = None) -> Tensor:
    """A weight of direction v and length g.

    .. math:: w = g\\,\\frac{v}{\\lVert v \\rVert}, \\qquad
        \\frac{\\partial L}{\\partial g} =
        \\frac{\\langle \\nabla_w, v \\rangle}{\\lVert v \\rVert}, \\qquad
        \\nabla_v = \\frac{g}{\\lVert v \\rVert} \\left(\\nabla_w - \\frac{\\partial L}{\\partial g}
        \\frac{v}{\\lVert v \\rVert}\\right)

    The norm is taken over every dimension but ``dim``, in fp32 for half types. On a transposed
    convolution the default ``dim=0`` is the *input* channel, as in torch; ``dim=1`` gives one norm
    per output channel.

    Args:
        v: the direction, any shape of at least one dimension, floating point, any strides.
        g: the length: v's shape with ones everywhere but at ``dim``; 0-d for the whole tensor.
        dim: the dimension that keeps its own norms; None or -1: one norm for the whole tensor.
        eps: norms below ``eps`` count as ``eps`` (as in torch.nn.functional.normalize); None: a
            zero row gives NaN, as torch's.

    Returns:
        v's shape, contiguous; the dtype that v and g promote to.

    Raises:
        IndexError: ``dim`` out of range, or a 0-d ``v``.
        ValueError: ``eps`` is not positive.
        NotImplementedError: ``v`` or ``g`` is not floating point.
        RuntimeError: ``g`` of another shape, or on another device.

    Source: Salimans & Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.functional.weight_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]))
        tensor([[6., 8.]])
    """
    dim = normalized_dim(v.dim(), dim)
    check(v, g, dim)
    if eps is not None and not eps > 0:
        raise ValueError(
            f"expected a positive eps, or None for no lower bound of the norm; got {eps}"
        )
    if v.numel() == 0:
        # nothing to normalise: zero gradients, where a norm would give 0/0 (and torch a crash)
        return v * g
    way = dispatch.way("weight_norm", v, g)
    if way is None:
        return _native(v, g, dim, eps)
    # made contiguous here and not in the Function: double backward must find the way back to a
    # strided v
    w: Tensor = _apply[way](v.contiguous(), g.contiguous(), dim, eps, way)
    return w
