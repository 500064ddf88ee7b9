"""Layer norm on ATen's own kernels: the oracle everywhere, the implementation where there is no
GPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.ops.activation.reference import ACTIVATIONS, wide

aten = torch.ops.aten


def _for(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The parameter in the type that x is computed in: ATen takes no other."""
    return None if parameter is None else parameter.to(wide(x).dtype)


def composite(
    x: Tensor,  # [..., *shape]
    weight: Tensor | None,  # [*shape]
    bias: Tensor | None,  # [*shape]
    shape: list[int],
    eps: float,
    activation: str,
) -> Tensor:
    """Layer norm and its activation as torch's own functions, differentiable any number of
    times."""
    mixed = any(p is not None and p.dtype != x.dtype for p in (weight, bias))
    if not mixed or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        y = F.layer_norm(x, shape, weight, bias, eps)
    else:  # torch rejects most mixtures of dtypes, and what it accepts it computes in fp32 too
        kind = (
            torch.float64
            if torch.float64 in {t.dtype for t in (x, weight, bias) if t is not None}
            else torch.float32
        )
        w, b = (None if p is None else p.to(kind) for p in (weight, bias))
        y = F.layer_norm(x.to(kind), shape, w, b, eps).to(x.dtype)
    return y if activation == "identity" else ACTIVATIONS[activation].value(y)


def layer_norm_forward(
    x: Tensor,  # [..., *shape]
    residual: Tensor | None,  # [..., *shape]
    weight: Tensor | None,  # [*shape]
    bias: Tensor | None,  # [*shape]
    dims: int,
    eps: float,
    activation: str,
    dtype: torch.dtype,
    want_sum: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    total = x if residual is None else x + residual
    z, mean, rstd = aten.native_layer_norm(
        wide(total).contiguous(),
        total.shape[total.dim() - dims :],
        _for(x, weight),
        _for(x, bias),
        eps,
    )
    y = z if activation == "identity" else ACTIVATIONS[activation].value(z)
    statistics = torch.stack([mean.reshape(-1), rstd.reshape(-1)])
    return y.to(dtype), statistics, total.contiguous() if want_sum else None


def layer_norm_backward(
    x: Tensor,  # [..., *shape]
    dy: Tensor,  # [..., *shape]
    dsum: Tensor | None,  # [..., *shape]
    weight: Tensor | None,  # [*shape]
    bias: Tensor | None,  # [*shape]
    statistics: Tensor,  # [2, M]
    dims: int,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    last = x.dim() - dims
    shape = x.shape[last:]
    w, b = _for(x, weight), _for(x, bias)
    s, dz = wide(x).contiguous(), wide(dy).to(wide(x).dtype).contiguous()
    mean, rstd = (t.view(*x.shape[:last], *[1] * dims) for t in statistics)
    if activation != "identity":
        z = (s - mean) * rstd
        z = z if w is None else z * w
        z = z if b is None else z + b
        dz = ACTIVATIONS[activation].gradient(dz, z)
    mask = [needs[0], needs[1] and weight is not None, needs[2] and bias is not None]
    dx, dweight, dbias = aten.native_layer_norm_backward(dz, s, shape, mean, rstd, w, b, mask)
    if mask[0]:
        dx = dx.to(x.dtype) if dsum is None else (dx + dsum).to(x.dtype)
    return (
        dx if mask[0] else None,
        _parameter(dweight, weight, math.prod(x.shape[:last])) if mask[1] else None,
        _parameter(dbias, bias, math.prod(x.shape[:last])) if mask[2] else None,
    )


def _parameter(gradient: Tensor, parameter: Tensor | None, rows: int) -> Tensor:
    """The gradient in the parameter's dtype; ATen leaves it undefined where there are no rows."""
    assert parameter is not None
    if rows == 0:
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return gradient.to(parameter.dtype)
