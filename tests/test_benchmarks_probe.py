"""`python -m benchmarks probe`: that its kernels do what they are timed for, that every row is
written, and that ncu's answers are understood. What they measure, only a GPU tells."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastnorm
from benchmarks import ncu, probe, probe_dram, probe_l2, schema, tune
from benchmarks.__main__ import main, parser
from benchmarks.measure import Bench
from benchmarks.ncu import ISSUED, READ, REASONS, TIME, WRITTEN, Kernel
from benchmarks.probe_dram import FORMS, options
from benchmarks.probe_jobs import ITEM, SIZES, Segments, poisoned, segments
from benchmarks.probe_l2 import Reread, Window, l2
from benchmarks.problems import TRAINING
from tests.conftest import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the kernels are Triton's")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="what the interpreter runs")

# as ncu --csv --print-units base prints it, between its own lines and the program's
SAMPLE = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "statistics_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Profiling "normalize_kernel" - 1: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4242","python3.12","127.0.0.1","statistics_kernel","1","7","(256, 1, 1)","(1056, 1, 1)",\
"0","9.0","Command line profiler metrics","dram__bytes_read.sum","byte","411,041,792"
"0","4242","python3.12","127.0.0.1","statistics_kernel","1","7","(256, 1, 1)","(1056, 1, 1)",\
"0","9.0","Command line profiler metrics","dram__bytes_write.sum","byte","1,024"
"1","4242","python3.12","127.0.0.1","normalize_kernel","1","7","(256, 1, 1)","(1056, 1, 1)",\
"0","9.0","Command line profiler metrics","dram__bytes_read.sum","Mbyte","382.5"
"1","4242","python3.12","127.0.0.1","normalize_kernel","1","7","(256, 1, 1)","(1056, 1, 1)",\
"0","9.0","Command line profiler metrics","dram__bytes_write.sum","Mbyte","394.6"
"""
_ROW = (
    '"0","4242","python3.12","127.0.0.1","backward_kernel","1","7","(256, 1, 1)","(1056, 1, 1)",'
    '"0","9.0","Command line profiler metrics",'
)
WHY = "\n".join(
    [
        SAMPLE.splitlines()[4],
        f'{_ROW}"gpu__time_duration.sum","ns","301,120"',
        f'{_ROW}"sm__warps_active.avg.pct_of_peak_sustained_active","%","61.53"',
        f'{_ROW}"smsp__issue_active.avg.pct_of_peak_sustained_active","%","30.9"',
        f'{_ROW}"lts__t_sector_hit_rate.pct","%","44.4"',
    ]
)
FORBIDDEN = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance \
Counters on the target device 0.
"""
X_BYTES = 411_041_792


# the kernels


@needs_triton
@pytest.mark.triton
@pytest.mark.parametrize("job", segments("cpu"), ids=str)
def test_segments_copy_every_element(job: Segments, device: str) -> None:
    x = torch.randn(job.shape, dtype=torch.bfloat16, device=device)
    y = poisoned(x)
    job.call(y, x)()
    assert torch.equal(y, x)


def test_segments_are_as_long_as_they_say_and_a_matrix_is_large() -> None:
    on_gpu = [job for job in segments("cuda") if isinstance(job, Segments)]
    row = SIZES["cuda"].cols * ITEM
    assert {job.segment for job in on_gpu} == {None, 32, 64, 128, 256, 512, 1024, row}
    assert all(job.floor >= 2 * (256 << 20) for job in on_gpu)
    for device in SIZES:
        numbers = [(job.variant, job.shape) for job in (*segments(device), *l2(device))]
        assert len(set(numbers)) == len(numbers)


@needs_triton
@pytest.mark.triton
@interpreted
@pytest.mark.parametrize(
    "job",
    [
        Reread("cpu", 48 << 10, "", writes=False),
        Reread("cpu", 48 << 10, "evict_first", writes=True),
        Window("cpu", 48 << 10, "evict_first"),
    ],
    ids=str,
)
def test_what_is_read_again_is_checked_before_it_is_timed(
    job: Reread | Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing, note = job.measured()
    assert timing.median > 0
    assert note.endswith("TB/s of loads and stores")
    monkeypatch.setattr(probe_l2, "poisoned", torch.clone)  # right before any kernel wrote it
    monkeypatch.setattr("benchmarks.probe_kernels.reread_kernel", NOTHING)
    monkeypatch.setattr("benchmarks.probe_kernels.window_kernel", NOTHING)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    with pytest.raises(AssertionError):
        job.measured()


class _Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> _Nothing:
        return self

    def __call__(self, *args: object, **options: object) -> None:
        pass


NOTHING = _Nothing()


@needs_triton
def test_a_kernel_that_writes_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.probe_kernels.copy_segments_kernel", NOTHING)
    (row,) = Segments("cpu", 128).rows(Bench("cpu"))
    assert not row.ok and row.ms_median is None
    assert row.note == "AssertionError: the copy is not what was copied"


def test_what_the_model_predicts() -> None:
    kept, either, lost = (Window("cuda", n << 20, "").predicted for n in (16, 24, 40))
    assert (kept, either, lost) == ("1.00", "0.67 to 1.00", "0.67")
    # a pass is a read from L2 and a write to DRAM: 2 F at 5.5 TB/s take longer than F at 3.0
    assert Reread("cuda", 16 << 20, "", writes=True).predicted == "0.92"
    assert Reread("cuda", 48 << 20, "", writes=True).predicted == "0.51"
    assert Reread("cuda", 24 << 20, "", writes=False).predicted == "3.00 to 5.50 TB/s"
    assert Segments("cuda", 128).predicted == "0.73 to 1.00"


# the command


@needs_triton
@interpreted
def test_every_planned_row_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "probe.json"
    assert main(["probe", "--device", "cpu", "--out", str(out)]) == 0
    results = schema.load(out)
    planned = [job for jobs in probe.PROBES.values() for job in jobs("cpu")]
    keys = [(*job.failed("").key, job.provider_name) for job in planned]
    assert [(*row.key, row.provider) for row in results.rows] == keys
    for row in results.rows:
        if row.provider.startswith("fastnorm-cuda"):
            assert not row.ok and row.note.startswith("missing: ")
        else:
            assert row.ok and row.ms_median and row.note, row
        if row.op == "batch_norm" and row.ok:
            assert "no DRAM bytes: there is no GPU here" in row.note
    assert "the times say nothing of a GPU" in results.environment.note
    said = capsys.readouterr().out
    assert "predicted, H100" in said
    assert "1.00 read, 0.94 written batch_norm plain, fastnorm-triton, as it is: " in said


def test_it_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.json"
    out.write_text("mine")
    assert main(["probe", "--device", "cpu", "--only", "segments,l2", "--out", str(out)]) == 2
    assert "exists: a measurement is never overwritten" in capsys.readouterr().err
    assert out.read_text() == "mine"
    with pytest.raises(SystemExit):
        main(["probe", "--only", "l3"])
    assert "unknown 'l3': choose from segments, l2, dram" in capsys.readouterr().err


# the forms, and ncu


@pytest.mark.parametrize("backend, changes, _", FORMS)
@pytest.mark.parametrize("mode", TRAINING)
@interpreted
def test_every_form_is_right_and_is_called_as_ncu_calls_it(
    backend: str, changes: tuple[tuple[str, int], ...], _: str, mode: str
) -> None:
    of = replace(probe_dram.problem("cpu"), modes=(mode,))
    form = probe_dram.provider(of, backend, changes)
    missing = fastnorm.backends().get(backend)
    if missing is not None:
        pytest.skip(missing)
    if mode == "forward":
        stage = Bench("cpu").stage(of)
        with form.active():
            tensors = stage.fresh()
            assert not stage.check(form.bind(of, tensors), tensors)[2]
    turned = [f"{knob}={value}" for knob, value in changes]
    assert probe_dram.main([backend, *turned, *options(of)]) == 0


def test_the_forms_have_names_of_their_own() -> None:
    names = [job.provider_name for job in probe_dram.jobs("cuda")]
    assert len(set(names)) == len(names)
    assert {"fastnorm-cuda, FORM=2 (hold)", "fastnorm-cuda, LAUNCHES=2 (two launches)"} < set(names)


def planned(*arguments: str) -> list[probe_dram.DramJob]:
    return probe._asked(parser().parse_args(["probe", *arguments]))


def test_a_problem_that_is_asked_about() -> None:
    shape = ["--shape", "32x256x14x14", "--layout", "nhwc", "--variant", "residual+relu"]
    jobs = planned("--op", "batch_norm", *shape, "--mode", "forward", "backward")
    assert len(jobs) == 2 * len(FORMS)
    last = jobs[-1].problem
    assert (str(last), last.modes) == (
        "batch_norm residual+relu 32x256x14x14 nhwc bfloat16", ("backward",),
    )  # fmt: skip
    # and the program that ncu runs understands it
    program = argparse.ArgumentParser()
    probe_dram.add_problem(program, required=True)
    assert tune.problem_of(program.parse_args(options(last))) == last
    jobs = planned("--op", "layer_norm", "--shape", "64,768", "--backend", "cuda", "torch")
    assert [job.provider_name for job in jobs] == ["torch", "fastnorm-cuda, as it is"]
    assert planned() == []


def test_half_a_problem_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--device", "cpu", "--op", "batch_norm"]) == 2
    assert "--op and --shape go together" in capsys.readouterr().err


@needs_triton
@interpreted
def test_the_rows_of_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "probe.json"
    problem = ["--op", "layer_norm", "--shape", "4x8", "--dtype", "float32"]
    only = ["--mode", "backward", "--backend", "torch", "triton", "--out", str(out)]
    assert main(["probe", "--device", "cpu", *problem, *only]) == 0
    rows = schema.load(out).rows
    names = [(row.provider, row.mode, row.ok) for row in rows]
    assert names == [(who, "backward", True) for who in ("torch", "fastnorm-triton, as it is")]
    assert "layer_norm plain backward, torch: " in capsys.readouterr().out


def test_what_ncu_prints_is_understood() -> None:
    found = ncu.parse(SAMPLE)
    assert found == [
        Kernel("statistics_kernel", {READ: 411_041_792.0, WRITTEN: 1024.0}),
        Kernel("normalize_kernel", {READ: 382_500_000.0, WRITTEN: 394_600_000.0}),
    ]
    assert ncu.bytes_told(found, 1, X_BYTES) == (
        "DRAM 1.93 read, 0.96 written of x, in statistics_kernel, normalize_kernel"
    )
    assert ncu.passes(SAMPLE) == 1
    assert ncu.passes(SAMPLE.replace("100% - 1 pass", "100% - 3 passes")) == 3
    assert ", replayed 3 times" in ncu.bytes_told(found, 3, X_BYTES)


@pytest.mark.parametrize(
    "number, unit", [("301,120", "ns"), ("301.12", "us"), ("301.12", "usecond"), ("0.30112", "ms")]
)
def test_what_a_kernel_waits_for(number: str, unit: str) -> None:
    table = WHY.replace('"ns","301,120"', f'"{unit}","{number}"')
    found = ncu.kernels(table, "", 0, REASONS)
    assert found[0].of[TIME] == pytest.approx(0.30112)
    assert ncu.reasons_told(found) == (
        "backward_kernel 0.3011 ms, 62% of warps resident, 31% of cycles issue, 44% hits in L2"
    )
    with pytest.raises(ncu.Uncounted, match=f"ncu's table has no {ISSUED}"):
        ncu.kernels(
            "\n".join(line for line in table.splitlines() if ISSUED not in line), "", 0, REASONS
        )


@pytest.mark.parametrize(
    "stdout, note",
    [
        (FORBIDDEN, "ncu ended with 1: ERR_NVGPUCTRPERM - The user does not have permission"),
        ("==WARNING== No kernels were profiled.\n", "ended with 1: ==WARNING== No kernels were"),
        ("", "ncu ended with 1: it said nothing"),
        (SAMPLE.replace('"byte"', '"furlong"'), "ncu's table is not as expected (KeyError"),
    ],
)
def test_what_ncu_does_not_count_is_said(stdout: str, note: str) -> None:
    with pytest.raises(ncu.Uncounted) as why:
        ncu.kernels(stdout, "", 1, ncu.BYTES)
    assert note in str(why.value)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ncu that counts as the samples say; the file of what it was asked."""
    path = tmp_path / "ncu"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'case "$2" in dram*) cat {tmp_path}/bytes;; *) cat {tmp_path}/why;; esac\n'
    )
    path.chmod(0o755)
    (tmp_path / "bytes").write_text(SAMPLE)
    (tmp_path / "why").write_text(WHY)
    monkeypatch.setattr(ncu, "find_ncu", lambda: str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tmp_path / "asked"


def test_ncu_is_asked_for_one_form(asked: Path) -> None:
    of = probe_dram.problem("cuda")
    assert of.numel * of.itemsize == X_BYTES
    said = probe_dram.counted(of, "cuda", (("FORM", 3),), reasons=False)
    assert said.startswith("DRAM 1.93 read, 0.96 written of x") and "ms" not in said
    (line,) = asked.read_text().splitlines()
    assert "--metrics dram__bytes_read.sum,dram__bytes_write.sum --csv" in line
    assert line.endswith(
        " -m benchmarks.probe_dram cuda FORM=3 --op batch_norm --variant plain "
        "--shape 256x256x56x56 --layout nchw --dtype bfloat16 --mode forward"
    )


def test_ncu_is_asked_for_the_reasons_by_themselves(asked: Path) -> None:
    of = replace(probe_dram.problem("cuda"), modes=("backward",))
    said = probe_dram.counted(of, "cuda", (), reasons=True)
    assert "; backward_kernel 0.3011 ms, 62% of warps resident" in said
    assert [line.split()[1] for line in asked.read_text().splitlines()] == [
        ",".join(ncu.BYTES), ",".join(REASONS),
    ]  # fmt: skip
    (asked.parent / "why").write_text(FORBIDDEN)
    said = probe_dram.counted(of, "cuda", (), reasons=True)
    assert said.startswith("DRAM 1.93 read")
    assert "; not what it waits for: ncu ended with 0: ERR_NVGPUCTRPERM" in said


def test_without_ncu_there_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncu, "PLACES", ())
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = probe_dram.counted(probe_dram.problem("cuda"), "torch", (), reasons=True)
    assert said == "no DRAM bytes: there is no ncu here"
