"""The README's section on performance, from the newest results files of each device."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

from benchmarks import targets
from benchmarks.report.asked import (
    memory_sentence,
    share_sentence,
    target_header,
    target_rows,
)
from benchmarks.report.lines import Run, runs, state
from benchmarks.report.markdown import markdown_table
from benchmarks.report.opening import ASKED, MEMORY, SPEED, steps
from benchmarks.report.pictures import OVERVIEW
from benchmarks.report.sides import LEGEND, side_header, side_rows
from benchmarks.report.tables import (
    SUMMARY,
    SUMMARY_LEGEND,
    summary_rows,
    table,
)
from benchmarks.schema import Results, ResultsError, load

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OPENING = "<!-- opening:begin -->", "<!-- opening:end -->"
RESULTS = Path("benchmarks", "results")
NO_GPU = (
    "**No GPU has been measured yet**: there is no results file of one in `benchmarks/results/`."
)
ON_CPU = (
    "Measured on a CPU, where fastnorm calls torch's own functions: the table shows what the call "
    "itself costs, and how much this machine's times scatter. It says nothing about a GPU."
)
LARGEST = "largest_batch"  # the op of rows whose note is what was measured
WIDTH = 120  # characters in a line of the README


def _prose(text: str) -> list[str]:
    return [*textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False), ""]


class Measured(NamedTuple):
    """What one state of the code measured on one device, and the files, the oldest first."""

    run: Run
    paths: list[Path]


def newest(root: Path) -> list[Measured]:
    """Of each device, GPUs first, the newest results file and all others of its state of the code:
    a suite is measured in parts, and none of them hides another."""
    found: dict[str, list[tuple[Path, Results]]] = {}
    for path in sorted((root / RESULTS).glob("*/*.json")):
        results = load(path)
        e = results.environment
        if path.parent.name != e.slug:
            raise ResultsError(f"{path} is of {e.device!r}: its folder is {RESULTS / e.slug}")
        if results.rows:
            found.setdefault(e.slug, []).append((path, results))
    measured = []
    for _, files in sorted(found.items()):
        files.sort(key=lambda file: file[1].environment.timestamp)
        last = state(files[-1][1].environment)
        files = [file for file in files if state(file[1].environment) == last]
        paths, results_of = zip(*files, strict=True)
        measured += [Measured(run, list(paths)) for run in runs(results_of)]
    return sorted(measured, key=lambda one: one.run.environment.on_cpu)


def _device(run: Run, paths: list[Path], root: Path) -> list[str]:
    """Heading, summary, models, pictures and caption of one device."""
    told = [f"### {run.title}", ""]
    if run.environment.on_cpu:
        told += _prose(f"{ON_CPU} {targets.NONE_ON_CPU}")
    told += _prose(run.environment.note) if run.environment.note else []
    models = [line for line in run.lines if line.op == "model"]
    limits = [line for line in run.lines if line.op == LARGEST]
    others = [line for line in run.lines if line.op not in ("model", LARGEST)]
    if others:
        told += [*markdown_table(SUMMARY, summary_rows(others), 3), "", *_prose(SUMMARY_LEGEND)]
    told += _prose(sentence) if (sentence := memory_sentence(run.lines)) else []
    if not run.environment.on_cpu:
        told += ["Rows that meet what `benchmarks/targets.py` asks, and geometric means:", ""]
        told += [*markdown_table(target_header(), target_rows(run.lines), 1), ""]
        if sides := side_rows(run):
            told += [*markdown_table(side_header(run), sides, 3), "", *_prose(LEGEND)]
    if models:
        one = table("models", models, run)
        rows = ([cell.text for cell in row] for row in one.rows)
        told += [f"Models: {one.unit}.", "", *markdown_table(one.header, rows, 4), ""]
        told += _prose(sentence) if (sentence := share_sentence(models)) else []
    for line in limits:
        each = (f"{name}: {row.note}" for name, row in line.rows.items())
        told += _prose(f"Largest batch of {line.variant}: {'; '.join(each)}.")
    folder = paths[0].parent
    there = [picture.name for picture in sorted(folder.glob("*.png"))]
    link = folder.relative_to(root).as_posix()
    if OVERVIEW in there:
        told += [f"![Speed of fastnorm, {run.title}]({link}/{OVERVIEW})", ""]
    apart = (OVERVIEW, SPEED, MEMORY)
    more = [f"[{name.removesuffix('.png')}]({link}/{name})" for name in there if name not in apart]
    if more:
        told += _prose("Pictures: " + ", ".join(more) + ".")
    files = ", ".join(f"[{path.name}]({link}/{path.name})" for path in paths)
    every = f"Every row: {files}."
    return [*told, *_prose(f"{run.title}; {run.versions}; {run.copy}. {every}")]


def readme_table(root: Path) -> str:
    """What stands between the markers of the README of this checkout."""
    found = newest(root)
    told = [""]
    if all(run.environment.on_cpu for run, _ in found):
        told += [NO_GPU, ""]
    for run, paths in found:
        told += _device(run, paths, root)
    return "\n".join(told)


def readme_opening(root: Path) -> str:
    """What stands near the top of the README: of every GPU whose models were measured, how much
    faster and how much less memory. Nothing where there is none."""
    told: list[str] = []
    for run, paths in newest(root):
        folder = paths[0].parent
        link = folder.relative_to(root).as_posix()
        there = [name for name in (SPEED, MEMORY) if (folder / name).is_file()]
        if there and steps(run):
            e = run.environment
            told += _prose(
                f"Training steps on {e.device} at {e.commit[:10]}, torch {e.torch}, before and "
                "after `replace_` and `fuse_`, and each of them compiled "
                "([every number](#performance)):"
            )
            # half a page each: as HTML, because Markdown knows no width
            told += [
                f'<img src="{link}/{name}" width="49%" alt="{ASKED[name]} {run.title}">'
                for name in there
            ]
            told.append("")
    return "\n".join(["", *told] if told else [])


def between_markers(text: str, begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    """The README before, between and after its markers; ResultsError where they are not."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ResultsError(f"README.md must have {begin} and, after it, {end}, each once")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before, inside.removeprefix("\n"), after


def rewrite(root: Path) -> bool:
    """Write table and opening into the README; whether that changed it."""
    readme = root / "README.md"
    old = new = readme.read_text(encoding="utf-8")
    written = (((BEGIN, END), readme_table(root)), (OPENING, readme_opening(root)))
    for (begin, end), told in written:
        before, _, after = between_markers(new, begin, end)
        new = f"{before}{begin}\n{told}{end}{after}"
    readme.write_text(new, encoding="utf-8")
    return new != old
