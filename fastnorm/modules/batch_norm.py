"""Batch norm layers: torch's, the same with residual and activation, and mean-only ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastnorm import dispatch
from fastnorm.modules.attributes import pair
from fastnorm.modules.programs import Proxy, Scriptable, leaf
from fastnorm.ops.activation import check_name
from fastnorm.ops.batch_norm import by_way
from fastnorm.ops.batch_norm.mean_only import mean_only_batch_norm


def _statistics(module: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """(running mean, running variance, batches so far, batch statistics?): what a layer's mode and
    buffers mean for one forward, as torch's layers read them."""
    training, tracks, buffers = module.training, module.track_running_stats, module._buffers
    mean, var = pair(module, buffers, "running_mean", "running_var")
    batch_stats = training or (mean is None and var is None)
    if training and not tracks:
        return None, None, None, True
    if not training:
        return mean, var, None, batch_stats
    if "num_batches_tracked" in buffers:
        return mean, var, buffers["num_batches_tracked"], True
    return mean, var, getattr(module, "num_batches_tracked", None), True


def fused(
    module: Any, input: Tensor, activation: str | None, residual: Tensor | None = None
) -> Tensor:
    """batch_norm with a layer's parameters, buffers and mode."""
    mean, var, count, batch_stats = _statistics(module)
    weight, bias = pair(module, module._parameters, "weight", "bias")
    return by_way(
        dispatch.way("batch_norm", input, residual, weight, bias, mean, var),
        input,
        mean,
        var,
        weight,
        bias,
        batch_stats,
        module.momentum,
        module.eps,
        count,
        "identity" if activation is None else check_name(activation),
        residual,
    )


class _BatchNorm(Scriptable, torch.nn.modules.batchnorm._BatchNorm):
    """The forward of the drop-ins; parameters, buffers, checks and state_dict are torch's."""

    activation: str | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input, residual)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return fused(self, input, self.activation, residual)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fused kernels: same constructor, numbers, buffers, errors and
    state_dict.

    .. math:: y = (x - \\mathrm{E}[x]) / \\sqrt{\\mathrm{Var}[x] + \\epsilon} \\cdot w + b

    Input ``[N, C]`` or ``[N, C, L]``; see :func:`fastnorm.functional.batch_norm` for dtypes and
    errors.

    Source: Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.BatchNorm1d(4)(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fused kernels: same constructor, numbers, buffers, errors and
    state_dict.

    .. math:: y = (x - \\mathrm{E}[x]) / \\sqrt{\\mathrm{Var}[x] + \\epsilon} \\cdot w + b

    Input ``[N, C, H, W]``, contiguous or channels_last; see :func:`fastnorm.functional.batch_norm`
    for dtypes and errors.

    Source: Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.BatchNorm2d(4)(torch.randn(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on fused kernels: same constructor, numbers, buffers, errors and
    state_dict.

    .. math:: y = (x - \\mathrm{E}[x]) / \\sqrt{\\mathrm{Var}[x] + \\epsilon} \\cdot w + b

    Input ``[N, C, D, H, W]``, contiguous or channels_last_3d; see
    :func:`fastnorm.functional.batch_norm` for dtypes and errors.

    Source: Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.BatchNorm3d(4)(torch.randn(2, 4, 2, 3, 3)).shape
        torch.Size([2, 4, 2, 3, 3])
    """


class _BatchNormAct(_BatchNorm):
    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        check_name(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"  # type: ignore[no-untyped-call]


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    """BatchNorm1d with a residual and an activation in the same pass.

    .. math:: y = f(\\mathrm{bn}(x) + r)

    Constructor: torch.nn.BatchNorm1d's plus keyword ``activation``, a name of
    :func:`fastnorm.functional.activation` (ValueError otherwise); ``forward(x, residual=None)``.

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.BatchNormAct1d(4, activation="silu")(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    """BatchNorm2d with a residual and an activation in the same pass.

    .. math:: y = f(\\mathrm{bn}(x) + r)

    Constructor: torch.nn.BatchNorm2d's plus keyword ``activation``, a name of
    :func:`fastnorm.functional.activation` (ValueError otherwise); ``forward(x, residual=None)``.

    Example:
        >>> import torch, fastnorm
        >>> x = torch.randn(2, 4, 3, 3)
        >>> bool((fastnorm.BatchNormAct2d(4, activation="relu")(x, residual=x) >= 0).all())
        True
    """


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    """BatchNorm3d with a residual and an activation in the same pass.

    .. math:: y = f(\\mathrm{bn}(x) + r)

    Constructor: torch.nn.BatchNorm3d's plus keyword ``activation``, a name of
    :func:`fastnorm.functional.activation` (ValueError otherwise); ``forward(x, residual=None)``.

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.BatchNormAct3d(4, activation="gelu")(torch.randn(2, 4, 2, 3, 3)).shape
        torch.Size([2, 4, 2, 3, 3])
    """


class _MeanOnlyBatchNorm(Scriptable, torch.nn.Module):
    """The keys of batch norm's state_dict without weight and running_var."""

    _version = 2
    dimensions: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.bias = (
            torch.nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
            if bias
            else None
        )
        mean = (
            torch.zeros(num_features, device=device, dtype=dtype) if track_running_stats else None
        )
        count = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.running_mean: Tensor | None
        self.num_batches_tracked: Tensor | None
        self.register_buffer("running_mean", mean)
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget the batches seen so far."""
        if self.running_mean is not None:
            self.running_mean.zero_()
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Zero the bias and forget the batches seen so far."""
        self.reset_running_stats()
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        if input.dim() not in self.dimensions:
            expected = " or ".join(f"{n}D" for n in self.dimensions)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
        mean, _, count, batch_stats = _statistics(self)
        return mean_only_batch_norm(
            input, mean, self.bias, batch_stats, self.momentum, num_batches_tracked=count
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )


class MeanOnlyBatchNorm1d(_MeanOnlyBatchNorm):
    """Mean-only batch norm over ``[N, C]`` or ``[N, C, L]``: centres each channel and leaves its
    scale.

    .. math:: y = x - \\mathrm{E}[x] + b

    Args:
        num_features: C.
        momentum: share of a batch in the running mean; None for the cumulative average.
        bias: learn b, ``[C]``, zero at first.
        track_running_stats: keep the running mean that evaluation centres with; without it, the
            batch's is used.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises ValueError for an input of another dimension, and for one value per channel in training.

    Source: Salimans & Kingma, 2016, section 3, https://arxiv.org/abs/1602.07868

    Example:
        >>> import torch, fastnorm
        >>> bool(fastnorm.MeanOnlyBatchNorm1d(4)(torch.randn(8, 4)).mean().abs() < 1e-6)
        True
    """

    dimensions = (2, 3)


class MeanOnlyBatchNorm2d(_MeanOnlyBatchNorm):
    """Mean-only batch norm over ``[N, C, H, W]``: see :class:`MeanOnlyBatchNorm1d`.

    .. math:: y = x - \\mathrm{E}[x] + b

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.MeanOnlyBatchNorm2d(4)(torch.randn(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    dimensions = (4,)


class MeanOnlyBatchNorm3d(_MeanOnlyBatchNorm):
    """Mean-only batch norm over ``[N, C, D, H, W]``: see :class:`MeanOnlyBatchNorm1d`.

    .. math:: y = x - \\mathrm{E}[x] + b

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.MeanOnlyBatchNorm3d(4)(torch.randn(2, 4, 2, 3, 3)).shape
        torch.Size([2, 4, 2, 3, 3])
    """

    dimensions = (5,)
