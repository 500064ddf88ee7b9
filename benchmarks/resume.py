"""A results file that a later run goes on with: whether both are of one state of code and machine,
and what is not in it yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import schema
from benchmarks.environment import environment
from benchmarks.jobs import Job, OpJob
from benchmarks.refused import Refused
from benchmarks.schema import Environment, Results, Row

SAME = ("device", "driver", "cuda", "torch", "triton", "python", "fastnorm", "commit", "peers")
MISSING = "missing: "  # what the note of a row begins with whose provider is not here


def opened(path: Path, device: str) -> Results:
    """The results to go on with; Refused where their rows and new ones are not comparable."""
    try:
        before = schema.load(path)
    except (schema.ResultsError, OSError) as error:
        raise Refused(f"--resume: {error}") from None
    now = environment(device, 0.0)
    for which, found in ((f"{path} was measured", before.environment), ("this is", now)):
        if found.dirty:
            raise Refused(
                f"--resume: {which} with files that differ from commit {found.commit[:10]}: "
                "nothing tells whether they are the same ones"
            )
    differ = [name for name in SAME if getattr(before.environment, name) != getattr(now, name)]
    if differ:
        raise Refused(
            f"--resume: {path} is of "
            + "; ".join(
                f"{name} {getattr(before.environment, name)}, and this is {getattr(now, name)}"
                for name in differ
            )
        )
    return before


def _what(row: Row) -> tuple[object, ...]:
    """A job, as its rows tell it: all but the mode."""
    return (row.op, row.variant, *row.shape, row.layout, row.dtype, row.provider)


def remaining(jobs: Iterable[Job], rows: Sequence[Row]) -> list[Job]:
    """The jobs less what these rows say; a row that says why there is no time ends its job."""
    missing = {(row.op, row.provider) for row in rows if row.note.startswith(MISSING)}
    ended = {(_what(row), row.mode) for row in rows if not row.ok}
    measured = {(_what(row), row.mode) for row in rows}
    found: list[Job] = []
    for job in jobs:
        first = job.failed("")
        what = _what(first)
        modes = job.problem.modes if isinstance(job, OpJob) else (first.mode,)
        failed = any((what, mode) in ended for mode in modes)
        if failed or (job.family, job.provider_name) in missing:
            continue
        if not isinstance(job, OpJob):
            found += [] if (what, first.mode) in measured else [job]
            continue
        served = (mode for mode in modes if job.provider.serves(job.problem, mode))
        left = tuple(mode for mode in served if (what, mode) not in measured)
        if left:
            found.append(replace(job, problem=replace(job.problem, modes=left)))
    return found


def start(now: Environment, out: Path) -> None:
    """A new file; one that is there goes on, and its note says since when."""
    if not out.exists():
        schema.save(Results(now), out)
        return
    before = schema.load(out)
    since = f"continued {now.timestamp}, when a copy moved {now.copy_bandwidth_gbs:.4g} GB/s"
    notes = [before.environment.note, since]
    if now.note not in notes:
        notes.append(now.note)
    before.environment.note = "; ".join(filter(None, notes))
    schema.save(before, out)
