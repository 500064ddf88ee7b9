"""The report of a run as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks import targets
from benchmarks.report.asked import (
    TARGET_LEGEND,
    memory_sentence,
    missed_sentence,
    target_header,
    target_rows,
)
from benchmarks.report.lines import Run
from benchmarks.report.tables import (
    LEGEND,
    SUMMARY,
    SUMMARY_LEGEND,
    sentence,
    summary_rows,
    tables,
    worst,
)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> list[str]:
    """The first `words` columns are words, the others numbers."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = ["---"] * words + ["---:"] * (len(header) - words)
    return [line(header), "|" + "|".join(ruler) + "|", *map(line, rows)]


def _targets(run: Run) -> list[str]:
    if run.environment.on_cpu:
        return [targets.NONE_ON_CPU]
    missed = [f"- {missed_sentence(one)}" for one in targets.missed(run.lines)]
    told = ["", "Missed:", "", *missed] if missed else ["", "No row misses a target."]
    return [*markdown_table(target_header(), target_rows(run.lines), 1), *told]


def markdown(run: Run, pictures: Sequence[str] = ()) -> str:
    """The report of a run as Markdown."""
    lines = [f"# fastnorm benchmarks, {run.title}", "", f"{run.versions}; {run.copy}.", ""]
    if run.environment.note:
        lines += [run.environment.note, ""]
    lines += [*markdown_table(SUMMARY, summary_rows(run.lines), 3), "", SUMMARY_LEGEND, ""]
    if told := memory_sentence(run.lines):
        lines += [told, ""]
    if lost := worst(run):
        lines += ["## Worst rows", "", *(f"- {sentence(line)}" for line in lost), ""]
    lines += ["## Targets", "", *_targets(run), ""]
    if pictures:
        lines += ["## Pictures", "", *(f"![{name}]({name})" for name in pictures), ""]
    for one in tables(run):
        rows = ([cell.text for cell in row] for row in one.rows)
        lines += [f"## {one.title}", "", f"Cells: {one.unit}.", ""]
        lines += [*markdown_table(one.header, rows, 4), ""]
        notes = [*one.notes, *one.profiles]
        lines += [*(f"- {note}" for note in notes), ""] if notes else []
    legends = [LEGEND] if run.environment.on_cpu else [LEGEND, "", TARGET_LEGEND]
    return "\n".join([*lines, *legends, ""])
