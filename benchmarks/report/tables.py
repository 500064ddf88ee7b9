"""The tables of a run, as text: what the terminal, Markdown, the HTML page and the README show."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import host_profile, kernels, targets
from benchmarks.problems import HOST
from benchmarks.report.lines import (
    LOSS,
    TIE,
    WIN,
    Against,
    Line,
    Run,
    geometric_mean,
    grouped,
    interval,
    is_ours,
    shape_text,
    time_text,
    timed,
)
from benchmarks.schema import Row

SIGNS = {WIN: "▲", TIE: "≈", LOSS: "▼"}
LEGEND = (
    "▲ fastnorm is faster, ▼ fastnorm is slower, ≈ the p20-p80 ranges overlap; the number is their "
    "median time over ours. The floor fraction is the time of a plain copy of the fewest bytes "
    "that the op can move, over the median time: 1.00 is the limit. torch.compile's models are "
    "compared with ours compiled, fastnorm-compiled, where those were run."
)
UNITS = {
    "host": "median host time of a layer's call, µs",
    "host-backward": "median host time of a layer's backward, µs",
    "step": "median wall clock of forward and backward, from an idle device to an idle one, ms",
    "steps": "median wall clock of forward and backward, many in a row, ms",
    "graph": "median wall clock of forward and backward as a CUDA graph, replayed, ms",
    "model": "median time of a training step, ms, and peak memory, MiB",
    "GPU": "median device time, ms, and floor fraction",
    "CPU": "median wall clock on the CPU, ms, and floor fraction",
}


@dataclass(frozen=True)
class Cell:
    """What stands in a table: `order` is what a column is sorted by, `against` what colours it."""

    text: str
    order: float | str = ""
    against: Against | None = None
    title: str = ""


@dataclass
class Table:
    """The lines of one op and mode."""

    title: str
    unit: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str]
    profiles: list[str]  # where the host's time goes


def failure(row: Row) -> str:
    """A row without a time in one word; its note goes below the table."""
    told = row.note.lower()
    if "not installed" in told or "missing" in told:
        return "missing"
    return "wrong" if "wrong" in told else "failed"


def told(row: Row) -> str:
    """What a timed row has beside its median: shown where the mouse rests on its cell."""
    unit, factor = ("µs", 1e3) if row.mode in HOST else ("ms", 1.0)
    low, high = (time_text(factor * end) for end in interval(row))
    parts = [f"p20-p80 {low}-{high} {unit}"]
    if row.error is not None and row.torch_error is not None:
        parts.append(f"error {row.error:.1e}, torch's {row.torch_error:.1e}")
    if row.peak_memory_mib is not None:
        parts.append(f"peak memory {row.peak_memory_mib:.4g} MiB")
    return "; ".join([*parts, row.note] if row.note else parts)


def provider_cell(line: Line, provider: str) -> Cell:
    row = line.rows.get(provider)
    if row is None:
        return Cell("", float("inf"))
    if not timed(row) or row.ms_median is None:
        return Cell(failure(row), float("inf"), title=row.note)
    text = time_text(row.ms_median * (1e3 if row.mode in HOST else 1))
    if row.op == "model":
        text += "" if row.peak_memory_mib is None else f" {row.peak_memory_mib:.0f}"
    elif row.floor_fraction is not None:
        text += f" {row.floor_fraction:.2f}"
    other = None if is_ours(provider) else line.against(row)
    return Cell(text, row.ms_median, other, told(row))


def against_cell(found: Against | None, named: bool = False) -> Cell:
    if found is None:
        return Cell("", 0.0)
    name = f" {found.provider}" if named else ""
    return Cell(f"{SIGNS[found.verdict]} {found.ratio:.2f}x{name}", found.ratio, found)


def target_cell(one: targets.Verdict) -> Cell:
    """Whether a row is what it is to be: the target that it misses by most, or the first it has."""
    every = "; ".join(map(str, one.targets))
    if one.failed:
        return Cell("missed, no result", -1e99)
    if one.missed:
        return Cell(f"missed {one.missed[0].brief}", -one.short, title=every)
    return Cell(f"met {one.targets[0].brief}" if one.targets else "", 1.0, title=every)


def memory_cell(line: Line) -> Cell:
    ratio, mine = line.memory, line.ours
    if ratio is None or mine is None:
        return Cell("", float("inf"))
    return Cell(f"{ratio:.2f}x {mine.peak_memory_mib:.4g} MiB", ratio)


def _apart(row: Row) -> str:
    """A row's note but for its kernels and its profile, which are others in every row."""
    parts = row.note.split("; ") if row.note else []
    return "; ".join(
        part for part in parts if kernels.read(part) is None and host_profile.read(part) is None
    )


def notes(rows: Iterable[Row]) -> list[str]:
    """Why rows have no time, and what else was noted, once each with the number of rows."""
    every = list(rows)
    found = Counter((row.provider, row.note or failure(row)) for row in every if not timed(row))
    found.update((row.provider, _apart(row)) for row in every if timed(row) and _apart(row))
    return [
        f"{name}: {note} ({count} row{'s' * (count > 1)})" for (name, note), count in found.items()
    ]


