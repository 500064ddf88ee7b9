"""`python -m benchmarks report`: what it prints and writes is what the rows say."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.report import write_report
from benchmarks.report.lines import runs, shape_text, size_text, time_text
from benchmarks.report.markdown import markdown
from benchmarks.report.tables import SUMMARY, summary_rows, table
from benchmarks.report.terminal import terminal
from benchmarks.schema import Results, load, save
from tests import made_up

ROOT = Path(__file__).parents[1]
# by hand: geometric means of (2/0.5, 1/1.05, 1/2) and of (1/0.5, 1/1.05, 1/2)
COUNTED = [
    "batch_norm", "nchw", "forward", "4", "0.48", "1.24x", "0.98x", "0.50x torch",
    "1 / 1 / 1 and 1 failed",
]  # fmt: skip


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results file that was really measured, on this CPU."""
    path = tmp_path_factory.mktemp("measured") / "quick.json"
    command = "-m benchmarks run --suite quick --op activation --providers torch,fastnorm"
    subprocess.run(
        [sys.executable, *command.split(), "--device", "cpu", "--budget", "20", "--out", path],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    return path


@pytest.fixture
def gpu_file(tmp_path: Path) -> Path:
    save(made_up.gpu_results(), tmp_path / "gpu.json")
    return tmp_path / "gpu.json"


def test_summary_is_what_a_hand_counts() -> None:
    summary = summary_rows(made_up.run_of(made_up.small_results()).lines)
    assert summary[0] == COUNTED
    assert summary[1] == ["batch_norm", "nchw", "host", "1", "", "", "", "", ""]


def test_formulas_of_kernelbench_do_not_raise_the_mean_of_an_op() -> None:
    results = made_up.small_results()
    for median, provider in ((9.0, "torch"), (1.0, "fastnorm")):
        row = made_up.small_row("won", provider, median)
        row.variant = "kernelbench_88"
        results.rows.append(row)
    summary = summary_rows(made_up.run_of(results).lines)
    assert COUNTED in summary
    (apart,) = (row for row in summary if row[0] == "batch_norm (KernelBench)")
    assert apart[3:6] == ["1", "0.50", "9.00x"]


def test_table_is_what_a_hand_counts() -> None:
    run = made_up.run_of(made_up.small_results())
    one = table("batch_norm, forward", run.of("forward"), run)
    assert one.unit == "median device time, ms, and floor fraction"
    assert one.header[:6] == [
        *("variant", "shape", "layout", "dtype", "against torch", "against the best"),
    ]
    assert one.header[6:] == ["target", "torch", "torch.compile", "fastnorm"]
    assert [[cell.text for cell in row[1:2] + row[4:6]] for row in one.rows] == [
        ["2x3x4x4", "▲ 4.00x", "▲ 2.00x torch.compile"],
        ["4x3x4x4", "≈ 0.95x", "≈ 0.95x torch"],
        ["8x3x4x4", "▼ 0.50x", "▼ 0.50x torch"],
        ["16x3x4x4", "", ""],
    ]
    assert [[cell.text for cell in row[6:]] for row in one.rows] == [
        ["met 2.00x/0.98x best", "2.00 0.25", "1.00 0.50", "0.500 1.00"],
        ["met ≈0.95x/0.98x best", "1.00 0.50", "", "1.05 0.48"],
        ["missed 0.50x/1.00x torch", "1.00 0.50", "failed", "2.00 0.25"],
        ["missed, no result", "1.00 0.50", "", "failed"],
    ]
    assert sorted(one.notes) == [
        "fastnorm: RuntimeError: out of luck (1 row)",
        "torch.compile: RuntimeError: out of luck (1 row)",
    ]
    assert one.rows[0][9].title == "p20-p80 0.495-0.505 ms"
    assert one.rows[2][6].title == "best 0.50x, at least 0.98x; torch 0.50x, at least 1.00x"


def test_markdown_and_terminal_have_the_counted_numbers() -> None:
    run = made_up.run_of(made_up.small_results())
    written, printed = markdown(run), terminal(run)
    assert f"| {' | '.join(COUNTED)} |" in written
    cells = ["plain", "8x3x4x4", "nchw", "float32", "▼ 0.50x", "▼ 0.50x torch"]
    cells += ["missed 0.50x/1.00x torch", "1.00 0.50"]
    assert f"| {' | '.join([*cells, 'failed', '2.00 0.25'])} |" in written
    assert re.search(r"\s+".join(map(re.escape, COUNTED)), printed)
    assert re.search(r"\s+".join(map(re.escape, [*cells, "failed", "2.00 0.25"])), printed)
    assert "batch_norm plain forward, 8x3x4x4, nchw, float32: 0.50x the speed of torch" in printed
    assert "batch_norm plain forward, 16x3x4x4, nchw, float32: RuntimeError: out of luck" in printed
    assert re.search(
        r"plain\s+2x3x4x4\s+nchw\s+float32\s+7.50", printed
    )  # microseconds of the host


def test_a_ratio_of_ours_uses_what_a_user_gets() -> None:
    """`fastnorm` counts, even where a backend that was asked for by name is faster."""
    results = made_up.small_results()
    results.rows.append(made_up.small_row("lost", "fastnorm-cuda", 0.1))
    assert summary_rows(made_up.run_of(results).lines)[0] == COUNTED


def test_terminal_of_a_width_says_which_columns_it_left_out() -> None:
    run = made_up.run_of(made_up.gpu_results())
    every, narrow = terminal(run), terminal(run, width=120)
    assert "too wide" not in every and "quack-kernels  " in every
    hidden = "fastnorm-cuda, apex, attorch, flag_gems, liger-kernel, quack-kernels"
    assert re.search(
        f"too wide for this terminal, in report.md: .*{hidden}", " ".join(narrow.split())
    )
    tables = narrow[: narrow.index("\nSummary\n")]
    assert max(map(len, tables.splitlines())) <= 120
    assert "\033[" not in narrow and "\033[1;38;5;208m" in terminal(run, colour=True)


def test_every_output_of_the_command(gpu_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = gpu_file.parent / "out"
    assert main(["report", str(gpu_file), "--op", "mean_only_batch_norm", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "fastnorm benchmarks, GPU: Made-up H100" in printed and f"{out / 'report.html'}" in printed
    )
    for name in ("report.md", "report.html"):
        text = (out / name).read_text(encoding="utf-8")
        assert "GPU: Made-up H100" in text and "mean_only_batch_norm, backward" in text
        assert "layer_norm" not in text.replace("placeholder", "")


def test_a_measured_cpu_file_is_reported_as_cpu(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = load(measured)
    assert {row.provider for row in results.rows} == {"torch", "fastnorm"}
    assert main(["report", str(measured), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("fastnorm benchmarks, CPU") and "wall clock on the CPU" in printed
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert written.startswith("# fastnorm benchmarks, CPU") and "device time" not in written
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Measured on a CPU" in html and "<h1>fastnorm benchmarks<br>CPU" in html
    summary = {tuple(row[:3]): row for row in summary_rows(made_up.run_of(results).lines)}
    for mode in ("forward", "backward"):
        lines = [row for row in results.rows if row.mode == mode and row.provider == "fastnorm"]
        assert summary["activation", "flat", mode][3] == str(len(lines)) != "0"


def test_a_cpu_never_stands_beside_a_gpu(tmp_path: Path) -> None:
    """Nor do two commits of one device."""
    gpu, cpu = made_up.small_results(), made_up.small_results(made_up.CPU)
    later = Results(replace(gpu.environment, commit="f" * 40), gpu.rows)
    found = runs([cpu, later, gpu])
    assert [run.kind for run in found] == ["GPU", "GPU", "CPU"]
    again = Results(replace(gpu.environment, timestamp="2026-02-02T00:00:00Z"), gpu.rows[:3])
    (both,) = runs([gpu, again])
    assert len(both.lines) == 5 and both.environment.timestamp.startswith("2026-02")


def test_two_runs_of_one_device_keep_their_own_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the [bench] extra")
    gpu = made_up.small_results()
    later = Results(replace(gpu.environment, commit="f" * 40), gpu.rows)
    write_report(runs([gpu, later]), tmp_path)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", written)
    assert len(links) == len(set(links)) and {link.split("/")[0] for link in links} == {
        "made-up-h100", "made-up-h100-1",
    }  # fmt: skip
    assert all((tmp_path / link).is_file() for link in links)


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "is not JSON"),
        ('{"rows": []}', "names no schema"),
        ('{"schema": 9, "rows": []}', "is of schema 9; this version reads schema 1"),
        ('{"schema": 1, "rows": {}}', "has no list of rows"),
        ('{"schema": 1, "environment": {}, "rows": []}', "its fields are device, driver, cuda"),
    ],
)
def test_a_file_that_is_no_results_file(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error and told in error


@pytest.mark.parametrize(
    "old, new, told",
    [
        ('"mode": "forward"', '"mode": "sideways"', "forward, backward, forward+backward, host"),
        ('"layout": "nchw"', '"layout": "nwhc"', "choose one of nchw, nhwc, nlc, rows, flat"),
        ('"ok": true', '"okay": true', "unknown ['okay']; its fields are op, variant, mode"),
    ],
)
def test_a_row_of_another_schema_is_told_what_is_accepted(
    old: str, new: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    save(made_up.small_results(), path)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert "row 0" in error and told in error


def test_what_is_not_there_is_told_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.json"
    save(made_up.small_results(), there)
    assert main(["report", str(tmp_path / "gone.json")]) == 2
    assert str(there) in capsys.readouterr().err
    assert main(["report", str(there), "--op", "convolution"]) == 2
    assert "no rows of op convolution: choose from batch_norm" in capsys.readouterr().err
    save(Results(made_up.GPU, []), there)
    assert main(["report", str(there)]) == 2
    assert "has no rows" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "name a results file, or --readme" in capsys.readouterr().err


def test_numbers_are_written_as_people_read_them() -> None:
    assert [time_text(x) for x in (0.00123, 0.0456, 0.5, 12.34, 123.4, 1234.5)] == [
        "0.00123", "0.0456", "0.500", "12.3", "123", "1234",
    ]  # fmt: skip
    assert [size_text(x) for x in (2**-20, 0.5, 1, 98, 392, 1024)] == [
        "1 B", "512 KiB", "1 MiB", "98 MiB", "392 MiB", "1 GiB",
    ]  # fmt: skip
    assert [shape_text(x) for x in ((1 << 24,), (1000,), (2, 3), ())] == [
        "2^24", "1000", "2x3", "0-d",
    ]  # fmt: skip


def test_summary_has_a_cell_for_every_heading() -> None:
    run = made_up.run_of(made_up.gpu_results())
    assert {len(row) for row in summary_rows(run.lines)} == {len(SUMMARY)}
