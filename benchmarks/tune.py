"""`python -m benchmarks tune`: the candidates of one op on one shape, or on every shape of a suite,
timed against the floor, so that a closed rule can be read off the data. The library itself does not
tune."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastnorm
from benchmarks import schema, suites
from benchmarks.candidates import Changes, applied, candidates, knobs, label, rules_choice
from benchmarks.command import measured
from benchmarks.jobs import FAST_S, SLOW_S
from benchmarks.measure import Bench, blank
from benchmarks.ops import OPS
from benchmarks.prepare import add_prepare
from benchmarks.problems import DTYPES, TRAINING, Problem
from benchmarks.providers import Ours
from benchmarks.refused import Refused, device_of
from benchmarks.schema import Row
from benchmarks.tuned import RULE, shapes_table, table

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

    rank = 0.0

    @property
    def limit_s(self) -> float:
        return SLOW_S if self.backend == "triton" else FAST_S  # Triton compiles every candidate

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
        """The note says what the closed rule took where it was free to choose."""
        turned = knobs(self.problem, self.backend)
        with rules_choice(k for k in turned if k.name not in dict(self.changes)) as choice:
            for row in bench.rows(self.problem, self.provider):
                if row.ok and choice:
                    taken = RULE + label(turned, tuple(choice.items()))
                    row.note = "; ".join(filter(None, (row.note, taken)))
                yield row

    def failed(self, note: str) -> Row:
        return blank(self.problem, self.problem.modes[0], self.provider_name, note, ok=False)

    def __str__(self) -> str:
        return f"{self.problem}, {self.problem.modes[0]}, {self.provider_name}"


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
    dtype = chosen.dtype or "bfloat16"
    problem = Problem(chosen.op, variant, chosen.shape, layout, dtype, tuple(chosen.mode))
    try:
        op.tensors(replace(problem, shape=tuple(min(n, 4) for n in problem.shape)), "cpu")
    except (IndexError, RuntimeError, ValueError) as error:
        raise Refused(f"{chosen.shape} is no shape of {chosen.op} in {layout}: {error}") from None
    return problem


def problems_of(chosen: argparse.Namespace, device: str) -> list[Problem]:
    """The problem that was asked for, or every one of the suites, in the modes that were asked for:
    the important ones first, and those that differ from one before in the variant alone, or in
    which half type it is, after all others. Refused if none is left."""
    if chosen.shape:
        found = [problem_of(chosen)]
    else:
        every = [p for p in suites.problems(chosen.suite, device) if p.op == chosen.op]
        asked = {n: getattr(chosen, n) for n in ("variant", "layout", "dtype")}
        found = [
            replace(p, modes=tuple(chosen.mode), importance=0)
            for p in every
            if all(value in (None, getattr(p, name)) for name, value in asked.items())
        ]
        found = list(dict.fromkeys(found))  # a suite may have asked for one of the modes only
        first: dict[tuple[object, ...], Problem] = {}
        found.sort(key=lambda p: first.setdefault((p.shape, p.layout, p.itemsize), p) is not p)
        found = found[: len(first)] if chosen.distinct else found
        if not found:
            there = dict.fromkeys(f"{p.variant} {p.layout} {p.dtype}" for p in every)
            raise Refused(
                f"suite {', '.join(chosen.suite)} has no {chosen.op} of that kind on {device}; "
                f"it has {', '.join(there) or 'none at all'}"
            )
    if device != "cpu":
        return found
    small = [problem for problem in found if problem.numel <= INTERPRETED]
    if not small:
        raise Refused(f"the interpreter takes shapes of up to {INTERPRETED} elements")
    if len(small) < len(found):
        print(f"left out, with more than {INTERPRETED} elements: {len(found) - len(small)} shapes")
    return small


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


def plan(problems: Sequence[Problem], backend: str, names: Sequence[str] | None) -> list[TuneJob]:
    """The candidates of every problem and mode: each knob by itself (all of them, or those of these
    names) before two together, so that a short budget sees every problem."""
    op = problems[0].op
    every = dict.fromkeys(knob for problem in problems for knob in knobs(problem, backend))
    unknown = [name for name in names or () if name not in (knob.name for knob in every)]
    if unknown:
        there = ", ".join(knob.name for knob in every) or "none"
        raise Refused(f"{op} on {backend} has no knob {', '.join(unknown)}: it has {there}")
    chosen = [knob for knob in every if not names or knob.name in names]
    for knob in chosen:
        obstacle = knob.obstacle()
        if obstacle is not None:
            print(f"{knob.name} stays as it is: {obstacle}")
    if not any(knob.obstacle() is None for knob in chosen):
        print(f"nothing of {op} on {backend} can be turned: only what it does now is timed")
    jobs = [
        TuneJob(replace(problem, modes=(mode,)), backend, changes)
        for problem in problems
        for mode in problem.modes
        for changes in candidates([k for k in knobs(problem, backend) if k in chosen], mode)
    ]
    return sorted(jobs, key=lambda job: max(1, len(job.changes)))


def new_file(what: str) -> Path:
    """In benchmarks/tuning/, under a name that no other measurement has."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return TUNING / f"{re.sub('[^a-z0-9_]+', '-', what)}-{now:%Y%m%d-%H%M%S}.json"


