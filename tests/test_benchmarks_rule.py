"""`python -m benchmarks rule`: from rows that nobody measured to a rule that a hand writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import rule, schema, suites
from benchmarks.__main__ import main
from benchmarks.problems import STEPS
from benchmarks.report.lines import side_by_side
from benchmarks.schema import Results, Row
from fastnorm import dispatch
from tests import made_up


def rows(
    op: str, times: dict[int, dict[str, float]], variant: str = "plain", spread: float = 0.01
) -> list[Row]:
    """Of each size each provider's milliseconds."""
    found = []
    for size, each in times.items():
        for provider, ms in each.items():
            row = Row(op, variant, STEPS, [size // 4, 4], "rows", "bfloat16", provider, ms)
            row.ms_p20, row.ms_p80 = ms * (1 - spread), ms * (1 + spread)
            found.append(row)
    return found


def found(given: list[Row]) -> dict[str, dispatch.Rule]:
    return {one.family: one.rule for one in rule.rules(side_by_side(given))}


SLOW_BELOW = {
    1 << 10: {"torch": 1.0, "fastnorm-cuda": 1.2, "fastnorm-triton": 2.0},
    1 << 12: {"torch": 1.0, "fastnorm-cuda": 1.005, "fastnorm-triton": 2.0},  # noise
    1 << 14: {"torch": 1.0, "fastnorm-cuda": 0.9, "fastnorm-triton": 1.5},
    1 << 16: {"torch": 2.0, "fastnorm-cuda": 1.0, "fastnorm-triton": 0.9},
}


def test_a_backend_serves_from_where_it_is_nowhere_slower() -> None:
    triton_first = dispatch.Rule(("triton", "cuda"), {"triton": 1 << 16, "cuda": 1 << 12})
    assert found(rows("layer_norm", SLOW_BELOW)) == {"layer_norm": triton_first}
    # a loss above a gain counts
    uneven = {**SLOW_BELOW, 1 << 18: {"torch": 1.0, "fastnorm-cuda": 0.9, "fastnorm-triton": 1.1}}
    assert found(rows("layer_norm", uneven)) == {
        "layer_norm": dispatch.Rule(("cuda",), {"cuda": 1 << 12})
    }


def test_every_variant_of_a_family_counts_and_so_does_a_failure() -> None:
    silu = {1 << 14: {"torch": 1.0, "fastnorm-cuda": 1.3, "fastnorm-triton": 1.3}}
    given = [*rows("batch_norm", SLOW_BELOW), *rows("batch_norm", silu, "silu")]
    assert found(given)["batch_norm"].from_elements == {"triton": 1 << 16, "cuda": 1 << 16}
    given = rows("batch_norm", SLOW_BELOW)
    given[-2].ok, given[-2].ms_median = False, None  # CUDA's at the largest size
    assert found(given)["batch_norm"].backends == ("triton",)


def test_it_is_told_beside_the_rule_that_there_is() -> None:
    told = rule.text(side_by_side(rows("layer_norm", SLOW_BELOW)))
    assert (
        '    "layer_norm": Rule(("triton", "cuda"), {"triton": 1 << 16, "cuda": 1 << 12}),' in told
    )
    assert '    # fastnorm/dispatch.py has Rule(("cuda", "triton"), {"cuda": ' in told
    (line,) = (line for line in told.splitlines() if "1 << 12  " in line)
    assert line.split() == ["layer_norm", "plain", "1", "<<", "12", "1000", "1005", "2000"]
    same = rows("layer_norm", {
        1 << 14: {"torch": 1.0, "fastnorm-cuda": 2.0, "fastnorm-triton": 2.0},
        1 << 16: {"torch": 1.0, "fastnorm-cuda": 0.8, "fastnorm-triton": 2.0},
        1 << 18: {"torch": 1.0, "fastnorm-cuda": 0.5, "fastnorm-triton": 0.6},
    })  # fmt: skip
    if dispatch.RULES["layer_norm"].from_elements == {"cuda": 1 << 16, "triton": 1 << 18}:
        assert "dispatch.py" not in rule.text(side_by_side(same))
    never = rows("layer_norm", {1 << 16: {"torch": 1.0, "fastnorm-cuda": 2.0}})
    assert "    # cuda: slower than torch at the largest size" in rule.text(side_by_side(never))
    assert rule.text(side_by_side(made_up.small_results().rows)) == ""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    schema.save(Results(made_up.GPU, rows("layer_norm", SLOW_BELOW)), path)
    assert main(["rule", str(path)]) == 0
    assert '"layer_norm": Rule(' in capsys.readouterr().out
    schema.save(made_up.small_results(), path)
    assert main(["rule", str(path)]) == 2
    assert "has no times of our kernels in --suite rule" in capsys.readouterr().err


def test_the_suite_has_every_family_and_size() -> None:
    problems = suites.problems(["rule"], "cuda")
    assert {p.op for p in problems} == set(dispatch.RULES)
    for family in dispatch.RULES:
        sizes = {p.numel for p in problems if p.op == family}
        assert sizes == {1 << exponent for exponent in range(10, 21, 2)}
    assert {p.modes for p in problems} == {(STEPS,)}
