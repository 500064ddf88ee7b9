"""Who computes an op: torch, torch.compile, our backends, and the peers."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import Any

import torch

import fastnorm
from benchmarks import layers, two_launches
from benchmarks.activations import RARE
from benchmarks.calls import Call, Provider, through_autograd
from benchmarks.ops import OPS, Tensors
from benchmarks.peers import PEERS
from benchmarks.problems import GRAPH, STEPS, Problem


def _asked_of_all(problem: Problem) -> bool:
    return problem.op == "activation" or problem.variant not in RARE


@dataclass(frozen=True)
class Torch(Provider):
    def serves(self, problem: Problem, mode: str) -> bool:
        return _asked_of_all(problem)

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        if layers.wanted(problem):
            return layers.bind(problem, tensors, ours=False)
        return through_autograd(OPS[problem.op].torch(problem), tensors)


@dataclass(frozen=True)
class Compiled(Provider):
    def serves(self, problem: Problem, mode: str) -> bool:
        # those are about launches, torch's and ours
        return _asked_of_all(problem) and mode not in (STEPS, GRAPH)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        # backward runs many times over one forward: its buffers must not be given away. Elsewhere
        # they may: a model's step would need more memory without
        config: Any = importlib.import_module("torch._functorch.config")
        patched: contextlib.AbstractContextManager[Any] = config.patch(donated_buffer=False)
        return patched

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        # a compiled function forgets nothing: after eight shapes it would run eagerly, in silence
        torch._dynamo.reset()
        function = torch.compile(OPS[problem.op].torch(problem), dynamic=False, fullgraph=True)
        return through_autograd(function, tensors)


@dataclass(frozen=True)
class Ours(Provider):
    backend: str = "auto"

    def missing(self, device: str) -> str | None:
        if self.backend == "auto":
            return None
        if device == "cpu":
            return "its kernels serve CUDA tensors"
        return fastnorm.backends()[self.backend]

    def active(self) -> contextlib.AbstractContextManager[Any]:
        return fastnorm.backend(self.backend)

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        if problem.op == "batch_norm" and two_launches.LAUNCHES == 2:  # a candidate of tune
            return through_autograd(two_launches.ours(problem), tensors)
        if layers.wanted(problem):
            return layers.bind(problem, tensors, ours=True)
        return through_autograd(OPS[problem.op].ours(problem), tensors)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Torch("torch"),
        Ours("fastnorm"),
        Ours("fastnorm-cuda", backend="cuda"),
        Ours("fastnorm-triton", backend="triton"),
        *PEERS,
        Compiled("torch.compile", slow=True),
    )
}
