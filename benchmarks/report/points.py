"""Pictures of points: floor fraction by size, and the overview of all speeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report.lines import (
    DEVICE_MODES,
    TIE,
    Line,
    Run,
    geometric_mean,
    grouped,
    is_ours,
    size_text,
    timed,
)
from benchmarks.report.style import SCALE, colour_of, legend, new_figure, step, title, to_png

TICKS = (0.1, 0.25, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


def _middle(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The median of the points of each factor of two of size."""
    octaves: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        octaves.setdefault(round(math.log2(x)), []).append((x, y))
    return [
        (statistics.median(x for x, _ in near), statistics.median(y for _, y in near))
        for _, near in sorted(octaves.items())
    ]


def _floor_panel(panel: Any, lines: Sequence[Line], colours: Mapping[str, tuple[str, str]]) -> None:
    """One faint point per shape, and a line through their medians."""
    for i, (provider, (colour, marker)) in enumerate(colours.items()):
        rows = [(line.mebibytes, line.rows.get(provider)) for line in lines]
        found = [
            (size, row.floor_fraction)
            for size, row in rows
            if row is not None and timed(row) and row.floor_fraction is not None
        ]
        if not found:
            continue
        aside = 2 ** (0.05 * (i - len(colours) / 2))  # points of one size stand side by side
        ours = is_ours(provider)
        x, y = [size * aside for size, _ in found], [value for _, value in found]
        faint = {"s": 22, "alpha": 0.55} if ours else {"s": 16, "alpha": 0.4}
        panel.scatter(x, y, color=colour, marker=marker, linewidths=0, **faint)
        middle = _middle(found)
        x, y = [size * aside for size, _ in middle], [value for _, value in middle]
        width, order = 2.4 if provider == "fastnorm" else 1.3, 3 if ours else 2
        panel.plot(x, y, color=colour, marker=marker, ms=6, label=provider, lw=width, zorder=order)


def _size_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """The sizes with room on both sides, and never so near each other that no tick is between."""
    sizes = [line.mebibytes for line in lines]
    low, high = min(sizes) / 1.5, max(sizes) * 1.5
    widen = max(1.0, math.sqrt(16 * low / high))
    return low / widen, high * widen


def floor_picture(run: Run, lines: Sequence[Line], name: str) -> bytes:
    """Floor fraction by size: variants from top to bottom, modes from left to right."""
    from matplotlib.ticker import FuncFormatter

    variants = sorted({line.variant for line in lines})
    modes = [mode for mode in DEVICE_MODES if any(line.mode == mode for line in lines)]
    every = (row.floor_fraction or 0 for line in lines for row in line.rows.values())
    highest = 1.05 * max(1.03, *every)
    height = 1.9 + 3.1 * len(variants)
    figure, panels = new_figure(len(variants), len(modes), height, sharex=True, sharey=True)
    colours = colour_of(run.providers)
    for variant, row in zip(variants, panels, strict=True):
        for mode, panel in zip(modes, row, strict=True):
            here = [line for line in lines if (line.variant, line.mode) == (variant, mode)]
            _floor_panel(panel, here, colours)
            panel.set_title(f"{variant} {mode}".strip(), fontsize=11)
            panel.axhline(1, color="black", lw=1, ls=":")
            panel.set_xscale("log", base=2)
            panel.set_xlim(*_size_limits(lines))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_text(x)))
            panel.grid(alpha=0.25)
            panel.set_ylim(0, highest)
    for panel in panels[-1]:
        panel.set_xlabel("size of the input (points: shapes; lines: their medians)")
    for panel in panels[:, 0]:
        panel.set_ylabel("floor fraction (1 = a plain copy)")
    drawn = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    names = [provider for provider in colours if provider in drawn]
    handles = [drawn[provider] for provider in names]
    legend(figure, handles, names)
    title(figure, run, f"{name}: floor fraction by size, higher is better")
    return to_png(figure)


def _strip(panel: Any, groups: Sequence[Sequence[Line]], which: str) -> None:
    """One dot per line, coloured as in the heat maps, small where it is within the noise, and a bar
    at the geometric mean."""
    found = [[one for line in group if (one := getattr(line, which))] for group in groups]
    ratios = [[one.ratio for one in group] for group in found]
    for at, (group, values) in enumerate(zip(found, ratios, strict=True)):
        # dots of one group in five rows, so that equal ones do not hide each other
        heights = [at + 0.13 * (i % 5 - 2) for i in range(len(values))]
        colours = [SCALE[step(value)] for value in values]
        sizes = [9 if one.verdict == TIE else 30 for one in group]
        edge = {"edgecolors": "#555555", "linewidths": 0.5, "zorder": 3}
        panel.scatter(values, heights, s=sizes, c=colours, **edge)
        if mean := geometric_mean(values):
            panel.plot([mean, mean], [at - 0.42, at + 0.42], color="black", lw=2)
            panel.annotate(
                f"{mean:.2f}", (1.01, at), xycoords=("axes fraction", "data"), va="center"
            )
    panel.axvline(1, color="black", lw=1, ls=":")
    panel.set_xscale("log", base=2)
    every = [1.0] + [value for values in ratios for value in values]
    panel.set_xlim(min(0.75, min(every)) / 1.05, 1.05 * max(1.33, max(every)))


def overview_picture(run: Run) -> bytes:
    """The speed of every line, op by op: what the README shows."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    groups = {
        key: lines
        for key, lines in grouped(run.lines, "family", "layout", "mode").items()
        if any(line.best for line in lines)
    }
    figure, panels = new_figure(1, 2, 2.2 + 0.36 * len(groups), sharey=True)
    names = (("torch", "against torch eager"), ("best", "against the best other, torch included"))
    for (which, name), panel in zip(names, panels[0], strict=True):
        _strip(panel, list(groups.values()), which)
        panel.set_title(name, fontsize=11)
        low, high = panel.get_xlim()
        inside = [tick for tick in TICKS if low <= tick <= high]
        panel.xaxis.set_major_locator(FixedLocator(inside))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}"))
        panel.grid(axis="x", alpha=0.25)
        panel.set_xlabel("their median time over ours (above 1 fastnorm is faster)")
        panel.set_yticks(range(len(groups)), [", ".join(key) for key in groups], fontsize=9.5)
        panel.set_ylim(len(groups) - 0.5, -0.5)
    figure.supxlabel(
        "one dot per shape, variant and dtype; red: fastnorm is slower, blue: faster; "
        "small dot: within the p20-p80 noise; bar and number: geometric mean",
        fontsize=9.5,
    )
    title(figure, run, "Speed of fastnorm")
    return to_png(figure)
