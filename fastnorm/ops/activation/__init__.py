"""Activations on their own: GELU, SiLU, SELU, Swish with a learnable beta, and every other that a
norm can fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnorm import dispatch, layout
from fastnorm.ops.activation import reference
from fastnorm.ops.registry import applied, by_formula, differentiable_backward, register

NAMES = tuple(reference.ACTIVATIONS)
_GELU = {"none": "gelu", "tanh": "gelu_tanh", "sigmoid": "gelu_sigmoid"}


def check_name(name: str | None) -> str:
    """The activation's name, "identity" for None; ValueError, with the choices, for a name that is
    none of them."""
    if name is None:
        return "identity"
    if name not in reference.ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(NAMES)}, or None")
    return name


def _not_implemented(x: Tensor, function: str) -> NotImplementedError:
    return NotImplementedError(
        f'"{function}" not implemented for {x.dtype}: give a floating-point tensor'
    )


def _check_dtype(x: Tensor, function: str) -> None:
    if not x.is_floating_point():
        raise _not_implemented(x, function)


# the outputs, and what an op of this family looks like to torch


def forward_outputs(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def backward_outputs(x: Tensor, dy: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def _inplace_outputs(x: Tensor, y: Tensor, name: str) -> None:
    return None


def swish_backward_outputs(
    x: Tensor, dy: Tensor, beta: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return torch.empty_like(x) if needs[0] else None, torch.empty_like(beta) if needs[1] else None


def swish_forward_outputs(x: Tensor, beta: Tensor) -> Tensor:
    return torch.empty_like(x)


_forward = register(
    "activation", "activation_forward", "(Tensor x, str name) -> Tensor", forward_outputs
)
_backward = register(
    "activation",
    "activation_backward",
    "(Tensor x, Tensor dy, str name) -> Tensor",
    backward_outputs,
)
_forward_ = register(
    "activation",
    "activation_forward_",
    "(Tensor x, Tensor(a!) y, str name) -> ()",
    _inplace_outputs,
)
_swish_forward = register(
    "activation", "swish_forward", "(Tensor x, Tensor beta) -> Tensor", swish_forward_outputs
)
_swish_backward = register(
    "activation",
    "swish_backward",
    "(Tensor x, Tensor dy, Tensor beta, bool[2] needs) -> (Tensor?, Tensor?)",
    swish_backward_outputs,
)


def _gradient(x: Tensor, dy: Tensor | None, name: str) -> Tensor | None:
    if dy is None:  # what torch gives no gradient gets none from us
        return None
    if by_formula(dy):
        (dx,) = differentiable_backward(reference.ACTIVATIONS[name].value, (x,), dy)
        return dx
    found: Tensor = _backward(x, layout.match(dy, x), name)
    return found


class ActivationFunction(torch.autograd.Function):
    """y = activation(x); saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, way: str) -> Tensor:
        ctx.name = name
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        y: Tensor = _forward.by[way](x, name)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _gradient(x, dy, ctx.name), None, None


_apply = applied(ActivationFunction)


class InplaceActivationFunction(torch.autograd.Function):
    """y = activation(x), written over ``target``, of which x is a copy that autograd knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, name: str, way: str) -> Tensor:
        ctx.name = name
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(target)
        ctx.save_for_backward(x)
        _forward_.by[way](x, target, name)
        return target

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        # not through the other Function's backward: Dynamo cannot trace one from within another
        (x,) = ctx.saved_tensors
        return _gradient(x, dy, ctx.name), None, None, None


_apply_ = applied(InplaceActivationFunction)


class SwishFunction(torch.autograd.Function):
    """y = x * sigmoid(beta * x); saves x and beta."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, way: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, beta)
        y: Tensor = _swish_forward.by[way](x, beta)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        x, beta = ctx.saved_tensors
        if by_formula(dy):
            return *differentiable_backward(reference.swish, (x, beta), dy), None
        needs = list(ctx.needs_input_grad[:2])
        dx, dbeta = _swish_backward(x, layout.match(dy, x), beta, needs)
        return dx, dbeta, None


_apply_swish = applied(SwishFunction)


def activation(input: Tensor, name: str | None, inplace: bool = False) -> Tensor:
    """Apply the activation of that name, the ones a norm can fuse.

    .. math:: y = f(x)

    Names: identity, relu, relu6, leaky_relu (0.01), elu (1), selu, gelu, gelu_tanh, gelu_sigmoid,
    silu, hardswish, mish, tanh, sigmoid; parameters are torch's defaults. Half types compute in
    fp32.

    Args:
        input: any shape, floating point; a dense layout (channels_last too) is kept, others are
            compacted.
        name: one of the names above; None means identity.
        inplace: overwrite ``input``.

    Returns:
        Same shape and dtype as ``input``.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: ``input`` is not floating point.

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.functional.activation(torch.tensor([-1.0, 2.0]), "relu6")
        tensor([0., 2.])
    """
    name = check_name(name)
    if name == "identity":
        _check_dtype(input, name)
        return input if inplace else input.clone()
    return _activation(input, name, inplace)


def _activation(input: Tensor, name: str, inplace: bool = False) -> Tensor:
    way = dispatch.way("activation", input)
    if way is None:
        if not inplace:
            return reference.ACTIVATIONS[name].value(input)
        # of a copy: what torch's functions save for backward must not be overwritten
        copied = torch.is_grad_enabled() and input.requires_grad
        return input.copy_(reference.ACTIVATIONS[name].value(input.clone() if copied else input))
    return _by_our_op(way, input, name, inplace)


