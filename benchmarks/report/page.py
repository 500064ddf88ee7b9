"""One HTML page that opens from disk: pictures and tables inside it, nothing fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape

from benchmarks import targets
from benchmarks.report.asked import (
    TARGET_LEGEND,
    memory_sentence,
    missed_sentence,
    target_header,
    target_rows,
)
from benchmarks.report.lines import Run
from benchmarks.report.style import SCALE, STEP_NAMES, ink, step
from benchmarks.report.tables import (
    LEGEND,
    SUMMARY,
    SUMMARY_LEGEND,
    Cell,
    Table,
    sentence,
    summary_rows,
    tables,
    worst,
)

Pictures = Sequence[tuple[str, bytes]]  # name and PNG

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1600px;
       padding: 0 1rem; color: #1a1a1a; background: white; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.35rem; border-top: 3px solid #333; padding-top: .6rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
.cpu { border: 2px solid #333; padding: .5rem .8rem; font-weight: bold; }
.wide { overflow-x: auto; }
img { max-width: min(100%, 1200px); height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .5rem; border: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { background: #f0f0f0; } th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid #0072b2; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
td.word, th.word { text-align: left; } td.none { color: #8a1c1c; font-style: italic; }
.note { color: #444; font-size: 13px; } .scale { display: flex; margin: .5rem 0; }
.scale span { padding: .15rem .6rem; font-size: 12px; }
.tools { position: sticky; top: 0; background: white; padding: .5rem 0;
         border-bottom: 1px solid #ccc; }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, row = head.parentElement;
    const body = row.closest("table").tBodies[0], at = [...row.children].indexOf(head);
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of row.children) other.removeAttribute("aria-sort");
    head.ariaSort = sign === 1 ? "ascending" : "descending";
    const value = (tr) => tr.children[at].dataset.order;
    const number = [...body.rows].every((tr) => !isNaN(value(tr)));
    const compare = number ? (a, b) => a - b : (a, b) => a.localeCompare(b);
    body.append(...[...body.rows].sort((a, b) => sign * compare(value(a), value(b))));
  });
}
const words = document.getElementById("words"), lost = document.getElementById("lost");
function filter() {
  const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const tr of document.querySelectorAll("table.rows tbody tr")) {
    const text = tr.dataset.text;
    tr.hidden = !wanted.every((word) => text.includes(word)) || (lost.checked && !tr.dataset.lost);
  }
  for (const group of document.querySelectorAll(".group"))
    group.hidden = group.querySelector("tbody tr:not([hidden])") === null;
}
words.addEventListener("input", filter);
lost.addEventListener("change", filter);
"""


def _colours() -> str:
    """The scale of the heat maps, as classes s0 (slowest) to s10."""
    return "\n".join(
        f".s{i} {{ background: {colour}; color: {ink(i)}; }}" for i, colour in enumerate(SCALE)
    )


def _key() -> str:
    middle = len(STEP_NAMES) // 2
    names = [f"≤ {name}" for name in STEP_NAMES[:middle]] + ["1"]
    names += [f"≥ {name}" for name in STEP_NAMES[middle:]]
    spans = (f'<span class="s{i}">{name}</span>' for i, name in enumerate(names))
    return f'<div class="scale">{"".join(spans)}</div>'


def _cell(cell: Cell) -> str:
    classes = []
    if isinstance(cell.order, str):
        classes.append("word")
    if cell.against is not None:
        classes.append(f"s{step(cell.against.ratio)}")
    elif cell.text in ("wrong", "failed", "missing"):
        classes.append("none")
    named = f' class="{" ".join(classes)}"' if classes else ""
    # infinity, for cells without a time, is a number in Python and a word in JavaScript
    order = "1e99" if cell.order == float("inf") else escape(str(cell.order))
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    return f'<td{named}{title} data-order="{order}">{escape(cell.text)}</td>'


