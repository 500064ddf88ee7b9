"""benchmarks/gpu.sh: a dry run from end to end, and what it does when a step fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import schema, summary
from benchmarks.schema import Row

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GPUs of ours are on Linux")
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTNORM_")}
    environment = {**kept, "PYTHON": sys.executable, "FASTNORM_BUILD_CUDA": "0", **variables}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_dry_run(tmp_path: Path) -> None:
    done = run(
        "--dry-run", 300, tmp_path / "out", FASTNORM_COMMIT="0123abc",
        FASTNORM_TESTS="tests/test_activation.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing failed" in done.stdout
    out = tmp_path / "out"
    pictures = {"training.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {path.name for path in out.iterdir()} == pictures | {
        "setup.log", "tests-cuda.log", "tests-triton.log", "sanitizer.log", "suite.log",
        "training.log", "training.json", "results.json", "summary.txt",
    }  # fmt: skip
    results = schema.load(out / "results.json")
    assert (results.environment.commit, results.environment.dirty) == ("0123abc", False)
    assert results.environment.on_cpu
    assert any(row.ok for row in results.rows)
    assert "0 wrong on reference, cpu" in (out / "sanitizer.log").read_text()
    assert "tests collected" in (out / "tests-triton.log").read_text()
    assert "ours, farthest from the floor first" in (out / "summary.txt").read_text()


FAKE = """#!/bin/bash
# a python that takes note of what it is asked for, and fails at it
echo "$@" >> "$ASKED"
case "$*" in
    -) echo "torch 2.11, CUDA 13.0, 1 GPUs"; echo "A made-up GPU 9.0";;
    "-m pytest tests -q"*) exit 1;;
    "-c import xdist"*) echo "-n 8";;
    "-m benchmarks run"*) echo "{}" > "${@: -1}";;
esac
"""


def test_what_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    asked, out = tmp_path / "asked", tmp_path / "out"
    for name in ("python", "compute-sanitizer"):
        fake = tmp_path / name
        fake.write_text(FAKE)
        fake.chmod(0o755)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "peer.whl").touch()
    done = run(
        500, out, PYTHON=str(tmp_path / "python"), ASKED=str(asked), FASTNORM_BUILD_CUDA="1",
        FASTNORM_WHEELS=str(wheels), PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: tests-cuda tests-triton (see their logs)" in done.stdout
    lines = asked.read_text().splitlines()
    wanted = [
        "-m pip install -q --no-index",
        "-",
        "setup.py build_ext --inplace",
        "-c import xdist",
        "-m pytest tests -q -n 8 -o faulthandler_timeout=60 -k cuda",
        "-m pytest tests -q -n 8 -o faulthandler_timeout=60 -k triton",
        *(f"--tool {tool}" for _ in ("cuda", "triton") for tool in ("memcheck", "racecheck")),
        "-m benchmarks train --device cuda",
        "-m benchmarks run --suite ops,models,host,kernelbench --device cuda --budget 4",
        "-m benchmarks.summary",
    ]
    assert len(lines) == len(wanted)
    for line, start in zip(lines, wanted, strict=True):
        assert line.startswith(start)
    assert "failed: tests-cuda tests-triton" in (out / "summary.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    done = run(60, tmp_path / "out")
    assert done.returncode == 1
    assert "no GPU: torch sees none (--dry-run does what needs none)" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "benchmarks/gpu.sh [--dry-run] BUDGET OUT_DIR"),
        (["soon", "out"], "BUDGET is soon: it must be a number of seconds"),
        (["9", "."], "is not empty: a measurement is never overwritten"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def row(provider: str, ms: float | None, **others: object) -> Row:
    return Row(
        "layer_norm", "plain", "forward", [4, 8], "rows", "float32", provider, ms_median=ms,
        **others,  # type: ignore[arg-type]
    )  # fmt: skip


def test_summary_has_the_worst_first() -> None:
    from benchmarks.environment import environment

    rows = [
        row("torch", 3.0, floor_fraction=0.1),
        row("liger-kernel", 1.0, floor_fraction=0.9),
        row("fastnorm-cuda", 2.0, floor_fraction=0.5),
        row("fastnorm", 2.5, floor_fraction=0.4),
        row("quack-kernels", None, ok=False, note="missing: not installed"),
        row("flag_gems", None, ok=False, note="wrong result: dx"),
    ]
    said = summary.summary(schema.Results(environment("cpu", 10.0), rows))
    assert [f"{f:.2f} {r.provider}" for f, r, _ in summary.behind(rows)] == [
        "2.50 fastnorm", "2.00 fastnorm-cuda",
    ]  # fmt: skip
    assert "no measurement: 1\n  layer_norm plain forward 4x8 rows float32 flag_gems: wrong" in said
    assert "missing: 1\n  quack-kernels: missing: not installed" in said
    first, second = said[said.index("farthest from the floor") :].splitlines()[1:3]
    assert first.split()[0] == "40.0%"
    assert second.split()[0] == "50.0%"
