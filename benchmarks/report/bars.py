"""Bars: peak memory and throughput of models, host time of calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.lines import Line, Run, shape_text, time_text, timed
from benchmarks.report.style import colour_of, legend, new_figure, patches, title, to_png

Groups = Sequence[tuple[str, Mapping[str, tuple[float, str]]]]  # name, provider -> bar and label


def bars(panel: Any, groups: Groups, colours: Mapping[str, tuple[str, str]], room: float) -> None:
    """Groups of horizontal bars, from top to bottom, each with its number; `room` to the right of
    the longest bar is for that number."""
    longest = max((value for _, values in groups for value, _ in values.values()), default=1)
    at, ticks = 0.0, []
    for _, values in groups:
        ticks.append(at + max(len(values) - 1, 0) / 2)
        for name in colours:
            if name in values:
                value, text = values[name]
                panel.barh(at, value, height=0.85, color=colours[name][0])
                paper = {"facecolor": "white", "lw": 0, "pad": 0.6}
                x = value + 0.006 * longest
                panel.text(x, at, text, va="center", fontsize=8.5, bbox=paper)
                at += 1
        at += 0.8
    panel.set_yticks(ticks, [name for name, _ in groups], fontsize=9.5)
    panel.set_ylim(at - 0.8, -0.8)
    panel.set_xlim(0, longest * (1 + room))
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)


def _height(groups: Groups) -> float:
    return 2.0 + 0.19 * sum(len(values) + 0.8 for _, values in groups)


def _drawn(colours: Mapping[str, Any], *every: Groups) -> list[str]:
    named = {name for groups in every for _, values in groups for name in values}
    return [name for name in colours if name in named]


def models_picture(run: Run, lines: Sequence[Line]) -> bytes:
    """Peak memory, where it is known, and throughput of training steps."""
    memory: list[tuple[str, dict[str, tuple[float, str]]]] = []
    speed: list[tuple[str, dict[str, tuple[float, str]]]] = []
    for line in lines:
        name = f"{line.variant}\n{shape_text(line.shape)} {line.dtype}"
        rows = {p: row for p, row in line.rows.items() if timed(row)}
        peaks = {p: row.peak_memory_mib for p, row in rows.items() if row.peak_memory_mib}
        memory.append((name, {p: (mib, f"{mib:,.0f}") for p, mib in peaks.items()}))
        base = rows["torch"].ms_median if "torch" in rows else None
        ratios = {}
        for provider, row in rows.items():
            if base and row.ms_median:
                each = row.samples_per_second
                text = f"{base / row.ms_median:.2f}x" + (f", {each:,.4g}/s" if each else "")
                ratios[provider] = (base / row.ms_median, text)
        speed.append((name, ratios))
    counted = any(values for _, values in memory)  # on a CPU nobody counts memory
    figure, panels = new_figure(1, 1 + counted, max(_height(memory), _height(speed)))
    colours = colour_of(run.providers)
    left, right = panels[0][0], panels[0][-1]
    bars(right, speed, colours, 0.35 if counted else 0.2)
    right.set_xlabel("speed over torch's (and samples per second), higher is better")
    right.axvline(1, color="black", lw=1, ls=":")
    if counted:
        right.set_yticks([])
        bars(left, memory, colours, 0.2)
        left.set_xlabel("peak memory of a training step (MiB), lower is better")
    names = _drawn(colours, memory, speed)
    legend(figure, patches(names, colours), names)
    title(figure, run, "Models: one training step")
    return to_png(figure)


def host_picture(run: Run, lines: Sequence[Line], heading: str) -> bytes:
    """Host time of a call or of its backward."""
    groups = []
    for line in lines:
        times = {p: 1e3 * row.ms_median for p, row in line.rows.items() if row.ms_median and row.ok}
        label = f"{line.variant or line.op}\n{shape_text(line.shape)} {line.dtype}"
        groups.append((label, {p: (value, time_text(value)) for p, value in times.items()}))
    figure, panels = new_figure(1, 1, _height(groups))
    colours = colour_of(run.providers)
    bars(panels[0][0], groups, colours, 0.1)
    panels[0][0].set_xlabel("median host time of a call (µs), lower is better")
    names = _drawn(colours, groups)
    legend(figure, patches(names, colours), names)
    title(figure, run, heading)
    return to_png(figure)
