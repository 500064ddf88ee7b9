"""The benchmarks' command line, and a run that something goes wrong in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import command, context, measure, runner, schema
from benchmarks.__main__ import main, parser
from benchmarks.calls import Call, Provider
from benchmarks.environment import environment
from benchmarks.jobs import Job, OpJob
from benchmarks.measure import blank
from benchmarks.ops import Tensors
from benchmarks.problems import Problem
from benchmarks.refused import Refused
from benchmarks.schema import Row
from tests.conftest import HAS_TRITON

# the command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--suite", "slow"], "unknown 'slow': choose from quick, ops, models"),
        (["run", "--op", "group_norm"], "unknown 'group_norm': choose from batch_norm"),
        (["run", "--providers", "torch,apexx"], "unknown 'apexx': choose from torch, fastnorm"),
        (["run", "--dtype", "int8"], "unknown 'int8': choose from float32"),
        (["run", "--budget", "-1"], "is not a positive number of seconds"),
        (["tune", "--op", "group_norm", "--shape", "4"], "choose from"),
        (["walk"], "choose from"),
    ],
)
def test_an_unknown_name_lists_the_choices(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_results_file_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    out.write_text("mine")
    assert main(["run", "--device", "cpu", "--out", str(out)]) == 2
    assert "exists: a measurement is never overwritten" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_nothing_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--suite", "rule", "--device", "cpu", "--op", "mean_only_batch_norm"]
    assert main([*arguments, "--out", str(tmp_path / "r.json")]) == 2
    assert "it has activation in bfloat16, batch_norm in bfloat16" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--device", "cuda", "--out", str(tmp_path / "r.json")]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_some_of_the_models() -> None:
    options = ["run", "--suite", "models", "--model", "resnet50,bert_base", "--providers", "torch"]
    jobs = command.jobs_of(parser().parse_args(options), "cpu")
    assert [str(job) for job in jobs] == ["model resnet50 torch", "model bert_base torch"]
    with pytest.raises(Refused, match="--model chooses among those of --suite models"):
        command.jobs_of(parser().parse_args(["run", "--suite", "ops", *options[3:]]), "cpu")


def test_jobs_of_the_filters() -> None:
    options = ["--op", "layer_norm", "weight_norm", "--providers", "torch,fastnorm"]
    jobs = command.jobs_of(parser().parse_args(["run", *options]), "cpu")
    assert {job.family for job in jobs} == {"layer_norm", "weight_norm"}
    assert {job.provider_name for job in jobs} == {"torch", "fastnorm"}


@pytest.mark.parametrize("dirty", [True, False])
def test_keep(dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNORM_COMMIT", "0123456789abcdef" + "-dirty" * dirty)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(Worker, "script", [None] * 2, raising=False)
    monkeypatch.setattr(runner, "Worker", Worker)
    arguments = ["--op", "weight_norm", "--device", "cpu", "--providers", "torch"]
    status = main(["run", "--suite", "quick", *arguments, "--keep"])
    found = list(tmp_path.glob("cpu-*/2*-0123456789-weight_norm.json"))
    assert (status, len(found)) == ((2, 0) if dirty else (0, 1))


# a run that something goes wrong in


@dataclass(frozen=True)
class Crashing(Provider):
    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        os._exit(3)


@dataclass(frozen=True)
class Raising(Provider):
    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        raise ValueError("no such kernel\nand a trace that nobody wants in a table")


@dataclass(frozen=True)
class Absent(Provider):
    def missing(self, device: str) -> str | None:
        return "it is on holiday"


def test_a_provider_that_fails_costs_one_row(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    problems = [
        Problem("activation", name, (256,), "flat", "float32", ("forward",))
        for name in ("gelu", "silu")
    ]
    given = ["torch", Crashing("crashing"), Raising("raising"), Absent("absent"), "fastnorm"]
    jobs = [OpJob(problem, provider) for problem in problems for provider in given]
    assert runner.run(jobs, "cpu", 100.0, out, "a test") == []
    results = schema.load(out)
    assert results.environment.note == "a test"
    assert results.environment.copy_bandwidth_gbs > 0
    found = [(row.variant, row.provider, row.ok) for row in results.rows]
    assert found == [
        ("gelu", "torch", True), ("gelu", "crashing", False), ("gelu", "raising", False),
        ("gelu", "absent", False), ("gelu", "fastnorm", True),
        ("silu", "torch", True), ("silu", "crashing", False), ("silu", "raising", False),
        ("silu", "fastnorm", True),  # who is missing is said once for each op
    ]  # fmt: skip
    notes = {row.provider: row.note for row in results.rows}
    assert notes["crashing"] == "its process died: exit status 3"
    assert notes["raising"] == "ValueError: no such kernel"
    assert notes["absent"] == "missing: it is on holiday"


class Worker:
    """Stands in for the process that measures: what `script` says of each job, in order."""

    script: list[Any]

    def __init__(self, device: str, note: str, quiet: bool) -> None:
        self.environment = environment(device, 1.0, note)
        self.stopped: list[bool] = []

    def rows(self, job: Job, until: float) -> Iterator[tuple[str, Row]]:
        what = self.script.pop(0)
        if isinstance(what, float):
            time.sleep(what)
            what = None
        if what is not None:
            raise what
        yield "row", blank(PROBLEM, "forward", "torch")

    def stop(self, kill: bool = False) -> None:
        self.stopped.append(kill)


PROBLEM = Problem("activation", "gelu", (4,), "flat", "float32")
JOBS = [OpJob(PROBLEM, "torch") for _ in range(4)]


def test_an_interrupted_run_leaves_a_valid_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "script", [None, None, KeyboardInterrupt()], raising=False)
    monkeypatch.setattr(runner, "Worker", Worker)
    out = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        runner.run(JOBS, "cpu", 100.0, out)
    assert len(schema.load(out).rows) == 2


def test_a_run_ends_with_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "script", [None, 0.2], raising=False)
    monkeypatch.setattr(runner, "Worker", Worker)
    out = tmp_path / "r.json"
    assert runner.run(JOBS, "cpu", 0.1, out) == JOBS[2:]
    assert len(schema.load(out).rows) == 2


def test_a_job_that_the_budget_cuts_off_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [None, runner.OutOfTime(), None, None]
    monkeypatch.setattr(Worker, "script", script, raising=False)
    monkeypatch.setattr(runner, "Worker", Worker)
    out = tmp_path / "r.json"
    assert runner.run(JOBS, "cpu", 100.0, out) == [JOBS[1]]
    assert [row.ok for row in schema.load(out).rows] == [True] * 3


def test_a_provider_whose_process_dies_twice_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = runner.WorkerDied("the job took longer than its limit and was ended")
    monkeypatch.setattr(Worker, "script", [died, died, None, None], raising=False)
    monkeypatch.setattr(runner, "Worker", Worker)
    out = tmp_path / "r.json"
    others = [
        OpJob(PROBLEM, "fastnorm"),
        OpJob(Problem("layer_norm", "plain", (4, 4), "rows", "float32"), "torch"),
    ]
    assert runner.run([*JOBS, *others], "cpu", 100.0, out) == []
    assert [(row.ok, row.note) for row in schema.load(out).rows] == [
        *[(False, str(died))] * 2,
        (False, "left out: its process died 2 times in this family"),  # said once, for two jobs
        *[(True, "")] * 2,
    ]


@dataclass(frozen=True)
class Told(Raising):
    """An error in our extension's words, and in those of torch."""

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        raise RuntimeError(
            "batch_norm_backward failed: misaligned address (cudaErrorMisalignedAddress)"
            if problem.variant == "gelu"
            else "CUDA error: out of memory"
        )


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("variant", ["gelu", "silu"])
def test_a_dead_context_ends_the_process_whatever_the_error_says(
    variant: str, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "dead_context", lambda: "misaligned address" * dead)
    bench, problem = measure.Bench("cpu"), Problem("activation", variant, (4,), "flat", "float32")
    bench.stage(problem)
    # a device that is gone gives no memory back: that would hide the error
    monkeypatch.setattr(bench, "forget", lambda: pytest.fail("asked of it") if dead else None)
    rows = bench.rows(problem, Told("told"))
    row = next(rows)
    assert not row.ok and row.note.startswith("RuntimeError: ")
    with pytest.raises(RuntimeError if dead else StopIteration):
        next(rows)


@pytest.mark.parametrize(
    "initialized, errors, dead",
    [
        (False, ["never asked"], ""),
        (True, [], ""),
        (True, ["of a launch that is over"], ""),
        (True, ["an illegal memory access\nand advice", "the same\nand advice"], "the same"),
    ],
)
def test_a_context_is_dead_where_the_error_stays(
    initialized: bool, errors: list[str], dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        if errors:
            raise RuntimeError(errors.pop(0))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert context.dead_context() == dead


COMMANDS = {
    "run": ["run"],
    "tune": ["tune", "--op", "activation", "--shape", "64"],
    "probe": ["probe", "--only", "segments"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_process_that_cannot_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "tune" and not HAS_TRITON:
        pytest.skip("what is tuned on a CPU are Triton's kernels")

    def start(*_: object) -> None:
        raise runner.WorkerDied("its process died: exit status 1")

    monkeypatch.setattr(runner, "Worker", start)
    out = tmp_path / "r.json"
    assert main([*COMMANDS[name], "--device", "cpu", "--out", str(out)]) == 1
    assert "could not start: its process died: exit status 1" in capsys.readouterr().err
    assert not out.exists()
