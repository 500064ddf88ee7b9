"""benchmarks/targets.py against what a hand counts, on rows that nobody measured."""

from __future__ import annotations

import math

import pytest

from benchmarks import summary, targets
from benchmarks.report.asked import memory_sentence, missed_sentence, target_rows
from benchmarks.report.lines import Line, side_by_side
from benchmarks.report.markdown import markdown
from benchmarks.report.page import page
from benchmarks.report.tables import table
from benchmarks.report.terminal import terminal
from benchmarks.schema import Results, Row
from tests import made_up

IMAGE = (256, 64, 112, 112)  # 6.4 MB a channel in bf16
CHANNEL_67_MB = (64, 64, 512, 512)

# op, variant, shape, layout, dtype, forward, backward
FLOORS = [
    ("batch_norm", "plain", IMAGE, "nchw", "bfloat16", 0.90, 0.90),
    # x of 12.8 MB a channel; with dy twice that: 5 moves against 3
    ("batch_norm", "relu", IMAGE, "nchw", "float32", 0.90, 0.95 * 3 / 5),
    ("batch_norm", "plain", CHANNEL_67_MB, "nchw", "float32", 0.95 * 2 / 3, 0.95 * 3 / 5),
    # x, residual; x, dy, residual of 19.3 MB: 7 moves, of which one is dresidual, against 5
    ("batch_norm", "residual+relu", IMAGE, "nchw", "bfloat16", 0.90, 0.95 * 5 / 7),
    # x, then x, residual -> y; x, dy, then x, dy -> dx
    ("batch_norm", "residual", IMAGE, "nhwc", "bfloat16", 0.95 * 3 / 4, 0.95 * 3 / 5),
    ("batch_norm", "residual+relu", IMAGE, "nhwc", "bfloat16", 0.95 * 3 / 4, 0.95 * 5 / 7),
    ("batch_norm", "silu", IMAGE, "nhwc", "bfloat16", 0.95 * 2 / 3, 0.95 * 3 / 5),
    ("batch_norm", "relu", (32, 1024, 2048), "nlc", "bfloat16", 0.95 * 2 / 3, 0.95 * 3 / 5),
    ("batch_norm", "plain", (16000, 1000), "rows", "bfloat16", 0.95 * 2 / 3, 0.95 * 3 / 5),
    ("batch_norm", "plain", (15999, 1000), "rows", "bfloat16", None, None),
    ("batch_norm", "plain", (32, 1024, 14, 14), "nchw", "bfloat16", None, None),
    # x; dy
    ("mean_only_batch_norm", "plain", IMAGE, "nchw", "float32", 0.90, 0.90),
    ("mean_only_batch_norm", "plain", IMAGE, "nhwc", "float32", 0.95 * 2 / 3, 0.95 * 2 / 3),
    ("layer_norm", "plain", (32768, 1024), "rows", "bfloat16", 0.92, 0.85),
    ("layer_norm", "residual", (32768, 32768), "rows", "bfloat16", 0.92, 0.85),
    ("layer_norm", "plain", (32768, 65536), "rows", "bfloat16", 0.85, 0.85),
    ("layer_norm", "plain", (64, 56, 56, 256), "nchw", "bfloat16", 0.92, 0.85),
    ("layer_norm", "plain", (64, 56, 56, 96), "nchw", "bfloat16", None, None),
    ("layer_norm", "last3", (16, 64, 256, 256), "rows", "float32", 0.85, 0.85),
    ("layer_norm", "plain", (1 << 20, 128), "rows", "bfloat16", None, None),
    ("layer_norm", "plain", (4096, 1024), "rows", "bfloat16", None, None),
    ("activation", "gelu", (1 << 24,), "flat", "bfloat16", 0.95, 0.95),
    ("activation", "gelu", (1 << 22,), "flat", "float32", None, None),
    ("weight_norm", "dim0", (8192, 8192), "flat", "float32", None, None),
]


@pytest.mark.parametrize("op, variant, shape, layout, dtype, forward, backward", FLOORS)
def test_floor_that_is_asked_for(
    op: str, variant: str, shape: tuple[int, ...], layout: str, dtype: str, forward: float | None,
    backward: float | None,
) -> None:  # fmt: skip
    for mode, wanted in (("forward", forward), ("backward", backward), ("host", None)):
        found = targets.floor_fraction(Line(op, variant, mode, shape, layout, dtype))
        assert found == (wanted and pytest.approx(wanted)), mode


