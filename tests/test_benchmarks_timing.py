"""How the benchmarks time: quantiles, copies beside which an op is judged, the progress line."""

from __future__ import annotations

import importlib
import itertools
import time
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import measure, progress, timing
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS
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


@pytest.fixture
def asked_of_triton(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The milliseconds that its clock was asked to measure for, on a GPU that is not there."""
    asked: list[float] = []

    def do_bench(call: Any, warmup: float, rep: float, quantiles: list[float]) -> list[float]:
        call()
        asked.append(rep)
        return [10 * q for q in quantiles]

    monkeypatch.setattr(importlib.import_module("triton.testing"), "do_bench", do_bench)
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    return asked


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the clock on a GPU is Triton's")


@needs_triton
def test_device_time_on_a_gpu_is_cold(asked_of_triton: list[float]) -> None:
    calls: list[int] = []
    assert timing.device_time(lambda: calls.append(1), "cuda") == (5.0, 2.0, 8.0)
    assert calls == [1, 1, 1]  # warm, for an estimate, measured
    assert asked_of_triton == [timing.MEASURED_MS]


@needs_triton
def test_a_long_call_is_measured_more_than_once(asked_of_triton: list[float]) -> None:
    timing.device_time(lambda: time.sleep(0.03), "cuda")
    assert asked_of_triton[0] >= timing.GPU_RUNS * 30.0


@pytest.mark.parametrize(
    "host, device, flush, gaps",
    [
        (0.02, 0.01, 0.1, False),  # launched while the flush runs
        (0.40, 0.31, 0.1, True),  # eighty launches of small kernels
        (0.40, 0.75, 0.1, True),  # the last of them is long
        (0.40, 0.90, 0.1, False),
    ],
)
def test_host_gaps(
    host: float, device: float, flush: float, gaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "launch_time", lambda call, device: timing.Launch(host, device))
    assert timing.host_gaps(lambda: None, device, flush, "cuda") == gaps


def test_launch_time_ends_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "synchronize", lambda device: time.sleep(0.02))
    found = timing.launch_time(lambda: time.sleep(0.01), "cuda")
    assert found.host >= 10.0
    assert found.whole >= found.host + 20.0


def test_host_time_counts_calls() -> None:
    calls = itertools.count()
    found = timing.host_time(lambda: next(calls), "cpu", calls=200)
    assert 0 < found.p20 <= found.median <= found.p80 < 1
    assert next(calls) == 220  # a tenth of them warms up


def test_a_copy_of_a_size_is_timed_five_times_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def device_time(call: Any, device: str, spent_ms: float, runs: int) -> timing.Timing:
        timed.append(call().numel())
        return timing.Timing([0.4, 0.6, 0.5, 9.0, 0.45][len(timed) % 5], 0.1, 10.0)

    monkeypatch.setattr(timing, "device_time", device_time)
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 20)
    copies = timing.Copies("cpu")
    assert copies.milliseconds(1000) == copies.milliseconds(1000) == 0.5
    assert timed == [500] * 5  # half of what it moves is read
    # a copy larger than the largest is as many times longer
    assert copies.milliseconds(4 << 20) == 2.0
    assert timed == [500] * 5 + [1 << 19] * 5
    # the 20th of the five at 0.44, the 80th at 2.28
    assert copies.spread(1000) == pytest.approx((2.28 - 0.44) / 0.5)
    assert copies.spread(4 << 20) == copies.spread(1000)
    # 2^20 bytes in half a millisecond
    assert copies.bandwidth_gbs() == pytest.approx((1 << 20) / 0.5e-3 * 1e-9)


@pytest.mark.parametrize(
    "cache, moved", [(0, 1 << 27), (1 << 25, 1 << 27), (300 << 20, 600 << 20), (1 << 30, 1 << 30)]
)
def test_no_cache_holds_the_copy_of_the_heading(
    cache: int, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(timing, "last_cache_bytes", lambda: cache)
    monkeypatch.setattr(
        timing.Copies, "milliseconds", lambda self, moved: asked.append(moved) or 1.0
    )
    timing.Copies("cpu").bandwidth_gbs()
    assert asked == [moved]


def test_a_row_says_what_its_time_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("activation", "gelu", (64,), "flat", "float32", ("forward",))
    bench = measure.Bench("cpu")
    stage = bench.stage(problem)
    call = PROVIDERS["torch"].bind(problem, stage.fresh())
    bench.device = "cuda"  # from here on, as far as clocks are concerned
    monkeypatch.setattr(timing, "peak_memory_mib", lambda *_: 1.0)
    monkeypatch.setattr(timing, "device_time", lambda *_: timing.Timing(1.0, 0.9, 1.1))
    monkeypatch.setattr(timing.Copies, "milliseconds", lambda *_: 0.5)
    for gaps, spread, noted in (
        (False, 0.05, []),
        (True, 0.05, [measure.HOST_GAPS]),
        (True, 0.5, [measure.HOST_GAPS, measure.SPREAD_COPY]),
    ):
        monkeypatch.setattr(timing, "host_gaps", lambda *_, gaps=gaps: gaps)
        monkeypatch.setattr(timing.Copies, "spread", lambda *_, spread=spread: spread)
        row = bench._timed(stage, replace(call, note="a peer"), "forward", "torch")
        assert row.note == "; ".join(["a peer", *noted])


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
