"""The report as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.lines import LOSS, TIE, WIN, Run
from benchmarks.report.tables import (
    LEGEND,
    SIGNS,
    SUMMARY,
    SUMMARY_LEGEND,
    Cell,
    Table,
    sentence,
    summary_rows,
    tables,
    worst,
)

# blue and orange, which every kind of sight tells apart; bold for both
STYLES = {WIN: "\033[1;38;5;33m", TIE: "", LOSS: "\033[1;38;5;208m"}
BOLD, RESET = "\033[1m", "\033[0m"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[Cell]], colour: bool) -> list[str]:
    """Columns as wide as their widest cell; numbers to the right, words to the left."""
    widths = [max(len(name), *(len(row[i].text) for row in rows)) for i, name in enumerate(header)]
    left = [all(isinstance(row[i].order, str) for row in rows) for i in range(len(header))]
    left = [
        is_left or name == "against the best" for is_left, name in zip(left, header, strict=True)
    ]

    def pad(text: str, i: int) -> str:
        return text.ljust(widths[i]) if left[i] else text.rjust(widths[i])

    def style(cell: Cell, i: int) -> str:
        signed = colour and cell.against and cell.text[0] in SIGNS.values()
        code = STYLES[cell.against.verdict] if cell.against and signed else ""
        return f"{code}{pad(cell.text, i)}{RESET}" if code else pad(cell.text, i)

    lines = ["  ".join(pad(name, i) for i, name in enumerate(header)).rstrip()]
    lines.append("  ".join("-" * width for width in widths))
    lines += ["  ".join(style(cell, i) for i, cell in enumerate(row)).rstrip() for row in rows]
    return lines


def _table(one: Table, colour: bool) -> list[str]:
    title = f"{BOLD}{one.title}{RESET}" if colour else one.title
    body = _aligned(one.header, one.rows, colour)
    return ["", f"{title}  ({one.unit})", *body, *(f"  {note}" for note in one.notes)]


def terminal(run: Run, colour: bool = False) -> str:
    """Every line of the run, a summary and the worst rows last, where the eye is."""
    head = f"fastnorm benchmarks, {run.title}"
    lines = [f"{BOLD}{head}{RESET}" if colour else head, run.versions, run.copy]
    lines += [run.environment.note] if run.environment.note else []
    lines += ["", LEGEND]
    for one in tables(run):
        lines += _table(one, colour)
    rows = [
        [*map(Cell, row[:3], row[:3]), *(Cell(text, 0.0) for text in row[3:])]
        for row in summary_rows(run.lines)
    ]
    lines += ["", f"{BOLD}Summary{RESET}" if colour else "Summary", *_aligned(SUMMARY, rows, False)]
    lines += ["", SUMMARY_LEGEND]
    lost = worst(run)
    lines += [
        "",
        "Worst rows against the best other:" if lost else "No row is slower than others'.",
    ]
    lines += [f"  {sentence(line)}" for line in lost]
    return "\n".join(lines)
