"""The report as a person reads it in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from benchmarks import targets
from benchmarks.report.asked import (
    TARGET_LEGEND,
    memory_sentence,
    missed_sentence,
    target_header,
    target_rows,
)
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
FIXED = 6  # columns that are never left out
MOST = 10  # rows that miss a target: report.md has them all
PROSE = 100  # characters in a line of it where nobody says how wide the terminal is


def _widths(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[int]:
    return [max(len(name), *(len(row[i].text) for row in rows)) for i, name in enumerate(header)]


def aligned(header: Sequence[str], rows: Sequence[Sequence[Cell]], colour: bool) -> list[str]:
    """Columns as wide as their widest cell; numbers to the right, words to the left."""
    widths = _widths(header, rows)
    left = [all(isinstance(row[i].order, str) for row in rows) for i in range(len(header))]
    named = [name in ("against the best", "target") for name in header]
    left = [is_left or is_named for is_left, is_named in zip(left, named, strict=True)]

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
    """The columns that `width` characters hold: providers other than torch and fastnorm are left
    out from the right, then memory and target, which the lines at the end sum up."""
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
    below += ["where the host's time goes: in report.md"] if one.profiles else []
    for note in (*below, *one.notes):
        lines += textwrap.wrap(
            note, width or len(note) + 2, initial_indent="  ", subsequent_indent="    "
        )
    return lines


def _words(rows: Sequence[Sequence[str]], words: int) -> list[list[Cell]]:
    """Cells of which the first are words, the others numbers."""
    return [
        [*(Cell(text, text) for text in row[:words]), *(Cell(text, 0.0) for text in row[words:])]
        for row in rows
    ]


def _targets(run: Run, colour: bool) -> list[str]:
    """A line for every family, and the rows that miss their targets by most."""
    if run.environment.on_cpu:
        return ["", targets.NONE_ON_CPU]
    heading = f"{BOLD}Targets{RESET}" if colour else "Targets"
    rows = _words(target_rows(run.lines), 1)
    lines = ["", heading, *aligned(target_header(), rows, False), ""]
    missed = targets.missed(run.lines)
    lines.append("Rows that miss a target:" if missed else "No row misses a target.")
    lines += [f"  {missed_sentence(one)}" for one in missed[:MOST]]
    left = len(missed) - MOST
    return [*lines, f"  and {left} more, in report.md"] if left > 0 else lines


def terminal(run: Run, colour: bool = False, width: int | None = None) -> str:
    """Every line of the run, a summary and the worst rows last, where the eye is; in lines of
    `width` characters, or as long as the tables are."""

    def wrapped(text: str) -> list[str]:
        return textwrap.wrap(text, width or PROSE)

    head = f"fastnorm benchmarks, {run.title}"
    lines = [f"{BOLD}{head}{RESET}" if colour else head, *wrapped(run.versions), run.copy]
    lines += wrapped(run.environment.note)
    lines += ["", *wrapped(LEGEND)]
    lines += [] if run.environment.on_cpu else wrapped(TARGET_LEGEND)
    for one in tables(run):
        lines += _table(one, colour, width)
    rows = _words(summary_rows(run.lines), 3)
    lines += ["", f"{BOLD}Summary{RESET}" if colour else "Summary", *aligned(SUMMARY, rows, False)]
    lines += ["", *wrapped(SUMMARY_LEGEND)]
    if told := memory_sentence(run.lines):
        lines += ["", *wrapped(told)]
    lost = worst(run)
    lines += [
        "",
        "Worst rows against the best other:" if lost else "No row is slower than others'.",
    ]
    lines += [f"  {sentence(line)}" for line in lost]
    return "\n".join(lines + _targets(run, colour))
