"""What ncu counts of the kernels of a program: their bytes of DRAM, and what they wait for.

Clocks stay as they are, and ncu leaves the caches alone: what the first of two launches leaves
there, the second finds. What one pass over a kernel cannot count, ncu counts in another, whose
caches are not the first one's: bytes are counted by themselves.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.environment import ROOT
from benchmarks.measure import first_line

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
# the kernel's time; of the warps that could be resident, and of the cycles, those that issued an
# instruction, over the cycles in which a multiprocessor had work; of L2's sectors, those it had
TIME, WARPS = "gpu__time_duration.sum", "sm__warps_active.avg.pct_of_peak_sustained_active"
ISSUED, HITS = "smsp__issue_active.avg.pct_of_peak_sustained_active", "lts__t_sector_hit_rate.pct"
BYTES, REASONS = (READ, WRITTEN), (TIME, WARPS, ISSUED, HITS)

NCU = "ncu"
OPTIONS = ("--csv", "--print-units", "base", "--profile-from-start", "off",
           "--clock-control", "none", "--cache-control", "none",
           "--target-processes", "all", "--print-kernel-base", "function")  # fmt: skip
NCU_S = 100.0
PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")  # where PATH lacks it
_SI = {"n": 1e-6, "u": 1e-3, "m": 1.0, "": 1e3}
UNITS = {
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 1.0, "": 1.0},
    **{f"{prefix}{unit}": ms for prefix, ms in _SI.items() for unit in ("s", "second")},
}  # to bytes, percent and milliseconds


class Kernel(NamedTuple):
    name: str
    of: dict[str, float]  # of each metric that was asked for


class Uncounted(RuntimeError):
    """Why there are no counts."""


def find_ncu() -> str | None:
    found = [str(path) for place in PLACES for path in sorted(Path("/").glob(place[1:]))]
    return shutil.which(NCU) or (found[-1] if found else None)


def parse(text: str) -> list[Kernel]:
    """The kernels in what `ncu --csv` printed: its own lines, the program's, and the table's."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for cells in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        # a number may have its thousands apart
        value = float(cells["Metric Value"].replace(",", "")) * UNITS[cells["Metric Unit"]]
        found.setdefault((cells["ID"], cells["Kernel Name"]), {})[cells["Metric Name"]] = value
    return [Kernel(name, of) for (_, name), of in found.items()]


def kernels(stdout: str, stderr: str, status: int, metrics: Sequence[str]) -> list[Kernel]:
    """What ncu counted; Uncounted says why not, in its own words."""
    try:
        found = parse(stdout)
    except (KeyError, ValueError) as error:
        raise Uncounted(f"ncu's table is not as expected ({first_line(error)})") from None
    lacking = {name for kernel in found for name in metrics if name not in kernel.of}
    if lacking:
        raise Uncounted(f"ncu's table has no {', '.join(sorted(lacking))}")
    if not found:
        said = [line for line in (stdout + "\n" + stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("==ERROR==")]
        why = (errors or said[-1:] or ["it said nothing"])[0]
        raise Uncounted(f"ncu ended with {status}: {why.removeprefix('==ERROR== ')}"[:300])
    return found


def passes(said: str) -> int:
    """How often ncu ran a kernel."""
    return max(map(int, re.findall(r"- (\d+) pass", said)), default=1)


def counted(program: Sequence[str], metrics: Sequence[str]) -> tuple[list[Kernel], int]:
    """(the kernels between a Python program's cudaProfilerStart and Stop, how often ncu ran
    each)."""
    ncu = find_ncu()
    if ncu is None:
        raise Uncounted("there is no ncu here")
    command = [ncu, "--metrics", ",".join(metrics), *OPTIONS, sys.executable, "-m", *program]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=NCU_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Uncounted(first_line(error)) from None
    found = kernels(done.stdout, done.stderr, done.returncode, metrics)
    return found, passes(done.stdout + done.stderr)


def bytes_told(found: Sequence[Kernel], replays: int, size: int) -> str:
    """Bytes over the size of x."""
    read, written = (sum(kernel.of[name] for kernel in found) / size for name in BYTES)
    names = ", ".join(kernel.name for kernel in found)
    replayed = f", replayed {replays} times: the caches of a replay are not the call's"
    return f"DRAM {read:.2f} read, {written:.2f} written of x, in {names}" + (
        replayed if replays > 1 else ""
    )


def reasons_told(found: Sequence[Kernel]) -> str:
    """Of each kernel its time and what it does meanwhile."""
    return "; ".join(
        f"{name} {of[TIME]:.4f} ms, {of[WARPS]:.0f}% of warps resident, {of[ISSUED]:.0f}% of "
        f"cycles issue, {of[HITS]:.0f}% hits in L2"
        for name, of in found
    )
