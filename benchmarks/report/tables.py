"""The tables of a run, as text: what the terminal, Markdown, the HTML page and the README show."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    "that the op can move, over the median time: 1.00 is the limit."
)
UNITS = {
    "host": "median host time of a call, µs",
    "step": "median time of a training step, ms, and peak memory, MiB",
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


def failure(row: Row) -> str:
    """A row without a time in one word; its note goes below the table."""
    told = row.note.lower()
    if "not installed" in told or "missing" in told:
        return "missing"
    return "wrong" if "wrong" in told else "failed"


def told(row: Row) -> str:
    """What a timed row has beside its median: shown where the mouse rests on its cell."""
    unit, factor = ("µs", 1e3) if row.mode == "host" else ("ms", 1.0)
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
    text = time_text(row.ms_median * (1e3 if row.mode == "host" else 1))
    if row.mode == "step":
        text += "" if row.peak_memory_mib is None else f" {row.peak_memory_mib:.0f}"
    elif row.mode != "host" and row.floor_fraction is not None:
        text += f" {row.floor_fraction:.2f}"
    other = None if is_ours(provider) else line.against(row)
    return Cell(text, row.ms_median, other, told(row))


def against_cell(found: Against | None, named: bool = False) -> Cell:
    if found is None:
        return Cell("", 0.0)
    name = f" {found.provider}" if named else ""
    return Cell(f"{SIGNS[found.verdict]} {found.ratio:.2f}x{name}", found.ratio, found)


def notes(rows: Iterable[Row]) -> list[str]:
    """Why rows have no time, and what else was noted, once each with the number of rows."""
    found = Counter((row.provider, row.note or failure(row)) for row in rows if not timed(row))
    found.update((row.provider, row.note) for row in rows if timed(row) and row.note)
    return [
        f"{name}: {note} ({count} row{'s' * (count > 1)})" for (name, note), count in found.items()
    ]


def table(title: str, lines: Sequence[Line], run: Run) -> Table:
    """Providers without a single time in these lines stand in the notes only."""
    served = [p for p in run.providers if any(timed(line.rows.get(p)) for line in lines)]
    header = ["variant", "shape", "layout", "dtype", "against torch", "against the best", *served]
    rows = []
    for line in lines:
        rows.append(
            [
                Cell(line.variant, line.variant),
                Cell(shape_text(line.shape), line.mebibytes),
                Cell(line.layout, line.layout),
                Cell(line.dtype, line.dtype),
                against_cell(line.torch),
                against_cell(line.best, named=True),
                *(provider_cell(line, p) for p in served),
            ]
        )
    unit = UNITS.get(lines[0].mode, UNITS[run.kind])
    every = [row for line in lines for row in line.rows.values()]
    return Table(title, unit, header, rows, notes(every))


def tables(run: Run) -> list[Table]:
    groups = grouped(run.lines, "op", "mode")
    return [table(f"{op}, {mode}", lines, run) for (op, mode), lines in groups.items()]


def lost_to_failure(line: Line) -> bool:
    """Whether we have no time where another has one."""
    others = any(timed(row) and not is_ours(name) for name, row in line.rows.items())
    return others and not timed(line.ours) and any(map(is_ours, line.rows))


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
        failed = sum(lost_to_failure(line) for line in group)
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
    failed = [line for line in run.lines if lost_to_failure(line)]
    lost = [line for line in run.lines if line.best is not None and line.best.verdict == LOSS]
    return failed + sorted(lost, key=lambda line: line.best.ratio if line.best else 0)[:count]


def sentence(line: Line) -> str:
    where = f"{line.name}, {shape_text(line.shape)}, {line.layout}, {line.dtype}"
    best = line.best
    if best is not None:
        return f"{where}: {best.ratio:.2f}x the speed of {best.provider}"
    why = {row.note or failure(row) for name, row in line.rows.items() if is_ours(name)}
    return f"{where}: {'; '.join(sorted(why))}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> list[str]:
    """The first `words` columns are words, the others numbers."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = ["---"] * words + ["---:"] * (len(header) - words)
    return [line(header), "|" + "|".join(ruler) + "|", *map(line, rows)]


def markdown(run: Run, pictures: Sequence[str] = ()) -> str:
    """The report of a run as Markdown."""
    lines = [f"# fastnorm benchmarks, {run.title}", "", f"{run.versions}; {run.copy}.", ""]
    if run.environment.note:
        lines += [run.environment.note, ""]
    lines += [*markdown_table(SUMMARY, summary_rows(run.lines), 3), "", SUMMARY_LEGEND, ""]
    if lost := worst(run):
        lines += ["## Worst rows", "", *(f"- {sentence(line)}" for line in lost), ""]
    if pictures:
        lines += ["## Pictures", "", *(f"![{name}]({name})" for name in pictures), ""]
    for one in tables(run):
        rows = ([cell.text for cell in row] for row in one.rows)
        lines += [f"## {one.title}", "", f"Cells: {one.unit}.", ""]
        lines += [*markdown_table(one.header, rows, 4), ""]
        lines += [*(f"- {note}" for note in one.notes), ""] if one.notes else []
    return "\n".join([*lines, LEGEND, ""])
