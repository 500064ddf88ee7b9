"""How an op of ours becomes a torch operator: a schema, an allocation function, three backends."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fastnorm import dispatch

LIBRARY = torch.library.Library("fastnorm", "DEF")


def _first(inputs: tuple[Any, ...]) -> Tensor:
    """The tensor whose device decides: the first input, or the first of a list that is that."""
    x: Tensor = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
    return x


def _ways(family: str, name: str, overload: Any) -> dict[str, Callable[..., Any]]:
    """The implementations of an op by the way to them: every way from the beginning, because a
    graph of torch.compile is compiled again when a dict that it looked at has grown."""
    by: dict[str, Callable[..., Any]] = {dispatch.DISPATCHER: overload}

    def at_first(backend: str, *inputs: Any) -> Any:
        # `import fastnorm` must touch neither triton nor the extension
        module = importlib.import_module(f"fastnorm.ops.{family}.{backend}")
        by[backend] = getattr(module, name)
        return by[backend](*inputs)

    def on_their_device(backend: str, *inputs: Any) -> Any:
        with torch.cuda.device(_first(inputs).device):  # kernels launch on the current one
            return by[backend](*inputs)

    for backend in dispatch.BACKENDS:
        by[backend] = functools.partial(at_first, backend)
    for backend, elsewhere in dispatch.ELSEWHERE.items():
        by[elsewhere] = functools.partial(on_their_device, backend)
    return by


class Op:
    """An op of ours: torch's dispatcher (``torch.ops.fastnorm.<name>``), or one of the backends.

    ``op.by[way](*inputs)`` goes the way that dispatch.way has found; ``op(*inputs)`` finds it.
    """

    def __init__(self, family: str, name: str, overload: Any) -> None:
        self.family = family
        self.by = _ways(family, name, overload)
        self.tensors = sum("Tensor" in str(a.type) for a in overload._schema.arguments)

    def __call__(self, *inputs: Any) -> Any:
        return self.by[self.way(*inputs)](*inputs)

    def way(self, *inputs: Any) -> str:
        """How a call with these inputs is made; its tensors are enough."""
        if torch.compiler.is_compiling():
            return dispatch.DISPATCHER
        tensors = inputs[: self.tensors]
        if type(tensors[0]) is list:
            tensors = tuple(x for part in tensors for x in (part if type(part) is list else [part]))
        return dispatch.way_to_op(self.family, *tensors)


def register(family: str, name: str, schema: str, outputs: Callable[..., Any]) -> Op:
    """Define ``torch.ops.fastnorm.<name>``.

    ``fastnorm/ops/<family>/<backend>.py`` has a function ``<name>(*inputs)`` that returns what the
    op does. ``outputs(*inputs)`` allocates that (a tensor, a tuple of tensors and Nones, or None
    for an op in place) and leaves it empty: it is the fake implementation, and the backends whose
    kernels are ours begin with it, so fake and real cannot disagree. The first input is the tensor
    whose device decides, or a list of tensors of one device; tensors come before everything else.
    """

    def run(*inputs: Any) -> Any:
        return op.by[dispatch.way_to_backend(family, _first(inputs))](*inputs)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnorm::{name}", outputs, lib=LIBRARY)
    op = Op(family, name, getattr(torch.ops.fastnorm, name).default)
    return op


def applied(function: type[torch.autograd.Function]) -> dict[str, Callable[..., Any]]:
    """What calls a Function whose forward takes the way to its op: by that way."""
    # without what apply does at every call for torch.func, whose tensors never go straight to a
    # backend (dispatch.way)
    straight = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    ways = (*dispatch.BACKENDS, *dispatch.ELSEWHERE.values())
    return {dispatch.DISPATCHER: function.apply, **dict.fromkeys(ways, straight)}


def by_formula(*gradients: Tensor | None) -> bool:
    """Whether backward has to be made of torch's functions: it will be differentiated itself
    (create_graph=True), or its gradients are batched (is_grads_batched) and have no data to point
    at."""
    if torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and any(
        dy is not None and is_legacy_batchedtensor(dy) for dy in gradients
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
