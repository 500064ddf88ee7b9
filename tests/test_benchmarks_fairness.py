"""That the benchmarks favour nobody: what providers are given, and what their rows say of it."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import worker
from benchmarks.measure import Bench, Stage
from benchmarks.ops import Tensors
from benchmarks.peers import BELOW_AUTOGRAD, PEERS
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS

ROWS = Problem("layer_norm", "plain", (4, 8), "rows", "float32")


def test_compiled_ops_leave_the_process_as_it_was() -> None:
    config: Any = pytest.importorskip("torch._functorch.config")
    before = config.donated_buffer
    seen = []

    class Asking(type(PROVIDERS["torch.compile"])):  # type: ignore[misc]
        def bind(self, problem, tensors):  # type: ignore[no-untyped-def]
            seen.append(config.donated_buffer)
            return PROVIDERS["torch"].bind(problem, tensors)

    rows = list(Bench("cpu").rows(ROWS, Asking("asking")))
    assert all(row.ok for row in rows)
    assert seen == [False]  # backward runs many times over one forward
    assert config.donated_buffer == before


def test_every_provider_gets_the_same_numbers() -> None:
    seen: list[Tensors] = []

    class Seeing(type(PROVIDERS["torch"])):  # type: ignore[misc]
        def bind(self, problem, tensors):  # type: ignore[no-untyped-def]
            seen.append({name: t.detach().clone() for name, t in tensors.items()})
            return super().bind(problem, tensors)

    def drawn(seed: int, problem: Problem) -> tuple[torch.Tensor, ...]:
        bench = Bench("cpu", seed)
        torch.rand(3)  # whatever ran before
        assert all(row.ok for row in bench.rows(problem, Seeing("seeing")))
        return (*seen[-1].values(), *bench.stage(problem).oracle.dys)

    def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
        return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

    first = drawn(7, ROWS)
    assert same(first, drawn(7, ROWS))
    assert not same(first, drawn(8, ROWS))  # fresh ones in another run
    wide = replace(ROWS, dtype="float16")
    assert not torch.equal(first[0].half(), drawn(7, wide)[0])


def test_every_process_of_a_run_has_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(worker.Worker, "_start", lambda self: given.append(self._arguments[-1]))
    process = worker.Worker("cpu")
    process._start()
    assert len(given) == 2
    assert len(set(given)) == 1


class Package(types.ModuleType):
    """Stands in for a peer's module: whatever is asked of it is a function."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


@pytest.mark.parametrize("name", ["quack-kernels", "flag_gems"])
def test_a_peer_below_autograd_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    for module in (
        *("quack", "quack.rmsnorm", "flag_gems", "flag_gems.ops"),
        *(f"flag_gems.ops.{op}" for op in ("batch_norm", "layernorm", "weightnorm")),
        *(f"flag_gems.ops.{op}" for op in ("gelu", "silu", "selu")),
    ):
        monkeypatch.setitem(sys.modules, module, Package(module))
    for op, variant, _ in peer.adapters:
        shape = {"batch_norm": (2, 3, 2, 2), "activation": (8,)}.get(op, (4, 4, 4, 4))
        layout = {"batch_norm": "nchw", "layer_norm": "rows"}.get(op, "flat")
        problem = Problem(op, variant, shape, layout, "float32")
        call = peer.bind(problem, Stage(problem, "cpu").fresh())
        assert call.note.endswith(BELOW_AUTOGRAD), (op, variant)
