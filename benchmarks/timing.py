"""How long a call takes: on the device, on the host, and a plain copy beside it.

Device time on CUDA is measured with events, the L2 cache flushed before every run, by
triton.testing.do_bench; on a CPU it is the wall clock, and caches keep what fits in them. Always
the median, with the 20th and 80th percentile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

WARMUP_MS, MEASURED_MS = 15.0, 60.0  # of one row
CPU_RUNS = 9  # at least, however long one takes
HOST_CALLS = 2000
DRAIN = 50  # host calls between two synchronisations: a full launch queue would block
COPY_BYTES = 1 << 30  # a larger copy is as many times longer: it is bandwidth alone


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


def device_time(call: Callable[[], Any], device: str) -> Timing:
    """The time of a call on the device: L2-cold on CUDA, the wall clock on a CPU."""
    if device != "cpu":
        from triton.testing import do_bench

        median, p20, p80 = do_bench(
            call, warmup=WARMUP_MS, rep=MEASURED_MS, quantiles=[0.5, 0.2, 0.8]
        )
        return Timing(median, p20, p80)
    spent = 0.0
    while spent < WARMUP_MS:
        spent += _wall_clock(call)
    samples: list[float] = []
    while len(samples) < CPU_RUNS or sum(samples) < MEASURED_MS:
        samples.append(_wall_clock(call))
    return quantiles(samples)


def host_time(call: Callable[[], Any], device: str, calls: int = HOST_CALLS) -> Timing:
    """The time until a call returns, not until the device is done."""
    for _ in range(calls // 10):
        call()
    samples = []
    for i in range(calls):
        if i % DRAIN == 0:
            synchronize(device)
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) * 1e-6)
    return quantiles(samples)


def step_time(step: Callable[[], Any], device: str, steps: int, warmup: int) -> Timing:
    """The wall clock of a training step, from an idle device to an idle device."""
    for _ in range(warmup):
        step()
    samples = []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        samples.append((time.perf_counter() - start) * 1e3)
    return quantiles(samples)


@dataclass
class Copies:
    """Plain copies on a device, each size timed once in this run: what 1.0 of a floor fraction
    is."""

    device: str

    def __post_init__(self) -> None:
        self._known: dict[int, float] = {}

    def milliseconds(self, moved: int) -> float:
        """The time of a copy that moves so many bytes, half of them read and half written."""
        size = max(1, min(moved, COPY_BYTES) // 2)
        if size not in self._known:
            source = torch.empty(size, dtype=torch.uint8, device=self.device).random_(0, 256)
            target = torch.empty_like(source)
            self._known[size] = device_time(lambda: target.copy_(source), self.device).median
        return self._known[size] * max(1.0, moved / (2 * size))

    def bandwidth_gbs(self) -> float:
        """Of a large copy, bytes read and bytes written."""
        moved = COPY_BYTES if self.device != "cpu" else COPY_BYTES // 8
        return moved / self.milliseconds(moved) * 1e-6


def peak_memory_mib(call: Callable[[], Any], owned: int, device: str) -> float | None:
    """The most device memory during a call, `owned` bytes of its inputs included and whatever else
    is allocated left out; None on a CPU, where nobody counts it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - owned
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - others) / 2**20
