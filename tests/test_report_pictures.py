"""The pictures of a report: every label is inside, none lies on another, colours can be told apart.

That they please the eye is for a person to see; what a test can see of it is here.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="pictures need the [bench] extra")

import numpy as np
from PIL import Image

from benchmarks.report import bars, heat, opening, pictures, points
from benchmarks.report.lines import Line, Run
from benchmarks.report.style import COLOURS, SCALE, SPARE, ink
from benchmarks.schema import Results, Row
from tests import made_up

# Machado, Oliveira and Fernandes (2009), of full strength, on linear RGB
SIGHTS = {
    "all colours": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
Draw = Callable[[Run, Sequence[Line], str], bytes]


def _linear(colour: str) -> Any:
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _lab(colour: str, sight: str) -> Any:
    """A colour in CIE L*a*b* as such eyes see it: a difference of 2 is just noticed."""
    linear = np.clip(np.array(SIGHTS[sight]) @ _linear(colour), 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _apart(one: str, other: str, sight: str) -> float:
    return float(np.linalg.norm(_lab(one, sight) - _lab(other, sight)))


@pytest.mark.parametrize("sight", SIGHTS)
def test_providers_are_told_apart_by_every_kind_of_sight(sight: str) -> None:
    named = [*COLOURS.values(), *SPARE]
    for (one, _), (other, _) in itertools.combinations(named, 2):
        assert _apart(one, other, sight) > 12, f"{one} and {other}"
    assert len({marker for _, marker in named}) == len(named)


@pytest.mark.parametrize("sight", SIGHTS)
def test_losses_are_told_from_wins_by_every_kind_of_sight(sight: str) -> None:
    lightness = [_lab(colour, sight)[0] for colour in SCALE]
    for i in range(5):
        assert _apart(SCALE[i], SCALE[10 - i], sight) > 18
        assert lightness[i] < lightness[i + 1] - 6, "darker is further from 1"
        assert lightness[10 - i] < lightness[9 - i] - 6
        # red is darker than blue to some: a loss is then the stronger of the two
        assert lightness[i] - lightness[10 - i] < 5, "a loss is as strong as a win"


def test_numbers_are_read_on_the_colours_of_the_scale() -> None:
    for i, colour in enumerate(SCALE):
        light = float(np.dot([0.2126, 0.7152, 0.0722], _linear(colour)))
        contrast = 1.05 / (light + 0.05) if ink(i) == "white" else (light + 0.05) / 0.05
        assert contrast > 3.3, f"{ink(i)} on {colour}"


def _many_providers(results: Results) -> Results:
    """Every row of torch once more for each of eight others, among them four that no one knows."""
    names = ("liger-kernel", "quack-kernels", "flag_gems", "inplace-abn")
    strangers = ("another", "a-peer-with-a-long-name", "yet-another-peer")
    rows = list(results.rows)
    for i, name in enumerate((*names, *strangers)):
        for row in results.rows:
            if row.provider == "torch" and row.ms_median:
                extra = copy(row)
                extra.provider, extra.ms_median = name, row.ms_median * (0.5 + 0.1 * i)
                extra.ms_p20 = extra.ms_p80 = extra.ms_median
                rows.append(extra)
    return Results(results.environment, rows)


def _cpu_with_models() -> Results:
    cpu = made_up.cpu_results()
    models = [copy(row) for row in made_up.model_rows()]
    for row in models:
        row.peak_memory_mib = None  # nobody counts it on a CPU
    return Results(cpu.environment, [*cpu.rows, *models])


def _only(wanted: Callable[[Row], bool], results: Results | None = None) -> Results:
    results = results or made_up.gpu_results()
    return Results(results.environment, [row for row in results.rows if wanted(row)])


# drawing all of a GPU's pictures takes half a minute: of each kind the fullest
FULLEST = {
    ("batch_norm", "nhwc"),
    ("activation", "flat"),
    ("layer_norm", "rows"),
    ("model", "nchw"),
}
DATA = {
    "gpu": _only(lambda row: (row.op, row.layout) in FULLEST and row.dtype == "bfloat16"),
    "cpu": _cpu_with_models(),
    "many providers": _only(
        lambda row: row.op in ("layer_norm", "model") and row.dtype != "float16",
        _many_providers(made_up.gpu_results()),
    ),
    "two providers": _only(
        lambda row: row.op == "weight_norm" and row.provider in ("torch", "fastnorm")
    ),
    "one size": _only(lambda row: row.op == "mean_only_batch_norm"),
    "five lines": made_up.small_results(),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, before they become PNG."""
    figures: list[Any] = []

    def keep(figure: Any) -> bytes:
        figure.canvas.draw()
        figures.append(figure)
        return b""

    for module in (bars, heat, opening, points):
        monkeypatch.setattr(module, "to_png", keep)
    return figures


