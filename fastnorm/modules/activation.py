"""Activation layers: torch's GELU, SiLU and SELU, and Swish with a beta that can be learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnorm.modules.programs import Proxy, Scriptable, leaf, twin_of
from fastnorm.ops.activation import activation, gelu, selu, silu, swish


class GELU(Scriptable, torch.nn.GELU):
    """torch.nn.GELU on fused kernels, with a third form.

    Formulas, dtypes and errors: :func:`fastnorm.functional.gelu`.

    Args:
        approximate: "none" | "tanh" | "sigmoid". Another value is a RuntimeError at the first call,
            as torch's.

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.GELU("sigmoid")(torch.tensor([1.0]))
        tensor([0.8458])
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return gelu(input, self.approximate)


class SiLU(Scriptable, torch.nn.SiLU):
    """torch.nn.SiLU on fused kernels; see :func:`fastnorm.functional.silu`.

    .. math:: y = x\\,\\sigma(x)

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.SiLU()(torch.tensor([1.0]))
        tensor([0.7311])
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return silu(input, self.inplace)


class SELU(Scriptable, torch.nn.SELU):
    """torch.nn.SELU on fused kernels; see :func:`fastnorm.functional.selu`.

    .. math:: y = \\lambda (\\max(0, x) + \\min(0, \\alpha (e^x - 1)))

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.SELU()(torch.tensor([1.0]))
        tensor([1.0507])
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return selu(input, self.inplace)


class Swish(Scriptable, torch.nn.Module):
    """Swish, the sigmoid linear unit with a slope beta that can be learned; SiLU at beta = 1.

    .. math:: y = x\\,\\sigma(\\beta x)

    Args:
        beta: its first value.
        num_parameters: 1, or one beta for each of C channels (dimension 1 of the input).
        learnable: a parameter; otherwise a buffer.
        device: of beta.
        dtype: of beta; fp32 beside half inputs is the usual choice.

    Raises:
        ValueError: ``num_parameters`` below 1; at a call, an input of another number of channels.

    Source: Ramachandran et al., Searching for Activation Functions, 2017,
    https://arxiv.org/abs/1710.05941

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.Swish(beta=2.0)(torch.tensor([1.0])).item()
        0.8807970285415649
    """

    beta: Tensor

    def __init__(
        self,
        beta: float = 1.0,
        num_parameters: int = 1,
        learnable: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_parameters < 1:
            raise ValueError(
                f"num_parameters must be 1 or the number of channels, got {num_parameters}"
            )
        self.num_parameters = num_parameters
        self.init = beta
        value = torch.empty(num_parameters, device=device, dtype=dtype)
        if learnable:
            self.beta = torch.nn.Parameter(value)
        else:
            self.register_buffer("beta", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give beta its first value again."""
        torch.nn.init.constant_(self.beta, self.init)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return swish(input, self.beta)

    def extra_repr(self) -> str:
        learnable = isinstance(self.beta, torch.nn.Parameter)
        return f"beta={self.init}, num_parameters={self.num_parameters}, learnable={learnable}"


class NamedActivation(torch.nn.Module):
    """The forward of another package's activation, in front of its class: one of ours by name."""

    name: str
    theirs: type[torch.nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return activation(input, self.name)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return twin_of(self, self.theirs)