def tune(chosen: argparse.Namespace) -> int:
    """Time the candidates; the exit status."""
    try:
        device = device_of(chosen.device)
        problems = problems_of(chosen, device)
        backend = _backend(chosen.backend, device)
        jobs = plan(problems, backend, chosen.knob)
        what = str(problems[0]) if chosen.shape else f"{chosen.op} {' '.join(chosen.suite)}"
        out = chosen.out or new_file(f"{what} {backend}")
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
    status, left_out = measured(jobs, device, budget, out, note, chosen.prepare)
    if status:
        return status
    results = schema.load(out)
    shown = table if chosen.shape else shapes_table
    print(shown(results.rows, results.environment))
    if left_out:
        print(f"{len(left_out)} of {len(jobs)} candidates had no time; --budget gives more")
    print(f"the data are in {out}")
    return 0


def register(subparsers: Any, seconds: Any, several: Callable[[Sequence[str]], Any]) -> None:
    """Add `tune`; the parsed arguments' `run(arguments)` gives the exit status."""
    made = subparsers.add_parser("tune", help="time the candidates of one op's launch parameters")
    made.add_argument("--op", required=True, choices=tuple(OPS))
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--shape", type=shape_of, metavar="256x64x112x112")
    where.add_argument(
        "--suite", type=several(tuple(suites.SUITES)), metavar="NAME",
        help=f"every shape of {', '.join(suites.SUITES)}, the important ones first",
    )  # fmt: skip
    made.add_argument("--knob", nargs="+", metavar="NAME", help="turn no other; default: all")
    made.add_argument(
        "--distinct", action="store_true",
        help="of a suite one problem, the most important, of each shape, layout and width of type",
    )  # fmt: skip
    every = "default: of a shape the op's first, of a suite all"
    made.add_argument("--variant", help=every)
    made.add_argument("--layout", help=every)
    made.add_argument(
        "--dtype", choices=tuple(DTYPES), help="default: of a shape bfloat16, of a suite all"
    )
    made.add_argument("--mode", nargs="+", default=list(TRAINING), choices=TRAINING)
    made.add_argument("--backend", choices=BACKENDS, help="default: the first that is here")
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    made.add_argument(
        "--budget", type=seconds, metavar="SECONDS",
        help=f"default {GPU_BUDGET:.0f}, on a CPU {CPU_BUDGET:.0f}",
    )  # fmt: skip
    add_prepare(made, seconds)
    made.add_argument("--out", type=Path, help="default: a new file in benchmarks/tuning/")
    made.set_defaults(run=tune)