def test_what_no_suite_measures_has_no_floor() -> None:
    for mode, dtype in (("forward+backward", "bfloat16"), ("forward", "float64")):
        given = [
            Row("batch_norm", name, mode, list(IMAGE), "nchw", dtype, "fastnorm", 1.0,
                floor_fraction=0.1)
            for name in ("plain", "silu")
        ]  # fmt: skip
        for one in targets.verdicts(side_by_side(given)):
            assert [target.what for target in one.missed] == []


def rows(
    op: str, variant: str, mode: str, shape: tuple[int, ...], times: dict[str, float],
    layout: str = "flat", spread: float = 0.001, **ours: object,
) -> list[Row]:  # fmt: skip
    """A row of each provider with its time; `ours` goes into those of fastnorm."""
    found = []
    for provider, ms in times.items():
        given = ours if provider == "fastnorm" else {}
        ends = ms * (1 - spread), ms * (1 + spread)
        row = Row(op, variant, mode, list(shape), layout, "bfloat16", provider, ms, *ends, **given)  # type: ignore[arg-type]
        found.append(row)
    return found


def judged(given: list[Row]) -> targets.Verdict:
    (one,) = targets.verdicts(side_by_side(given))
    return one


LARGE, SMALL = (1 << 26,), (1 << 10,)


@pytest.mark.parametrize(
    "ours, spread, word, short",
    [
        (0.9, 0.001, "met", 0.0),
        (1.015, 0.001, "met", 0.0),  # 0.985 of the best's speed
        (1.25, 0.001, "missed", (0.98 - 0.8) / 0.98),
        (1.25, 0.2, "met", 0.0),  # 0.8, which is noise
    ],
)
def test_never_slower_than_the_best_other(
    ours: float, spread: float, word: str, short: float
) -> None:
    times = {"torch": 2.0, "liger-kernel": 1.0, "fastnorm": ours}
    found = judged(rows("layer_norm", "plain", "forward", (8, 64), times, "rows", spread))
    assert (found.word, found.short) == (word, pytest.approx(short))
    assert [target.what for target in found.targets] == ["best"]


def test_a_floor_is_met_or_missed_by_a_share_of_it() -> None:
    times = {"torch": 2.0, "fastnorm": 1.0}
    met = judged(rows("activation", "gelu", "forward", LARGE, times, floor_fraction=0.96))
    assert met.word == "met"
    missed = judged(rows("activation", "gelu", "forward", LARGE, times, floor_fraction=0.76))
    assert missed.short == pytest.approx(0.2)
    assert missed_sentence(missed) == (
        "activation gelu forward, 2^26, flat, bfloat16: floor 0.76, at least 0.95 (20% short)"
    )


def test_what_has_no_time_is_missed_where_another_has_one() -> None:
    failed = rows("weight_norm", "dim0", "forward", (4, 4), {"torch": 1.0, "fastnorm": 1.0})
    failed[1].ok, failed[1].note, failed[1].ms_median = False, "ValueError: no such kernel", None
    found = judged(failed)
    assert (found.word, found.short) == ("missed", math.inf)
    assert missed_sentence(found).endswith("flat, bfloat16: ValueError: no such kernel")
    failed[0].ok = False
    assert judged(failed).word == "none"


def test_an_activation_is_not_slower_than_torch_at_any_size() -> None:
    times = {"torch": 1.0, "fastnorm": 1.01}
    found = judged(rows("activation", "gelu", "forward", SMALL, times))
    assert [str(target) for target in found.missed] == ["torch 0.99x, at least 1.00x"]
    found = judged(rows("activation", "gelu", "forward", SMALL, times, spread=0.1))
    assert found.word == "met"
    assert [target.brief for target in found.targets] == [
        "0.99x/0.98x best", "≈0.99x/1.00x torch",
    ]  # fmt: skip
    # a learnable beta: three times torch's expression
    for ours, word in ((0.3, "met"), (0.5, "missed")):
        times = {"torch": 1.0, "fastnorm": ours}
        assert judged(rows("activation", "swish", "forward", SMALL, times)).word == word


