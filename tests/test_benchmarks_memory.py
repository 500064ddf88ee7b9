"""Peak memory and kernel counts of the benchmarks: what stands in a row is what a user sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks import kernels, measure, timing
from benchmarks.kernels import Counter, Kernels, counted, read
from benchmarks.measure import Bench
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS

SHAPE = (2048, 64)
MEBIBYTES = 0.5


def peak(call: Callable[[], Any], owned: int, device: str) -> float:
    """As timing.peak_memory_mib counts on a GPU, by the profiler's list of allocations."""
    wanted = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with profile(**wanted) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return (owned + most) / 2**20


@pytest.mark.parametrize(
    "variant, forward, backward",
    [
        ("plain", 2, 4),  # x, y; x, y, dy, dx
        # x, z, y; x, y, dy, dz and z, then dx: what was saved is given back as it goes
        ("silu", 3, 5),
    ],
)
def test_memory_of_a_backward_is_that_of_the_whole_step(
    variant: str, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "peak_memory_mib", peak)
    problem = Problem("layer_norm", variant, SHAPE, "rows", "float32")
    found = {row.mode: row for row in Bench("cpu").rows(problem, PROVIDERS["torch"])}
    # statistics are a thirtieth of a tensor
    for mode, tensors in (("forward", forward), ("backward", backward)):
        assert found[mode].peak_memory_mib == pytest.approx(tensors * MEBIBYTES, abs=0.1)


def test_the_wall_clock_of_a_step_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "peak_memory_mib", peak)
    problem = Problem("weight_norm", "dim0", (64, 64), "flat", "float32", ("step",))
    for provider in ("torch", "fastnorm"):
        (row,) = Bench("cpu").rows(problem, PROVIDERS[provider])
        assert row.ok, row.note
        assert (row.mode, row.floor_bytes) == ("step", None)
        assert row.ms_median is not None and row.ms_median > 0


def event(name: str, us: float, device: DeviceType = DeviceType.CUDA, **others: bool) -> Any:
    elapsed = SimpleNamespace(elapsed_us=lambda: us)
    given = {"is_user_annotation": False} | others
    return SimpleNamespace(name=name, device_type=device, time_range=elapsed, **given)


def test_kernels_are_counted_by_name() -> None:
    events = [
        *[event("statistics", us) for us in (1.0, 2.0, 9.0, 2.0)],
        *[event("normalize", 1.5)] * 7,  # twice a call, and the first was lost
        event("a fill of the first call", 50.0),
        *[event("cudaLaunchKernel", 7.0, DeviceType.CPU)] * 12,
        *[event("a range", 80.0, is_user_annotation=True)] * 4,
    ]
    assert counted(events, 4, DeviceType.CUDA) == Kernels(3, 2.0 + 2 * 1.5)
    assert counted([], 4, DeviceType.CUDA) is None


@pytest.mark.parametrize("one", [Kernels(1, 2.84), Kernels(12, 105.0)])
def test_a_note_is_read_as_it_was_written(one: Kernels) -> None:
    found = read(f"a peer; {one}; floor_fraction is as sure as the copy")
    assert found is not None
    assert found.launches == one.launches
    assert found.microseconds == pytest.approx(one.microseconds, abs=0.05)
    assert read(f"{kernels.NOT_COUNTED}: it died") is None


def test_a_process_of_its_own_counts_and_is_not_asked_again_once_dead() -> None:
    """On a CPU, where the profiler sees ops in the place of kernels."""
    counter = Counter("cpu", 0)
    problem = Problem("activation", "gelu", (64,), "flat", "float32")
    modes = ("forward", "backward")
    try:
        told = counter.told(problem, "torch", modes)
        assert set(told) == set(modes)
        forward, backward = (read(told[mode]) for mode in modes)
        assert forward is not None and forward.launches == 1  # aten::gelu
        assert backward is not None and backward.launches > 1
        why = counter.told(problem, "nobody", modes)
        assert why == dict.fromkeys(modes, "kernels not counted: KeyError: 'nobody'")
        assert counter._child is not None
        counter._child._process.kill()
        died = dict.fromkeys(modes, "kernels not counted: the process that counts them died")
        assert [counter.told(problem, "torch", modes) for _ in range(2)] == [died] * 2
        assert counter._child is None
    finally:
        counter.stop()


class Stub:
    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def told(self, problem: Problem, provider: str, modes: tuple[str, ...]) -> dict[str, str]:
        self.asked.append((provider, modes))
        return dict.fromkeys(modes, "1 kernel, 2.0 us")


def test_only_small_rows_of_a_gpu_say_what_they_launch() -> None:
    small = Problem("activation", "gelu", (64,), "flat", "float32")
    bench, torchs = Bench("cpu"), PROVIDERS["torch"]
    bench.counter = stub = Stub()  # type: ignore[assignment]
    assert [row.note for row in bench.rows(small, torchs) if "kernel" in row.note] == []
    assert stub.asked == []
    bench.device = "cuda"  # from here on, as far as counting is concerned
    both = ["forward", "backward"]
    assert bench._counts(small, torchs, both) == dict.fromkeys(both, "1 kernel, 2.0 us")
    assert bench._counts(small, torchs, ["host"]) == {}
    assert bench._counts(replace(small, shape=(1 << 18,)), torchs, both) == {}  # 1.05 MB
    assert bench._counts(small, PROVIDERS["torch.compile"], both) == {}
    assert bench._counts(small, replace(torchs, name="a candidate"), both) == {}
    whole = Problem("weight_norm", "hifigan", (1 << 24,), "flat", "float32")
    assert set(bench._counts(whole, torchs, [*both, "step"])) == set(both)
    assert stub.asked == [("torch", tuple(both))] * 2


def test_a_note_of_kernels_comes_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("activation", "gelu", (64,), "flat", "float32", ("forward",))
    bench = Bench("cpu")
    monkeypatch.setattr(Bench, "_counts", lambda *_: {"forward": "1 kernel, 2.0 us"})
    monkeypatch.setattr(timing.Copies, "spread", lambda *_: 1.0)
    (row,) = bench.rows(problem, PROVIDERS["torch"])
    assert row.note == f"{measure.SPREAD_COPY}; 1 kernel, 2.0 us"
