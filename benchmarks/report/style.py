"""What all pictures share: colours, the figure, and how it becomes a small PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

from benchmarks.report.lines import Run

# after Okabe and Ito, moved where two of them look alike to somebody (tests/test_report_pictures.py
# measures that for every kind of sight); and a marker of its own for each
COLOURS = {
    "torch": ("#4d4d4d", "s"),
    "torch.compile": ("#a6a6a6", "D"),
    "fastnorm": ("#0072b2", "o"),
    "fastnorm-triton": ("#56b4e9", "v"),
    "fastnorm-cuda": ("#009e73", "^"),
    "fastnorm-replaced": ("#9900ff", "<"),
    "fastnorm-replaced-compiled": ("#8866ee", ">"),
    "fastnorm-compiled": ("#001100", "8"),
    "liger-kernel": ("#e69f00", "P"),
    "quack-kernels": ("#d55e00", "X"),
    "flag_gems": ("#c060a0", "*"),
    "inplace-abn": ("#772200", "h"),
    "apex": ("#440055", "d"),
    "attorch": ("#aaff88", "p"),
}
SPARE = (("#eeccaa", "H"), ("#bb9955", "1"))
# our time against theirs, in steps that are as wide and as strong on both sides of 1
STEPS = (1 / 2, 1 / 1.5, 1 / 1.25, 1 / 1.1, 1 / 1.02, 1.02, 1.1, 1.25, 1.5, 2.0)
SCALE = (  # from slower than half to faster than twice
    "#67001f #b2182b #d6604d #f4a582 #fddbc7 #f7f7f7 #d1e5f0 #92c5de #4393c3 #2166ac #053061"
).split()
STEP_NAMES = "1/2 1/1.5 1/1.25 1/1.1 1/1.02 1.02 1.1 1.25 1.5 2".split()
WIDTH, DPI = 12.0, 100  # 1200 pixels


def step(ratio: float) -> int:
    """The place in SCALE of a ratio: that of a loss mirrors that of the same win."""
    if ratio < 1:
        return len(STEPS) - step(1 / ratio)
    return sum(ratio >= edge for edge in STEPS)


def ink(index: int) -> str:
    """Black or white, whichever is read on that colour of SCALE."""
    return "white" if index in (0, 1, 2, 8, 9, 10) else "black"


def colour_of(providers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each, the same in every picture of a run."""
    spare = cycle(SPARE)
    return {name: COLOURS.get(name) or next(spare) for name in providers}


def new_figure(
    rows: int, columns: int, height: float, width: float = WIDTH, **options: Any
) -> tuple[Any, Any]:
    # no window is opened, and no state of pyplot's is left behind
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def title(figure: Any, run: Run, text: str) -> None:
    """A heading that always names the device."""
    figure.suptitle(f"{text}\n{run.title}, {run.environment.timestamp[:10]}", fontsize=13)


def legend(figure: Any, handles: Sequence[Any], names: Sequence[str], width: float = WIDTH) -> None:
    """The providers below the figure, in as many columns as its width holds."""
    column = 60 + 8 * max(map(len, names), default=0)  # pixels: a handle, and a letter each
    columns = min(len(names), int(width * DPI) // column)
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, columns))


def patches(names: Sequence[str], colours: Mapping[str, tuple[str, str]]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=colours[name][0]) for name in names]


def to_png(figure: Any) -> bytes:
    """The figure in 256 colours, which is a third of the bytes; those of the scale and of the
    providers are among them, however few points have them."""
    from PIL import Image

    raw = io.BytesIO()
    figure.savefig(raw, format="png")
    image = Image.open(raw).convert("RGB")
    named = ["#ffffff", "#000000", *SCALE, *(colour for colour, _ in (*COLOURS.values(), *SPARE))]
    exact = [_rgb(colour) for colour in named]
    found = image.quantize(256 - len(exact), dither=Image.Dither.NONE).getpalette() or []
    colours = [*exact, *zip(*[iter(found)] * 3, strict=True)][:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in colours for value in colour])
    indexed = image.quantize(palette=palette, dither=Image.Dither.NONE)
    # the nearest colour is found to within a few steps only: what is that near is the exact one
    nearest = [min(exact, key=partial(_distance, colour)) for colour in colours]
    pairs = zip(nearest, colours, strict=True)
    snapped = (one if _distance(one, colour) < 8 else colour for one, colour in pairs)
    indexed.putpalette([value for colour in snapped for value in colour])
    small = io.BytesIO()
    indexed.save(small, "png", optimize=True)
    return small.getvalue()


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _distance(one: Sequence[int], other: Sequence[int]) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