@pytest.mark.parametrize(
    "op, variant, ours, word",
    [
        ("batch_norm", "plain", 1.25, "met"),
        ("batch_norm", "silu", 1.35, "missed"),
        ("layer_norm", "plain", 1.9, "met"),
        ("activation", "silu", 2.1, "missed"),
        ("weight_norm", "dim0", 1.2, "missed"),
        ("mean_only_batch_norm", "plain", 9.0, "none"),
    ],
)
def test_host_time(op: str, variant: str, ours: float, word: str) -> None:
    times = {"torch": 0.01, "fastnorm": 0.01 * ours, "quack-kernels": 0.001}
    assert judged(rows(op, variant, "host", (8, 8), times)).word == word


@pytest.mark.parametrize("ours, word", [(0.09, "met"), (0.12, "missed")])
def test_weights_of_a_whole_model(ours: float, word: str) -> None:
    times = {"torch": 1.0, "fastnorm": ours}
    assert judged(rows("weight_norm", "hifigan", "step", (100,), times)).word == word
    one = judged(rows("weight_norm", "hifigan", "forward", (100,), times, note="1 kernel, 9.0 us"))
    assert one.word == "met"
    two = judged(rows("weight_norm", "hifigan", "forward", (100,), times, note="2 kernels, 9.0 us"))
    assert [str(target) for target in two.missed] == ["launches 2.00, at most 1.00"]


@pytest.mark.parametrize(
    "shape, note, missed",
    [
        ((32, 64, 7, 7), "1 kernel, 2.8 us", []),
        ((32, 64, 7, 7), "a peer; 4 kernels, 3.6 us", ["launches", "kernels"]),
        ((32, 64, 14, 14), "1 kernel, 3.6 us", []),
        ((32, 64, 7, 7), "kernels not counted: the process that counts them died", []),
    ],
)
def test_a_small_batch_norm(shape: tuple[int, ...], note: str, missed: list[str]) -> None:
    times = {"torch": 0.02, "fastnorm": 0.01}
    found = judged(rows("batch_norm", "plain", "forward", shape, times, "nchw", note=note))
    assert [target.what for target in found.missed] == missed


def test_an_activation_costs_next_to_nothing_over_the_norm_without() -> None:
    def cost(mode: str, ours: float, spread: float = 0.001) -> targets.Verdict:
        given = [
            *rows("batch_norm", "plain", mode, IMAGE, {"fastnorm": 1.0}, "nchw", spread),
            *rows("batch_norm", "silu", mode, IMAGE, {"fastnorm": ours}, "nchw", spread),
        ]
        (found,) = (one for one in targets.verdicts(side_by_side(given)) if one.targets)
        return found

    assert cost("forward", 1.02).word == cost("backward", 1.08).word == "met"
    assert [str(t) for t in cost("forward", 1.05).missed] == ["epilogue 1.05x, at most 1.03x"]
    assert cost("forward", 1.05, spread=0.1).word == "met"
    small = rows("batch_norm", "plain", "forward", (8, 8, 2, 2), {"fastnorm": 1.0}, "nchw")
    small += rows("batch_norm", "silu", "forward", (8, 8, 2, 2), {"fastnorm": 9.0}, "nchw")
    assert {one.word for one in targets.verdicts(side_by_side(small))} == {"none"}


def test_every_backend_is_held_to_the_limits_of_host_time() -> None:
    times = {"torch": 0.01, "fastnorm": 0.0101, "fastnorm-cuda": 0.012, "fastnorm-triton": 0.016}
    for mode in ("host", "host-backward"):
        found = judged(rows("batch_norm", "plain", mode, (8, 8), times))
        assert [str(t) for t in found.missed] == ["host, fastnorm-triton 1.60x, at most 1.30x"]
        assert [t.what for t in found.targets] == [
            "host",
            "host, fastnorm-cuda",
            found.missed[0].what,
        ]


