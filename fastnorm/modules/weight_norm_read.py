"""How a grouped layer's weight is read while the model's forward runs: without torch's module calls
of the parametrization, which take about as long as computing the weights does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from fastnorm.modules.weight_norm import WeightNorm, running


def originals(chain: Any) -> tuple[Tensor, Tensor]:
    """v and g of a parametrized tensor."""
    own, parameters = chain.__dict__, chain._parameters
    v, g = parameters.get("original1"), parameters.get("original0")
    if v is None or g is None or "original1" in own or "original0" in own:
        return chain.original1, chain.original0
    return v, g


def _called_plainly(module: nn.Module) -> bool:
    """Whether a call of the module is one of its class's forward, and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or "forward" in module.__dict__
    )


def _of_the_group(chain: Any) -> Tensor | None:
    """The weight that a running call has for it; None where there is none, or where torch's way to
    it does something more: hooks, parametrizations on top, subclasses."""
    modules = chain._modules
    norm = modules["0"]
    plain = (
        type(norm) is WeightNorm
        and len(modules) == 1
        and not parametrize._cache_enabled
        and not _has_any_global_hook()
        and _called_plainly(chain)
        and _called_plainly(norm)
    )
    return running.read(norm, *originals(chain)) if plain else None


def _reading(name: str, otherwise: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        if not torch.compiler.is_compiling() and running.calls:
            chains: Any = module._modules["parametrizations"]
            w = _of_the_group(chains._modules[name])
            if w is not None:
                return w
        return otherwise(module)

    read.otherwise = otherwise  # type: ignore[attr-defined]
    return read


def read_from_group(module: nn.Module, name: str) -> None:
    """Let a weight-normed tensor be looked for among those that a group computed, before torch's
    own property computes it. It stands in the class that torch made for the module (and that copies
    of the module share): a copy without a group, or a removed norm, meets torch's property."""
    cls = type(module)
    found = cls.__dict__.get(name)
    if type(found) is property and found.fget and not hasattr(found.fget, "otherwise"):
        setattr(cls, name, property(_reading(name, found.fget), found.fset))


def read_alone(module: nn.Module, name: str) -> None:
    """Give torch's own property back."""
    cls = type(module)
    found = cls.__dict__.get(name)
    otherwise = getattr(getattr(found, "fget", None), "otherwise", None)
    if isinstance(found, property) and otherwise is not None:
        setattr(cls, name, property(otherwise, found.fset))
