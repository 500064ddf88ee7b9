"""How an op of ours becomes a torch operator: a schema, an allocation function, three backends."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnorm import dispatch

LIBRARY = torch.library.Library("fastnorm", "DEF")


@functools.cache
def _implementation(family: str, backend: str, name: str) -> Callable[..., Any]:
    # imported at the first call: `import fastnorm` must touch neither triton nor the extension
    return getattr(importlib.import_module(f"fastnorm.ops.{family}.{backend}"), name)  # type: ignore[no-any-return]


_current_device = getattr(torch._C, "_cuda_getDevice", None)  # absent in a build for the CPU


def _straight(family: str, backend: str, name: str, allocate: Callable[..., Any]) -> Any:
    """The op on one backend, without torch's dispatcher."""

    def implementation(*inputs: Any) -> Any:
        return _implementation(family, backend, name)(*inputs)

    def allocated(*inputs: Any) -> Any:
        outputs = allocate(*inputs)
        if type(outputs) is tuple:
            inputs += outputs
        elif outputs is not None:
            inputs += (outputs,)
        x = inputs[0] if type(inputs[0]) is not list else inputs[0][0]
        if x.is_cuda and x.get_device() != _current_device():  # type: ignore[misc]
            with torch.cuda.device(x.device):  # kernels launch on the current one
                implementation(*inputs)
        else:
            _implementation(family, backend, name)(*inputs)
        return outputs

    return implementation if backend == "reference" else allocated


class Op:
    """An op of ours: torch's dispatcher (``torch.ops.fastnorm.<name>``), or one of the backends.

    ``op.by[way](*inputs)`` goes the way that dispatch.way has found; ``op(*inputs)`` finds it.
    """

    def __init__(self, family: str, overload: Any, by: dict[str, Callable[..., Any]]) -> None:
        self.family = family
        self.by = by
        self.tensors = sum("Tensor" in str(a.type) for a in overload._schema.arguments)

    def __call__(self, *inputs: Any) -> Any:
        return self.by[self._way(inputs)](*inputs)

    def _way(self, inputs: tuple[Any, ...]) -> str:
        if torch.compiler.is_compiling():
            return dispatch.DISPATCHER
        tensors = inputs[: self.tensors]
        if type(tensors[0]) is list:
            tensors = tuple(x for part in tensors for x in (part if type(part) is list else [part]))
        return dispatch.way_to_op(self.family, *tensors)


def register(family: str, name: str, schema: str, allocate: Callable[..., Any]) -> Op:
    """Define ``torch.ops.fastnorm.<name>``.

    ``allocate(*inputs)`` returns the outputs (a tensor, a tuple of tensors and Nones, or None for
    an op in place) that ``fastnorm/ops/<family>/
    <backend>.py``'s function ``<name>(*inputs, *outputs)`` fills; it is the fake implementation as
    well, so fake and real cannot disagree. The reference backend alone is called as
    ``<name>(*inputs)`` and returns ATen's own tensors. The first input is the tensor whose device
    decides, or a list of tensors of one device; tensors come before everything else.
    """
    by = {
        backend: _straight(family, backend, name, allocate)
        for backend in dispatch.CHOICES
        if backend != "auto"
    }

    def run(*inputs: Any) -> Any:
        x = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
        return by[dispatch.select(family, x)](*inputs)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnorm::{name}", allocate, lib=LIBRARY)
    overload = getattr(torch.ops.fastnorm, name).default
    return Op(family, overload, {dispatch.DISPATCHER: overload, **by})


@functools.cache
def _without_torch_func(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without what it does at every call for torch.func, whose tensors never go
    straight to a backend (dispatch.way)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc,no-any-return]


def applied(function: type[torch.autograd.Function], way: str) -> Callable[..., Any]:
    """What calls a Function whose forward takes, last of all, the way to its op."""
    if way == dispatch.DISPATCHER:
        return function.apply
    return _without_torch_func(function)


def by_formula(*gradients: Tensor | None) -> bool:
    """Whether backward has to be made of torch's functions: it will be differentiated itself
    (create_graph=True), or its gradients are batched."""
    if torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and any(
        dy is not None and dispatch.batched(dy) for dy in gradients
    )


def differentiable_backward(
    composite: Callable[..., Any], inputs: tuple[Tensor | None, ...], gradients: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of ``composite(*inputs)`` as differentiable functions of the inputs and of
    ``gradients``.

    An autograd Function's backward takes this way where `by_formula` says so. One gradient per
    input; None where an input is None or needs none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: a residual that x was computed from, or x itself given twice, must not receive x's
        # gradient on top of its own
        inputs = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in inputs)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        if not wanted:
            return (None,) * len(inputs)
        outputs = composite(*inputs)
        found = iter(
            torch.autograd.grad(
                outputs, wanted, gradients, create_graph=create_graph, allow_unused=True
            )
        )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
