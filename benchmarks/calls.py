"""An op bound to its tensors by whoever computes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from benchmarks.activations import Function
from benchmarks.ops import Tensors
from benchmarks.problems import Problem

Gradients = tuple[Tensor | None, ...]


@dataclass
class Call:
    """An op bound to its tensors. `backward` takes what `forward` returned and a gradient for each
    of its outputs, as often as it is asked to; `names` are those of the gradients it returns.
    `last_backward` is that of a training step, which is asked once and lets go of what was saved
    while it runs; None where `backward` is."""

    forward: Callable[[], Any]
    backward: Callable[[Any, tuple[Tensor, ...]], Gradients] | None
    names: tuple[str, ...] = ()
    outputs: Callable[[Any], Any] = lambda result: result
    note: str = ""
    last_backward: Callable[[Any, tuple[Tensor, ...]], Gradients] | None = None

    def step(self, dys: tuple[Tensor, ...]) -> Gradients:
        """Forward and backward once, as a training step has them: the outputs live to the end, as
        the next layer keeps its input."""
        backward = self.last_backward or self.backward
        assert backward is not None, "asked only of who has one"
        return backward(self.forward(), dys)


@dataclass(frozen=True)
class Provider:
    """A name in the results file."""

    name: str
    slow: bool = False  # compiles or tunes for seconds before it runs: measured after the others

    def missing(self, device: str) -> str | None:
        """Why it cannot run here at all; None if it can."""
        return None

    def serves(self, problem: Problem, mode: str) -> bool:
        """Whether it has this op."""
        return True

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """What must be so while its calls are bound and run."""
        return contextlib.nullcontext()

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        raise NotImplementedError


def of_leaves(forward: Callable[[], Any], tensors: Tensors, note: str = "") -> Call:
    """A call whose backward is autograd's, to those of its tensors that want a gradient. The last
    one is the engine's alone: what `grad` looks at in Python first costs as much as a layer, once
    for a whole model."""
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    leaves = tuple(wanted.values())

    def backward(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
        return torch.autograd.grad(result, leaves, dys, retain_graph=True, allow_unused=True)

    def last(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
        results = result if isinstance(result, tuple) else (result,)
        return _engine_run_backward(
            results, dys, False, False, leaves, allow_unreachable=True, accumulate_grad=False
        )

    names = tuple(f"d{name}" for name in wanted)
    return Call(forward, backward, names, note=note, last_backward=last)


def through_autograd(function: Function, tensors: Tensors, note: str = "") -> Call:
    """A function of the tensors, whose backward is autograd's."""
    return of_leaves(lambda: function(**tensors), tensors, note)
