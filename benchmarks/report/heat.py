"""Heat maps of speed over shapes, in which losses are as visible as wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.lines import (
    DEVICE_MODES,
    TIE,
    Against,
    Line,
    Run,
    shape_text,
    size_text,
    timed,
)
from benchmarks.report.style import (
    SCALE,
    STEP_NAMES,
    STEPS,
    ink,
    new_figure,
    step,
    title,
    to_png,
)


def _cell_text(found: Against) -> str:
    text = f"{found.ratio:.2f}" if found.ratio < 9.95 else f"{found.ratio:.0f}"
    return f"({text})" if found.verdict == TIE else text


def _cells(panel: Any, places: Mapping[tuple[int, int], Line], which: str, size: float) -> None:
    from matplotlib.patches import Rectangle

    style: dict[str, Any] = {"edgecolor": "#bbbbbb", "lw": 0.6}
    for (row, column), line in places.items():
        found: Against | None = getattr(line, which)
        if found is not None:
            index = step(found.ratio)
            text, paper, colour = _cell_text(found), SCALE[index], ink(index)
        else:
            text, paper, colour = "-" if timed(line.ours) else "failed", "#eeeeee", "black"
        panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=paper, **style))
        panel.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _modes(panel: Any, columns: Sequence[tuple[str, str]]) -> None:
    """Variants above the map; modes below it, and a line between them."""
    from matplotlib.ticker import FixedFormatter, FixedLocator

    labels = [variant or "plain" for variant, _ in columns]
    panel.set_xticks(range(len(columns)), labels, rotation=40, ha="left", fontsize=9)
    panel.xaxis.tick_top()
    modes = [mode for _, mode in columns]
    names = sorted(set(modes), key=modes.index)
    centres = [modes.index(mode) + (modes.count(mode) - 1) / 2 for mode in names]
    below = panel.secondary_xaxis("bottom")
    below.xaxis.set_major_locator(FixedLocator(centres))
    below.xaxis.set_major_formatter(FixedFormatter(names))
    below.tick_params(length=0)
    for mode in names[1:]:
        panel.axvline(modes.index(mode) - 0.5, color="black", lw=1.5)


def _scale_bar(figure: Any, panels: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap(SCALE[1:-1]).with_extremes(under=SCALE[0], over=SCALE[-1])
    norm = BoundaryNorm(STEPS, len(SCALE) - 2)
    thin = 0.3 / figure.get_figheight()  # as high, and so as wide, below a low map
    place = {"location": "bottom", "shrink": 0.6, "aspect": 36, "fraction": thin, "pad": 0.01}
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=panels, extend="both", spacing="uniform", **place
    )
    bar.set_ticks(STEPS, labels=STEP_NAMES, fontsize=9)
    figure.supxlabel(
        "their median time over ours. Red: fastnorm is slower; blue: faster; (in brackets): within "
        "the p20-p80 noise; -: the other has no time; empty: not measured",
        fontsize=10,
    )


def heat_picture(run: Run, lines: Sequence[Line], name: str) -> bytes:
    """Speed over shapes, against torch and against the best other."""
    shapes = sorted({(line.mebibytes, line.shape) for line in lines})
    columns = sorted(
        {(line.variant, line.mode) for line in lines},
        key=lambda column: (DEVICE_MODES.index(column[1]), column[0]),
    )
    figure, panels = new_figure(1, 2, 3.1 + 0.24 * len(shapes), sharey=True)
    places = {
        (shapes.index((line.mebibytes, line.shape)), columns.index((line.variant, line.mode))): line
        for line in lines
    }
    names = (("torch", "against torch eager"), ("best", "against the best other, torch included"))
    for (which, heading), panel in zip(names, panels[0], strict=True):
        _cells(panel, places, which, 8.5 if len(columns) < 10 else 7.5)
        panel.set_title(heading, fontsize=11)
        panel.set_xlim(-0.5, len(columns) - 0.5)
        panel.set_ylim(len(shapes) - 0.5, -0.5)
        _modes(panel, columns)
        labels = [f"{shape_text(shape)},  {size_text(mib)}" for mib, shape in shapes]
        panel.set_yticks(range(len(shapes)), labels, fontsize=9)
        panel.tick_params(length=0)
    panels[0][0].set_ylabel("shape, and size of the input")
    _scale_bar(figure, panels)
    title(figure, run, f"{name}: speed of fastnorm")
    return to_png(figure)
