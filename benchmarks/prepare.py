"""What is compiled before anything is timed: several processes run the coming jobs once, so that
the caches on disk have their kernels when one process measures them, and the machine's cores do not
wait for one of them. Nothing is timed here, and what inductor's tuner chooses beside so many others
is not kept: it chooses again where it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch

from benchmarks import correctness, timing
from benchmarks.calls import Provider
from benchmarks.context import dead_context
from benchmarks.ops import OPS
from benchmarks.problems import HOST, Problem
from benchmarks.providers import Compiled, Ours

MOST = 12  # processes: each has a context of its own on the device
MEMORY = 0.85  # of the device's, of all of them together
LEAST = 4 << 30  # bytes of the device's memory for each: a context takes half a gigabyte
FORWARD = frozenset({"forward", HOST[0]})  # modes that run no backward
JIT_PEERS = ("liger-kernel",)  # a peer that tunes is not among them: it may keep what it chose


class OnProblem(Protocol):
    """A job of run or of tune that is a problem on a provider."""

    @property
    def problem(self) -> Problem: ...
    @property
    def provider(self) -> Provider: ...
    def missing(self, device: str) -> str | None: ...


class Prepared(NamedTuple):
    """How many jobs."""

    ran: int
    failed: int
    left: int

    def __str__(self) -> str:
        return f"{self.ran} ran once, {self.failed} failed, {self.left} had no time"


def compiles(job: Any) -> TypeGuard[OnProblem]:
    """Whether a job compiles kernels when it first runs, and keeps them on disk."""
    provider = getattr(job, "provider", None)
    if isinstance(provider, Ours):
        return provider.backend != "cuda"
    return isinstance(provider, Compiled) or getattr(provider, "name", "") in JIT_PEERS


def shares(jobs: Iterable[OnProblem], processes: int) -> list[list[OnProblem]]:
    """The jobs of each process, in their order; those of one problem are of one process, because
    they may have kernels in common."""
    of: dict[str, int] = {}
    found: list[list[OnProblem]] = [[] for _ in range(processes)]
    for job in jobs:
        found[of.setdefault(str(job.problem), len(of)) % processes].append(job)
    return [share for share in found if share]


def _processes(device: str) -> int:
    """As many as the machine has cores and the device has memory for."""
    most = min(MOST, os.cpu_count() or 1)
    if device == "cpu":
        return most
    return max(1, min(most, torch.cuda.get_device_properties(device).total_memory // LEAST))


@contextlib.contextmanager
def _inductor() -> Iterator[None]:
    """Inductor compiles in this process, and keeps no choice between kernels that it has timed."""
    config: Any = importlib.import_module("torch._inductor.config")
    with config.patch(compile_threads=1, autotune_local_cache=False):
        yield


def once(job: OnProblem, device: str) -> None:
    """Run a job's calls as they will be timed."""
    problem, provider = job.problem, job.provider
    inductor = _inductor() if isinstance(provider, Compiled) else contextlib.nullcontext()
    with inductor, provider.active():
        call = provider.bind(problem, OPS[problem.op].tensors(problem, device))
        result = call.forward()
        if call.backward is not None and not FORWARD.issuperset(problem.modes):
            outputs = correctness.outputs_of(call.outputs(result))
            call.backward(result, correctness.gradients_like(outputs))
    timing.synchronize(device)


def main(connection: Connection, device: str, share: float, jobs: Sequence[OnProblem]) -> None:
    """Run these jobs; send of each whether it ran."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption ends
    warnings.simplefilter("ignore")
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(share)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        for job in jobs:
            try:
                once(job, device)
            except Exception:
                connection.send(False)
                if dead_context():
                    return
            else:
                connection.send(True)


def prepare(
    jobs: Iterable[Any], device: str, seconds: float, processes: int | None = None
) -> Prepared:
    """Run what compiles among these jobs once, for so long at most; one that fails or ends its
    process is left to where it is timed."""
    deadline = time.monotonic() + seconds
    chosen = [job for job in jobs if compiles(job) and job.missing(device) is None]
    if not chosen:
        return Prepared(0, 0, 0)
    given = shares(chosen, processes or _processes(device))
    context = multiprocessing.get_context("spawn")  # CUDA survives no fork
    running: dict[Connection, BaseProcess] = {}
    ran = failed = 0
    try:
        for share in given:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, device, MEMORY / len(given), share)
            process: BaseProcess = context.Process(
                target=main, args=arguments, name="benchmarks prepare"
            )
            process.start()
            theirs.close()
            running[ours] = process
        while running and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(running), left):
                assert isinstance(connection, Connection)
                try:
                    right = connection.recv()
                except EOFError:  # it is done, or died
                    running.pop(connection).join()
                    continue
                ran, failed = ran + right, failed + (not right)
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            process.join()
    return Prepared(ran, failed, len(chosen) - ran - failed)


def add_prepare(parser: argparse.ArgumentParser, seconds: Callable[[str], float]) -> None:
    """Add `--prepare`."""
    parser.add_argument(
        "--prepare", type=seconds, default=0.0, metavar="SECONDS",
        help="of the budget, at most: up to "
        f"{MOST} processes compile the kernels ahead, nothing is timed; default: each job its own",
    )  # fmt: skip
