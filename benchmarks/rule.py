"""`python -m benchmarks rule FILE`: which backend serves tensors of which size, from the rows of
the suite `rule`: forward and backward, many in a row, where the slower of host and device counts.

For every family the sizes are those from which on a backend of ours is nowhere slower than torch's
own function, beyond the noise, and the backends in the order of their speed there. What it prints
is what fastnorm/dispatch.py has in RULES.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import schema
from benchmarks.problems import STEPS
from benchmarks.report.lines import (
    Line,
    against,
    geometric_mean,
    grouped,
    read,
    side_by_side,
    time_text,
    timed,
)
from benchmarks.report.tables import Cell
from benchmarks.report.terminal import aligned
from fastnorm import dispatch

BACKENDS = {"cuda": "fastnorm-cuda", "triton": "fastnorm-triton"}


@dataclass(frozen=True)
class Found:
    """Of a family, for each backend that has times: the smallest size from which on it is not
    slower than torch, None where it is at the largest; and its speed over torch's where each of
    them serves."""

    family: str
    least: dict[str, int | None]
    speed: dict[str, float]

    @property
    def rule(self) -> dispatch.Rule:
        """Those that gain anywhere, the fastest first."""
        sizes = {name: least for name, least in self.least.items() if least is not None}
        order = sorted(sizes, key=lambda name: -self.speed[name])
        return dispatch.Rule(tuple(order), {name: sizes[name] for name in order})


def _slower(line: Line, provider: str) -> bool:
    """Than torch, beyond the noise; who has no time in a line serves nobody there."""
    mine, torch = line.rows.get(provider), line.rows.get("torch")
    if not timed(mine):
        return True
    return mine is not None and torch is not None and timed(torch) and against(mine, torch).lost


def _least(lines: Sequence[Line], provider: str) -> int | None:
    """From the largest size down, as far as it is slower in no line."""
    found = None
    sizes: dict[int, list[Line]] = {}
    for line in lines:
        sizes.setdefault(math.prod(line.shape), []).append(line)
    for size in sorted(sizes, reverse=True):
        if any(_slower(line, provider) for line in sizes[size]):
            break
        found = size
    return found


def _speed(lines: Iterable[Line], provider: str, least: int) -> float:
    ratios = [
        against(line.rows[provider], line.rows["torch"]).ratio
        for line in lines
        if math.prod(line.shape) >= least
        if timed(line.rows.get("torch")) and timed(line.rows.get(provider))
    ]
    return geometric_mean(ratios) or 0.0


def rules(lines: Iterable[Line]) -> Iterator[Found]:
    """Of every family with such rows of our kernels."""
    steps = [line for line in lines if line.mode == STEPS]
    for (family,), group in grouped(steps, "op").items():
        there = {b: p for b, p in BACKENDS.items() if any(timed(x.rows.get(p)) for x in group)}
        least = {name: _least(group, provider) for name, provider in there.items()}
        common = max((size for size in least.values() if size is not None), default=0)
        speed = {name: _speed(group, there[name], common) for name in there}
        if there:
            yield Found(family, least, speed)


def _exponent(size: int) -> str:
    return f"1 << {size.bit_length() - 1}" if size.bit_count() == 1 else str(size)


def _rule_text(rule: dispatch.Rule) -> str:
    sizes = ", ".join(f'"{name}": {_exponent(size)}' for name, size in rule.from_elements.items())
    names = ", ".join(f'"{name}"' for name in rule.backends)
    return f"Rule(({names}{',' * (len(rule.backends) == 1)}), {{{sizes}}})"


def _times(lines: Sequence[Line]) -> list[str]:
    """Microseconds of a step by size."""
    providers = ["torch", *BACKENDS.values(), "fastnorm"]
    shown = [name for name in providers if any(timed(line.rows.get(name)) for line in lines)]
    rows = []
    for line in sorted(lines, key=lambda line: (line.op, line.variant, math.prod(line.shape))):
        cells = [Cell(f"{line.op} {line.variant}", ""), Cell(_exponent(math.prod(line.shape)))]
        for name in shown:
            row = line.rows.get(name)
            ms = row.ms_median if row is not None and timed(row) else None
            cells.append(Cell("" if ms is None else time_text(1e3 * ms), 0.0))
        rows.append(cells)
    return aligned(["µs of a step", "elements", *shown], rows, False)


def text(lines: Iterable[Line]) -> str:
    """Times, rules, and where dispatch.py has others; "" where there are no rows of the suite."""
    steps = [line for line in lines if line.mode == STEPS]
    found = list(rules(steps))
    if not found:
        return ""
    told = [*_times(steps), ""]
    for one in found:
        told.append(f'    "{one.family}": {_rule_text(one.rule)},')
        never = [name for name, least in one.least.items() if least is None]
        told += [f"    # {', '.join(never)}: slower than torch at the largest size"] * bool(never)
        now = dispatch.RULES.get(one.family)
        if now is not None and now != one.rule:
            told.append(f"    # fastnorm/dispatch.py has {_rule_text(now)}")
    return "\n".join(told)


def _rule(chosen: argparse.Namespace) -> int:
    try:
        results = read(chosen.file)
    except schema.ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = text(side_by_side(results.rows))
    if not said:
        print(f"error: {chosen.file} has no times of our kernels in --suite rule", file=sys.stderr)
        return 2
    print(said)
    return 0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `rule`; the parsed arguments' `run(arguments)` gives the exit status."""
    made = subparsers.add_parser(
        "rule", help="which backend serves tensors of which size, from the rows of --suite rule"
    )
    made.add_argument("file", type=Path)
    made.set_defaults(run=_rule)