def test_every_backend_is_held_to_the_cost_of_an_epilogue() -> None:
    given = [
        *rows("layer_norm", "plain", "forward", (32768, 1024),
              {"torch": 3.0, "fastnorm-cuda": 1.0, "fastnorm-triton": 2.0}, "rows"),
        *rows("layer_norm", "mish", "forward", (32768, 1024),
              {"torch": 9.0, "fastnorm-cuda": 1.02, "fastnorm-triton": 2.2}, "rows"),
    ]  # fmt: skip
    found = {one.line.variant: one for one in targets.verdicts(side_by_side(given))}
    assert [t.brief for t in found["mish"].missed] == ["1.10x/1.03x epilogue, fastnorm-triton"]
    assert "epilogue" in [t.what for t in found["mish"].targets]
    assert not any("epilogue" in t.what for t in found["plain"].targets)


@pytest.mark.parametrize("ours, missed", [(0.9, []), (1.05, ["frozen"])])
def test_frozen_weights_show_in_the_time(ours: float, missed: list[str]) -> None:
    given = [
        *rows("layer_norm", "plain", "backward", (32768, 1024), {"fastnorm": 1.0}, "rows"),
        *rows("layer_norm", "frozen", "backward", (32768, 1024), {"fastnorm": ours}, "rows"),
    ]
    found = {one.line.variant: one for one in targets.verdicts(side_by_side(given))}
    assert [t.what for t in found["frozen"].missed] == missed


@pytest.mark.parametrize(
    "op, variant, mode, ours, word",
    [
        ("weight_norm", "dim0", "step", 0.9, "met"),  # one weight need not be ten times as fast
        ("weight_norm", "dim0", "step", 1.1, "missed"),
        ("weight_norm", "hifigan", "graph", 0.9, "met"),  # of which no host is part
        ("weight_norm", "hifigan", "graph", 1.1, "missed"),
        ("layer_norm", "plain", "steps", 1.1, "missed"),
        ("layer_norm", "plain", "steps", 1.0, "met"),
        ("layer_norm", "plain", "step", 9.0, "none"),
    ],
)
def test_wall_clocks(op: str, variant: str, mode: str, ours: float, word: str) -> None:
    assert judged(rows(op, variant, mode, (8, 8), {"torch": 1.0, "fastnorm": ours})).word == word


@pytest.mark.parametrize(
    "name, note, replaced, ours, memory, missed",
    [
        ("resnet50", "torchvision", 0.95, 0.8, 0.9, []),
        ("resnet50", "torchvision", 0.95, 0.9, 0.9, ["torch"]),  # 1.11x
        ("resnet50", "our own ResNet of ten layers", 0.95, 0.9, 0.9, []),
        ("resnet50", "torchvision", 1.1, 0.8, 0.9, ["torch, fastnorm-replaced"]),
        ("efficientnet_b0", "timm", 0.95, 0.75, 0.74, []),
        ("efficientnet_b0", "timm", 0.95, 0.80, 0.80, ["memory", "torch"]),  # 1.25x
        ("vit_b_16", "timm", 0.95, 0.99, 1.5, []),
        ("vit_b_16", "timm", 0.95, 1.05, 1.0, ["torch"]),
    ],
)
def test_models(
    name: str, note: str, replaced: float, ours: float, memory: float, missed: list[str]
) -> None:
    times = {"torch": 1.0, "fastnorm-replaced": replaced, "fastnorm": ours, "torch.compile": 0.1}
    given = rows("model", name, "step", (8, 3, 64, 64), times, "nhwc", note=note)
    given[0].peak_memory_mib, given[2].peak_memory_mib = 100.0, 100.0 * memory
    assert [target.what for target in judged(given).missed] == missed


def test_a_compiled_model_is_compared_with_a_compiled_one() -> None:
    times = {"torch": 1.0, "fastnorm": 0.8, "torch.compile": 0.6, "fastnorm-compiled": 0.5}
    compiled, slower = times, {**times, "fastnorm-compiled": 0.7}
    given = rows("model", "vit_b_16", "step", (8, 3, 64, 64), compiled, "nhwc", note="timm")
    (line,) = side_by_side(given)
    assert line.torch is not None and line.torch.ratio == pytest.approx(1 / 0.8)
    assert line.best is not None and line.best.ratio == pytest.approx(0.6 / 0.5)
    assert line.best.provider == "torch.compile"
    assert judged(given).missed == []
    given = rows("model", "vit_b_16", "step", (8, 3, 64, 64), slower, "nhwc", note="timm")
    assert [t.what for t in judged(given).missed] == ["torch.compile, fastnorm-compiled"]


