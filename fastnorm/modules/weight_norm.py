"""Weight norm as a parametrization, with torch's names."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

from fastnorm.ops.weight_norm import norm_shape, normalized_dim
from fastnorm.ops.weight_norm import weight_norm as _weight_norm


class Computed(NamedTuple):
    """A weight that a group computed (modules/weight_norm_group.py), and what from."""

    w: Tensor
    v: Tensor
    g: Tensor
    v_version: int
    g_version: int

    def serves(self, v: Tensor, g: Tensor) -> bool:
        """Whether it is what these tensors give, here and now."""
        if v is not self.v or g is not self.g:
            return False
        if v._version != self.v_version or g._version != self.g_version:
            return False
        if self.w.is_inference() and not torch.is_inference_mode_enabled():
            return False
        wanted = torch.is_grad_enabled() and (v.requires_grad or g.requires_grad)
        return self.w.requires_grad or not wanted


class Call(NamedTuple):
    """A forward of a grouped model that is running, and the weights computed for it."""

    model: torch.nn.Module
    weights: dict[torch.nn.Module, Computed]  # by parametrization


class Running(threading.local):
    """The calls that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def find(self, parametrization: torch.nn.Module, v: Tensor, g: Tensor) -> Tensor | None:
        for call in reversed(self.calls):
            computed = call.weights.get(parametrization)
            if computed is not None and computed.serves(v, g):
                return computed.w
        return None

    def read(self, parametrization: torch.nn.Module, v: Tensor, g: Tensor) -> Tensor | None:
        """What :meth:`find` finds, as the present grad mode wants it."""
        w = self.find(parametrization, v, g)
        if w is None or torch.is_grad_enabled() or not w.requires_grad:
            return w
        return w.detach()


running = Running()


def _pack(x: Tensor) -> tuple[Tensor, int]:
    return x, x._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    x, version = packed
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a weight-normed layer's {list(x.shape)} is at version {x._version}, "
            f"expected version {version}"
        )
    return x


def unobserved_saving() -> contextlib.AbstractContextManager[Any]:
    """Keep what a weight saves for backward from saved-tensor hooks: torch.utils.checkpoint counts
    saved tensors, and computes alone, again, what the model's call had computed for all."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


class WeightNorm(parametrizations._WeightNorm):
    """The parametrization g, v -> g * v / ||v|| of :func:`weight_norm`: torch's, on our kernels.

    Example:
        >>> import fastnorm
        >>> fastnorm.modules.weight_norm.WeightNorm(dim=1, eps=1e-12)
        WeightNorm(dim=1, eps=1e-12)
    """

    dim: int
    # of the class: `replace_` makes one of ours of torch's instance, which has dim alone
    eps: float | None = None

    def __init__(self, dim: int | None = 0, eps: float | None = None) -> None:
        super().__init__(dim)
        if eps is not None:
            if not eps > 0:
                raise ValueError(
                    f"expected a positive eps, or None for no lower bound of the norm; got {eps}"
                )
            self.eps = eps

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _weight_norm(weight_v, weight_g, self.dim, self.eps)
        w = running.read(self, weight_v, weight_g)
        if w is not None:
            return w
        with unobserved_saving():
            return _weight_norm(weight_v, weight_g, self.dim, self.eps)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(g, v) of a weight: g = ||weight||, v the weight itself."""
        shape = norm_shape(weight, normalized_dim(weight.dim(), self.dim))
        if weight.numel() == 0:  # torch cannot take the norm of no rows
            return weight.new_zeros(shape), weight
        return torch.norm_except_dim(weight, 2, self.dim), weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.eps is None else f", eps={self.eps}")


class _OldNames:
    """Loads `weight_g`, `weight_v` of torch's former weight norm; picklable, and idle once the norm
    is removed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
    ) -> None:
        g, v = f"{prefix}{self.name}_g", f"{prefix}{self.name}_v"
        if g in state_dict and v in state_dict and parametrize.is_parametrized(module, self.name):
            for i, key in enumerate((g, v)):
                state_dict[f"{prefix}parametrizations.{self.name}.original{i}"] = state_dict.pop(
                    key
                )


def weight_norm(
    module: torch.nn.Module, name: str = "weight", dim: int | None = 0, eps: float | None = None
) -> torch.nn.Module:
    """Give a parameter of a module the form w = g * v / ||v||, as
    torch.nn.utils.parametrizations.weight_norm does.

    g and v become ``parametrizations.<name>.original0`` and ``original1``; checkpoints with
    ``<name>_g`` and ``<name>_v`` load too. On a transposed convolution the default ``dim=0`` is the
    *input* channel.

    Args:
        module: any module; its class becomes ``Parametrized<Class>``.
        name: the parameter or buffer.
        dim: the dimension that keeps its own norms; None or -1: one norm for the whole tensor.
        eps: norms below ``eps`` count as ``eps``; None: a zero row gives NaN, as torch's.

    Returns:
        The module.

    Raises:
        ValueError: no parameter or buffer of that name, or ``eps`` is not positive.
        IndexError: ``dim`` out of range.
        RuntimeError: the parameter is already parametrized, or uninitialised.

    Source: Salimans & Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868

    Example:
        >>> import torch, fastnorm
        >>> layer = fastnorm.weight_norm(torch.nn.Linear(20, 40))
        >>> layer.parametrizations.weight.original0.shape
        torch.Size([40, 1])
    """
    if parametrize.is_parametrized(module, name):
        raise RuntimeError(
            f"Cannot register weight_norm on '{name}': it already has a parametrization, and "
            "weight norm, which has two tensors, must be the first one. Remove it before, or "
            "register the other after weight norm"
        )
    parametrize.register_parametrization(module, name, WeightNorm(dim, eps), unsafe=True)
    module._register_load_state_dict_pre_hook(_OldNames(name), with_module=True)
    return module


def remove_weight_norm(module: torch.nn.Module, name: str = "weight") -> torch.nn.Module:
    """Make a plain parameter of a weight-normed one again; it keeps the value it has now.

    Args:
        module: a module given to :func:`weight_norm`, ours or torch's (its former one too).
        name: the parameter.

    Returns:
        The module.

    Raises:
        ValueError: no weight norm on that parameter.

    Example:
        >>> import torch, fastnorm
        >>> fastnorm.remove_weight_norm(fastnorm.weight_norm(torch.nn.Linear(20, 40)))
        Linear(in_features=20, out_features=40, bias=True)
    """
    if not parametrize.is_parametrized(module, name):
        return torch.nn.utils.remove_weight_norm(
            module, name
        )  # raises ValueError where there is none
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    if not any(isinstance(p, parametrizations._WeightNorm) for p in chain):
        raise ValueError(f"weight_norm of '{name}' not found in {module}")
    was_parameter = isinstance(chain.original0, torch.nn.Parameter)
    parametrize.remove_parametrizations(module, name)
    if was_parameter and name in module._buffers:  # what torch makes of a frozen parameter
        value = module._buffers.pop(name)
        assert value is not None
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return module