def _by_our_op(way: str, input: Tensor, name: str, inplace: bool) -> Tensor:
    if not input.is_floating_point():
        raise _not_implemented(input, name)
    # copied outside the Function, where autograd sees it: what a Function saves must be what it was
    # given
    if not inplace:
        x = input if input.is_contiguous() else layout.dense(input)
        return _apply[way](x, name, way)  # type: ignore[no-any-return]
    # no kernel can write through a view that negates; Dynamo cannot ask for it
    if not torch.compiler.is_compiling() and input.is_neg():
        return input.copy_(_by_our_op(way, input.clone(), name, False))
    if torch.is_grad_enabled() and input.requires_grad:
        if input.is_leaf:
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
        return _apply_[way](input.clone(), input, name, way)  # type: ignore[no-any-return]
    with torch.no_grad():
        _forward_.by[way](input, input, name)
    return input


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit.

    .. math::
        \\text{none: } \\tfrac{x}{2}(1 + \\operatorname{erf}(x/\\sqrt 2)) \\qquad
        \\text{tanh: } \\tfrac{x}{2}(1 + \\tanh(\\sqrt{2/\\pi}(x + 0.044715 x^3))) \\qquad
        \\text{sigmoid: } x\\,\\sigma(1.702 x)

    Args:
        input: any shape, floating point; a dense layout is kept.
        approximate: "none" | "tanh" (torch's), or "sigmoid" (Hendrycks & Gimpel's cheap form).

    Returns:
        Same shape and dtype as ``input``.

    Raises:
        RuntimeError: ``approximate`` is none of the three.
        NotImplementedError: ``input`` is not floating point.

    Source: Hendrycks & Gimpel, Gaussian Error Linear Units, 2016, https://arxiv.org/abs/1606.08415

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.functional.gelu(torch.tensor([0.0, 1.0]), approximate="tanh")
        tensor([0.0000, 0.8412])
    """
    if approximate not in _GELU:
        raise RuntimeError(
            f"approximate argument must be one of {', '.join(_GELU)}, got {approximate!r}"
        )
    return _activation(input, _GELU[approximate])


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Sigmoid linear unit, also called Swish with beta = 1.

    .. math:: y = x\\,\\sigma(x)

    Args:
        input: any shape, floating point; a dense layout is kept.
        inplace: overwrite ``input`` (a copy of it is kept for backward).

    Returns:
        Same shape and dtype as ``input``.

    Raises:
        NotImplementedError: ``input`` is not floating point.

    Source: Elfwing et al., Sigmoid-weighted linear units, 2017, https://arxiv.org/abs/1702.03118

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.functional.silu(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7311])
    """
    way = dispatch.way("activation", input)
    if way is None:
        return torch.nn.functional.silu(input, inplace)
    return _by_our_op(way, input, "silu", inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """Scaled exponential linear unit.

    .. math:: y = \\lambda (\\max(0, x) + \\min(0, \\alpha (e^x - 1))),
        \\quad \\lambda = 1.0507, \\alpha = 1.6733

    The gradient at 0 is that of the negative branch (1.7581), as torch's.

    Args:
        input: any shape, floating point; a dense layout is kept.
        inplace: overwrite ``input`` (a copy of it is kept for backward).

    Returns:
        Same shape and dtype as ``input``.

    Raises:
        NotImplementedError: ``input`` is not floating point.

    Source: Klambauer et al., Self-Normalizing Neural Networks, 2017,
    https://arxiv.org/abs/1706.02515

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.functional.selu(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.0507])
    """
    way = dispatch.way("activation", input)
    if way is None:
        return torch.nn.functional.selu(input, inplace)
    return _by_our_op(way, input, "selu", inplace)


def swish(input: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Swish: the sigmoid linear unit with a slope that can be learned.

    .. math::
        y = x\\,\\sigma(\\beta x), \\qquad
        \\frac{\\partial y}{\\partial \\beta} = x^2\\,\\sigma(\\beta x)\\,(1 - \\sigma(\\beta x))

    Args:
        input: any shape, floating point; a dense layout is kept.
        beta: a number, a tensor with one element, or one per channel, ``[C]`` with C =
            ``input.size(1)``.

    Returns:
        Same shape and dtype as ``input``. The gradient of ``beta`` is summed in fp32 in the pass
        that computes the input's.

    Raises:
        ValueError: ``beta`` has neither one element nor one per channel.
        NotImplementedError: ``input`` is not floating point.
        RuntimeError: ``input`` and ``beta`` are on different devices.

    Source: Ramachandran et al., Searching for Activation Functions, 2017,
    https://arxiv.org/abs/1710.05941

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.functional.swish(torch.tensor([[1.0, 1.0]]), torch.tensor([0.0, 1.0]))
        tensor([[0.5000, 0.7311]])
    """
    _check_dtype(input, "swish")
    if not isinstance(beta, Tensor):
        beta = torch.full((1,), float(beta), dtype=reference.wide_dtype(input), device=input.device)
    channels = input.size(1) if input.dim() > 1 else 1
    if beta.numel() != 1 and tuple(beta.shape) != (channels,):
        raise ValueError(
            f"expected beta of one element or of shape [{channels}], one per channel of an input "
            f"of shape {list(input.shape)}; got {list(beta.shape)}"
        )
    _check_dtype(beta, "swish")
    if beta.device != input.device:
        raise RuntimeError(
            f"input is on {input.device}, beta on {beta.device}: expected both on the same device"
        )
    way = dispatch.way("activation", input, beta)
    if way is None:
        return reference.swish(input, beta)
    x = layout.dense(input)
    if beta.numel() > 1 and not layout.canonical(x):
        x = x.contiguous()
    result: Tensor = _apply_swish[way](x, beta.contiguous(), way)
    return result