def test_a_family_is_counted_and_its_mean_asked() -> None:
    given = [
        *rows("layer_norm", "plain", "forward", (8, 64), {"torch": 4.0, "fastnorm": 1.0}, "rows"),
        *rows("layer_norm", "plain", "backward", (8, 64), {"torch": 1.0, "fastnorm": 1.1}, "rows"),
        # not of the mean, which is of device rows
        *rows("layer_norm", "plain", "host", (8, 64), {"torch": 1.0, "fastnorm": 1.5}, "rows"),
        *rows("layer_norm", "plain", "step", (8, 64), {"torch": 1.0, "fastnorm": 9.0}, "rows"),
    ]
    mean = math.sqrt(4.0 / 1.1)
    assert target_rows(side_by_side(given)) == [
        ["layer_norm", "4", "2", "1", "1", f"{mean:.2f}x met", f"{mean:.2f}x met"],
    ]
    (family,) = targets.families(side_by_side(given))
    assert family.best is not None
    assert family.best.wanted == 1.15


def test_every_report_of_a_gpu_has_the_targets() -> None:
    run = made_up.run_of(made_up.small_results())
    missed = "8x3x4x4, nchw, float32: torch 0.50x, at least 1.00x (50% short); best 0.50x"
    family = ["batch_norm", "5", "2", "2", "1", "1.24x missed", "0.98x missed"]
    assert f"| {' | '.join(family)} |" in markdown(run)
    for text in (markdown(run), terminal(run), page([(run, [])])):
        assert missed in text
        assert "benchmarks/targets.py" in text
    html = page([(run, [])])
    assert "2 rows miss a target" in html
    assert 'data-order="-inf"' not in html  # no number where the page sorts
    said = summary.summary(made_up.small_results())
    assert "targets missed, by most first: 2" in said
    assert missed in said


def test_a_cpu_has_no_targets_and_says_so_once() -> None:
    results = made_up.small_results(made_up.CPU)
    run = made_up.run_of(results)
    assert "target" not in table("batch_norm, forward", run.of("forward"), run).header
    for text in (markdown(run), terminal(run), page([(run, [])]), summary.summary(results)):
        assert text.count(targets.NONE_ON_CPU) == 1
        assert "at least" not in text


def test_memory_stands_beside_torchs() -> None:
    run = made_up.run_of(made_up.gpu_results())
    lines = [line for line in run.lines if line.op == "batch_norm" and line.mode == "forward"]
    one = table("batch_norm, forward", lines, run)
    at = one.header.index("memory")
    found = {row[0].text: row[at].text.split()[0] for row in one.rows if row[at].text}
    assert (found["plain"], found["silu"]) == ("1.00x", "0.67x")
    told = memory_sentence(run.lines)
    assert "forward 0.67x (0.67 to 0.67" in told
    assert "forward and backward together 0.75x (0.75 to 0.75" in told
    for text in (markdown(run), terminal(run)):
        assert " ".join(told.split()) in " ".join(text.split())
    for row in (rows := made_up.small_results().rows):
        assert row.peak_memory_mib is None
    assert memory_sentence(side_by_side(rows)) == ""


def test_kernels_of_small_rows_are_told_below_their_table() -> None:
    shape = (32, 64, 7, 7)
    of = ("batch_norm", "plain", "forward", shape)
    torchs, given = rows(*of, {"torch": 2.0}), rows(*of, {"fastnorm": 1.0}, note="1 kernel, 2.8 us")
    torchs[0].note = "called below autograd; 4 kernels, 9.1 us"
    run = made_up.run_of(Results(made_up.GPU, [*torchs, *given]))
    assert table("batch_norm, forward", run.lines, run).notes == [
        "torch: called below autograd (1 row)",
        "batch_norm plain forward, 32x64x7x7, flat, bfloat16: torch 4 kernels, 9.1 us; "
        "fastnorm 1 kernel, 2.8 us",
    ]
