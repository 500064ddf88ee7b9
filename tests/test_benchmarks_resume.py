"""A run in parts: `run --resume` goes on with a file, and `--prepare` compiles ahead of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import command, prepare, resume, runner, schema
from benchmarks.__main__ import main, parser
from benchmarks.calls import Call
from benchmarks.candidates import Changes
from benchmarks.environment import environment
from benchmarks.jobs import Job, ModelJob, OpJob
from benchmarks.measure import blank
from benchmarks.ops import Tensors
from benchmarks.problems import TRAINING, Problem
from benchmarks.providers import PROVIDERS, Ours
from benchmarks.tune import TuneJob
from benchmarks.zoo import MODELS

GELU, SILU = (
    Problem("activation", name, (256,), "flat", "float32", TRAINING) for name in ("gelu", "silu")
)
SMALL = ["--suite", "host", "--device", "cpu", "--op", "activation", "--variant", "gelu"]
SMALL += ["--providers", "torch", "--budget", "300"]
MODEL = next(iter(MODELS))
CLEAN = "0123456789abcdef"


# a file that goes on


def test_what_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTNORM_COMMIT", CLEAN)
    out = tmp_path / "r.json"
    assert main(["run", *SMALL, "--out", str(out), "--note", "a fan was on"]) == 0
    first = schema.load(out)
    modes = ["host", "host-backward", "forward", "backward"]
    assert [row.mode for row in first.rows] == modes
    schema.save(replace(first, rows=first.rows[:2]), out)
    capsys.readouterr()
    assert main(["run", *SMALL, "--resume", str(out)]) == 0
    second = schema.load(out)
    assert second.rows[0] == first.rows[0]  # to the last digit
    assert [row.key for row in second.rows] == [row.key for row in first.rows]
    before, _, since = second.environment.note.partition("; continued ")
    assert before == "a fan was on" and "when a copy moved " in since
    assert f"{out} has 2 rows: 1 jobs are done" in capsys.readouterr().out

    def nothing(*_: object) -> None:
        raise AssertionError("everything is there")

    monkeypatch.setattr(runner, "Worker", nothing)
    assert main(["run", *SMALL, "--resume", str(out)]) == 0
    assert schema.load(out) == second


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("commit", "fedcba", f"is of commit fedcba, and this is {CLEAN}"),
        ("torch", "1.0", "is of torch 1.0, and this is "),
        ("device", "a lamp", "is of device a lamp, and this is CPU"),
        ("peers", {"apex": "1"}, "is of peers {'apex': '1'}, and this is {"),
        ("dirty", True, "was measured with files that differ from commit 0123456789"),
    ],
)
def test_a_file_of_another_state_is_refused(
    field: str, value: object, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("FASTNORM_COMMIT", CLEAN)
    out = tmp_path / "r.json"
    there = replace(environment("cpu", 1.0), **{field: value})  # type: ignore[arg-type]
    schema.save(schema.Results(there), out)
    before = out.read_bytes()
    assert main(["run", *SMALL, "--resume", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert out.read_bytes() == before


def test_files_that_differ_now_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTNORM_COMMIT", CLEAN)
    out = tmp_path / "r.json"
    assert main(["run", *SMALL, "--resume", str(out)]) == 2
    assert "error: --resume: [Errno 2] No such file" in capsys.readouterr().err
    schema.save(schema.Results(environment("cpu", 1.0)), out)
    monkeypatch.setenv("FASTNORM_COMMIT", f"{CLEAN}-dirty")
    assert main(["run", *SMALL, "--resume", str(out)]) == 2
    assert "this is with files that differ from commit 0123456789" in capsys.readouterr().err


def test_the_rest_of_a_job_is_its_other_mode() -> None:
    jobs: list[Job] = [OpJob(p, name) for p in (GELU, SILU) for name in ("torch", "fastnorm")]
    jobs.append(ModelJob(MODEL, "torch", "cpu"))
    rows = [
        blank(GELU, "forward", "torch"),
        blank(SILU, "forward", "torch"),
        blank(SILU, "backward", "torch"),
        blank(GELU, "forward", "fastnorm", "its process died: signal 9", ok=False),
    ]
    assert resume.remaining(jobs, rows) == [
        OpJob(replace(GELU, modes=("backward",)), "torch"),
        OpJob(SILU, "fastnorm"),
        jobs[-1],
    ]
    assert resume.remaining(jobs, [jobs[-1].failed("no memory")]) == jobs[:-1]


def test_who_is_missing_is_not_asked_again() -> None:
    jobs = [OpJob(p, name) for p in (GELU, SILU) for name in ("torch", "fastnorm-cuda")]
    rows = [blank(GELU, "forward", "fastnorm-cuda", "missing: no nvcc", ok=False)]
    assert {job.provider_name for job in resume.remaining(jobs, rows)} == {"torch"}


def test_a_layout_and_a_variant() -> None:
    options = ["--suite", "ops", "models", "--op", "batch_norm"]
    options += ["--layout", "nhwc,rows", "--variant", "relu", "plain"]
    jobs = command.jobs_of(parser().parse_args(["run", *options]), "cuda")
    problems = [job.problem for job in jobs if isinstance(job, OpJob)]
    assert len(problems) == len(jobs)  # no model
    assert {p.layout for p in problems} == {"nhwc", "rows"}
    assert {p.variant for p in problems} == {"relu", "plain"}


# compiling ahead


@dataclass(frozen=True)
class Noting(Ours):
    """Leaves a file in a folder when it runs."""

    folder: str = ""

    def missing(self, device: str) -> str | None:
        return None

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        if problem.variant == "selu":
            os._exit(3)
        if problem.variant == "gelu_tanh":
            raise RuntimeError("out of memory")
        if problem.variant == "swish":
            time.sleep(100)
        Path(self.folder, f"{problem.variant} {self.name} {os.getpid()}").touch()
        return PROVIDERS["torch"].bind(problem, tensors)


def of(variant: str, folder: Path, name: str = "first") -> OpJob:
    return OpJob(replace(GELU, variant=variant), Noting(name, folder=str(folder)))


def test_several_processes_run_every_job_once(tmp_path: Path) -> None:
    jobs = [
        of("gelu", tmp_path), of("selu", tmp_path), of("gelu", tmp_path, "second"),
        of("gelu_tanh", tmp_path), of("silu", tmp_path), OpJob(GELU, "torch"),
    ]  # fmt: skip
    # problems in turn: gelu and gelu_tanh, selu and silu; and the end of one costs its own process
    found = prepare.prepare(jobs, "cpu", 60.0, processes=2)
    assert found == prepare.Prepared(ran=2, failed=1, left=2)
    noted = sorted(path.name.split() for path in tmp_path.iterdir())
    assert [note[:2] for note in noted] == [["gelu", "first"], ["gelu", "second"]]
    assert noted[0][2] == noted[1][2] != str(os.getpid())


def test_it_ends_with_its_time(tmp_path: Path) -> None:
    began = time.monotonic()
    found = prepare.prepare([of("swish", tmp_path), of("gelu", tmp_path)], "cpu", 0.5, processes=1)
    assert found == prepare.Prepared(ran=0, failed=0, left=2)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("memory, most", [(80 << 30, 12), (24 << 30, 6), (2 << 30, 1)])
def test_a_small_device_has_fewer_processes(
    memory: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert prepare._processes("cuda") == most


def test_only_what_compiles_is_prepared() -> None:
    names = [n for n, p in PROVIDERS.items() if prepare.compiles(OpJob(GELU, p))]
    assert names == ["fastnorm", "fastnorm-triton", "liger-kernel", "torch.compile"]
    changes: Changes = (("BLOCK_BYTES", 4096),)
    assert prepare.compiles(TuneJob(GELU, "triton", changes))
    assert not prepare.compiles(TuneJob(GELU, "cuda", ()))
    assert not prepare.compiles(ModelJob(MODEL, "torch.compile", "cpu"))


def test_a_run_prepares_within_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[float] = []

    def prepared(jobs: object, device: str, seconds: float) -> prepare.Prepared:
        given.append(seconds)
        time.sleep(0.2)
        return prepare.Prepared(1, 0, 0)

    def measured(jobs: object, device: str, budget: float, *_: object) -> list[Job]:
        given.append(budget)
        return []

    monkeypatch.setattr(command, "prepare", prepared)
    monkeypatch.setattr(runner, "run", measured)
    jobs = [OpJob(GELU, "torch")]
    assert command.measured(jobs, "cpu", 5.0, tmp_path / "r.json", "", 9.0) == (0, [])
    assert given[0] == 5.0 and 0 < given[1] <= 4.8
    assert "compiled ahead in 0 s: 1 ran once, 0 failed, 0 had no time" in capsys.readouterr().out