def _labels(axes: Any) -> Iterator[Any]:
    for axis in (axes.xaxis, axes.yaxis):
        yield axis.label
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)
    yield axes.title
    for child in axes.child_axes:  # the names of modes below a heat map
        yield from _labels(child)


def _texts(figure: Any) -> list[Any]:
    """All words around the panels and in the legend."""
    found = [text for axes in figure.axes for text in _labels(axes)]
    found += [text for legend in figure.legends for text in legend.get_texts()]
    found += [figure._suptitle, figure._supxlabel]
    return [text for text in found if text is not None and text.get_visible() and text.get_text()]


def _corners(text: Any, renderer: Any) -> Any:
    """The corners of a text's own box, which is turned with it."""
    turned, text_angle = text.get_window_extent(renderer), text.get_rotation()
    if text_angle in (0, 90):
        box = turned
        return np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])
    angle = np.deg2rad(text_angle)
    c, s = np.cos(angle), np.sin(angle)
    # a box w by h, turned: its extent is w c + h s by w s + h c
    w, h = np.linalg.solve([[c, s], [s, c]], [turned.width, turned.height])
    middle = np.array([(turned.x0 + turned.x1) / 2, (turned.y0 + turned.y1) / 2])
    around = np.array([(-w, -h), (w, -h), (w, h), (-w, h)]) / 2
    return middle + around @ np.array([[c, s], [-s, c]])


def _overlap(one: Any, other: Any) -> bool:
    """Whether two convex shapes share more than a pixel: no edge of either parts them."""
    for corners in (one, other):
        for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            normal = np.array([end[1] - start[1], start[0] - end[0]])
            normal = normal / (np.linalg.norm(normal) or 1)
            a, b = one @ normal, other @ normal
            if min(a.max(), b.max()) - max(a.min(), b.min()) < 1:
                return False
    return True


def _check(figure: Any, wide: int) -> None:
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    assert width == wide
    texts = _texts(figure)
    shapes = [_corners(text, renderer) for text in texts]
    for text, corners in zip(texts, shapes, strict=True):
        inside = corners.min() > -1 and corners[:, 0].max() < width + 1
        assert inside and corners[:, 1].max() < height + 1, f"{text.get_text()!r} is cut off"
        assert text.get_fontsize() >= 8, f"{text.get_text()!r} is too small"
    for (one, a), (other, b) in itertools.combinations(zip(texts, shapes, strict=True), 2):
        assert not _overlap(a, b), f"{one.get_text()!r} lies on {other.get_text()!r}"


@pytest.mark.parametrize("name", DATA)
def test_every_label_is_inside_and_none_lies_on_another(name: str, drawn: list[Any]) -> None:
    run = made_up.run_of(DATA[name])
    names = [one for one, _ in pictures.pictures(run)]
    assert len(names) == len(set(names)) == len(drawn) > 0
    for picture, figure in zip(names, drawn, strict=True):
        try:
            _check(figure, 750 if picture.startswith("opening-") else 1200)
        except AssertionError as error:
            raise AssertionError(f"{picture}: {error}") from None
        assert run.title in figure._suptitle.get_text()


def test_axes_name_their_units(drawn: list[Any]) -> None:
    run = made_up.run_of(made_up.gpu_results())
    found: dict[str, set[str]] = {}
    chosen = [x for x in run.lines if x.op in ("mean_only_batch_norm", "model", "layer_norm")]
    for name, _ in pictures.pictures(Run(run.environment, chosen)):
        axes = drawn[-1].axes
        labels = {text for ax in axes for text in (ax.get_xlabel(), ax.get_ylabel()) if text}
        found.setdefault(name.split("-")[0].removesuffix(".png"), set()).update(labels)
    assert found["floor"] == {
        "size of the input (points: shapes; lines: their medians)",
        "floor fraction (1 = a plain copy)",
    }
    assert found["host"] == {"median host time of a call (µs), lower is better"}
    assert found["opening"] == {
        "speed over torch eager's (and samples per second), higher is better",
        "peak memory over torch eager's, lower is better",
    }
    assert found["models"] == {
        "peak memory of a training step (MiB), lower is better",
        "speed over torch's (and samples per second), higher is better",
    }
    assert found["overview"] == {"their median time over ours (above 1 fastnorm is faster)"}
    assert found["speed"] == {"shape, and size of the input"}


