"""Layer norm as a module: torch's, plus an activation, a residual and the sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnorm.modules.attributes import pair
from fastnorm.modules.programs import Proxy, Scriptable, leaf
from fastnorm.ops.activation import check_name
from fastnorm.ops.layer_norm import layer_norm


class LayerNorm(Scriptable, torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` with an optional activation and an optional residual in the same
    kernels.

    .. math:: y = f(\\operatorname{layer\\_norm}(x + r))

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: torch's.
        activation: the name of one, see :func:`fastnorm.functional.activation`; None is none.
        autocast: None gives fp32 for half input under CUDA autocast, as torch; "input" keeps the
            input's dtype.

    Raises:
        ValueError: unknown ``activation`` or ``autocast``.

    Source: Ba, Kiros & Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.LayerNorm(4, activation="gelu")(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    # class attributes: replace_ makes a torch.nn.LayerNorm one of these without calling __init__
    activation: str | None = None
    autocast: str | None = None

    def __init__(
        self, *args: Any, activation: str | None = None, autocast: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_name(activation)
        if autocast not in (None, "input"):
            raise ValueError(
                f"unknown autocast {autocast!r}: choose None (fp32 as torch) "
                "or 'input' (the input's dtype)"
            )
        self.activation = activation
        self.autocast = autocast

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None, return_sum: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """activation(layer_norm(input + residual)), and with ``return_sum`` the sum as well."""
        if isinstance(input, Proxy):
            return leaf(self, input, residual, return_sum or None)
        weight, bias = pair(self, self._parameters, "weight", "bias")
        return layer_norm(
            input,
            self.normalized_shape,
            weight,
            bias,
            self.eps,
            activation=self.activation,
            residual=residual,
            return_sum=return_sum,
            autocast=self.autocast,
        )

    def extra_repr(self) -> str:
        """torch's, and what differs from it."""
        text: str = super().extra_repr()
        for name in ("activation", "autocast"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text
