"""What batch norm reads and writes of DRAM, over the size of x, as ncu counts it.

ncu runs this module as a program: one call of one form, alone between cudaProfilerStart and Stop,
so that every kernel of the call is counted and none of what prepares it. Clocks stay as they are.
ncu leaves the caches alone too: the program itself fills L2 with clean lines before the call, and
what the first of two launches leaves there, the second finds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import fastnorm
from benchmarks.calls import Call, Provider, through_autograd
from benchmarks.candidates import Changes, knobs, label
from benchmarks.environment import ROOT
from benchmarks.jobs import SLOW_S
from benchmarks.measure import Bench, blank, first_line
from benchmarks.ops import OPS, Tensors
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS, Ours
from benchmarks.refused import device_of
from benchmarks.schema import Row
from benchmarks.tune import Candidate
from fastnorm import functional
from fastnorm.ops.batch_norm import sync

PROGRAM = "benchmarks.probe_dram"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
NCU = ("ncu", "--metrics", f"{READ},{WRITTEN}", "--csv", "--print-units", "base",
       "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none",
       "--target-processes", "all", "--print-kernel-base", "function")  # fmt: skip
NCU_S = 100.0
PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")  # where PATH lacks it
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
FLUSHED_BYTES = 1 << 29  # several times any L2

TWICE = "two-launches-"  # before the name of a backend

# (who, which form, what the design counts on)
TWO, TICKET = "1.93 read, 0.96 written", "1.00 read, 0.94 written"
HOLD = "1.00 read, 0.99 written"
FORMS: tuple[tuple[str, Changes, str], ...] = (
    ("torch", (), TWO),
    (f"{TWICE}cuda", (), TWO),
    ("cuda", (), HOLD),
    ("cuda", (("FORM", 2),), HOLD),
    ("cuda", (("FORM", 3),), TICKET),
    ("cuda", (("FORM", 4),), ""),
    ("cuda", (("FORM", 1),), ""),
    (f"{TWICE}triton", (), TWO),
    ("triton", (), TICKET),
)


def problem(device: str, shape: tuple[int, ...] | None = None) -> Problem:
    """bf16 on a GPU; fp32 in the interpreter, which does not round to bf16 as a GPU does."""
    sizes, dtype = (
        ((256, 256, 56, 56), "bfloat16") if device != "cpu" else ((2, 4, 8, 8), "float32")
    )
    return Problem("batch_norm", "plain", shape or sizes, "nchw", dtype, ("forward",))


class Kernel(NamedTuple):
    name: str
    read: float  # bytes
    written: float


def parse(text: str) -> list[Kernel]:
    """The kernels in what `ncu --csv` printed: its own lines, the program's, and the table's."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for cells in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        # a number may have its thousands apart, and bytes their unit
        value = float(cells["Metric Value"].replace(",", "")) * UNITS[cells["Metric Unit"]]
        found.setdefault((cells["ID"], cells["Kernel Name"]), {})[cells["Metric Name"]] = value
    return [Kernel(name, of[READ], of[WRITTEN]) for (_, name), of in found.items()]


def find_ncu() -> str | None:
    found = [str(path) for place in PLACES for path in sorted(Path("/").glob(place[1:]))]
    return shutil.which(NCU[0]) or (found[-1] if found else None)


def counted(of: Problem, backend: str, changes: Changes) -> str:
    """What ncu counted of one call, or why it did not."""
    ncu = find_ncu()
    if ncu is None:
        return "no DRAM bytes: there is no ncu here"
    if not torch.cuda.is_available():
        return "no DRAM bytes: there is no GPU here"
    turned = [f"{name}={value}" for name, value in changes]
    command = [ncu, *NCU[1:], sys.executable, "-m", PROGRAM, backend, *turned]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=NCU_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no DRAM bytes: {first_line(error)}"
    return told(done.stdout, done.stderr, done.returncode, of.numel * of.itemsize)


