"""One case of the table, and what the families' cases share: dtypes, parameters, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
