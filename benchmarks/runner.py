"""A run: jobs in order of importance until the budget is spent, every row written as it comes."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import resume, schema
from benchmarks.jobs import Job
from benchmarks.progress import Progress
from benchmarks.worker import OutOfTime, Worker, WorkerDied

GRACE_S = 5.0  # by which the job that runs when the budget is spent may go beyond it
DEATHS = 2  # after so many a provider is left out of the family: each costs seconds or a limit


def run(
    jobs: Sequence[Job], device: str, budget: float, out: Path, note: str = "", quiet: bool = True
) -> list[Job]:
    """Measure into a new results file, or at the end of one that is there; return the jobs that the
    budget had no time for.

    The file is whole at every moment. KeyboardInterrupt leaves what was measured in it.
    """
    deadline = time.monotonic() + budget
    worker = Worker(device, note, quiet)
    try:
        resume.start(worker.environment, out)
        lacking: set[tuple[str, str]] = set()
        deaths: collections.Counter[tuple[str, str]] = collections.Counter()
        latest: dict[str, float] = {}  # seconds that the last job of a provider took
        left_out = []
        with Progress(len(jobs), deadline - time.monotonic()) as progress:
            for job in jobs:
                key = (job.family, job.provider_name)
                now = time.monotonic()
                if now + latest.get(job.provider_name, 0.0) > deadline:
                    left_out.append(job)
                elif deaths[key] == DEATHS and key not in lacking:
                    why = f"left out: its process died {DEATHS} times in this family"
                    schema.append(out, job.failed(why))
                    lacking.add(key)
                elif key not in lacking:
                    progress.running(job)
                    try:
                        if _one(worker, job, out, deadline + GRACE_S):
                            lacking.add(key)
                    except WorkerDied:
                        deaths[key] += 1
                    except OutOfTime:
                        left_out.append(job)
                    latest[job.provider_name] = time.monotonic() - now
                progress.done()
    except BaseException:
        worker.stop(kill=True)
        raise
    worker.stop()
    return left_out


def _one(worker: Worker, job: Job, out: Path, until: float) -> bool:
    """Run a job; whether its provider is missing here, for this job and all of its family.
    WorkerDied where it ended its process, which a row says by then."""
    lacking = told = False
    try:
        for kind, row in worker.rows(job, until):
            lacking = lacking or kind == "missing"
            told = told or not row.ok
            schema.append(out, row)
    except WorkerDied as death:
        if not told:  # what ends the process may have had time to say so
            schema.append(out, job.failed(str(death)))
        raise
    return lacking