def told(stdout: str, stderr: str, status: int, size: int) -> str:
    """Bytes over the size of x in a line; the reason, in ncu's words, where there are none."""
    try:
        kernels = parse(stdout)
    except (KeyError, ValueError) as error:
        return f"no DRAM bytes: ncu's table is not as expected ({first_line(error)})"
    if not kernels:
        said = [line for line in (stdout + "\n" + stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("==ERROR==")]
        why = (errors or said[-1:] or ["it said nothing"])[0]
        return f"no DRAM bytes: ncu ended with {status}: {why.removeprefix('==ERROR== ')}"[:300]
    read, written = (sum(values) / size for values in list(zip(*kernels, strict=True))[1:])
    names = ", ".join(kernel.name for kernel in kernels)
    passes = max(map(int, re.findall(r"- (\d+) pass", stdout + stderr)), default=1)
    replayed = f", replayed {passes} times: the caches of a replay are not the call's"
    return f"DRAM {read:.2f} read, {written:.2f} written of x, in {names}" + (
        replayed if passes > 1 else ""
    )


class TwoLaunches(Ours):
    """The statistics in one launch and y in another, as synchronised batch norm has them; between
    the two a small one that makes one process's statistics those of all."""

    def missing(self, device: str) -> str | None:
        return fastnorm.backends()[self.backend]

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        def run(x, weight, bias, running_mean, running_var):  # type: ignore[no-untyped-def]
            x = x.detach()
            statistics = sync._statistics(x)[None]
            mean, var, _ = sync._merge(statistics, running_mean, running_var, None, 0.1)
            return functional.batch_norm(x, mean, var, weight.detach(), bias.detach(), False)

        return through_autograd(run, tensors)


def provider(of: Problem, backend: str, changes: Changes) -> Provider:
    if backend == "torch":
        return PROVIDERS["torch"]
    if backend.startswith(TWICE):
        ours = backend.removeprefix(TWICE)
        return TwoLaunches(f"fastnorm-{ours}, two launches", backend=ours)
    how = label(knobs(of, backend), changes)
    return Candidate(f"fastnorm-{backend}, {how}", backend=backend, problem=of, changes=changes)


@dataclass(frozen=True)
class DramJob:
    """One form: timed against the floor, then counted."""

    problem: Problem
    backend: str
    changes: Changes
    predicted: str

    family, rank, limit_s = "batch_norm", 0.0, SLOW_S

    @property
    def provider_name(self) -> str:
        return provider(self.problem, self.backend, self.changes).name

    def missing(self, device: str) -> str | None:
        return provider(self.problem, self.backend, self.changes).missing(device)

    def rows(self, bench: Bench) -> Iterator[Row]:
        for row in bench.rows(self.problem, provider(self.problem, self.backend, self.changes)):
            if row.ok:
                bench.forget()
                counts = counted(self.problem, self.backend, self.changes)
                row.note = "; ".join(filter(None, (row.note, counts)))
            yield row

    def failed(self, note: str) -> Row:
        return blank(self.problem, "forward", self.provider_name, note, ok=False)

    def __str__(self) -> str:
        return self.provider_name


def jobs(device: str) -> list[DramJob]:
    return [DramJob(problem(device), *form) for form in FORMS]


@contextlib.contextmanager
def alone(device: str) -> Iterator[None]:
    """What ncu counts, from an L2 whose lines nobody needs to write back: none of its writes is in
    the counts."""
    if device == "cpu":
        yield
        return
    clean = torch.empty(FLUSHED_BYTES // 8, dtype=torch.int64, device=device).random_()
    torch.cuda.synchronize()
    clean.sum()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run one form once, for ncu to count."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=main.__doc__)
    parser.add_argument("backend", choices=sorted({backend for backend, *_ in FORMS}))
    parser.add_argument("changes", nargs="*", metavar="KNOB=VALUE")
    chosen = parser.parse_args(arguments)
    pairs = (change.split("=") for change in chosen.changes)
    changes = tuple((name, int(value)) for name, value in pairs)
    device = device_of(None)
    of = problem(device)
    form = provider(of, chosen.backend, changes)
    with form.active():
        call = form.bind(of, OPS[of.op].tensors(of, device))
        call.forward()  # compiled, loaded, its memory allocated
        with alone(device):
            call.forward()
    return 0


if __name__ == "__main__":
    sys.exit(main())
