"""Synchronised batch norm as a layer, and the conversion of a model to it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastnorm.modules import batch_norm
from fastnorm.modules.programs import Proxy
from fastnorm.ops.batch_norm.collectives import check_group
from fastnorm.ops.batch_norm.sync import sync_batch_norm
from fastnorm.surgery.edits import Edits, apply, check_model, swap, untouchable


class SyncBatchNorm(batch_norm._BatchNormAct):
    """Batch norm over the batches of all processes, with a residual and an activation in the same
    pass.

    .. math:: y = f((x - \\mathrm{E}[x]) / \\sqrt{\\mathrm{Var}[x] + \\epsilon} \\cdot w + b + r)

    E and Var are those of one process with the whole batch: one all_gather per forward, one
    all_reduce per backward, in training only. In eval mode, without an initialised process group,
    and in a group of one process it is batch norm. It is a ``_BatchNorm`` of torch's, but not an
    ``nn.SyncBatchNorm``, which DistributedDataParallel refuses on CPUs.

    Input ``[N, C, ...]``, N may differ between processes and be 0; see
    :func:`fastnorm.functional.sync_batch_norm` for dtypes and errors.
    :func:`convert_sync_batchnorm` makes a model's batch norms these.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; None for the cumulative average.
        affine: learn w and b.
        track_running_stats: keep the running statistics that evaluation normalises with; without
            them it uses those of its own process's batch.
        process_group: whose processes share statistics; None for all of them. A copy of the layer
            shares it; it cannot be pickled, the state_dict can.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        activation: f, a name of :func:`fastnorm.functional.activation`; None for none.
        options: further keywords of torch's batch norm: ``bias`` where this torch has it.

    Raises:
        ValueError: an unknown activation.
        TypeError: ``process_group`` is not one.

    Source: Ioffe & Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> import torch, fastnorm
        >>> layer = fastnorm.SyncBatchNorm(4, activation="relu")
        >>> layer(torch.randn(2, 4, 3, 3)).shape  # in one process: batch norm
        torch.Size([2, 4, 3, 3])
    """

    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        **options: Any,
    ) -> None:
        check_group(process_group)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            activation=activation,
            **options,
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training or isinstance(input, Proxy):
            return super().forward(input, residual)
        self._check_input_dim(input)
        tracks = self.track_running_stats
        return sync_batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.momentum,
            self.eps,
            self.process_group,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
            activation=self.activation,
            residual=residual,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "TorchScript has no collectives, and with them no SyncBatchNorm: fastnorm.restore_("
            "model) gives back the layers that convert_sync_batchnorm changed; torch.jit.trace and "
            "torch.export take the model in eval mode as it is"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # a group is shared, never copied
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _refusal(module: nn.Module) -> str:
    """Why a layer that has to share its statistics cannot; empty if it can, or need not."""
    if isinstance(module, batch_norm._MeanOnlyBatchNorm):
        return "mean-only batch norm has no synchronised form"
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, SyncBatchNorm):
        return ""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "a lazy layer: run a batch through the model first"
    forwards = (
        nn.modules.batchnorm._BatchNorm.forward,
        nn.SyncBatchNorm.forward,
        batch_norm._BatchNorm.forward,
    )
    if type(module).forward not in forwards:
        return "its class has a forward of its own, which would be lost"
    return untouchable(module)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Make every batch norm of a model a :class:`SyncBatchNorm`, in place: the same objects.

    It takes torch's BatchNorm1d, -2d, -3d and SyncBatchNorm and ours, before or after
    :func:`replace_` and :func:`fuse_`: parameters, buffers, hooks, mode, dtype, device, a folded
    activation and residual stay as they are. Call it before DDP, FSDP or torch.compile wrap the
    model. :func:`restore_` undoes it along with everything else.

    .. math:: (x - \\mathrm{E}_{process}[x]) \\to (x - \\mathrm{E}_{group}[x])

    Args:
        module: any model; a batch norm itself is converted too.
        process_group: whose processes share statistics. None: those of the group that a layer
            already has, else all processes.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a module, or is a TorchScript module; ``process_group`` is not
            a process group.
        ValueError: a layer that would keep its own statistics, by name: a lazy, mean-only or
            parametrized one, one whose class has a forward of its own. Nothing is changed then.

    Example:
        >>> import torch, fastnorm
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> _ = fastnorm.fuse_(model)
        >>> fastnorm.convert_sync_batchnorm(model)[0].activation
        'relu'
    """
    check_model(module, "convert_sync_batchnorm")
    check_group(process_group)
    edits: Edits = []
    for name, layer in module.named_modules():
        reason = _refusal(layer)
        if reason:
            raise ValueError(
                f"convert_sync_batchnorm() cannot convert {name or 'the module'} "
                f"({type(layer).__name__}): {reason}"
            )
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            group = (
                getattr(layer, "process_group", None) if process_group is None else process_group
            )
            edits.append((layer, functools.partial(_convert, layer, group)))
    apply(edits)
    return module


def _convert(layer: nn.Module, process_group: Any) -> None:
    if isinstance(layer, SyncBatchNorm):
        layer.process_group = process_group
    else:
        swap(layer, SyncBatchNorm, process_group=process_group)
