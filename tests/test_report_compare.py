"""`python -m benchmarks compare`: a regression is told from noise, and from what is not ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.report.difference import difference
from benchmarks.schema import Results, Row, save
from tests import made_up

Compare = Callable[..., tuple[int, str, str]]


def changed(
    factor: float, provider: str = "fastnorm", spread: float = 0.01, only: int | None = None
) -> Results:
    """The small results with the times of a provider multiplied; of its row `only`, or of all."""
    results = made_up.small_results()
    rows = [row for row in results.rows if row.provider == provider and row.ms_median]
    for row in rows if only is None else [rows[only]]:
        assert row.ms_median is not None
        row.ms_median *= factor
        row.ms_p20, row.ms_p80 = row.ms_median * (1 - spread), row.ms_median * (1 + spread)
    return results


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Run the command on two results; (exit status, what it printed, its error)."""

    def run(old: Results, new: Results, *options: str) -> tuple[int, str, str]:
        save(old, tmp_path / "old.json")
        save(new, tmp_path / "new.json")
        status = main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


OLD = made_up.small_results()
LAST = "0 faster, 0 slower, {} within the noise, 0 only in the old file, 0 only in the new one; "


def test_a_file_against_itself_is_the_same(compare: Compare) -> None:
    status, told, _ = compare(OLD, OLD)
    assert status == 0
    drift = "torch itself: +0.0%, the geometric mean of 5 rows; with the same torch this is what "
    last = LAST.format(len(OLD.rows)) + "0 regressions of fastnorm past 5%\n"
    assert told == drift + "the machine did\n" + last


def test_a_slower_machine_shows_in_torch_itself(compare: Compare) -> None:
    _, told, _ = compare(OLD, changed(1.5, "torch", only=0))
    assert "torch itself: +8.4%, the geometric mean of 5 rows" in told  # 1.5 to the 1/5


@pytest.mark.parametrize(
    "new, options, status, verdict",
    [
        pytest.param(changed(1.2, only=0), [], 1, "slower", id="slower by 20 %"),
        pytest.param(changed(1.2, only=0), ["--threshold", "0.25"], 0, "slower", id="allowed"),
        pytest.param(changed(1.03, only=0), [], 0, "slower", id="3 %, beyond the noise"),
        pytest.param(changed(1.03, only=0), ["--threshold", "0"], 1, "slower", id="none allowed"),
        pytest.param(changed(1.2, only=0, spread=0.3), [], 0, "same", id="within the noise"),
        pytest.param(changed(0.8, only=0), [], 0, "faster", id="faster"),
        pytest.param(changed(1.5, "torch.compile", only=0), [], 0, "slower", id="a peer's"),
    ],
)
def test_exit_status_is_of_regressions_beyond_noise_and_threshold(
    compare: Compare,
    new: Results,
    options: list[str],
    status: int,
    verdict: str,
) -> None:
    found, told, _ = compare(OLD, new, *options)
    assert found == status
    count = {"faster": 0, "slower": 0, "same": len(OLD.rows) - 1} | {verdict: 1}
    count["same"] = len(OLD.rows) - count["faster"] - count["slower"]
    assert (
        f"{count['faster']} faster, {count['slower']} slower, {count['same']} within the noise"
        in told
    )
    assert f"{status} regressions of fastnorm" in told


def test_what_changed_is_named_with_both_times(compare: Compare) -> None:
    _, told, _ = compare(OLD, changed(1.2, spread=0.1))
    regressions = told[told.index("Regressions of fastnorm past 5%") :]
    for change in (
        "+20.0%  0.500 -> 0.600 ms  fastnorm: batch_norm plain forward, 2x3x4x4, nchw, float32",
        "+20.0%  2.00 -> 2.40 ms  fastnorm: batch_norm plain forward, 8x3x4x4, nchw, float32",
    ):
        assert change in regressions
    assert ", 4x3x4x4" not in regressions, "its percentiles overlap"


def test_a_result_that_is_gone_is_a_regression_if_it_is_ours(compare: Compare) -> None:
    for provider, status in (("fastnorm", 1), ("torch.compile", 0)):
        new = made_up.small_results()
        row = next(row for row in new.rows if row.provider == provider)
        row.ok, row.ms_median, row.note = False, None, "wrong result: y0: error 0.3"
        found, told, _ = compare(OLD, new)
        assert found == status
        assert "No result any more (1):" in told and "wrong result: y0: error 0.3" in told
        found, told, _ = compare(new, OLD)
        assert found == 0 and "A result now (1):" in told


def test_rows_of_one_file_only_are_counted(compare: Compare) -> None:
    fewer = Results(OLD.environment, OLD.rows[:3])
    assert compare(OLD, fewer)[0] == 0
    assert f"Only in the old file ({len(OLD.rows) - 3}):" in compare(OLD, fewer)[1]
    assert f"Only in the new file ({len(OLD.rows) - 3}):" in compare(fewer, OLD)[1]


def test_another_environment_is_said(compare: Compare) -> None:
    new = Results(replace(OLD.environment, torch="2.12.0+cu130", note="warm"), OLD.rows)
    status, told, _ = compare(OLD, new)
    assert status == 0
    assert told.startswith("The environment changed (1):\n  torch: 2.11.0+cu130 -> 2.12.0+cu130\n")


def test_bad_input_is_told_in_one_line(compare: Compare, tmp_path: Path) -> None:
    status, told, error = compare(OLD, made_up.small_results(made_up.CPU))
    assert (status, told) == (2, "")
    assert error == (
        "error: the old file is of 'Made-up H100' and the new one of 'Made-up processor': times "
        "of two devices cannot be compared; give two files of one device\n"
    )
    status, _, error = compare(OLD, OLD, "--threshold", "-1")
    assert status == 2 and "--threshold is -1.0: it must be 0 or more" in error
    bad = tmp_path / "old.json"
    bad.write_text('{"schema": 2, "rows": []}', encoding="utf-8")
    assert main(["compare", str(bad), str(bad)]) == 2


def test_without_percentiles_the_median_is_all_there_is() -> None:
    def one(median: float) -> Results:
        row = Row("activation", "gelu", "forward", [8], "flat", "float32", "fastnorm", median)
        return Results(made_up.GPU, [row])

    found = difference(one(1.0), one(1.001))
    assert len(found.slower) == 1 and found.regressions == []
    assert difference(one(1.0), one(1.0)).same == 1