def test_a_floor_picture_has_every_point_in_it(drawn: list[Any]) -> None:
    results = made_up.small_results()
    results.rows[2].floor_fraction = 1.4  # a tensor that a cache held
    run = made_up.run_of(results)
    points.floor_picture(run, run.of("forward"), "batch_norm")
    (panel,) = drawn[0].axes
    low, high = panel.get_xlim()
    assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 1.4
    seen = [offset for dots in panel.collections for offset in dots.get_offsets()]
    assert len(seen) == 4 + 1 + 3  # torch, torch.compile, fastnorm: what has a time
    assert all(low < x < high for x, _ in seen)
    assert sum(low <= tick <= high for tick in panel.get_xticks()) >= 2


def test_heat_map_has_the_ratios_and_brackets_noise(drawn: list[Any]) -> None:
    run = made_up.run_of(made_up.small_results())
    heat.heat_picture(run, run.of("forward"), "batch_norm")
    torch, best = ([text.get_text() for text in ax.texts] for ax in drawn[0].axes[:2])
    assert torch == ["4.00", "(0.95)", "0.50", "failed"]
    assert best == ["2.00", "(0.95)", "0.50", "failed"]
    papers = [patch.get_facecolor() for patch in drawn[0].axes[1].patches]
    assert len(set(papers)) == 4


def test_a_png_is_as_wide_as_a_page_or_half_of_it_and_small() -> None:
    run = made_up.run_of(made_up.cpu_results())
    found = dict(pictures.pictures(run))
    assert {"overview.png", "host-batch_norm.png", "floor-batch_norm-nchw-float32.png"} <= set(
        found
    )
    for name, png in found.items():
        image = Image.open(io.BytesIO(png))
        wide = 750 if name.startswith("opening-") else 1200
        assert (image.format, image.width) == ("PNG", wide), name
        assert len(png) < 150_000, name
    speed = Image.open(io.BytesIO(found["speed-batch_norm-nchw-float32.png"])).convert("RGB")
    seen = {colour for _, colour in speed.getcolors(1 << 20) or ()}
    assert sum(tuple(bytes.fromhex(colour[1:])) in seen for colour in SCALE) == len(SCALE)


def test_the_readme_has_no_picture_of_a_single_size() -> None:
    run = made_up.run_of(made_up.gpu_results())
    found = {(line.op, line.variant) for line in pictures._chosen(run)}
    assert {("layer_norm", "plain"), ("activation", "gelu")} <= found
    assert not {("layer_norm", "mish"), ("layer_norm", "tanh")} & found


def test_the_opening_is_of_models_in_torchs_numbers() -> None:
    rows = list(made_up.model_rows())
    failed = next(r for r in rows if (r.variant, r.provider) == ("vit_b_16", "torch.compile"))
    failed.ok, failed.ms_median = False, None
    without = [r for r in rows if (r.variant, r.provider) != ("bert_base", "torch")]
    for row in without:
        row.note = "our own generator" if row.variant == "hifigan_v1" else "timm"
    run = made_up.run_of(Results(made_up.GPU, without))
    groups = dict(opening.groups(opening.steps(run), opening._speed))
    assert "bert_base" not in groups  # nothing to stand over
    assert "hifigan_v1\n(of our own)" in groups
    assert set(groups["vit_b_16"]) == set(opening.NAMES) - {"torch.compile"}
    (torchs, ours) = (
        next(r for r in rows if (r.variant, r.provider) == ("resnet50", name))
        for name in ("torch", "fastnorm-compiled")
    )
    assert torchs.ms_median and ours.ms_median
    bar, label = groups["resnet50"]["fastnorm-compiled"]
    assert bar == pytest.approx(torchs.ms_median / ours.ms_median)
    assert label.startswith(f"{bar:.2f}x, ") and label.endswith("/s")
    memory = dict(opening.groups(opening.steps(run), opening._memory))
    assert memory["resnet50"]["fastnorm"] == (pytest.approx(0.7), "0.70x, 8.18 GiB")
    assert opening.steps(made_up.run_of(Results(made_up.CPU, without))) == []
