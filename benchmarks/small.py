"""Every kind of problem that a suite has, with few elements, and problems whose blocks work
together: what compute-sanitizer runs, and the tests.

    python -m benchmarks.small --backend cuda     check all of it against fp64; exit status 1 on a
                                                  wrong result
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from benchmarks import suites
from benchmarks.candidates import Changes, Knob, applied, candidates, knobs, label
from benchmarks.context import dead_context
from benchmarks.measure import Bench, first_line
from benchmarks.ops import OPS
from benchmarks.problems import TRAINING, Problem
from benchmarks.providers import Ours
from benchmarks.refused import Refused, device_of
from benchmarks.together import together
from fastnorm import dispatch


def small(problem: Problem) -> Problem:
    """The same problem with few elements, forward and backward; HiFi-GAN is what it is."""
    shape = problem.shape
    if problem.op == "layer_norm":
        dims = 3 if problem.variant == "last3" else 1
        shape = (*(min(n, 3) for n in shape[:-dims]), *(min(n, 40) for n in shape[-dims:]))
    elif problem.variant != "hifigan":
        most = 12 if problem.op == "weight_norm" else 100 if len(shape) == 1 else 6
        shape = tuple(min(n, most) for n in shape)
    return replace(problem, shape=shape, modes=TRAINING, importance=0)


def every_kind() -> list[Problem]:
    """One small problem of each op, variant, layout and dtype that a suite on a GPU has."""
    names = [name for name in suites.NAMES if name != suites.MODELS]
    found: dict[tuple[str, ...], Problem] = {}
    for problem in suites.problems(names, "cuda"):
        key = (problem.op, problem.variant, problem.layout, problem.dtype)
        found.setdefault(key, small(problem))
    return [problem for problem in found.values() if problem.variant != "hifigan"]


# a problem, what can be turned in its launcher, and what is turned
Way = tuple[Problem, tuple[Knob, ...], Changes]


def kinds(backend: str, every_way: bool) -> Iterator[Way]:
    """Every kind as the kernels are launched; in every way with each of the launcher's numbers
    changed by itself, too."""
    for problem in every_kind():
        turned = knobs(problem, backend) if every_way else ()
        found = {c: None for mode in TRAINING for c in candidates(turned, mode) if len(c) <= 1}
        yield from ((problem, turned, changes) for changes in found)


def check(backend: str, device: str, ways: Iterable[Way], excused: bool = False) -> int:
    """Run problems on a backend, forward and backward, against fp64; how many were wrong or failed.
    Excused: a way that is refused is no failure."""
    bench, provider, failed = Bench(device), Ours(backend, backend=backend), 0
    for problem, turned, changes in ways:
        how = f"{problem}, {label(turned, changes)}" if turned else str(problem)
        try:
            stage = bench.stage(problem)
            tensors = stage.fresh()
            with provider.active(), applied(turned, changes):
                complaint = stage.check(provider.bind(problem, tensors), tensors)[2]
        except Exception as error:
            if dead_context():
                print(f"{how}: {first_line(error)}; nothing more can be run", flush=True)
                return failed + 1
            if excused and changes:
                print(f"{how}: not possible: {first_line(error)}", flush=True)
                continue
            complaint = first_line(error)
        print(f"{how}: {complaint or 'right'}", flush=True)
        failed += bool(complaint)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--backend", default="auto", choices=dispatch.CHOICES)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=tuple(OPS))
    parser.add_argument(
        "--together", action="store_true", help="only problems whose blocks work together"
    )
    parser.add_argument(
        "--every-way",
        action="store_true",
        help="also with each of the launchers' numbers changed, as tune does",
    )
    chosen = parser.parse_args(arguments)
    try:
        device = device_of(chosen.device)
    except Refused as refusal:
        parser.error(str(refusal))

    def of_ops(ways: Iterable[Way]) -> Iterator[Way]:
        return (way for way in ways if way[0].op in chosen.op)

    failed = check(chosen.backend, device, of_ops(together(chosen.backend)))
    if not chosen.together:
        ways = of_ops(kinds(chosen.backend, chosen.every_way))
        failed += check(chosen.backend, device, ways, excused=True)
    print(f"{failed} wrong on {chosen.backend}, {device}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
