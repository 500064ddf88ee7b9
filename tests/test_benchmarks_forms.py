"""`python -m benchmarks tune --suite`: the candidates of an op over every shape of a suite."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastnorm
from benchmarks import measure, schema, suites, tune, tuned
from benchmarks.__main__ import main, parser
from benchmarks.candidates import KNOBS, Knob, rules_choice
from benchmarks.measure import Bench, blank
from benchmarks.ops import OPS
from benchmarks.problems import DTYPES, TRAINING, Problem
from benchmarks.report.lines import Line
from benchmarks.schema import Row
from benchmarks.tune import TuneJob
from benchmarks.tuned import PREDICTED, predictions, shapes_table
from tests.conftest import HAS_TRITON
from tests.made_up import GPU

FORMS = [(), *((("FORM", form),) for form in (1, 2, 3, 4))]
BIG = (256, 256, 56, 56)
needs_emulation = pytest.mark.skipif(
    torch.cuda.is_available() or fastnorm.backends()["cuda"] is not None,
    reason="the CUDA kernels run on the CPU here where g++ has compiled them",
)


def planned(*arguments: str, backend: str = "cuda") -> list[TuneJob]:
    chosen = parser().parse_args(["tune", *arguments])
    return tune.plan(tune.problems_of(chosen, "cuda"), backend, chosen.knob)


def sized(problem: Problem) -> tuple[object, ...]:
    return problem.shape, problem.layout, problem.itemsize


def test_every_shape_is_planned_with_its_default_and_each_form() -> None:
    jobs = planned("--op", "batch_norm", "--suite", "ops,kernelbench", "--knob", "FORM")
    of_the_suite = suites.problems(["ops", "kernelbench"], "cuda")
    wanted = {str(p) for p in of_the_suite if p.op == "batch_norm"}
    assert {str(job.problem) for job in jobs} == wanted
    for i in range(0, len(jobs), len(FORMS)):  # the numbers of a problem are drawn and checked once
        some = jobs[i : i + len(FORMS)]
        assert [job.changes for job in some] == FORMS
        assert len({job.problem for job in some}) == 1
    by_problem = [(str(job.problem), job.problem.modes) for job in jobs[:: len(FORMS)]]
    assert by_problem == [(name, (m,)) for name in dict(by_problem) for m in TRAINING]


def test_important_shapes_come_first_and_another_activation_last() -> None:
    jobs = planned("--op", "batch_norm", "--suite", "ops", "--knob", "FORM")
    found = list(dict.fromkeys(str(job.problem) for job in jobs))
    by_name = {str(p): p for p in suites.problems(["ops"], "cuda")}
    problems = [by_name[name] for name in found]
    many = len({sized(p) for p in problems})
    assert len({sized(p) for p in problems[:many]}) == many < len(problems)
    for part in (problems[:many], problems[many:]):
        assert [p.importance for p in part] == sorted(p.importance for p in part)


def test_two_knobs_together_come_after_every_shape() -> None:
    jobs = planned("--op", "batch_norm", "--suite", "quick")
    alone = [job for job in jobs if len(job.changes) <= 1]
    assert {len(job.changes) for job in jobs} == {0, 1, 2}
    assert jobs[: len(alone)] == alone
    assert {str(job.problem) for job in alone} == {str(job.problem) for job in jobs}


@pytest.mark.skipif(not HAS_TRITON, reason="the knobs are those of Triton's launchers")
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_planned(op: str) -> None:
    knob = KNOBS[op, "triton"][0]
    jobs = planned("--op", op, "--suite", "ops", "--knob", knob.name, backend="triton")
    served = {job.provider_name.partition("=")[0] for job in jobs}
    assert served == {"as it is", knob.name}
    assert {job.problem.op for job in jobs} == {op}


def test_a_part_of_a_suite() -> None:
    jobs = planned(
        "--op", "batch_norm", "--suite", "ops", "--dtype", "float32", "--layout", "nchw",
        "--variant", "plain", "--mode", "backward", "--knob", "FORM",
    )  # fmt: skip
    found = {(j.problem.dtype, j.problem.layout, j.problem.variant, j.problem.modes) for j in jobs}
    assert found == {("float32", "nchw", "plain", ("backward",))}


def test_a_knob_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnorm.ops.batch_norm import cuda

    monkeypatch.setattr(cuda, "STAGES", 2, raising=False)
    knob = Knob("STAGES", cuda.__name__, (1, 2, 4))
    monkeypatch.setitem(KNOBS, ("batch_norm", "cuda"), (*KNOBS["batch_norm", "cuda"], knob))
    jobs = planned("--op", "batch_norm", "--shape", "8x8x4x4", "--knob", "STAGES")
    assert [job.provider_name for job in jobs] == ["as it is", "STAGES=1", "STAGES=4"] * 2
    found = []
    for job in jobs[:3]:
        with job.provider.active():
            found.append(cuda.STAGES)  # type: ignore[attr-defined]
    assert found == [2, 1, 4]
    every = planned("--op", "batch_norm", "--shape", "8x8x4x4", "--mode", "forward")
    assert (("FORM", 2), ("STAGES", 4)) in [job.changes for job in every]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "weight_norm", "--suite", "quick", "--variant", "dim9"], "it has dim0 flat"),
        (
            ["--op", "batch_norm", "--suite", "quick", "--dtype", "bfloat16"],
            "the interpreter takes shapes of up to 65536 elements",
        ),
        (
            ["--op", "batch_norm", "--suite", "host", "--knob", "FORM", "TILE"],
            "batch_norm on triton has no knob FORM, TILE: it has OWNER_TILES, TILE_BYTES",
        ),
    ],
)
@pytest.mark.skipif(not HAS_TRITON, reason="the kernels are Triton's")
def test_what_it_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_shape_or_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    for both in ([], ["--shape", "4x4", "--suite", "quick"]):
        with pytest.raises(SystemExit):
            main(["tune", "--op", "batch_norm", *both])
        assert "--suite" in capsys.readouterr().err


@needs_emulation
@pytest.mark.cuda
@pytest.mark.parametrize("spread", [-1.0, 1e9])  # a busy machine's rows have a note before ours
def test_a_form_that_cannot_serve_says_why_and_stops_nothing(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SPREAD", spread)
    few_channels = Problem("batch_norm", "plain", (160, 1, 32, 32), "nchw", "float32", ("forward",))
    bench, found = Bench("cpu"), {}
    for job in tune.plan([few_channels], "cuda", ["FORM"]):
        (found[job.provider_name],) = job.rows(bench)
    hold = found.pop("FORM=2 (hold)")
    assert not hold.ok
    assert "too many blocks in cooperative launch" in hold.note
    assert list(found) == ["as it is", "FORM=1 (owner)", "FORM=3 (ticket)", "FORM=4 (stream)"]
    assert all(row.ok and row.floor_fraction for row in found.values())
    noisy = f"{measure.SPREAD_COPY}; " if spread < 0 else ""
    assert found["FORM=3 (ticket)"].note.startswith(f"{noisy}the rule takes BATCHES=1")
    assert found["as it is"].note.startswith(f"{noisy}the rule takes FORM=")
    said = shapes_table([hold, *found.values()], GPU)
    assert "FORM=2 (hold): RuntimeError: fastnorm's CUDA backend: batch_norm_plan failed" in said
    assert said.count("[") == 2  # the choice that is marked, and the legend


@needs_emulation
def test_the_rules_choice_is_that_of_the_plan_and_nothing_stays_changed() -> None:
    from fastnorm.ops.batch_norm import cuda

    before, x = cuda.plan, torch.randn(4, 6, 8, 8)
    with rules_choice(KNOBS["batch_norm", "cuda"]) as choice:
        made = cuda.plan(x, x, "identity", False, False, 1, 0)
        assert (choice["FORM"], choice["BATCHES"]) == (made.form, made.batches)
    assert cuda.plan is before


def row(provider: str, ms: float | None, note: str = "", **where: object) -> Row:
    problem = Problem("batch_norm", "plain", BIG, "nchw", "bfloat16")
    made = blank(problem, "forward", provider, note, ok=ms is not None)
    made.ms_median = ms
    made.floor_fraction = None if ms is None else 0.5 / ms
    for name, value in where.items():
        setattr(made, name, value)
    return made


def test_the_table_has_what_is_predicted_beside_what_is_measured() -> None:
    rows = [
        row("as it is", 0.62, "host gaps; the rule takes FORM=3 (ticket), BATCHES=1"),
        row("FORM=2 (hold)", 0.55, "the rule takes BATCHES=2"),
        row("FORM=3 (ticket)", 0.625),
        row("FORM=4 (stream)", None, "does not fit"),
        row("FORM=2 (hold)", 0.7, variant="residual"),
    ]
    lines = shapes_table(rows, GPU).splitlines()
    assert lines[0] == "candidates on Made-up H100"
    assert lines[1].split("  ")[-1] == "two launches"
    plain, residual = lines[3].split(), lines[4].split()
    where = ["batch_norm", "forward", "plain", "256x256x56x56", "nchw", "bfloat16"]
    beside = ["0.81", "0.91*", "(0.97)", "[0.80]", "(0.95)", "-", "(0.67)"]
    assert plain == [*where, *beside]
    assert residual[6:] == ["0.71*"]  # moves more: nothing is predicted of it
    assert "never measured" in lines[6]
    assert lines[7:] == [
        "  FORM=4 (stream): does not fit (1 row)",
        "  as it is: host gaps (1 row)",
    ]


def test_a_table_without_predictions() -> None:
    problem = Problem("layer_norm", "plain", (4096, 1024), "rows", "bfloat16")
    said = shapes_table([blank(problem, "forward", "as it is", "no memory", ok=False)], GPU)
    assert "predicted" not in said
    assert "as it is: no memory (1 row)" in said
    assert shapes_table([], GPU) == "nothing was measured"


def test_the_predictions_are_of_forms_and_of_shapes_of_the_suites() -> None:
    given = json.loads(PREDICTED.read_text())
    assert "never measured" in given["source"]
    words = {word for knob in KNOBS["batch_norm", "cuda"] for _, word in knob.words}
    there = {p.shape for p in suites.problems(["ops", "kernelbench"], "cuda")}
    for one in given["rows"]:
        assert set(one["model"]) <= words | {"copy"}
        for value in one["model"].values():
            low, high = (
                value if one["layout"] == "nhwc" and isinstance(value, list) else [value] * 2
            )
            assert 0 < low <= high <= 1
        assert tuple(one["shape"]) in there
        assert one["dtype"] in DTYPES
        assert one["mode"] in TRAINING
        assert one["layout"] in ("nchw", "nhwc")
    names = ("shape", "layout", "dtype", "mode")
    keys = {str([one[name] for name in names]) for one in given["rows"]}
    assert len(keys) == len(given["rows"]) == 96


def test_a_prediction_is_against_the_models_own_copy() -> None:
    given = json.loads(PREDICTED.read_text())
    small = Line("batch_norm", "relu", "forward", (32, 1024, 14, 14), "nchw", "bfloat16")
    assert predictions(small, given)["hold"] == pytest.approx((0.67 / 0.79,) * 2)
    last = Line("batch_norm", "relu", "forward", small.shape, "nhwc", "bfloat16")
    assert predictions(last, given)["hold"] == pytest.approx((0.57 / 0.79, 0.68 / 0.79))
    assert "stream" not in predictions(
        last, given
    )  # of 1024 channels the model says nothing of use
    for other in ({"dtype": "float16"}, {"variant": "residual"}, {"layout": "nlc"}):
        assert predictions(replace(last, **other), given) == {}


def test_a_range_is_said_as_one() -> None:
    shape: dict[str, object] = {"shape": [32, 1024, 14, 14], "layout": "nhwc"}
    said = shapes_table([row("FORM=2 (hold)", 1.0, **shape)], GPU).splitlines()
    assert "0.50* (0.72 to 0.86)" in said[3]
    assert "costs 48 bytes on top of its own" in said[5]


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels are Triton's")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted without a GPU")
def test_tune_a_suite_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ((4, 4, 4, 4), (4, 8, 2, 2), (8, 64, 56, 56))
    tiny = [Problem("batch_norm", "relu", shape, "nchw", "float32") for shape in shapes]
    monkeypatch.setitem(suites.CPU_SUITES, "quick", lambda: tiny)
    out = tmp_path / "tuning.json"
    arguments = ["tune", "--op", "batch_norm", "--suite", "quick", "--knob", "OWNER_TILES"]
    arguments += ["--device", "cpu", "--backend", "triton", "--mode", "forward"]
    assert main([*arguments, "--budget", "60", "--out", str(out)]) == 0
    rows = schema.load(out).rows
    names = ["as it is", "OWNER_TILES=0 (ticket)", *(f"OWNER_TILES={n}" for n in (2, 8, 16))]
    assert [row.provider for row in rows] == 2 * names
    assert [tuple(row.shape) for row in rows[::5]] == list(shapes[:2])
    assert all(row.ok and row.ms_median and row.floor_fraction for row in rows)
    said = capsys.readouterr().out
    assert "left out, with more than 65536 elements: 1 shapes" in said
    assert len([line for line in said.splitlines() if line.startswith("batch_norm  ")]) == 2

    assert tuned.main([str(out)]) == 0
    assert capsys.readouterr().out in said
    assert tuned.main([str(tmp_path / "gone.json")]) == 2
    assert "No such file" in capsys.readouterr().err

    before = out.read_bytes()
    assert main([*arguments, "--out", str(out)]) == 2
    assert "a measurement is never overwritten" in capsys.readouterr().err
    assert out.read_bytes() == before

    out = tmp_path / "no time.json"
    assert main([*arguments, "--budget", "0.001", "--out", str(out)]) == 0
    assert "10 of 10 candidates had no time; --budget gives more" in capsys.readouterr().out
    assert schema.load(out).rows == []
