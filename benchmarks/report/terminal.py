"""The report as a person reads it in a terminal."""

from __future__ import annotations

import textwrap
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
FIXED = 6  # columns before those of the providers
PROSE = 100  # characters in a line of it where nobody says how wide the terminal is


def _widths(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[int]:
    return [max(len(name), *(len(row[i].text) for row in rows)) for i, name in enumerate(header)]


def aligned(header: Sequence[str], rows: Sequence[Sequence[Cell]], colour: bool) -> list[str]:
    """Columns as wide as their widest cell; numbers to the right, words to the left."""
    widths = _widths(header, rows)
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


def _columns(one: Table, width: int | None) -> list[int]:
    """The columns that `width` characters hold: providers are left out from the right, other than
    torch and fastnorm."""
    kept = list(range(len(one.header)))
    spare = [i for i in kept[FIXED:] if one.header[i] not in ("torch", "fastnorm")]
    widths = _widths(one.header, one.rows)
    while width is not None and spare and sum(widths[i] + 2 for i in kept) - 2 > width:
        kept.remove(spare.pop())
    return kept


def _table(one: Table, colour: bool, width: int | None) -> list[str]:
    title = f"{BOLD}{one.title}{RESET}" if colour else one.title
    kept = _columns(one, width)
    rows = [[row[i] for i in kept] for row in one.rows]
    lines = ["", f"{title}  ({one.unit})", *aligned([one.header[i] for i in kept], rows, colour)]
    hidden = [name for i, name in enumerate(one.header) if i not in kept]
    below = [f"too wide for this terminal, in report.md: {', '.join(hidden)}"] if hidden else []
    for note in (*below, *one.notes):
        lines += textwrap.wrap(
            note, width or len(note) + 2, initial_indent="  ", subsequent_indent="    "
        )
    return lines


def terminal(run: Run, colour: bool = False, width: int | None = None) -> str:
    """Every line of the run, a summary and the worst rows last, where the eye is; in lines of
    `width` characters, or as long as the tables are."""

    def wrapped(text: str) -> list[str]:
        return textwrap.wrap(text, width or PROSE)

    head = f"fastnorm benchmarks, {run.title}"
    lines = [f"{BOLD}{head}{RESET}" if colour else head, *wrapped(run.versions), run.copy]
    lines += wrapped(run.environment.note)
    lines += ["", *wrapped(LEGEND)]
    for one in tables(run):
        lines += _table(one, colour, width)
    rows = [
        [*map(Cell, row[:3], row[:3]), *(Cell(text, 0.0) for text in row[3:])]
        for row in summary_rows(run.lines)
    ]
    lines += ["", f"{BOLD}Summary{RESET}" if colour else "Summary", *aligned(SUMMARY, rows, False)]
    lines += ["", *wrapped(SUMMARY_LEGEND)]
    lost = worst(run)
    lines += [
        "",
        "Worst rows against the best other:" if lost else "No row is slower than others'.",
    ]
    lines += [f"  {sentence(line)}" for line in lost]
    return "\n".join(lines)
