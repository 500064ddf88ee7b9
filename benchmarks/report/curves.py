"""The picture of a training: losses over each other, their distance, and the final tensors'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from benchmarks.report.style import new_figure, to_png
from benchmarks.training_file import LIMIT, Trained, Training, faults, limit, share

# torch's first run is wide and pale, so that ours is seen upon it
STYLES = (
    {"color": "#a6a6a6", "lw": 5.0, "ls": "-"},
    {"color": "#e69f00", "lw": 1.4, "ls": "-"},
    {"color": "#772200", "lw": 1.4, "ls": ":"},
)
OURS = {"color": "#0072b2", "lw": 1.6, "ls": "--"}
LEAST = 1e-9  # what equal numbers are drawn at, where the scale is logarithmic


def _styles(names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    *torchs, ours = names
    given = {name: dict(STYLES[min(i, len(STYLES) - 1)]) for i, name in enumerate(torchs)}
    return {**given, ours: dict(OURS)}


def _losses(panel: Any, trained: Trained) -> None:
    from matplotlib.ticker import FuncFormatter

    for name, style in _styles(list(trained.losses)).items():
        curve = trained.losses[name]
        panel.plot(range(1, len(curve) + 1), curve, label=name, **style)
    panel.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_formatter(plain)
    panel.yaxis.set_minor_formatter(plain if min(map(min, trained.losses.values())) > 0.5 else "")
    panel.set_ylabel("loss")
    panel.set_title(trained.name, fontsize=12)


def _distances(panel: Any, trained: Trained) -> None:
    """How far the losses of the other runs have been from torch's first up to each step."""
    first, *others = trained.losses
    styles = _styles(list(trained.losses))
    for name in others:
        pairs = zip(trained.losses[name], trained.losses[first], strict=False)
        apart = [max(abs(a - b) / abs(b), LEAST) if b else LEAST for a, b in pairs]
        panel.plot(range(1, len(apart) + 1), list(accumulate(apart, max)), **styles[name])
    panel.set_yscale("log")
    panel.set_ylabel("largest relative distance so far\nfrom torch's loss (equal: 1e-9)")
    panel.set_xlabel("step")


def _tensors(panel: Any, trained: Trained) -> None:
    """A point per tensor that is not the same in every run: what torch's runs spread, and how far
    ours is."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("largest distance between two of torch's runs")
    panel.set_ylabel("distance of fastnorm\nfrom torch (equal: 1e-9)")
    if trained.compared is None:
        panel.text(0.5, 0.5, "interrupted: nothing compared", transform=panel.transAxes)
        return
    every = trained.compared.tensors.values()
    pairs = [(max(x, LEAST), max(y, LEAST)) for x, y in every if x or y]
    pairs = pairs or [(LEAST, LEAST)]
    low, high = min(x for x, _ in pairs) / 2, max(x for x, _ in pairs) * 2
    line = [low * (high / low) ** (i / 50) for i in range(51)]
    panel.plot(line, line, color="black", lw=1, ls=":", label="as far as torch from itself")
    panel.plot(
        line,
        [limit(x) for x in line],
        color="#d55e00",
        lw=1.6,
        label=f"limit: {LIMIT:g}x and one rounding",
    )
    panel.scatter(*zip(*pairs, strict=True), s=26, color=OURS["color"], label="a final tensor")
    worst = max(map(share, every))
    equal = f" ({len(every) - len(pairs)} equal in all runs)" if len(every) > len(pairs) else ""
    told = f"{len(every)} final tensors{equal}, the worst at {worst:.2f} of its limit"
    panel.set_title(told, fontsize=10)
    panel.legend(loc="best", fontsize=9)


def curves_picture(training: Training) -> bytes:
    """One column per model: losses, their distances from torch's, and the final tensors."""
    models, environment = training.models, training.environment
    figure, panels = new_figure(3, len(models), 12.0)
    for column, trained in enumerate(models):
        for row, draw in enumerate((_losses, _distances, _tensors)):
            panel = panels[row][column]
            draw(panel, trained)
            panel.grid(alpha=0.25)
            panel.set_axisbelow(True)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    where = "on a CPU, " if environment.on_cpu else ""
    told = training.settings
    wrong = [trained.name for trained in models if faults(trained)]
    verdict = f"NOT the same training: {', '.join(wrong)};" if wrong else "The same training"
    figure.suptitle(
        f"{verdict} {where}{told['steps']} steps of {told['batch']} digits, "
        f"fastnorm's backend: {told['backend']}\n{environment.device}, fastnorm "
        f"{environment.fastnorm} at {environment.commit[:10]}, torch {environment.torch}, "
        f"{environment.timestamp[:10]}",
        fontsize=13,
    )
    return to_png(figure)
