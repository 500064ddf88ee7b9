"""`python -m benchmarks tune`: the candidates of one op on one shape, timed against its floor, so
that a closed rule can be read off the data. The library itself does not tune."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastnorm
from benchmarks import runner, schema
from benchmarks.candidates import AS_IT_IS, Changes, applied, candidates, knobs, label
from benchmarks.command import INTERRUPTED
from benchmarks.jobs import SLOW_S, Job
from benchmarks.measure import Bench, blank
from benchmarks.ops import OPS
from benchmarks.problems import DTYPES, TRAINING, Problem
from benchmarks.providers import Ours
from benchmarks.refused import Refused, device_of
from benchmarks.schema import Environment, Row

TUNING = Path(__file__).parent / "tuning"
BACKENDS = ("cuda", "triton")
GPU_BUDGET, CPU_BUDGET = 240.0, 20.0
INTERPRETED = 1 << 16  # elements: a program takes the interpreter about 5 ms


@dataclass(frozen=True)
class Candidate(Ours):
    """One of our backends with some of its constants changed."""

    problem: Problem | None = None
    changes: Changes = ()

    def missing(self, device: str) -> str | None:
        return fastnorm.backends()[self.backend]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        assert self.problem is not None
        with super().active(), applied(knobs(self.problem, self.backend), self.changes):
            yield


@dataclass(frozen=True)
class TuneJob:
    """One candidate in one mode."""

    problem: Problem
    backend: str
    changes: Changes

    limit_s = SLOW_S
    rank = 0.0

    @property
    def provider_name(self) -> str:
        return label(knobs(self.problem, self.backend), self.changes)

    @property
    def family(self) -> str:
        return self.problem.op

    @property
    def provider(self) -> Candidate:
        return Candidate(
            self.provider_name, backend=self.backend, problem=self.problem, changes=self.changes
        )

    def missing(self, device: str) -> str | None:
        return self.provider.missing(device)

    def rows(self, bench: Bench) -> Iterator[Row]:
        return bench.rows(self.problem, self.provider)

    def failed(self, note: str) -> Row:
        return blank(self.problem, self.problem.modes[0], self.provider_name, note, ok=False)

    def __str__(self) -> str:
        return f"{self.problem.modes[0]}, {self.provider_name}"


def shape_of(given: str) -> tuple[int, ...]:
    """A type for argparse: sizes with x or commas between them."""
    sizes = re.split(r"[x,]", given)
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{given!r} is no shape: write 256x64x112x112")
    return tuple(int(size) for size in sizes)


def problem_of(chosen: argparse.Namespace) -> Problem:
    """The problem that was asked for; Refused, with the choices, where the op has none such."""
    op = OPS[chosen.op]
    variant, layout = chosen.variant or op.variants[0], chosen.layout or op.layouts[0]
    for what, value, choices in (
        ("variant", variant, op.variants),
        ("layout", layout, op.layouts),
    ):
        if value not in choices:
            raise Refused(
                f"{chosen.op} has no {what} {value!r}: choose one of {', '.join(choices)}"
            )
    problem = Problem(chosen.op, variant, chosen.shape, layout, chosen.dtype, tuple(chosen.mode))
    try:
        op.tensors(replace(problem, shape=tuple(min(n, 4) for n in problem.shape)), "cpu")
    except (IndexError, RuntimeError, ValueError) as error:
        raise Refused(f"{chosen.shape} is no shape of {chosen.op} in {layout}: {error}") from None
    return problem


def _backend(asked: str | None, device: str) -> str:
    """The backend to tune; Refused, with the reason, where this machine does not have it."""
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    missing = fastnorm.backends()
    here = [name for name in BACKENDS if missing[name] is None]
    if device == "cpu" and asked == "cuda":
        raise Refused("the CUDA kernels run on a GPU: --backend triton interprets Triton's here")
    name = asked or ("triton" if device == "cpu" or not here else here[0])
    if missing[name] is not None:
        raise Refused(f"backend {name} cannot be tuned here: {missing[name]}")
    return name


def _jobs(problem: Problem, backend: str) -> list[Job]:
    """The candidates of every mode, those that change little first."""
    chosen = knobs(problem, backend)
    for knob in chosen:
        obstacle = knob.obstacle()
        if obstacle is not None:
            print(f"{knob.name} stays as it is: {obstacle}")
    if not any(knob.obstacle() is None for knob in chosen):
        print(f"nothing of {problem.op} on {backend} can be turned: only what it does now is timed")
    jobs: list[Job] = [
        TuneJob(replace(problem, modes=(mode,)), backend, changes)
        for mode in problem.modes
        for changes in candidates(chosen, mode)
    ]
    return sorted(jobs, key=lambda job: len(job.changes) if isinstance(job, TuneJob) else 0)


def _name(problem: Problem, backend: str) -> str:
    """A file name that no other measurement has."""
    what = re.sub("[^a-z0-9_]+", "-", str(problem))
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{what}-{backend}-{now:%Y%m%d-%H%M%S}.json"


def table(rows: list[Row], environment: Environment) -> str:
    """The candidates of each mode, the fastest first, beside the floor."""
    lines = []
    for mode in dict.fromkeys(row.mode for row in rows):
        timed = [row for row in rows if row.mode == mode and row.ms_median is not None]
        found = sorted(timed, key=lambda row: row.ms_median or math.inf)
        before = next((row.ms_median for row in found if row.provider == AS_IT_IS), None)
        lines.append(f"{mode} on {environment.device}")
        lines.append(f"{'ms':>10} {'of the floor':>13} {'to as it is':>12}  candidate")
        for row in found:
            assert row.ms_median is not None
            share = "" if row.floor_fraction is None else f"{row.floor_fraction:.1%}"
            gain = "" if before is None else f"{before / row.ms_median:.3f}x"
            lines.append(f"{row.ms_median:10.4f} {share:>13} {gain:>12}  {row.provider}")
        lines += [
            f"{'-':>10} {'':>13} {'':>12}  {row.provider}: {row.note}"
            for row in rows
            if row.mode == mode and row.ms_median is None
        ]
    return "\n".join(lines)


def tune(chosen: argparse.Namespace) -> int:
    """Time the candidates; the exit status."""
    try:
        problem = problem_of(chosen)
        device = device_of(chosen.device)
        backend = _backend(chosen.backend, device)
        if device == "cpu" and problem.numel > INTERPRETED:
            raise Refused(f"the interpreter takes shapes of up to {INTERPRETED} elements")
        out = chosen.out or TUNING / _name(problem, backend)
        if out.exists():
            raise Refused(f"{out} exists: a measurement is never overwritten; name another")
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    budget = chosen.budget or (CPU_BUDGET if device == "cpu" else GPU_BUDGET)
    note = f"candidates of the {backend} backend"
    if device == "cpu":
        note += ", interpreted on a CPU: their times say nothing of a GPU"
        print(note)
    try:
        left_out = runner.run(_jobs(problem, backend), device, budget, out, note)
    except KeyboardInterrupt:
        print(f"interrupted: what was measured is in {out}", file=sys.stderr)
        return INTERRUPTED
    results = schema.load(out)
    print(table(results.rows, results.environment))
    if left_out:
        print(f"{len(left_out)} candidates had no time; --budget gives more")
    print(f"the data are in {out}")
    return 0


def register(subparsers: Any, seconds: Any) -> None:
    """Add `tune`; the parsed arguments' `run(arguments)` gives the exit status."""
    made = subparsers.add_parser(
        "tune", help="time the candidates of one op's launch parameters on one shape"
    )
    made.add_argument("--op", required=True, choices=tuple(OPS))
    made.add_argument("--shape", required=True, type=shape_of, metavar="256x64x112x112")
    made.add_argument("--variant", help="default: the op's first, its plain form")
    made.add_argument("--layout", help="default: the op's first")
    made.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    made.add_argument("--mode", nargs="+", default=list(TRAINING), choices=TRAINING)
    made.add_argument("--backend", choices=BACKENDS, help="default: the first that is here")
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    made.add_argument(
        "--budget", type=seconds, metavar="SECONDS",
        help=f"default {GPU_BUDGET:.0f}, on a CPU {CPU_BUDGET:.0f}",
    )  # fmt: skip
    made.add_argument("--out", type=Path, help="default: a new file in benchmarks/tuning/")
    made.set_defaults(run=tune)
