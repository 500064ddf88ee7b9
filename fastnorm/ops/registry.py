"""How an op of ours becomes a torch operator: a schema, an allocation function, three backends."""

from __future__ import annotations

import contextlib
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


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels launch on the current device: make it the tensor's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    if outputs is None:  # an op that works in place
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)


def register(family: str, name: str, schema: str, allocate: Callable[..., Any]) -> Any:
    """Define ``torch.ops.fastnorm.<name>`` and return its overload.

    ``allocate(*inputs)`` returns the outputs (a tensor, a tuple of tensors and Nones, or None for
    an op in place) that ``fastnorm/ops/<family>/
    <backend>.py``'s function ``<name>(*inputs, *outputs)`` fills; it is the fake implementation as
    well, so fake and real cannot disagree. The reference backend alone is called as
    ``<name>(*inputs)`` and returns ATen's own tensors. The first input is the tensor whose device
    decides.
    """

    def run(*inputs: Any) -> Any:
        x = inputs[0]
        backend = dispatch.select(family, x)
        implementation = _implementation(family, backend, name)
        if backend == "reference":
            return implementation(*inputs)
        outputs = allocate(*inputs)
        with _on_device_of(x):
            implementation(*inputs, *_as_tuple(outputs))
        return outputs

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnorm::{name}", allocate, lib=LIBRARY)
    return getattr(torch.ops.fastnorm, name).default


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
