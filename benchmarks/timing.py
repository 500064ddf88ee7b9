"""How long a call takes: on the device, on the host, and a plain copy beside it.

Device time on CUDA is measured with events, the L2 cache flushed before every run, by
triton.testing.do_bench; on a CPU it is the wall clock, and caches keep what fits in them. Always
the median, with the 20th and 80th percentile.

Between the two events of a run the device may wait for the host, where a call of many small kernels
takes the host longer than the flush before it. `host_gaps` tells where, and its row says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

WARMUP_MS, MEASURED_MS = 15.0, 60.0  # of one row
CPU_RUNS = 9  # at least, however long one takes
GPU_RUNS = 5  # at least
HOST_CALLS = 2000
HOST_S = 4.0  # in which a slow call has fewer
DRAIN = 50  # host calls between two synchronisations: a full launch queue would block
COPY_BYTES = 1 << 30  # a larger copy is as many times longer: it is bandwidth alone
CPU_COPY_BYTES = 1 << 27  # on a CPU, or twice its last cache
COPIES = 5  # times that each size is timed: a busy moment of the machine must not judge every op
FLUSHED_BYTES = 1 << 28  # what do_bench writes before a run


class Timing(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float


def quantiles(samples: list[float]) -> Timing:
    """Median, 20th and 80th percentile of samples in milliseconds."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3])


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _wall_clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def device_time(
    call: Callable[[], Any], device: str, spent_ms: float = MEASURED_MS, runs: int = CPU_RUNS
) -> Timing:
    """The time of a call on the device: L2-cold on CUDA, the wall clock on a CPU. So long at least,
    and on a CPU so many runs."""
    if device != "cpu":
        from triton.testing import do_bench

        call()
        # do_bench divides this by an estimate of its own: two more runs than we want
        spent_ms = max(spent_ms, (GPU_RUNS + 2) * launch_time(call, device).whole)
        median, p20, p80 = do_bench(call, warmup=WARMUP_MS, rep=spent_ms, quantiles=[0.5, 0.2, 0.8])
        return Timing(median, p20, p80)
    warm = 0.0
    while warm < WARMUP_MS:
        warm += _wall_clock(call)
    samples: list[float] = []
    while len(samples) < runs or sum(samples) < spent_ms:
        samples.append(_wall_clock(call))
    return quantiles(samples)


class Launch(NamedTuple):
    """Milliseconds of a call on an idle device: until it returns, until the device is done."""

    host: float
    whole: float


def launch_time(call: Callable[[], Any], device: str) -> Launch:
    """Of a call that has run before."""
    synchronize(device)
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    synchronize(device)
    return Launch((returned - start) * 1e3, (time.perf_counter() - start) * 1e3)


def host_gaps(call: Callable[[], Any], measured: float, flush: float, device: str) -> bool:
    """Whether a device time may hold time in which the device waited for the host. It does not
    where the host is done before the flush is; nor where it needs less than half of what was
    measured: a device that waits for it is done one kernel later, which the host outlasts."""
    host = statistics.median(launch_time(call, device).host for _ in range(GPU_RUNS))
    return host > max(flush, measured / 2)


def host_time(
    call: Callable[..., Any],
    device: str,
    calls: int = HOST_CALLS,
    before: Callable[[], Any] | None = None,
) -> Timing:
    """The time until a call returns, not until the device is done. `before` is not timed: its
    result is what a call is given."""
    samples: list[float] = []
    end = time.monotonic() + HOST_S
    for i in range(-calls // 10, calls):
        if i % DRAIN == 0:
            synchronize(device)
            if len(samples) >= DRAIN and time.monotonic() > end:
                break
        given = (before(),) if before else ()
        start = time.perf_counter_ns()
        call(*given)
        took = time.perf_counter_ns() - start
        if i >= 0:
            samples.append(took * 1e-6)
    return quantiles(samples)


def step_time(
    step: Callable[[], Any], device: str, steps: int, warmup: int, row: int = 1
) -> Timing:
    """The wall clock of a training step, from an idle device to an idle device; of one step, where
    so many follow each other in a row."""
    for _ in range(warmup):
        step()
    samples = []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(row):
            step()
        synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3 / row)
    return quantiles(samples)


def graph_of(step: Callable[[], Any]) -> Callable[[], None]:
    """A step captured as a CUDA graph, after some on a stream of their own, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def last_cache_bytes() -> int:
    """Of a CPU, as Linux tells; 0 where it does not."""
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [level.read_text().strip() for level in levels]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


@dataclass
class Copies:
    """Plain copies on a device, each size timed COPIES times in this run: what 1.0 of a floor
    fraction is. A copy that fits in a CPU's cache runs there, as an op of that size does."""

    device: str

    def __post_init__(self) -> None:
        self._known: dict[int, Timing] = {}

    def _timing(self, moved: int) -> tuple[Timing, float]:
        """(of a copy of that size or the largest, how many times as much is to be moved)."""
        size = max(1, min(moved, COPY_BYTES) // 2)
        if size not in self._known:
            # random numbers, eight bytes at a time: a gigabyte is drawn in a second
            numbers = torch.empty(-(-size // 8), dtype=torch.int64, device=self.device).random_()
            source = numbers.view(torch.uint8)[:size]
            target = torch.empty_like(source)
            timed = [
                device_time(lambda: target.copy_(source), self.device, MEASURED_MS / COPIES, 2)
                for _ in range(COPIES)
            ]
            self._known[size] = quantiles([timing.median for timing in timed])
        return self._known[size], max(1.0, moved / (2 * size))

    def milliseconds(self, moved: int) -> float:
        """The time of a copy that moves so many bytes, half of them read and half written."""
        timing, times = self._timing(moved)
        return timing.median * times

    def spread(self, moved: int) -> float:
        """How far its times are apart, the 20th to the 80th percentile of them, to the median."""
        timing, _ = self._timing(moved)
        return (timing.p80 - timing.p20) / timing.median

    def bandwidth_gbs(self) -> float:
        """Of a copy that no cache holds, bytes read and bytes written."""
        moved = COPY_BYTES
        if self.device == "cpu":
            moved = min(moved, max(CPU_COPY_BYTES, 2 * last_cache_bytes()))
        return moved / self.milliseconds(moved) * 1e-6


def peak_memory_mib(call: Callable[[], Any], owned: int, device: str) -> float | None:
    """The most device memory during a call, `owned` bytes of its inputs included and whatever else
    is allocated when it starts left out; None on a CPU, where nobody counts it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - owned
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - others) / 2**20
