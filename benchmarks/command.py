"""`python -m benchmarks run`: from what was asked for to a results file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report, resume, runner, schema, suites
from benchmarks.environment import ROOT, environment
from benchmarks.jobs import Job, plan
from benchmarks.prepare import prepare
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS
from benchmarks.refused import Refused, device_of
from benchmarks.worker import WorkerDied
from benchmarks.zoo import MODELS

GPU_BUDGET, CPU_BUDGET = 480.0, 45.0
FILTERS = ("op", "variant", "layout", "dtype")
RESULTS = ROOT / "benchmarks" / "results"
INTERRUPTED = 130  # the exit status that a shell gives to Ctrl-C


def jobs_of(chosen: argparse.Namespace, device: str) -> list[Job]:
    """The jobs of these suites after every filter; Refused, with the choices, if none is left."""
    problems = suites.problems(chosen.suite, device)
    asked = {name: getattr(chosen, name) for name in FILTERS if getattr(chosen, name)}

    def wanted(p: Problem) -> bool:
        return all(getattr(p, name) in values for name, values in asked.items())

    if chosen.model and suites.MODELS not in chosen.suite:
        raise Refused(f"--model chooses among those of --suite {suites.MODELS}")
    models = [MODELS[name] for name in chosen.model or MODELS if suites.MODELS in chosen.suite]
    if (chosen.op and "model" not in chosen.op) or chosen.variant or chosen.layout:
        models = []
    jobs = plan(filter(wanted, problems), models, chosen.providers or PROVIDERS, device)
    if not jobs:
        names = dict.fromkeys(name for name in ("op", *asked) if name != "dtype")
        there = sorted({f"{' '.join(getattr(p, n) for n in names)} in {p.dtype}" for p in problems})
        raise Refused(
            f"suite {', '.join(chosen.suite)} has nothing of that kind on {device}; it has "
            + (", ".join(there) or "only models")
        )
    return jobs


def _kept(device: str, ops: Sequence[str]) -> Path:
    """Where a results file that is committed lives, one of these ops under their names; Refused
    where no commit is what is measured."""
    found = environment(device, 0.0)
    if found.dirty:
        raise Refused("--keep: files differ from the commit that the results would name")
    name = "-".join((found.timestamp[:10], found.commit[:10], *ops))
    return RESULTS / found.slug / f"{name}.json"


def _told(out: Path, left_out: list[Job], budget: float) -> None:
    """Where the results are, what is not among them, and what to do next."""
    if left_out:
        names = sorted({job.provider_name for job in left_out})
        print(
            f"{budget:.0f} s were spent: {len(left_out)} jobs of {', '.join(names)} were not run "
            f"(the first: {left_out[0]}); --budget gives more time, --resume {out} goes on"
        )
    rows = schema.load(out).rows
    failed = [row for row in rows if not row.ok]
    print(f"{out}: {len(rows) - len(failed)} rows measured, {len(failed)} that say why not")


def measured(
    jobs: Sequence[Job], device: str, budget: float, out: Path, note: str, ahead: float = 0.0
) -> tuple[int, list[Job]]:
    """runner.run for a command, after `ahead` seconds of the budget at most in which the jobs'
    kernels are compiled: its exit status, having said what stopped it, and the jobs that the budget
    had no time for."""
    end = time.monotonic() + budget
    try:
        if ahead:
            found = prepare(jobs, device, min(ahead, budget))
            print(f"compiled ahead in {time.monotonic() - end + budget:.0f} s: {found}", flush=True)
        return 0, runner.run(jobs, device, end - time.monotonic(), out, note)
    except KeyboardInterrupt:
        print(f"interrupted: what was measured is in {out}", file=sys.stderr)
        return INTERRUPTED, []
    except WorkerDied as death:
        print(f"error: the process that measures could not start: {death}", file=sys.stderr)
        return 1, []


def _where(chosen: argparse.Namespace, device: str) -> Path:
    """The file to write into, which nobody else has written, or the one to go on with."""
    if chosen.resume:
        return Path(chosen.resume)
    out = _kept(device, chosen.op or []) if chosen.keep else Path(chosen.out)
    if out.exists():
        raise Refused(
            f"{out} exists: a measurement is never overwritten; name another, or --resume it"
        )
    return out


def run(chosen: argparse.Namespace) -> int:
    """Measure; the exit status."""
    try:
        device = device_of(chosen.device)
        jobs = jobs_of(chosen, device)
        out = _where(chosen, device)
        if chosen.resume:
            there = resume.opened(out, device).rows
            every, jobs = jobs, resume.remaining(jobs, there)
            print(f"{out} has {len(there)} rows: {len(every) - len(jobs)} jobs are done")
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    budget = chosen.budget or (CPU_BUDGET if device == "cpu" else GPU_BUDGET)
    if device == "cpu":
        print("on the CPU: fastnorm is torch's own functions here, and its kernels do not run")
    status = 0
    left_out: list[Job] = []
    if jobs:
        status, left_out = measured(jobs, device, budget, out, chosen.note, chosen.prepare)
    if status:
        return status
    _told(out, left_out, budget)
    if chosen.plot:
        return report.report_files([out], out.with_name(f"{out.stem}-report"), None)
    print(f"next: python -m benchmarks report {'--readme' if chosen.keep else out}")
    return 0
