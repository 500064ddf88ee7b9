"""What a small row's time is made of: how many kernels a call launches, and how long they run.

A profiler that was once on may leave its hooks behind, and every later launch of that process then
takes longer (pytorch issue 144455): kernels are counted in a process of its own, which times
nothing, while the one that does waits for it.
"""

from __future__ import annotations

import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# torch has it from C, and exports it without saying so
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.child import Ended, Helper, Late
from benchmarks.problems import Problem

SMALL_BYTES = 10**6  # of x: from there on launches are not what takes the time
CALLS = 20
LIMIT_S = 45.0  # for one problem and provider, the start of the process included
NOT_COUNTED = "kernels not counted"


class Kernels(NamedTuple):
    """Of one call: kernels, fills and copies that it launches, microseconds that they run."""

    launches: int
    microseconds: float

    def __str__(self) -> str:
        return f"{self.launches} kernel{'s' * (self.launches != 1)}, {self.microseconds:.1f} us"


def read(note: str) -> Kernels | None:
    """What a row's note says of them."""
    found = re.search(r"\b(\d+) kernels?, ([0-9.]+) us\b", note)
    return Kernels(int(found[1]), float(found[2])) if found else None


def wanted(problem: Problem) -> bool:
    """Whether its rows say it: small tensors, and the one launch of a whole model's weights."""
    return problem.numel * problem.itemsize < SMALL_BYTES or problem.variant == "hifigan"


def counted(events: Iterable[Any], calls: int, device: DeviceType) -> Kernels | None:
    """The kernels of one call from a profiler's events of several; None if it saw none.

    Each name by itself, rounded: a profiler may lose the first kernels that it is to see.
    """
    times: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == device and not event.is_user_annotation:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    each = {name: round(len(found) / calls) for name, found in times.items()}
    if not any(each.values()):
        return None
    total = sum(n * statistics.median(times[name]) for name, n in each.items())
    return Kernels(sum(each.values()), total)


def kernels(call: Callable[[], Any], device: str) -> Kernels | None:
    """Of a call that has run before, its data in the caches; on a CPU its ops, for the tests."""
    on_cpu = device == "cpu"
    activity = ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(CALLS):
            call()
        timing.synchronize(device)
    kind = DeviceType.CPU if on_cpu else DeviceType.CUDA
    return counted(profiler.events() or (), CALLS, kind)


def _told(bench: Any, problem: Problem, provider: str, modes: tuple[str, ...]) -> dict[str, str]:
    """For every mode what its note is to say."""
    from benchmarks.providers import PROVIDERS

    stage = bench.stage(problem)
    with PROVIDERS[provider].active():
        call = PROVIDERS[provider].bind(problem, stage.fresh())
        found = {}
        for mode in modes:
            run = bench.run_of(stage, call, mode)
            run()
            found[mode] = str(kernels(run, bench.device) or f"{NOT_COUNTED}: the profiler saw none")
    return found


def _main(connection: Connection, device: str, seed: int) -> None:
    """Count for every problem and provider that is received."""
    from benchmarks.measure import Bench, first_line

    with open(os.devnull, "w") as sink:  # the profiler and compilers talk
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    warnings.simplefilter("ignore")
    bench = Bench(device, seed)
    while True:
        problem, provider, modes = connection.recv()
        try:
            connection.send(_told(bench, problem, provider, modes))
        except Exception as error:
            bench.forget()
            connection.send(dict.fromkeys(modes, f"{NOT_COUNTED}: {first_line(error)}"))


class Counter(Helper):
    """The process that counts, as the one that times sees it: never asked again once it died."""

    def __init__(self, device: str, seed: int) -> None:
        super().__init__(_main, (device, seed), "kernel counter", LIMIT_S)

    def told(self, problem: Problem, provider: str, modes: tuple[str, ...]) -> dict[str, str]:
        """For every mode what its note is to say: what was counted, or why it was not."""
        try:
            found: dict[str, str] = self.asked((problem, provider, modes))
        except (Ended, Late):
            return dict.fromkeys(modes, f"{NOT_COUNTED}: the process that counts them died")
        return found
