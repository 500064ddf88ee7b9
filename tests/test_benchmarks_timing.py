"""How the benchmarks time: quantiles, copies beside which an op is judged, the progress line."""

from __future__ import annotations

import importlib
import itertools
import time
from typing import Any

import pytest

from benchmarks import progress, timing
from tests.conftest import HAS_TRITON


def test_quantiles() -> None:
    assert timing.quantiles([float(n) for n in range(1, 12)]) == (6.0, 3.0, 9.0)
    assert timing.quantiles([2.0]) == (2.0, 2.0, 2.0)


def test_device_time_on_a_cpu_is_the_wall_clock() -> None:
    calls = itertools.count()

    def call() -> None:
        next(calls)
        time.sleep(0.004)

    found = timing.device_time(call, "cpu")
    assert 4.0 <= found.p20 <= found.median <= found.p80
    assert next(calls) >= timing.CPU_RUNS + 3  # warmed up before


@pytest.mark.skipif(not HAS_TRITON, reason="the clock on a GPU is Triton's")
def test_device_time_on_a_gpu_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(call: Any, warmup: float, rep: float, quantiles: list[float]) -> list[float]:
        call()
        return [10 * q for q in quantiles]

    monkeypatch.setattr(importlib.import_module("triton.testing"), "do_bench", do_bench)
    calls: list[int] = []
    assert timing.device_time(lambda: calls.append(1), "cuda") == (5.0, 2.0, 8.0)
    assert calls == [1]


def test_host_time_counts_calls() -> None:
    calls = itertools.count()
    found = timing.host_time(lambda: next(calls), "cpu", calls=200)
    assert 0 < found.p20 <= found.median <= found.p80 < 1
    assert next(calls) == 220  # a tenth of them warms up


def test_a_copy_of_a_size_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def device_time(call: Any, device: str) -> timing.Timing:
        timed.append(call().numel())
        return timing.Timing(0.5, 0.4, 0.6)

    monkeypatch.setattr(timing, "device_time", device_time)
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 20)
    copies = timing.Copies("cpu")
    assert copies.milliseconds(1000) == copies.milliseconds(1000) == 0.5
    assert timed == [500]  # half of what it moves is read
    # a copy larger than the largest is as many times longer
    assert copies.milliseconds(4 << 20) == 2.0
    assert timed == [500, 1 << 19]
    # 2^17 bytes in half a millisecond
    assert copies.bandwidth_gbs() == pytest.approx((1 << 17) / 0.5e-3 * 1e-9)


def test_nobody_counts_the_memory_of_a_cpu() -> None:
    assert timing.peak_memory_mib(lambda: None, 4, "cpu") is None


def test_progress_says_what_runs_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(10, 60.0) as told:
        assert told.left() == 60.0  # nothing is known yet but the budget
        for _ in range(5):
            now[0] += 4.0
            told.done()
        assert told.left() == 20.0  # five jobs at four seconds
        told.running("layer_norm")
    assert capsys.readouterr().err == "5/10, 20 s left: layer_norm\n"
