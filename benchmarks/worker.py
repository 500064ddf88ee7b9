"""The process that measures. Another one keeps the results, so that a peer that takes its process
down, or a kernel that never ends, costs one row."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import cast

from benchmarks.child import Child, Ended, Late
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
        # no daemon: who counts kernels is a child of it
        self._child = Child(main, self._arguments, "benchmarks worker", daemon=False)
        found = self._receive(time.monotonic() + START_S, "starting")
        assert isinstance(found, Environment)
        return found

    def _receive(self, deadline: float, what: str) -> object:
        try:
            return self._child.receive(deadline - time.monotonic())
        except Ended as death:
            raise WorkerDied(str(death)) from None
        except Late:
            raise WorkerDied(f"{what} took longer than its limit and was ended") from None

    def rows(self, job: Job, until: float) -> Iterator[tuple[str, Row]]:
        """("row" or "missing", a row) of a job as they come; OutOfTime when the run is over, and
        WorkerDied where there is no worker any more: a new one starts with the next call."""
        if not self._child.alive:
            self._start()
        limit = time.monotonic() + job.limit_s
        self._child.send(job)
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
        if kill:
            self._child.stop()
        else:
            self._child.send(None)
            self._child.stop(10)


if __name__ == "__main__":
    sys.exit("this is the worker of `python -m benchmarks run`")
