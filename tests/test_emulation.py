"""The CPU harness of the CUDA kernels: its engine, and that it reports every planted fault."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys

import pytest

from tests.emulation import build, planted, sanitize

SEEDS = range(8)


@pytest.fixture(scope="module")
def engine() -> planted.Planted:
    try:
        return planted.Planted("plain")
    except build.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=SEEDS)
def probes(engine: planted.Planted, request: pytest.FixtureRequest) -> planted.Planted:
    """The engine under each of several schedules."""
    engine.engine.configure(seed=request.param)
    return engine


# the engine


@pytest.mark.parametrize("threads", [1, 31, 32, 33, 64, 250, 256, 1024])
def test_a_block_sums_by_shuffles_and_shared_memory(probes: planted.Planted, threads: int) -> None:
    found = probes.probe("block_sum", grid=(5, 1, 1), block=(threads, 1, 1))
    assert found[:5] == [threads * (threads + 1) / 2] * 5


def test_shuffles(probes: planted.Planted) -> None:
    y = probes.probe("shuffles", count=256)
    lanes = range(32)
    expected = [
        *(i ^ 5 for i in lanes),
        *(i - 3 if i % 8 >= 3 else i for i in lanes),
        *(i + 3 if i % 8 < 5 else i for i in lanes),
        *(i // 8 * 8 + 7 for i in lanes),
        *(i ^ 5 for i in lanes),
        *(max(i - 3, i % 3 if i < 3 else 0) for i in lanes),
        *(i + 3 if i < 29 else i for i in lanes),
        *(7 for _ in lanes),
    ]
    assert y == [source + 1 for source in expected]


def test_votes(probes: planted.Planted) -> None:
    y = probes.probe("votes", block=(96, 1, 1))
    for t in range(96):
        warp = [i % 3 == 0 for i in range(t // 32 * 32, t // 32 * 32 + 32)]
        assert y[6 * t : 6 * t + 6] == [sum(warp), 1, 0, 32, 1, 0]


def test_parts_of_a_warp_work_apart(probes: planted.Planted) -> None:
    y = probes.probe("halves")
    product = struct.unpack("f", struct.pack("f", math.prod(range(17, 33))))[0]
    assert y[16:32] == [sum(range(1, 17))] * 16
    assert y[:16] == pytest.approx([product] * 16, rel=1e-6)


def test_atomics(probes: planted.Planted) -> None:
    y = probes.probe("atomics", block=(100, 1, 1))
    assert y[:9] == [100, 99, 0, 8, 200, 255, 100, 50, 25]


def test_every_thread_of_three_dimensions_knows_its_place(probes: planted.Planted) -> None:
    y = probes.probe("places", grid=(2, 3, 4), block=(5, 2, 3))
    assert y[:720] == list(range(720))


def test_shared_memory_starts_as_nan(probes: planted.Planted) -> None:
    for _ in range(2):  # also where another block had it before
        y = probes.probe("fresh_shared", shared=128)
        assert all(map(math.isnan, y[:32]))


def test_copies_are_there_once_they_are_waited_for(probes: planted.Planted) -> None:
    y = probes.probe("copies", count=12 * 32, shared=4 * 12 * 32)
    for copy, there in enumerate([1, 2, 3]):  # from which wait on
        for t in range(32):
            found = y[12 * t + 4 * copy : 12 * t + 4 * copy + 4]
            assert all(map(math.isnan, found[:there]))
            assert found[there:] == [4 * copy + 4] * (4 - there)


def test_arithmetic(engine: planted.Planted) -> None:
    y = engine.probe("arithmetic")
    expected = [
        2**-0.5,
        2**-0.5,
        math.exp(2),
        math.log(2),
        0.5,
        2 / 3,
        7,
        math.tanh(2),
        math.erf(2),
        math.expm1(2),
        math.log1p(2),
        2 + 3 + 4,
        4,
        31,
        0.66796875,
        0.66650390625,
    ]
    assert y[:16] == pytest.approx(expected, rel=2e-7)


def test_seeds_are_schedules_and_repeat(engine: planted.Planted) -> None:
    orders = []
    for seed in (0, 1, 2, 3, 2):
        engine.engine.configure(seed=seed)
        y = engine.probe("start_order", grid=(16, 1, 1), block=(1, 1, 1))
        assert sorted(y[:16]) == list(range(16))
        orders.append(tuple(y[:16]))
    assert orders[0] == tuple(range(16))
    assert len(set(orders)) == 4 and orders[2] == orders[4]


def test_as_many_blocks_are_resident_as_the_device_holds(engine: planted.Planted) -> None:
    block = (32, 1, 1)
    engine.engine.configure(sms=3, blocks_per_sm=2)
    assert engine.probe("together", grid=(6, 1, 1), block=block)[:6] == [1] * 6
    with pytest.raises(planted.LaunchError, match="every thread spins"):
        engine.probe("together", grid=(7, 1, 1), block=block)
    engine.engine.configure(sms=3, blocks_per_sm=2, resident=7)
    assert engine.probe("together", grid=(7, 1, 1), block=block)[:7] == [1] * 7
    with pytest.raises(planted.LaunchError, match="every thread spins"):
        engine.probe("together", grid=(8, 1, 1), block=block)
    engine.engine.configure(sms=3, blocks_per_sm=2, resident=1)
    assert engine.probe("together", grid=(6, 1, 1), block=block, cooperative=True)[:6] == [1] * 6
    with pytest.raises(planted.LaunchError, match="cudaErrorCooperativeLaunchTooLarge"):
        engine.probe("together", grid=(7, 1, 1), block=block, cooperative=True)


def test_shared_memory_and_threads_limit_how_many_are_resident(engine: planted.Planted) -> None:
    engine.engine.configure(sms=1, blocks_per_sm=32)
    for block, shared, fit in (((1024, 1, 1), 0, 2), ((32, 1, 1), 75 << 10, 3)):
        shape = {"block": block, "shared": shared, "asked": shared, "cooperative": True}
        assert engine.probe("together", grid=(fit, 1, 1), **shape)[:fit] == [1] * fit
        with pytest.raises(planted.LaunchError, match="cudaErrorCooperativeLaunchTooLarge"):
            engine.probe("together", grid=(fit + 1, 1, 1), **shape)


@pytest.mark.parametrize(
    "shape, error",
    [
        ({"block": (1025, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (32, 33, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (0, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (0, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (1, 65536, 1)}, "cudaErrorInvalidConfiguration"),
        ({"shared": (48 << 10) + 1}, "cudaErrorInvalidValue"),  # without asking
        ({"shared": 64 << 10, "asked": 60 << 10}, "cudaErrorInvalidValue"),
        ({"asked": (227 << 10) + 1}, "cudaErrorInvalidValue"),
    ],
)
def test_impossible_launches_are_refused(engine: planted.Planted, shape: dict, error: str) -> None:
    with pytest.raises(planted.LaunchError, match=error):
        engine.probe("halves", **shape)


def test_the_most_shared_memory_can_be_asked_for(engine: planted.Planted) -> None:
    most = 227 << 10
    assert math.isnan(engine.probe("fresh_shared", shared=most, asked=most)[0])


# planted faults

RACES = (
    *("missing_barrier", "missing_barrier_before_reuse", "relaxed_arrival", "relaxed_wait"),
    *("missing_fence", "missing_barrier_before_arrival", "missing_arrival", "counter_not_atomic"),
)
OVERFLOWS = {
    **dict.fromkeys(("global_read", "global_read_before", "shared_read", "dynamic_read"), "READ"),
    **dict.fromkeys(("global_write", "shared_write", "dynamic_write"), "WRITE"),
}
REPORTED = {
    "shuffle_outside_mask": "a shuffle reads lane",
    "shuffle_without_itself": "a lane is not in its own mask",
    "shuffle_with_the_gone": "or has returned",
    "warp_diverges": "lanes of one mask meet in different warp operations",
    "barrier_diverges": "a block meets in different barriers",
    "barrier_of_a_part": "part of it has returned",
    "barrier_against_warp": "deadlock",
    "spin_without_release": "every thread spins",
    "grid_barrier": "every thread spins",
    "order_by_index": "every thread spins",
}
LINES = planted.marked()


def run(kind: str, health: str, seeds: str, *names: str) -> subprocess.CompletedProcess[str]:
    """The faults in a process of their own: a sanitizer ends it."""
    command = [sys.executable, "-m", "tests.emulation.planted", kind, health, seeds, *names]
    return subprocess.run(
        command, cwd=build.ROOT, env=sanitize.environment(kind), capture_output=True, text=True
    )


def place(name: str) -> str:
    return f"faults.cu:{LINES[name]}"


def test_every_planted_fault_is_in_a_test() -> None:
    assert {*RACES, *OVERFLOWS, *REPORTED, "misaligned"} == LINES.keys()


@pytest.mark.parametrize("name", REPORTED)
def test_the_engine_reports(engine: planted.Planted, name: str) -> None:
    reports = []
    for seed in SEEDS:
        engine.engine.configure(seed=seed)
        try:
            engine.fault(name, broken=True)
        except planted.LaunchError as error:
            reports.append(str(error))
    assert reports and all(REPORTED[name] in r and place(name) in r for r in reports), reports
    # blocks that happen to start in order of their index hide it: one schedule would not do
    assert len(reports) >= len(SEEDS) - (name == "order_by_index")


@pytest.mark.parametrize("name", ["missing_barrier", "missing_barrier_before_reuse"])
def test_some_schedule_shows_a_missing_barrier(engine: planted.Planted, name: str) -> None:
    results = {True: set(), False: set()}
    for seed in SEEDS:
        engine.engine.configure(seed=seed)
        for broken, found in results.items():
            found.add(tuple(map(str, engine.fault(name, broken))))
    assert len(results[False]) == 1
    assert not results[True] <= results[False]


def test_a_launch_after_a_report_is_sound(engine: planted.Planted) -> None:
    with pytest.raises(planted.LaunchError, match="different barriers"):
        engine.fault("barrier_diverges", broken=True)
    assert engine.fault("barrier_diverges", broken=False) == [1] * 64


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_reports(engine: planted.Planted, name: str) -> None:
    for seed in ("0", "3"):
        result = run("tsan", "broken", seed, name)
        assert result.returncode == 66, result.stdout + result.stderr
        assert "WARNING: ThreadSanitizer: data race" in result.stderr
        assert place(name) in result.stderr, result.stderr


@pytest.mark.parametrize("name", OVERFLOWS)
def test_address_sanitizer_reports(engine: planted.Planted, name: str) -> None:
    result = run("asan", "broken", "0", name)
    assert result.returncode != 0
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr
    assert re.search(rf"^{OVERFLOWS[name]} of size 4", result.stderr, re.MULTILINE)
    assert re.search(rf"#0 .* in {name} .*{re.escape(place(name))}", result.stderr)


def test_undefined_behaviour_sanitizer_reports(engine: planted.Planted) -> None:
    result = run("asan", "broken", "0", "misaligned")
    assert result.returncode != 0
    assert re.search(rf"{place('misaligned')}:\d+: runtime error: .*misaligned", result.stderr)


@pytest.mark.parametrize("kind", build.KINDS)
def test_nothing_is_said_of_the_healthy(engine: planted.Planted, kind: str) -> None:
    result = run(kind, "healthy", ",".join(map(str, SEEDS)), *LINES)
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == len(SEEDS) * len(LINES)


# the kernels


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_nothing_is_said_of_the_kernels(engine: planted.Planted, kind: str) -> None:
    result = sanitize.sanitize(kind, seeds=[2], only=[])
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^seed 2: [1-9]\d* cases", result.stdout, re.MULTILINE)