def launches(lines: Iterable[Line]) -> Iterator[str]:
    """What the providers of a small line launch."""
    for line in lines:
        counts = {name: kernels.read(row.note) for name, row in line.rows.items() if timed(row)}
        told = [f"{name} {count}" for name, count in counts.items() if count is not None]
        if told:
            yield f"{where(line)}: {'; '.join(told)}"


def profiles(lines: Iterable[Line]) -> Iterator[str]:
    """Where the host's time of a line goes, by provider."""
    for line in lines:
        for name, row in line.rows.items():
            for found in filter(None, map(host_profile.read, row.note.split("; "))):
                yield f"{where(line)}: {name} {found}"


def table(title: str, lines: Sequence[Line], run: Run) -> Table:
    """Providers without a single time in these lines stand in the notes only."""
    served = [p for p in run.providers if any(timed(line.rows.get(p)) for line in lines)]
    header = ["variant", "shape", "layout", "dtype", "against torch", "against the best"]
    on_gpu = not run.environment.on_cpu
    counted = lines[0].op != "model" and any(line.memory is not None for line in lines)
    header += ["target"] * on_gpu + ["memory"] * counted
    rows = []
    for line, asked in zip(lines, targets.verdicts(lines), strict=True):
        rows.append(
            [
                Cell(line.variant, line.variant),
                Cell(shape_text(line.shape), line.mebibytes),
                Cell(line.layout, line.layout),
                Cell(line.dtype, line.dtype),
                against_cell(line.torch),
                against_cell(line.best, named=True),
                *([target_cell(asked)] * on_gpu),
                *([memory_cell(line)] * counted),
                *(provider_cell(line, p) for p in served),
            ]
        )
    first = lines[0]
    unit = UNITS[
        "model" if first.op == "model" else first.mode if first.mode in UNITS else run.kind
    ]
    every = [row for line in lines for row in line.rows.values()]
    told = [*notes(every), *launches(lines)]
    return Table(title, unit, [*header, *served], rows, told, [*profiles(lines)])


def tables(run: Run) -> list[Table]:
    groups = grouped(run.lines, "op", "mode")
    return [table(f"{op}, {mode}", lines, run) for (op, mode), lines in groups.items()]


def summary_rows(lines: Iterable[Line]) -> list[list[str]]:
    """One row per op, layout and mode, with losses counted like wins."""
    found = []
    for (op, layout, mode), group in grouped(lines, "family", "layout", "mode").items():
        fractions = [
            row.floor_fraction
            for line in group
            if timed(row := line.ours) and row is not None and row.floor_fraction is not None
        ]
        best = [line.best for line in group if line.best is not None]
        eager = geometric_mean(line.torch.ratio for line in group if line.torch is not None)
        other = geometric_mean(one.ratio for one in best)
        verdicts = Counter(one.verdict for one in best)
        least = min(best, key=lambda one: one.ratio, default=None)
        failed = sum(line.lost_to_failure for line in group)
        counts = f"{verdicts[WIN]} / {verdicts[TIE]} / {verdicts[LOSS]}" if best else ""
        found.append(
            [
                op,
                layout,
                mode,
                str(len(group)),
                f"{statistics.median(fractions):.2f}" if fractions else "",
                f"{eager:.2f}x" if eager else "",
                f"{other:.2f}x" if other else "",
                f"{least.ratio:.2f}x {least.provider}" if least else "",
                f"{counts} and {failed} failed".removeprefix(" and ") if failed else counts,
            ]
        )
    return found


SUMMARY = [
    "op",
    "layout",
    "mode",
    "rows",
    "floor fraction, median",
    "speed against torch",
    "against the best other",
    "worst row",
    "▲ / ≈ / ▼",
]
SUMMARY_LEGEND = (
    "Speeds are geometric means of their median time over ours: above 1 fastnorm is faster. The "
    "best other is the fastest provider of that row that is not ours, torch and torch.compile "
    "included. The last column counts rows in which fastnorm is faster than it, within the p20-p80 "
    "noise, and slower, and those that only others could run."
)


def worst(run: Run, count: int = 10) -> list[Line]:
    """The lines in which we failed, then those in which the best other beats us by most, beyond
    the noise."""
    failed = [line for line in run.lines if line.lost_to_failure]
    lost = [line for line in run.lines if line.best is not None and line.best.verdict == LOSS]
    return failed + sorted(lost, key=lambda line: line.best.ratio if line.best else 0)[:count]


def where(line: Line) -> str:
    """A line as a sentence begins with it."""
    return f"{line.name}, {shape_text(line.shape)}, {line.layout}, {line.dtype}"


def why(line: Line) -> str:
    """Why we have no time in it."""
    told = {row.note or failure(row) for name, row in line.rows.items() if is_ours(name)}
    return "; ".join(sorted(told))


def sentence(line: Line) -> str:
    best = line.best
    if best is not None:
        return f"{where(line)}: {best.ratio:.2f}x the speed of {best.provider}"
    return f"{where(line)}: {why(line)}"
