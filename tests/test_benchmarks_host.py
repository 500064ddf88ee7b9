"""Host time in the benchmarks: layers in the place of functions, backward, and where it goes."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import host_profile, kernels, layers, measure, suites, timing
from benchmarks.child import Child, Ended, Helper, Late
from benchmarks.host_profile import summarised
from benchmarks.measure import Bench, Stage
from benchmarks.ops import OPS
from benchmarks.problems import GRAPH, HOST, STEP, STEPS, TRAINING, Problem
from benchmarks.providers import PROVIDERS
from benchmarks.report.markdown import markdown
from benchmarks.report.page import page
from benchmarks.report.tables import tables
from benchmarks.report.terminal import terminal
from benchmarks.schema import Results, Row
from tests import made_up

SMALL = [suites._of_size(*layer, 1 << 10, "float32", HOST, 0) for layer in suites.LAYERS]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.host_time, "__defaults__", (20, None))
    monkeypatch.setattr(host_profile.profiled, "__defaults__", (None, 20))


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: f"{p.op}-{p.variant}")
def test_rows_of_every_layer(problem: Problem, quick: None) -> None:
    """Its results are checked, running statistics among them, on the tensors of the problem."""
    bench = Bench("cpu")
    for provider in ("torch", "fastnorm"):
        rows = list(bench.rows(problem, PROVIDERS[provider]))
        assert [row.mode for row in rows] == list(HOST), rows[0].note
        for row in rows:
            assert row.ok and row.ms_median is not None and row.ms_median > 0
            assert row.floor_bytes is None
            assert row.error is not None and row.error < 1e-5
            assert row.note.startswith("profile: ") == (provider == "fastnorm")


def test_every_layer_is_a_module_where_there_is_one() -> None:
    without = {
        (p.op, p.variant) for p in SMALL if p.op != "weight_norm" and layers._layers(p)[0] is None
    }
    assert without == {
        ("mean_only_batch_norm", "plain"), ("activation", "gelu_sigmoid"), ("activation", "swish"),
    }  # fmt: skip
    for problem in SMALL:
        tensors = OPS[problem.op].tensors(problem, "cpu")
        assert layers.wanted(problem)
        assert not layers.wanted(replace(problem, modes=TRAINING))
        call = layers.bind(problem, tensors, ours=True)
        assert set(call.names) == {f"d{name}" for name, t in tensors.items() if t.requires_grad}


def test_what_comes_before_a_call_is_not_timed() -> None:
    given: list[int] = []

    def before() -> int:
        time.sleep(2e-3)
        return 7

    found = timing.host_time(given.append, "cpu", 30, before)
    assert given == [7] * 33  # and a tenth to warm up
    assert found.median < 1.0


def test_a_slow_call_is_not_timed_thousands_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "HOST_S", 1e-3)
    calls = iter(range(1000))
    timing.host_time(lambda: time.sleep(1e-4) or next(calls), "cpu", 400)
    assert next(calls) == 40 + timing.DRAIN


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        found = dy
        for _ in range(2000):
            found = found + 0
        return found


def test_a_profile_sees_the_backward_by_itself() -> None:
    x = torch.ones(3, requires_grad=True)
    told = host_profile.profiled(
        lambda y: torch.autograd.grad(y.sum(), x), "cpu", lambda: Slow.apply(x), 5
    )
    assert told.startswith("profile: ")
    first = told.split(", ")[1]
    assert first.startswith("tests/test_benchmarks_host.backward "), told
    assert "forward" not in told


def test_a_profile_in_words() -> None:
    own = {
        ("/a/fastnorm/dispatch.py", 10, "way"): 3e-3,
        ("/a/fastnorm/ops/batch_norm/__init__.py", 9, "served"): 2e-3,
        ("~", 0, "<built-in method torch.empty_like>"): 4e-3,
        ("~", 0, "<method 'x; y' of 'z' objects>"): 1e-3,
    }
    assert summarised(own, 1000) == (
        "profile: 10.0 us a call, torch.empty_like 40%, fastnorm/dispatch.way 30%, "
        "batch_norm.served 20%, method 'x, y' of 'z' objects 10%"
    )
    many = own | {("~", i, f"<built-in method f{i}>"): 0.1e-3 for i in range(10)}
    assert summarised(many, 1000).endswith(", 6 others 5%")
    assert summarised({}, 1) == "profile: nothing was seen"
    assert host_profile.read(summarised(own, 1000)) == summarised(own, 1000)[len("profile: ") :]
    assert host_profile.read("1 kernel, 2.0 us") is None


# the wall clock


def test_steps_in_a_row_and_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("activation", "gelu", (64,), "flat", "float32", (STEP, STEPS, GRAPH))
    given: list[tuple[str, int]] = []
    step_time = timing.step_time

    def timed(step: Any, device: str, runs: int, warmup: int, row: int = 1) -> timing.Timing:
        given.append((getattr(step, "__name__", "step"), row))
        return step_time(step, device, runs, warmup, row)

    def replay() -> None:
        pass

    monkeypatch.setattr(timing, "step_time", timed)
    monkeypatch.setattr(timing, "graph_of", lambda step: replay)
    rows = list(Bench("cpu").rows(problem, PROVIDERS["torch"]))
    assert [(row.mode, row.ok) for row in rows] == [(m, True) for m in problem.modes]
    assert given == [("step", 1), ("step", measure.IN_A_ROW), ("replay", 1)]
    calls = iter(range(100))
    found = step_time(lambda: time.sleep(1e-3) or next(calls), "cpu", 3, 1, 4)
    assert next(calls) == 13
    assert 1.0 <= found.median < 2.5  # of one of them


def test_graphs_are_not_asked_of_a_cpu_nor_of_who_compiles() -> None:
    for device, there in (("cuda", True), ("cpu", False)):
        modes = {m for p in suites.problems(["ops"], device) for m in p.modes}
        assert (GRAPH in modes) == there
    (problem,) = (
        p
        for p in suites.problems(["ops"], "cuda")
        if p.variant == "hifigan" and p.dtype == "bfloat16"
    )
    assert problem.modes == (*TRAINING, STEP, GRAPH)
    for name, provider in PROVIDERS.items():
        served = [m for m in problem.modes if provider.serves(problem, m)]
        if name == "torch.compile":
            assert served == [*TRAINING, STEP]
        elif "fastnorm" in name or name == "torch":
            assert served == [*problem.modes]


def test_weights_in_bf16_are_right() -> None:
    for variant, shape in (("dim2", (12, 6, 8)), ("dim0", (6, 40)), ("hifigan", (1,))):
        problem = Problem("weight_norm", variant, shape, "flat", "bfloat16")
        stage = Stage(problem, "cpu")
        tensors = stage.fresh()
        assert stage.check(PROVIDERS["fastnorm"].bind(problem, tensors), tensors)[2] == ""


# processes that are asked


def _answers(connection: Connection) -> None:
    while True:
        asked = connection.recv()
        if asked == "die":
            os._exit(3)
        if asked == "wait":
            time.sleep(60)
        connection.send(asked * 2)


def test_a_child_that_dies_or_takes_too_long() -> None:
    child = Child(_answers, (), "a child of a test")
    child.send(4)
    assert child.receive(60) == 8
    child.send("die")
    with pytest.raises(Ended, match="its process died: exit status 3"):
        child.receive(60)
    assert not child.alive
    helper = Helper(_answers, (), "a helper of a test", 30, again=True)
    assert helper.asked(3) == 6
    with pytest.raises(Ended):
        helper.asked("die")
    assert helper.asked(5) == 10  # another one
    helper._limit_s = 0.1
    with pytest.raises(Late):
        helper.asked("wait")
    assert helper._child is None
    helper.stop()
    counter = kernels.Counter("cpu", 0)
    assert not counter._again


def test_profiles_are_in_the_report_and_not_in_the_terminal() -> None:
    row = Row("activation", "silu", "host", [64], "flat", "float32", "fastnorm-cuda", 6e-3)
    row.note = "a peer; profile: 10.0 us a call, way 40%; 1 kernel, 2.0 us"
    run = made_up.run_of(Results(made_up.GPU, [row]))
    (one,) = tables(run)
    assert one.notes[0] == "fastnorm-cuda: a peer (1 row)"
    where = "activation silu host, 64, flat, float32"
    assert one.profiles == [f"{where}: fastnorm-cuda 10.0 us a call, way 40%"]
    for text in (markdown(run), page([(run, [])])):
        assert one.profiles[0] in text
    assert one.profiles[0] not in terminal(run)
    assert "where the host's time goes: in report.md" in terminal(run)
