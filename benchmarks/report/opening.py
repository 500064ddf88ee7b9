"""What the README opens with: how much faster a training step is, and how much less memory it
takes. Two pictures of the models that a GPU was given; none of a CPU, whose models say nothing of
one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.report.bars import Groups, bars
from benchmarks.report.lines import Line, Run, timed
from benchmarks.report.style import colour_of, legend, new_figure, patches, title, to_png
from benchmarks.schema import Row

SPEED, MEMORY = "opening-speed.png", "opening-memory.png"
ASKED = {
    SPEED: "How much faster is a training step?",
    MEMORY: "How much less memory does it take?",
}
NAMES = {
    "torch": "torch eager",
    "fastnorm-replaced": "replace_",
    "fastnorm": "replace_ and fuse_",
    "torch.compile": "torch.compile",
    "fastnorm-replaced-compiled": "replace_, compiled",
    "fastnorm-compiled": "replace_ and fuse_, compiled",
}
HALF = 7.5  # inches: two stand beside each other on a wide screen


def steps(run: Run) -> list[Line]:
    """The models of a GPU whose step torch and one of ours have a time of."""
    if run.environment.on_cpu:
        return []
    return [line for line in run.lines if line.op == "model" and line.torch is not None]


def _name(line: Line) -> str:
    """Of a model, and whether it is a stand-in."""
    own = any(row.note.startswith("our own") for row in line.rows.values())
    return line.variant + ("\n(of our own)" if own else "")


def _speed(row: Row, torch: Row) -> tuple[float, str] | None:
    if not (row.ms_median and torch.ms_median):
        return None
    ratio = torch.ms_median / row.ms_median
    each = f", {row.samples_per_second:,.4g}/s" if row.samples_per_second else ""
    return ratio, f"{ratio:.2f}x{each}"


def _memory(row: Row, torch: Row) -> tuple[float, str] | None:
    if not (row.peak_memory_mib and torch.peak_memory_mib):
        return None
    ratio = row.peak_memory_mib / torch.peak_memory_mib
    return ratio, f"{ratio:.2f}x, {row.peak_memory_mib / 1024:.3g} GiB"


def groups(lines: list[Line], of: Callable[[Row, Row], tuple[float, str] | None]) -> Groups:
    """For every model the bar and the label of each provider, in torch's own numbers."""
    found = []
    for line in lines:
        given = {
            name: of(line.rows[name], line.rows["torch"])
            for name in NAMES
            if timed(line.rows.get(name))
        }
        each = {name: one for name, one in given.items() if one is not None}
        if each:
            found.append((_name(line), each))
    return found


def _picture(run: Run, given: Groups, heading: str, label: str) -> bytes:
    figure, panels = new_figure(1, 1, 2.2 + 0.17 * sum(len(v) + 0.8 for _, v in given), HALF)
    panel: Any = panels[0][0]
    named = [name for name in NAMES if any(name in values for _, values in given)]
    colours = colour_of(named)
    bars(panel, given, colours, 0.42)
    panel.axvline(1, color="black", lw=1, ls=":")
    panel.set_xlabel(label)
    legend(figure, patches(named, colours), [NAMES[name] for name in named], HALF)
    title(figure, run, heading)
    return to_png(figure)


def opening_pictures(run: Run) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of both, as far as there are numbers for them."""
    lines = steps(run)
    if given := groups(lines, _speed):
        label = "speed over torch eager's (and samples per second), higher is better"
        yield SPEED, _picture(run, given, ASKED[SPEED], label)
    if given := groups(lines, _memory):
        label = "peak memory over torch eager's, lower is better"
        yield MEMORY, _picture(run, given, ASKED[MEMORY], label)
