"""`python -m benchmarks probe`: what batch norm's choice between its forms depends on, measured on
the device before anything is tuned.

segments  a copy of a row-major matrix by segments of rows, against a plain copy: what blocks of
          channels cost in channels_last
l2        how much of what was just read still comes from L2 when it is read again, and how fast
dram      what each form of batch norm reads and writes of DRAM (benchmarks/probe_dram.py)

--op and --shape ask of one problem instead why it takes its time: dram, and what its kernels do.

Beside each stands what the model that the forms were designed with predicts for an H100.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import probe_dram, probe_jobs, probe_l2, schema
from benchmarks.command import measured
from benchmarks.probe_dram import DramJob
from benchmarks.probe_jobs import Probe
from benchmarks.refused import Refused, device_of
from benchmarks.schema import Row
from benchmarks.tune import new_file, problem_of

PROBES: dict[str, Callable[[str], Sequence[Probe | DramJob]]] = {
    "segments": probe_jobs.segments,
    "l2": probe_l2.l2,
    "dram": probe_dram.jobs,
}
BUDGET = 480.0
NOTE = 120  # characters of a note in the table; the file has all of it


def table(rows: list[Row], jobs: Sequence[Probe | DramJob], most: int | None = NOTE) -> str:
    """What was measured, beside what was predicted, and so much of each note."""
    predicted = {(*job.failed("").key, job.provider_name): job.predicted for job in jobs}
    lines = [f"{'ms':>9} {'of a copy':>10}  {'predicted, H100':<23} what: what came out"]
    for row in rows:
        ms = "-" if row.ms_median is None else f"{row.ms_median:.4f}"
        share = "" if row.floor_fraction is None else f"{row.floor_fraction:.2f}"
        mode = "" if row.mode == "forward" else f" {row.mode}"
        what = f"{row.op} {row.variant}{mode}, {row.provider}"
        said = predicted[(*row.key, row.provider)]
        lines.append(f"{ms:>9} {share:>10}  {said:<23} {what}: {row.note[:most]}".rstrip())
    return "\n".join(lines)


def _asked(chosen: argparse.Namespace) -> list[DramJob]:
    """The jobs of the problem that was asked for, if one was."""
    if (chosen.op is None) != (chosen.shape is None):
        raise Refused("--op and --shape go together: they are the problem that is asked about")
    return probe_dram.jobs_of(problem_of(chosen), chosen.backend) if chosen.op else []


def probe(chosen: argparse.Namespace) -> int:
    """Measure; the exit status."""
    try:
        device = device_of(chosen.device)
        out = chosen.out or new_file(f"probe {' '.join(chosen.only)} {device}")
        if out.exists():
            raise Refused(f"{out} exists: a measurement is never overwritten; name another")
        asked = _asked(chosen)
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    note = "what the memory does, for the choice between the forms of batch norm"
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        note += "; interpreted on a CPU, on sizes of its own: the times say nothing of a GPU"
        print(note)
    jobs: Sequence[Probe | DramJob] = asked or [
        job for name in chosen.only for job in PROBES[name](device)
    ]
    status, left_out = measured(jobs, device, chosen.budget, out, note)
    if status:
        return status
    print(table(schema.load(out).rows, jobs, None if asked else NOTE))
    if left_out:
        print(f"{len(left_out)} had no time in {chosen.budget:.0f} s: --only measures a part")
    print(f"the data are in {out}")
    return 0


def register(subparsers: Any, seconds: Any, several: Any, flat: Any) -> None:
    """Add `probe`; the parsed arguments' `run(arguments)` gives the exit status."""
    made = subparsers.add_parser(
        "probe", help="measure what the forms of batch norm ask of a GPU's memory"
    )
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    made.add_argument(
        "--only", type=several(tuple(PROBES)), nargs="+", action=flat, default=list(PROBES),
        metavar="NAME", help=f"{', '.join(PROBES)}; default all",
    )  # fmt: skip
    probe_dram.add_problem(made, required=False)
    made.add_argument(
        "--backend", nargs="+", choices=probe_dram.BACKENDS, default=list(probe_dram.BACKENDS),
        help="of a problem that is asked about; default all",
    )  # fmt: skip
    made.add_argument(
        "--budget", type=seconds, default=BUDGET, metavar="SECONDS", help=f"default {BUDGET:.0f}"
    )
    made.add_argument("--out", type=Path, help="default: a new file in benchmarks/tuning/")
    made.set_defaults(run=probe)