def _head(header: Sequence[str], words: Sequence[bool]) -> str:
    cells = (
        f'<th scope="col"{" class=word" if word else ""}><button>{escape(name)}</button></th>'
        for name, word in zip(header, words, strict=True)
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _table(one: Table, identity: str) -> Iterable[str]:
    words = [isinstance(cell.order, str) for cell in one.rows[0]]
    yield f'<div class="group"><h3 id="{identity}">{escape(one.title)}</h3>'
    yield f'<p class="note">Cells: {escape(one.unit)}.</p><div class="wide"><table class="rows">'
    yield _head(one.header, words) + "<tbody>"
    for row in one.rows:
        text = escape(" ".join([one.title, *(cell.text for cell in row)]).lower())
        lost = ' data-lost="1"' if _lost(row) else ""
        yield f'<tr data-text="{text}"{lost}>{"".join(map(_cell, row))}</tr>'
    yield "</tbody></table></div>"
    if told := [*one.notes, *one.profiles]:
        notes = "".join(f"<li>{escape(note)}</li>" for note in told)
        yield f'<ul class="note">{notes}</ul>'
    yield "</div>"


def _lost(row: Sequence[Cell]) -> bool:
    return any(cell.text.startswith("▼") for cell in row)


def _summary_class(column: int, text: str) -> str:
    """Words to the left; a speed has the colour of the scale."""
    if column < 3:
        return ' class="word"'
    speed = re.match(r"([0-9.]+)x", text)
    return f' class="s{step(float(speed[1]))}"' if speed else ""


def _summary(run: Run) -> Iterable[str]:
    yield f'<div class="wide"><table>{_head(SUMMARY, [i < 3 for i in range(len(SUMMARY))])}<tbody>'
    for row in summary_rows(run.lines):
        cells = (
            f'<td{_summary_class(i, text)} data-order="{escape(text.split("x")[0])}">'
            f"{escape(text)}</td>"
            for i, text in enumerate(row)
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield f'</tbody></table></div><p class="note">{escape(SUMMARY_LEGEND)}</p>'


def _targets(run: Run) -> Iterable[str]:
    """Every family's, then the rows that miss theirs, folded."""
    if run.environment.on_cpu:
        return
    header = target_header()
    words = [i == 0 for i in range(len(header))]
    yield f'<h3>Targets</h3><div class="wide"><table>{_head(header, words)}<tbody>'
    for row in target_rows(run.lines):
        cells = (
            f'<td{" class=word" if left else ""} data-order="{escape(text.split("x")[0])}">'
            f"{escape(text)}</td>"
            for text, left in zip(row, words, strict=True)
        )
        yield f"<tr>{''.join(cells)}</tr>"
    missed = targets.missed(run.lines)
    yield f"</tbody></table></div><details><summary>{len(missed)} rows miss a target</summary><ul>"
    yield from (f"<li>{escape(missed_sentence(one))}</li>" for one in missed)
    yield "</ul></details>"


def _section(run: Run, pictures: Pictures, number: int) -> Iterable[str]:
    yield f"<section><h2>{escape(run.title)}</h2>"
    yield f"<p>{escape(run.versions)};<br>{escape(run.copy)}.</p>"
    if run.environment.on_cpu:
        yield (
            '<p class="cpu">Measured on a CPU, where fastnorm is torch\'s own functions. '
            f"Nothing here says anything about a GPU. {targets.NONE_ON_CPU}</p>"
        )
    if run.environment.note:
        yield f"<p>{escape(run.environment.note)}</p>"
    yield from _summary(run)
    if told := memory_sentence(run.lines):
        yield f"<p>{escape(told)}</p>"
    if lost := worst(run):
        yield "<h3>Worst rows against the best other</h3><ul>"
        yield from (f"<li>{escape(sentence(line))}</li>" for line in lost)
        yield "</ul>"
    yield from _targets(run)
    every = [(f"t{number}-{i}", one) for i, one in enumerate(tables(run))]
    links = (f'<a href="#{identity}">{escape(one.title)}</a>' for identity, one in every)
    yield f"<p>Tables: {', '.join(links)}.</p>"
    for name, png in pictures:
        data = base64.b64encode(png).decode()
        alt = escape(f"{name.removesuffix('.png')}, {run.title}")
        yield f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    for identity, one in every:
        yield from _table(one, identity)
    yield "</section>"


def page(runs: Sequence[tuple[Run, Pictures]]) -> str:
    """The page of these runs, a section for each: what is in one section is of one device."""
    titles = escape("; ".join(run.title for run, _ in runs))
    on_gpu = any(not run.environment.on_cpu for run, _ in runs)
    legend = escape(TARGET_LEGEND) if on_gpu else ""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>fastnorm benchmarks, {titles}</title>",
            f"<style>{STYLE}{_colours()}</style></head><body>",
            f"<h1>fastnorm benchmarks<br>{titles}</h1>",
            f'<p class="note">{escape(LEGEND)} A provider\'s cell has the colour of its time over '
            f"ours: red where it is faster than fastnorm, blue where it is slower. {legend}</p>",
            _key(),
            '<p class="tools"><label>Rows with these words <input id="words" type="search" '
            'placeholder="batch_norm silu nhwc"></label> <label><input id="lost" type="checkbox"> '
            "only where fastnorm is slower</label> (click a heading to sort)</p>",
            *(text for i, (run, found) in enumerate(runs) for text in _section(run, found, i)),
            f"<script>{SCRIPT}</script></body></html>",
            "",
        ]
    )
