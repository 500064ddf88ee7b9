"""The process that measures. Another one keeps the results, so that a peer that takes its process
down, or a kernel that never ends, costs one row."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import cast

from benchmarks.jobs import Job
from benchmarks.schema import Environment, Row

START_S = 180.0  # importing torch on a cold disk, and the first copies


class WorkerDied(RuntimeError):
    """The worker ended, or was ended, in the middle of a job."""


class OutOfTime(RuntimeError):
    """The run's time was over in the middle of a job."""


def main(connection: Connection, device: str, note: str, quiet: bool, seed: int) -> None:
    """Send the environment, then the rows of every job that is received."""
    from benchmarks.environment import environment
    from benchmarks.measure import Bench

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption ends
    warnings.simplefilter("ignore")
    bench = Bench(device, seed)
    connection.send(environment(device, bench.copies.bandwidth_gbs(), note))
    with contextlib.ExitStack() as stack:
        if quiet:  # compilers and peers talk; the progress bar is the parent's
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(sink))
            stack.enter_context(contextlib.redirect_stderr(sink))
        while (job := connection.recv()) is not None:
            why = job.missing(device)
            if why is not None:
                connection.send(("missing", job.failed(f"missing: {why}")))
            else:
                for row in job.rows(bench):
                    connection.send(("row", row))
            connection.send(("done", None))
    bench.forget()


class Worker:
    """The measuring process, as the parent sees it."""

    def __init__(self, device: str, note: str = "", quiet: bool = True) -> None:
        # fresh numbers every run, the same for every process of it
        self._arguments = (device, note, quiet, time.time_ns() % (1 << 32))
        self.environment: Environment = self._start()

    def _start(self) -> Environment:
        context = multiprocessing.get_context("spawn")  # CUDA survives no fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=main, args=(theirs, *self._arguments), daemon=False, name="benchmarks worker"
        )
        self._process.start()
        theirs.close()
        found = self._receive(time.monotonic() + START_S, "starting")
        assert isinstance(found, Environment)
        return found

    def _receive(self, deadline: float, what: str) -> object:
        left = max(0.0, deadline - time.monotonic())
        try:
            if self._connection.poll(left):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            self._connection.close()
            raise WorkerDied(f"its process died: {_reason(self._process.exitcode)}") from None
        self.stop(kill=True)
        raise WorkerDied(f"{what} took longer than its limit and was ended")

    def rows(self, job: Job, until: float) -> Iterator[tuple[str, Row]]:
        """("row" or "missing", a row) of a job as they come; OutOfTime when the run is over, and
        WorkerDied where there is no worker any more: a new one starts with the next call."""
        if not self._process.is_alive():
            self._start()
        limit = time.monotonic() + job.limit_s
        self._connection.send(job)
        while True:
            try:
                kind, row = cast(tuple[str, Row], self._receive(min(limit, until), "the job"))
            except WorkerDied:
                if time.monotonic() >= until:
                    raise OutOfTime from None
                raise
            if kind == "done":
                return
            yield kind, row

    def stop(self, kill: bool = False) -> None:
        """End the process: at once, or after what it does now."""
        if not kill:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)
        self._connection.close()


def _reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {-exitcode}"
    return f"exit status {exitcode}"


if __name__ == "__main__":
    sys.exit("this is the worker of `python -m benchmarks run`")
