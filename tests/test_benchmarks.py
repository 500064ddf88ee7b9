"""The benchmark suite: what it measures, how it counts bytes, and what it says to bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import fastnorm
from benchmarks import correctness, models, ops, small, suites
from benchmarks.calls import Call, Gradients, Provider
from benchmarks.floors import floor_bytes
from benchmarks.jobs import OpJob, plan
from benchmarks.measure import Bench, Stage
from benchmarks.ops import OPS, Tensors
from benchmarks.peers import Peer
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS
from benchmarks.report.lines import is_compiled
from benchmarks.small import every_kind
from benchmarks.small import main as check_small
from benchmarks.zoo import MODELS
from tests.conftest import DEVICE

# op, variant, shape, layout, dtype, forward, backward: counted by hand, tensor by tensor
HAND_COUNTS = [
    # x -> y, 2 * 205,520,896 elements of 2 bytes; x, dy -> dx
    ("batch_norm", "plain", (256, 64, 112, 112), "nchw", "bfloat16", 822_083_584, 1_233_125_376),
    ("batch_norm", "silu", (2, 3, 5, 7), "nhwc", "float32", 2 * 210 * 4, 3 * 210 * 4),
    # x, residual -> y; x, dy -> dx: the residual's gradient is dy itself
    ("batch_norm", "residual", (8, 16), "rows", "float16", 3 * 128 * 2, 3 * 128 * 2),
    # x, residual -> y; x, residual, dy -> dx, dresidual
    ("batch_norm", "residual+relu", (8, 16), "rows", "float16", 3 * 128 * 2, 5 * 128 * 2),
    # x -> y; dy -> dx
    ("mean_only_batch_norm", "plain", (4, 8, 2, 2), "nchw", "float32", 2 * 512, 2 * 512),
    # x, weight, bias -> y; x, dy, weight -> dx, dweight, dbias
    (
        "layer_norm", "plain", (32, 10), "rows", "bfloat16",
        2 * 320 * 2 + 2 * 20, 3 * 320 * 2 + 3 * 20,
    ),
    ("layer_norm", "last3", (2, 3, 4, 5), "rows", "float32", 960 + 480, 1440 + 720),
    # x, residual, weight, bias -> y, sum; sum, dy, dsum, weight -> dx, dweight, dbias
    ("layer_norm", "residual", (32, 10), "rows", "float32", 5120 + 80, 5120 + 120),
    # v -> w; v, dw -> dv
    ("weight_norm", "dim0", (64, 32), "flat", "float32", 2 * 8192, 3 * 8192),
    # x -> y; x, dy -> dx
    ("activation", "gelu", (1 << 10,), "flat", "bfloat16", 4096, 6144),
    ("activation", "swish", (1 << 10,), "flat", "float32", 8192, 12288),
]  # fmt: skip


@pytest.mark.parametrize("op, variant, shape, layout, dtype, forward, backward", HAND_COUNTS)
def test_floor_against_hand_count(
    op: str, variant: str, shape: tuple[int, ...], layout: str, dtype: str, forward: int,
    backward: int,
) -> None:  # fmt: skip
    problem = Problem(op, variant, shape, layout, dtype)
    assert floor_bytes(problem, "forward") == forward
    assert floor_bytes(problem, "backward") == backward
    assert floor_bytes(problem, "forward+backward") == forward + backward
    assert floor_bytes(problem, "host") is None


def test_every_op_has_a_hand_count() -> None:
    assert {row[0] for row in HAND_COUNTS} == set(OPS)


@pytest.mark.parametrize("problem", every_kind(), ids=str)
def test_ours_computes_what_torch_does(problem: Problem) -> None:
    stage = Stage(problem, "cpu")
    tensors = stage.fresh()
    call = PROVIDERS["fastnorm"].bind(problem, tensors)
    error, torch_error, complaint = stage.check(call, tensors)
    assert complaint == ""
    assert math.isfinite(error)
    assert math.isfinite(torch_error)


def test_a_wrong_result_is_not_timed() -> None:
    problem = Problem("activation", "silu", (64,), "flat", "float32")

    class Wrong(type(PROVIDERS["torch"])):  # type: ignore[misc]
        def bind(self, problem, tensors):  # type: ignore[no-untyped-def]
            return super().bind(replace(problem, variant="gelu"), tensors)

    (row,) = Bench("cpu").rows(problem, Wrong("wrong"))
    assert not row.ok
    assert row.ms_median is None
    assert row.note.startswith("wrong result: ")
    assert row.error is not None
    assert row.error > 0.01


def test_running_statistics_are_checked() -> None:
    problem = Problem("batch_norm", "plain", (4, 3, 2, 2), "nchw", "float32")

    class Forgetful(type(PROVIDERS["torch"])):  # type: ignore[misc]
        def bind(self, problem, tensors):  # type: ignore[no-untyped-def]
            kept = {n: t if t.requires_grad else t.clone() for n, t in tensors.items()}
            return super().bind(problem, kept)

    (row,) = Bench("cpu").rows(problem, Forgetful("forgetful"))
    assert not row.ok
    assert "running_mean" in row.note
    assert "running_var" in row.note


@dataclass(frozen=True)
class Lazy(Provider):
    """torch, but for one result that it keeps to itself."""

    lacks: str = ""

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        call = PROVIDERS["torch"].bind(problem, tensors)
        if self.lacks == "backward":
            return replace(call, backward=None)
        if self.lacks.startswith("y"):
            return replace(call, outputs=lambda result: result[:1])
        kept = [i for i, name in enumerate(call.names) if name != self.lacks]

        def backward(result: Any, dys: tuple[torch.Tensor, ...]) -> Gradients:
            assert call.backward is not None
            gradients = call.backward(result, dys)
            return tuple(gradients[i] for i in kept)

        return replace(call, backward=backward, names=tuple(call.names[i] for i in kept))


@pytest.mark.parametrize("lacks", ["y1", "dresidual", "dweight", "dbias"])
def test_a_result_that_is_not_returned_is_wrong(lacks: str) -> None:
    problem = Problem("layer_norm", "residual", (4, 8), "rows", "float32")
    (row,) = Bench("cpu").rows(problem, Lazy("lazy", lacks=lacks))
    assert (row.ok, row.ms_median, row.error) == (False, None, math.inf)
    assert row.note == f"wrong result: {lacks} was not returned"


def test_a_call_without_backward_owes_no_gradients() -> None:
    problem = Problem("layer_norm", "residual", (4, 8), "rows", "float32")
    stage = Stage(problem, "cpu")
    tensors = stage.fresh()
    error, _, complaint = stage.check(Lazy("", lacks="backward").bind(problem, tensors), tensors)
    assert complaint == ""
    assert error < 1e-6


def test_a_result_of_another_shape_is_wrong() -> None:
    problem = Problem("activation", "gelu", (8,), "flat", "float32")
    stage = Stage(problem, "cpu")
    tensors = stage.fresh()
    call = PROVIDERS["torch"].bind(problem, tensors)
    call = replace(call, outputs=lambda y: torch.cat([y, y]), backward=None)
    assert stage.check(call, tensors)[2].startswith("wrong result: y0: error inf")


def test_oracle_in_parts_is_the_oracle_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for problem in every_kind():
        stage = Stage(problem, "cpu")
        whole = stage.torch_errors
        monkeypatch.setattr(correctness, "PART", problem.numel // 2)
        tensors = stage.fresh()
        oracle = correctness.Oracle(stage.problem, stage.tensors, stage.oracle.dys)
        results = stage.results(PROVIDERS["torch"].bind(stage.problem, tensors), tensors)
        parts = correctness.errors(results, oracle)
        monkeypatch.undo()
        assert parts.keys() == whole.keys()
        for name, error in parts.items():
            assert error == pytest.approx(whole[name], rel=0.3, abs=1e-9), (problem, name)


def test_rows_of_a_problem() -> None:
    problem = Problem("layer_norm", "plain", (64, 32), "rows", "float32")
    bench = Bench("cpu")
    rows = list(bench.rows(problem, PROVIDERS["torch"]))
    assert [row.mode for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row.ok
        assert row.ms_p20 is not None
        assert row.ms_p80 is not None
        assert 0 < row.ms_p20 <= row.ms_median <= row.ms_p80
        assert row.floor_fraction == pytest.approx(
            bench.copies.milliseconds(row.floor_bytes) / row.ms_median
        )
    (host,) = bench.rows(replace(problem, modes=("host",)), PROVIDERS["fastnorm"])
    assert host.mode == "host"
    assert host.floor_bytes is None


@pytest.mark.parametrize("suite", suites.NAMES)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_suites_plan_important_jobs_first(suite: str, device: str) -> None:
    models = MODELS.values() if suite == suites.MODELS else []
    jobs = plan(suites.problems([suite], device), models, PROVIDERS, device)
    assert jobs
    assert [job.rank for job in jobs] == sorted(job.rank for job in jobs)
    for job in jobs:
        if isinstance(job, OpJob):
            assert job.problem.variant in OPS[job.problem.op].variants
            assert job.problem.layout in OPS[job.problem.op].layouts


def test_nobody_compiles_before_the_first_models_and_kernelbench() -> None:
    problems = suites.problems(["ops", "kernelbench"], "cuda")
    given = [MODELS["resnet50"], MODELS["efficientnet_b0"], MODELS["hifigan_v1"]]
    jobs = plan(problems, given, ["torch", "fastnorm", "torch.compile"], "cuda")
    compiled = [i for i, job in enumerate(jobs) if isinstance(job, OpJob) and job.provider.slow]
    kernelbench = set(suites.problems(["kernelbench"], "cuda"))
    early = [
        i
        for i, job in enumerate(jobs)
        if not is_compiled(job.provider_name)
        and (not isinstance(job, OpJob) or job.problem in kernelbench)
    ]
    assert len(early) == 2 * len(kernelbench) + 3 * len(given)
    assert max(early) < compiled[0]
    secondary = [isinstance(job, OpJob) and job.problem.importance >= 1 for job in jobs]
    assert compiled[0] < secondary.index(True), "yet before what matters less"


def test_every_adapter_names_a_problem_that_exists() -> None:
    for provider in PROVIDERS.values():
        if isinstance(provider, Peer):
            for op, variant, _ in provider.adapters:
                assert variant in OPS[op].variants, provider.name


def test_a_peer_that_is_not_installed_says_so() -> None:
    peer = Peer("nobody", package="a_package_that_nobody_has")
    assert peer.missing("cuda") == "nobody is not installed"
    for provider in PROVIDERS.values():
        if isinstance(provider, Peer):
            assert provider.missing("cpu") is not None


def test_hifigan_is_the_generator_of_the_models() -> None:
    shapes = [
        tuple(p.shape)
        for name, p in MODELS["hifigan_v1"].build()[1].named_parameters()
        if name.endswith("original1")
    ]
    assert sorted(shapes) == sorted(ops.HIFIGAN)


def test_check_of_small_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_small(["--backend", "reference", "--device", "cpu", "--op", "weight_norm"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "weight_norm dim0 12x12 flat float32: right" in said
    assert said[-1] == "0 wrong on reference, cpu"


@pytest.mark.parametrize(
    "backend, op", [("triton", "mean_only_batch_norm"), ("cuda", "mean_only_batch_norm")]
)
@pytest.mark.hangs_after(120)  # a compilation for each of the launchers' numbers
def test_check_of_every_way(backend: str, op: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU: Triton's kernels interpreted, the CUDA sources compiled by g++."""
    if (missing := fastnorm.backends()[backend]) is not None:
        pytest.skip(missing)
    ways = (way for way in small.kinds(backend, every_way=True) if way[0].op == op)
    assert small.check(backend, DEVICE, ways, excused=True) == 0
    said = capsys.readouterr().out.splitlines()
    assert any(line.endswith(", as it is: right") for line in said)
    assert sum(line.endswith("right") for line in said) > 1, said


def test_a_generator_is_one_call_of_ours() -> None:
    (problem,) = (p for p in suites.problems(["quick"], "cuda") if p.variant == "hifigan")
    stage = Stage(problem, "cpu")
    tensors = stage.fresh()
    error, _, complaint = stage.check(PROVIDERS["fastnorm"].bind(problem, tensors), tensors)
    assert complaint == ""
    assert error < 1e-6
    (row,) = models.rows(MODELS["hifigan_v1"], "fastnorm", "cpu")
    assert row.ok, row.note
    assert row.note.endswith("weight_norm_ made one call of every weight norm")
