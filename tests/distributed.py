"""Tests on several processes: started once per number of ranks, with every case inside.

A module of cases marks its functions ``name(rank, ranks)`` with :func:`case`; a test file makes one
test of each with :func:`parametrize` and asks for its :func:`outcome`. A rank that fails says so
and leaves, which its peers notice: the cases after a failure are reported as not run.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tests.conftest  # noqa: F401  (interpreted kernels: decided before triton is imported)

Case = Callable[[int, int], None]
TIMEOUT = 300  # seconds, of a collective and of all cases of a module on one number of ranks
RANKS = (2, 3, 4)


def case(*ranks: int) -> Callable[[Case], Case]:
    """Run a function as a case on these numbers of ranks."""

    def mark(function: Case) -> Case:
        function.ranks = ranks  # type: ignore[attr-defined]
        return function

    return mark


def cases(module: str, ranks: int) -> dict[str, Case]:
    found = vars(importlib.import_module(module))
    return {name: f for name, f in found.items() if ranks in getattr(f, "ranks", ())}


def parametrize(*modules: str) -> pytest.MarkDecorator:
    """One test per case and number of ranks, in the order in which they run."""
    return pytest.mark.parametrize(
        "module, ranks, name",
        [
            pytest.param(module, ranks, name, id=f"{ranks}-{name}")
            for module in modules
            for ranks in RANKS
            for name in cases(module, ranks)
        ],
    )


def work(module: str, rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in pytest
    warnings.simplefilter("ignore", DeprecationWarning)  # of Dynamo, about its own code
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    done: dict[str, str] = {}
    for name, function in cases(module, ranks).items():
        torch.manual_seed(0)
        try:
            function(rank, ranks)
            done[name] = ""
        except BaseException:
            done[name] = f"rank {rank} of {ranks}:\n{traceback.format_exc()}"
        Path(folder, f"{rank}.json").write_text(json.dumps(done))
        if done[name]:
            os._exit(1)  # without a farewell: peers that wait for this rank must fail too
    dist.destroy_process_group()


@functools.cache
def outcomes(module: str, ranks: int) -> dict[str, str]:
    """Name of each case -> what went wrong on any rank; empty where nothing did."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all ranks
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=work, args=(module, rank, ranks, folder))
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(TIMEOUT)
            if worker.is_alive():
                worker.kill()
                worker.join()
        told = [
            json.loads(path.read_text()) if path.exists() else {}
            for path in (Path(folder, f"{rank}.json") for rank in range(ranks))
        ]
    missing = "not run: a case before it failed, or the time was up"
    return {
        name: "\n".join(filter(None, (one.get(name, missing) for one in told)))
        for name in cases(module, ranks)
    }


def outcome(module: str, ranks: int, name: str) -> str:
    return outcomes(module, ranks)[name]


class Collectives(TorchDispatchMode):
    """Counts what a rank sends to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(op)
        return op(*args, **(kwargs or {}))

    def note(self, op: Any) -> None:
        if op.namespace in ("c10d", "_c10d_functional") and "wait" not in op.__name__:
            self.seen[op.__name__.partition(".")[0]] += 1

    def take(self) -> dict[str, int]:
        seen, self.seen = self.seen, Counter()
        return dict(seen)
