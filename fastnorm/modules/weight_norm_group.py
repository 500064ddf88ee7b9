"""A model's weight-normed layers, computed together once per forward."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm as FormerWeightNorm

from fastnorm import dispatch
from fastnorm.modules.weight_norm import Call, Computed, WeightNorm, running, unobserved_saving
from fastnorm.modules.weight_norm_read import originals, read_alone, read_from_group
from fastnorm.ops.weight_norm.group import on_one_device
from fastnorm.surgery.edits import check_model, swap

_Model = TypeVar("_Model", bound=nn.Module)
_PLAIN = (Tensor, nn.Parameter)
_TORCHS = parametrizations._WeightNorm
_VERSION = operator.attrgetter("_version")


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, name, parametrization) of every weight-normed tensor, ours and torch's; a subclass
    of torch's computes something else."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                if isinstance(chain[0], WeightNorm) or type(chain[0]) is _TORCHS:
                    yield module, name, chain[0]


class Group:
    """The weight-normed layers of a model, and the hooks that compute them together."""

    def __init__(self) -> None:
        self.layers: list[tuple[nn.Module, str]] = []

    def before(self, model: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if running.calls:
            _forget_interrupted(model)
        call = Call(model, {})
        running.calls.append(call)
        # a replica of DataParallel has parametrizations of its own
        replica = getattr(model, "_is_replica", False)
        # torch.fx puts proxies in the place of parameters
        if not (replica or dispatch.transformed() or is_fx_symbolic_tracing()):
            self._compute(call.weights)

    def after(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for i, call in reversed(list(enumerate(running.calls))):
            if call.model is model:
                del running.calls[i]
                break

    def _members(self) -> Iterator[tuple[WeightNorm, Tensor, Tensor]]:
        """(parametrization, v, g) of every layer to be computed now."""
        nested = len(running.calls) > 1
        for module, name in self.layers:
            # as attributes would find it, without nn.Module.__getattr__
            chains = module._modules.get("parametrizations")
            chain = None if chains is None else chains._modules.get(name)
            if chain is None:
                continue
            norm: Any = chain._modules["0"]
            v, g = originals(chain)
            # DTensors, fake tensors and the like are not ours to group
            plain = type(v) in _PLAIN and type(g) in _PLAIN
            if not plain or not isinstance(norm, WeightNorm) or v.is_inference():
                continue
            if not (nested and running.find(norm, v, g) is not None):
                yield norm, v, g

    def _compute(self, weights: dict[nn.Module, Computed]) -> None:
        members = list(self._members())
        devices = {v.device for _, v, _ in members} | {g.device for _, _, g in members}
        for device in devices:
            here = members
            if len(devices) > 1:
                here = [x for x in members if x[1].device == x[2].device == device]
            if not here:
                continue
            norms, v, g = zip(*here, strict=True)
            with unobserved_saving():
                w = on_one_device(v, g, [x.dim for x in norms], [x.eps for x in norms])
            computed = map(Computed, w, v, g, map(_VERSION, v), map(_VERSION, g))
            weights.update(zip(norms, computed, strict=True))


def _forget_interrupted(model: nn.Module) -> None:
    """Drop the calls that are no longer running: torch calls no hook after a KeyboardInterrupt."""
    executing = []
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is nn.Module._call_impl.__code__:
            executing.append(frame.f_locals["self"])
    if model in executing:
        executing.remove(model)  # the call that now begins: the innermost of this model
    outermost_first = iter(reversed(executing))
    running.calls[:] = [
        call for call in running.calls if any(x is call.model for x in outermost_first)
    ]


def group_of(model: nn.Module) -> Group | None:
    """The group that :func:`weight_norm_` made of a model's layers."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Group)), None)


def ungroup(model: nn.Module) -> None:
    """Undo :func:`weight_norm_`: each layer computes its weight alone again."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            group = getattr(hook, "__self__", None)
            if isinstance(group, Group):
                for layer in group.layers:
                    read_alone(*layer)
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)


def _nothing_to_group(model: nn.Module) -> ValueError:
    former = sum(
        isinstance(hook, FormerWeightNorm)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )
    advice = (
        f": {former} have torch's former weight norm (torch.nn.utils.weight_norm), which is a hook "
        "of each layer; take it off with torch.nn.utils.remove_weight_norm, and"
        if former
        else ":"
    )
    return ValueError(
        f"{type(model).__name__} has no weight-normed layer that can be computed together"
        f"{advice} give its layers weight norm with fastnorm.weight_norm(layer) or "
        "torch.nn.utils.parametrizations.weight_norm(layer) first"
    )


def weight_norm_(model: _Model) -> _Model:
    """Compute all weights of a model's weight-normed layers together, once per forward of the
    model, instead of each where it is read.

    .. math:: w_i = g_i\\,\\frac{v_i}{\\lVert v_i \\rVert}, \\quad i = 1, 2, \\dots

    On the CUDA C++ backend that is one launch forward and one backward on each device (one more for
    layers in fp64; up to 227 layers in a launch); the Triton and reference backends go through the
    layers one by one. Parameters, their names, state_dict and the optimizer stay as they are.

    The weights exist from the beginning of ``model(...)`` until it returns or raises, all of them
    at once. Outside of it, and where a layer's v or g has changed since, ``layer.weight`` computes
    alone, as before; so does each layer in code that torch.compile compiles, and under torch.func,
    torch.jit and torch.export. A layer that a forward does not use gets no gradient (None), as in
    torch; gradient hooks on its v and g are called, with None.

    The gradients of all v and g come together, when the backward pass has gone through the first
    of the layers: **DistributedDataParallel cannot overlap their all-reduce with the backward pass
    any more**, only that of other parameters. With it, torch.utils.checkpoint needs
    ``use_reentrant=False``. Under fully sharded training group each sharded unit, not the whole
    model, at the beginning of whose forward the layers' v and g are not there yet.

    Args:
        model: its layers have weight norm already, by :func:`fastnorm.weight_norm` or
            torch.nn.utils.parametrizations.weight_norm (which becomes ours, as by
            :func:`fastnorm.replace_`). Calling it again looks for the layers anew: do so after
            adding or replacing some. Groups may be nested; :func:`fastnorm.restore_` takes them
            off.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module.
        ValueError: no layer of the model has weight norm.

    Source: Salimans & Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868

    Example:
        >>> import torch, fastnorm
        >>> layers = [fastnorm.weight_norm(torch.nn.Linear(4, 4)) for _ in range(3)]
        >>> model = fastnorm.weight_norm_(torch.nn.Sequential(*layers))
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """
    check_model(model, "weight_norm_")
    layers = list(_layers(model))
    if not layers:
        raise _nothing_to_group(model)
    for _, _, norm in layers:
        if type(norm) is _TORCHS:
            swap(norm, WeightNorm)
    group = group_of(model)
    if group is None:
        group = Group()
        model.register_forward_pre_hook(group.before)
        model.register_forward_hook(group.after, always_call=True)
    group.layers = [(module, name) for module, name, _ in layers]
    for layer in group.layers:
        read_from_group(*layer)
    return model
