"""Layer norm, with an optional residual added before it and an optional activation after it, in one
kernel each way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import dispatch, layout
from fastnorm.ops.activation import check_name
from fastnorm.ops.activation.reference import wide_dtype
from fastnorm.ops.layer_norm import reference
from fastnorm.ops.registry import applied, by_formula, differentiable_backward, register

# the outputs, and what an op of this family looks like to torch; statistics [2, M], wide, are the
# mean and 1 / sqrt(variance + eps) of every row


def outputs_of_rows(
    x: Tensor, M: int, dtype: torch.dtype, want_sum: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, statistics and the sum of M rows."""
    # empty and new_empty take twice as long
    statistics = torch.empty_strided((2, M), (M, 1), dtype=wide_dtype(x), device=x.device)
    total = layout.row_major(x, x.dtype) if want_sum else None
    return layout.row_major(x, dtype), statistics, total


def forward_outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    activation: str,
    dtype: torch.dtype,
    want_sum: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return outputs_of_rows(x, math.prod(x.shape[:-dims]), dtype, want_sum)


def backward_outputs(
    x: Tensor,
    dy: Tensor,
    dsum: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    dims: int,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = layout.row_major(x, x.dtype) if needs[0] else None
    dweight = layout.row_major(weight, weight.dtype) if needs[1] and weight is not None else None
    dbias = layout.row_major(bias, bias.dtype) if needs[2] and bias is not None else None
    return dx, dweight, dbias


_forward = register(
    "layer_norm",
    "layer_norm_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float eps, "
    "str activation, ScalarType dtype, bool want_sum) -> (Tensor, Tensor, Tensor?)",
    forward_outputs,
)
_backward = register(
    "layer_norm",
    "layer_norm_backward",
    "(Tensor x, Tensor dy, Tensor? dsum, Tensor? weight, Tensor? bias, Tensor statistics, "
    "int dims, str activation, bool[3] needs) -> (Tensor?, Tensor?, Tensor?)",
    backward_outputs,
)


class LayerNormFunction(torch.autograd.Function):
    """y = activation(layer_norm(x)), or with a residual (y, sum) = (activation(layer_norm(sum)),
    x + residual); saves x or the sum, never y.

    The sum is computed whenever a residual is given and a gradient is needed, wanted by the caller
    or not: what backward saves is then part of the graph, and double backward finds its way through
    it to x and the residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: tuple[int, float, str, torch.dtype, bool],
        way: str,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        dims, eps, activation, dtype, return_sum = settings
        want_sum = residual is not None and (return_sum or any(ctx.needs_input_grad))
        y, statistics, total = _forward.by[way](
            x, residual, weight, bias, dims, eps, activation, dtype, want_sum
        )
        ctx.settings = settings
        ctx.residual_dtype = x.dtype if residual is None else residual.dtype
        ctx.set_materialize_grads(False)  # what torch gives no gradient gets none from us
        ctx.save_for_backward(x if residual is None else total, weight, bias, statistics)
        if residual is None:
            return y  # type: ignore[no-any-return]
        if total is not None and not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:  # only the sum was used, and may have been changed since
            return *_of_terms(ctx, dsum), None, None, None, None
        x, weight, bias, statistics = ctx.saved_tensors
        dims, eps, activation, *_ = ctx.settings
        needs = [ctx.needs_input_grad[0] or ctx.needs_input_grad[1], *ctx.needs_input_grad[2:4]]
        if by_formula(dy, dsum):
            shape = list(x.shape[x.dim() - dims :])

            def composite(
                x: Tensor, weight: Tensor | None, bias: Tensor | None
            ) -> tuple[Tensor, ...]:
                y = reference.composite(x, weight, bias, shape, eps, activation).to(dy.dtype)
                return (y,) if dsum is None else (y, x * 1)

            gradients = (dy,) if dsum is None else (dy, dsum)
            dx, dweight, dbias = differentiable_backward(composite, (x, weight, bias), gradients)
        else:
            dx, dweight, dbias = _backward(
                x, dy, dsum, weight, bias, statistics, dims, activation, needs
            )
        return *_of_terms(ctx, dx), dweight, dbias, None, None


def _of_terms(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and the residual by that of their sum."""
    dresidual = dx if ctx.needs_input_grad[1] else None
    if dresidual is not None and dresidual.dtype is not ctx.residual_dtype:
        dresidual = dresidual.to(ctx.residual_dtype)
    return dx if ctx.needs_input_grad[0] else None, dresidual


_apply = applied(LayerNormFunction)


def _check(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """Raise torch's own error for what torch rejects too, and say which device is the odd one
    out."""
    device, dtype, sizes = input.device, input.dtype, input.shape
    # the last size alone first: a slice of a torch.Size takes as long as three questions
    well_formed = (
        shape
        and sizes
        and sizes[-1] == shape[-1]
        and (len(shape) == 1 or sizes[-len(shape) :] == shape)
        and dtype.is_floating_point
    )
    for parameter in (weight, bias):
        if parameter is None:
            continue
        well_formed = (
            well_formed
            and parameter.shape == shape
            and (parameter.dtype is dtype or parameter.is_floating_point())
        )
        if parameter.device != device:
            name = "weight" if parameter is weight else "bias"
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but input is on "
                f"{device} and {name} is on {parameter.device}"
            )
    if not well_formed:
        F.layer_norm(input, shape, weight, bias, eps)
        raise NotImplementedError(
            f'"layer_norm" not implemented for {input.dtype}: give a floating-point tensor'
        )


def output_dtype(input: Tensor, autocast: str | None) -> torch.dtype:
    """fp32 for half input under CUDA autocast, as torch's layer norm, unless autocast is "input";
    else input's dtype."""
    dtype = input.dtype
    if (
        (dtype is torch.bfloat16 or dtype is torch.float16)
        and autocast is None
        and input.is_cuda
        and torch.is_autocast_enabled("cuda")
    ):
        return torch.float32
    return dtype


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    return_sum: bool = False,
    autocast: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise every row (the last dimensions), optionally of a sum with a residual, optionally
    followed by an activation.

    .. math::
        s = x + r, \\qquad
        y = f\\left(\\frac{s - \\operatorname{E}[s]}{\\sqrt{\\operatorname{Var}[s] + \\epsilon}}\\,w
        + b\\right)

    Statistics are taken in fp32 (fp64 for fp64) of the sum as it is returned and saved, rounded to
    its dtype: y is then the norm of the tensor that the residual stream carries on, and
    backward, which has that tensor alone, differentiates the function that forward computed. It is
    also what the two layers compute one after the other.

    Args:
        input: ``[*, *normalized_shape]``, floating point, any strides.
        normalized_shape: the sizes of the last dimensions, at least one.
        weight, bias: ``[*normalized_shape]`` or None, of any floating dtype.
        eps: added to the (biased) variance, in units of the input squared.
        activation: the name of one, see :func:`fastnorm.functional.activation`; None is none.
        residual: added to the input first, with the dtype that torch's addition has. In the fused
            kernel where both have one shape, and one dtype or fp32 and half, as under autocast;
            anything else that torch can add is added before it.
        return_sum: return ``(y, input + residual)``: the pre-norm residual stream and its gradient
            stay in the same kernels. Without a residual the second is ``input`` itself.
        autocast: None gives fp32 for half input under CUDA autocast, as torch; "input" keeps the
            input's dtype.

    Returns:
        The input's shape, row-major, in the dtype of the input or of its sum with the residual;
        with that sum, row-major too, where ``return_sum``.

    Raises:
        RuntimeError: ``normalized_shape`` is empty or does not match the input, ``weight`` or
            ``bias`` (torch's text); parameters on another device; a residual that torch could not
            add.
        NotImplementedError: ``input`` is not floating point.
        ValueError: unknown ``activation`` or ``autocast``.

    Source: Ba, Kiros & Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.functional.layer_norm(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), (2,))
        tensor([[-1.0000,  1.0000],
                [ 0.0000,  0.0000]])
    """
    name = "identity" if activation is None else check_name(activation)
    if autocast is not None and autocast != "input":
        raise ValueError(
            f"unknown autocast {autocast!r}: choose None (fp32 as torch) "
            "or 'input' (the input's dtype)"
        )
    shape = tuple(normalized_shape)
    if residual is not None:
        input, residual = _terms(input, residual)
    way = dispatch.way("layer_norm", input, residual, weight, bias)
    if way is None:
        total = input if residual is None else input + residual
        y = reference.composite(total, weight, bias, list(shape), eps, name)
        if autocast is not None:
            y = y.to(total.dtype)
        return (y, total) if return_sum else y
    _check(input, shape, weight, bias, eps)
    dtype = output_dtype(input, autocast)
    settings = (len(shape), float(eps), name, dtype, return_sum)
    found = _apply[way](input, residual, weight, bias, settings, way)
    y, total = (found, input) if residual is None else found
    return (y, total) if return_sum else y


_HALF = (torch.float16, torch.bfloat16)


def _terms(input: Any, residual: Any) -> tuple[Tensor, Tensor | None]:
    """x, which has the dtype of the sum, and a residual that the kernels can add to it; the sum and
    None where they cannot."""
    if not (isinstance(input, Tensor) and isinstance(residual, Tensor)):
        return input + residual, None
    if residual.shape == input.shape and residual.device == input.device:
        if residual.dtype is input.dtype:
            return input, residual
        if input.dtype is torch.float32 and residual.dtype in _HALF:
            return input, residual
        if residual.dtype is torch.float32 and input.dtype in _HALF:
            return residual, input
    return input + residual, None
