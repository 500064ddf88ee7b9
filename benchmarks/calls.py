"""An op bound to its tensors by whoever computes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import Function, Tensors
from benchmarks.problems import Problem

Gradients = tuple[Tensor | None, ...]


@dataclass
class Call:
    """An op bound to its tensors. `backward` takes what `forward` returned and a gradient for each
    of its outputs, as often as it is asked to; `names` are those of the gradients it returns."""

    forward: Callable[[], Any]
    backward: Callable[[Any, tuple[Tensor, ...]], Gradients] | None
    names: tuple[str, ...] = ()
    outputs: Callable[[Any], Any] = lambda result: result
    note: str = ""


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


def through_autograd(function: Function, tensors: Tensors, note: str = "") -> Call:
    """A call whose backward is autograd's."""
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    leaves = tuple(wanted.values())

    def backward(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
        return torch.autograd.grad(result, leaves, dys, retain_graph=True, allow_unused=True)

    names = tuple(f"d{name}" for name in wanted)
    return Call(lambda: function(**tensors), backward, names, note=note)
