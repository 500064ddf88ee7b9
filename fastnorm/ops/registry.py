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


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    if outputs is None:  # an op that works in place
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)


_alive = torch._C._functorch.unwrap_if_dead
_PLAIN = (Tensor, torch.nn.Parameter)


def _unobserved(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch's dispatcher, given these, would do nothing but come back to us: no trace, mode
    or profiler wants to see the op, no subclass, and no tensor stands for other data than its own.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or tensors[0].is_meta  # type: ignore[union-attr]
    ):
        return False
    for x in tensors:  # noqa: SIM110  (a generator takes longer)
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return False
    return True


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """function.apply, without what it does at every call for torch.func, which never comes here
    (dispatch.transformed)."""
    if torch.compiler.is_compiling():
        return function.apply(*inputs)
    return super(torch.autograd.Function, function).apply(  # type: ignore[misc]
        *[_alive(x) if type(x) is Tensor else x for x in inputs]
    )


def register(family: str, name: str, schema: str, allocate: Callable[..., Any]) -> Any:
    """Define ``torch.ops.fastnorm.<name>`` and return what calls it: its overload, or the backend
    itself where torch's dispatcher would add nothing but time.

    ``allocate(*inputs)`` returns the outputs (a tensor, a tuple of tensors and Nones, or None for
    an op in place) that ``fastnorm/ops/<family>/
    <backend>.py``'s function ``<name>(*inputs, *outputs)`` fills; it is the fake implementation as
    well, so fake and real cannot disagree. The reference backend alone is called as
    ``<name>(*inputs)`` and returns ATen's own tensors. The first input is the tensor whose device
    decides, or a list of tensors of one device; tensors come before everything else.
    """

    def run(*inputs: Any) -> Any:
        x = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
        backend = dispatch.select(family, x)
        implementation = _implementation(family, backend, name)
        if backend == "reference":
            return implementation(*inputs)
        outputs = allocate(*inputs)
        given = outputs if type(outputs) is tuple else _as_tuple(outputs)
        if x.is_cuda and x.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(x.device):  # kernels launch on the current one
                implementation(*inputs, *given)
        else:
            implementation(*inputs, *given)
        return outputs

    def call(*inputs: Any) -> Any:
        given = inputs[:tensors]
        if type(given[0]) is list:
            given = tuple(x for part in given for x in (part if isinstance(part, list) else [part]))
        return run(*inputs) if _unobserved(given) else overload(*inputs)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnorm::{name}", allocate, lib=LIBRARY)
    overload = getattr(torch.ops.fastnorm, name).default
    tensors = sum("Tensor" in str(argument.type) for argument in overload._schema.arguments)
    return call


def differentiable_backward(
    composite: Callable[..., Any], inputs: tuple[Tensor | None, ...], gradients: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of ``composite(*inputs)`` as differentiable functions of the inputs and of
    ``gradients``.

    An autograd Function's backward takes this way when grad mode is on in it (create_graph=True):
    double backward goes through torch's own functions. One gradient per input; None where an input
    is None or needs none.
    """
    with torch.enable_grad():
        # views: a residual that x was computed from, or x itself given twice, must not receive x's
        # gradient on top of its own
        inputs = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in inputs)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        if not wanted:
            return (None,) * len(inputs)
        outputs = composite(*inputs)
        found = iter(
            torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True)
        )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
