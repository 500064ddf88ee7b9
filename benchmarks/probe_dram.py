"""What the forms of an op read and write of DRAM, over the size of x, as ncu counts it; and, of a
problem that was asked for, what its kernels wait for.

ncu runs this module as a program: one call of one form, alone between cudaProfilerStart and Stop,
so that every kernel of the call is counted and none of what prepares it. The program itself fills
L2 with clean lines before the call.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import correctness, ncu
from benchmarks.calls import Provider
from benchmarks.candidates import Changes, knobs, label
from benchmarks.jobs import SLOW_S
from benchmarks.measure import Bench, blank
from benchmarks.ops import OPS
from benchmarks.problems import DTYPES, TRAINING, Problem
from benchmarks.providers import PROVIDERS
from benchmarks.refused import device_of
from benchmarks.schema import Row
from benchmarks.tune import Candidate, problem_of, shape_of

PROGRAM = "benchmarks.probe_dram"
BACKENDS = ("torch", "cuda", "triton")
FLUSHED_BYTES = 1 << 29  # several times any L2

# (who, which form, what the design counts on)
TWO, TICKET = "1.93 read, 0.96 written", "1.00 read, 0.94 written"
HOLD = "1.00 read, 0.99 written"
FORMS: tuple[tuple[str, Changes, str], ...] = (
    ("torch", (), TWO),
    ("cuda", (("LAUNCHES", 2),), TWO),
    ("cuda", (), HOLD),
    ("cuda", (("FORM", 2),), HOLD),
    ("cuda", (("FORM", 3),), TICKET),
    ("cuda", (("FORM", 4),), ""),
    ("cuda", (("FORM", 1),), ""),
    ("triton", (("LAUNCHES", 2),), TWO),
    ("triton", (), TICKET),
)


def problem(device: str, shape: tuple[int, ...] | None = None) -> Problem:
    """bf16 on a GPU; fp32 in the interpreter, which does not round to bf16 as a GPU does."""
    sizes, dtype = (
        ((256, 256, 56, 56), "bfloat16") if device != "cpu" else ((2, 4, 8, 8), "float32")
    )
    return Problem("batch_norm", "plain", shape or sizes, "nchw", dtype, ("forward",))


def options(of: Problem) -> list[str]:
    """A problem of one mode as this program's options."""
    return [
        "--op", of.op, "--variant", of.variant, "--shape", "x".join(map(str, of.shape)),
        "--layout", of.layout, "--dtype", of.dtype, "--mode", *of.modes,
    ]  # fmt: skip


def counted(of: Problem, backend: str, changes: Changes, reasons: bool) -> str:
    """What ncu counted of one call, or why it did not."""
    if not torch.cuda.is_available():
        return "no DRAM bytes: there is no GPU here"
    turned = [f"{name}={value}" for name, value in changes]
    program = [PROGRAM, backend, *turned, *options(of)]
    try:
        found, replays = ncu.counted(program, ncu.BYTES)
        told = ncu.bytes_told(found, replays, of.numel * of.itemsize)
    except ncu.Uncounted as why:
        return f"no DRAM bytes: {why}"
    if not reasons:
        return told
    try:
        found, _ = ncu.counted(program, ncu.REASONS)
        return f"{told}; {ncu.reasons_told(found)}"
    except ncu.Uncounted as why:
        return f"{told}; not what it waits for: {why}"


def provider(of: Problem, backend: str, changes: Changes) -> Provider:
    if backend == "torch":
        return PROVIDERS["torch"]
    how = label(knobs(of, backend), changes)
    return Candidate(f"fastnorm-{backend}, {how}", backend=backend, problem=of, changes=changes)


@dataclass(frozen=True)
class DramJob:
    """One form: timed against the floor, then counted."""

    problem: Problem
    backend: str
    changes: Changes
    predicted: str
    reasons: bool = False

    rank, limit_s = 0.0, SLOW_S + ncu.NCU_S

    @property
    def family(self) -> str:
        return self.problem.op

    @property
    def provider_name(self) -> str:
        return provider(self.problem, self.backend, self.changes).name

    def missing(self, device: str) -> str | None:
        return provider(self.problem, self.backend, self.changes).missing(device)

    def rows(self, bench: Bench) -> Iterator[Row]:
        for row in bench.rows(self.problem, provider(self.problem, self.backend, self.changes)):
            if row.ok:
                bench.forget()
                counts = counted(self.problem, self.backend, self.changes, self.reasons)
                row.note = "; ".join(filter(None, (row.note, counts)))
            yield row

    def failed(self, note: str) -> Row:
        return blank(self.problem, self.problem.modes[0], self.provider_name, note, ok=False)

    def __str__(self) -> str:
        return self.provider_name


def jobs(device: str) -> list[DramJob]:
    """The forms of batch norm on the shape that the design speaks of."""
    return [DramJob(problem(device), *form) for form in FORMS]


def jobs_of(of: Problem, backends: Sequence[str] = BACKENDS) -> list[DramJob]:
    """Of a problem that was asked for, in each of its modes: every form of batch norm, any other op
    as it is."""
    forms = [(name, changes) for name, changes, _ in FORMS if of.op == "batch_norm" or not changes]
    return [
        DramJob(replace(of, modes=(mode,)), name, changes, "", reasons=True)
        for mode in of.modes
        for name, changes in forms
        if name in backends
    ]


def add_problem(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options of a problem, as benchmarks/tune.py reads them."""
    parser.add_argument("--op", choices=tuple(OPS), required=required)
    parser.add_argument("--shape", type=shape_of, metavar="256x64x112x112", required=required)
    parser.add_argument("--variant", help="default: the op's first")
    parser.add_argument("--layout", help="default: the op's first")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default bfloat16")
    parser.add_argument("--mode", nargs="+", choices=TRAINING, default=["forward"])


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
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("changes", nargs="*", metavar="KNOB=VALUE")
    add_problem(parser, required=True)
    chosen = parser.parse_args(arguments)
    pairs = (change.split("=") for change in chosen.changes)
    changes = tuple((name, int(value)) for name, value in pairs)
    device, of = device_of(None), problem_of(chosen)
    form = provider(of, chosen.backend, changes)
    with form.active():
        call = form.bind(of, OPS[of.op].tensors(of, device))
        result = call.forward()
        dys = correctness.gradients_like(correctness.outputs_of(call.outputs(result)))

        def run() -> None:
            if of.modes == ("forward",):
                call.forward()
            else:
                assert call.backward is not None, "all of these have one"
                call.backward(result, dys)

        run()  # compiled, loaded, its memory allocated
        with alone(device):
            run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
