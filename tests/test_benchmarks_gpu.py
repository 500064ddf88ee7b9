"""benchmarks/gpu.sh: a dry run from end to end, and what it does when a step fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import schema, summary
from benchmarks.schema import Row
from tests.conftest import HAS_TRITON

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GPUs of ours are on Linux")
QUICK = "--op activation --providers torch,fastnorm"
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTNORM_")}
    environment = {**kept, "PYTHON": sys.executable, "FASTNORM_BUILD_CUDA": "0", **variables}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def logs(out: Path) -> dict[str, str]:
    """The text of each log in the archive."""
    with tarfile.open(out / "logs.tar.gz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {
            Path(member.name).name: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in members
        }


def test_dry_run(tmp_path: Path) -> None:
    done = run(
        "--dry-run", 300, tmp_path / "out", FASTNORM_COMMIT="0123abc",
        FASTNORM_TESTS="tests/test_activation.py", FASTNORM_RUN=QUICK,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing failed" in done.stdout
    out = tmp_path / "out"
    pictures = {"training.png"} if importlib.util.find_spec("matplotlib") else set()
    found = {path.name for path in out.iterdir()}
    assert found == pictures | {"training.json", "results.json", "summary.txt", "logs.tar.gz"}
    results = schema.load(out / "results.json")
    assert (results.environment.commit, results.environment.dirty) == ("0123abc", False)
    assert results.environment.on_cpu
    assert any(row.ok for row in results.rows)
    assert {row.op for row in results.rows} == {"activation"}
    said = logs(out)
    assert set(said) == {
        *("setup.log", "tests-cuda.log", "tests-triton.log", "sanitizer.log", "suite.log"),
        "training.log",
    }
    assert "0 wrong on reference, cpu" in said["sanitizer.log"]
    assert "tests collected" in said["tests-triton.log"]
    assert "ours, farthest from the floor first" in (out / "summary.txt").read_text()

    # the next call goes on with what came back, and another commit does not
    given = {
        "FASTNORM_STEPS": "suite",
        "FASTNORM_RESUME": str(out / "results.json"),
        "FASTNORM_RUN": QUICK,
    }
    done = run("--dry-run", 100, tmp_path / "next", FASTNORM_COMMIT="0123abc", **given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "next").iterdir()} == {
        *("results.json", "summary.txt", "logs.tar.gz"),
    }
    rows = schema.load(tmp_path / "next" / "results.json").rows
    assert rows[: len(results.rows)] == results.rows  # a busy machine may have left the rest
    assert f"{len(results.rows)} rows: " in logs(tmp_path / "next")["suite.log"]
    done = run("--dry-run", 100, tmp_path / "other", FASTNORM_COMMIT="fedcba", **given)
    assert done.returncode == 2
    assert "results.json is not of commit fedcba" in done.stderr


@pytest.mark.skipif(not HAS_TRITON, reason="what is tuned on a CPU are Triton's kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted without a GPU")
def test_dry_run_of_probe_and_tune(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("--dry-run", 200, out, FASTNORM_STEPS="probe,tune", FASTNORM_PROBE="--only segments")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.name for path in out.iterdir()}
    assert found == {"probe.json", "tune.json", "summary.txt", "logs.tar.gz"}
    assert set(logs(out)) == {"setup.log", "probe.log", "tune.log"}
    assert {row.op for row in schema.load(out / "probe.json").rows} == {"probe_segments"}
    assert {row.op for row in schema.load(out / "tune.json").rows} == {"activation"}
    said = (out / "summary.txt").read_text()
    assert "predicted, H100" in said and "1.000x  as it is" in said


FAKE = """#!/bin/bash
# a python that takes note of what it is asked for, and fails at it
echo "$@" >> "$ASKED"
case "$*" in
    -) echo "torch 2.11, CUDA 13.0, 1 GPUs"; echo "A made-up GPU 9.0";;
    "-m pytest tests -q"*) seq 30; exit 1;;
    "-c import xdist"*) echo "-n 8";;
    "-m benchmarks train"*) touch "${@: -1}" "${@: -1}.png";;
    "-m benchmarks "*) echo "{}" > "${@: -1}";;
esac
"""
SETUP = ("-m pip install -q --no-index", "-", "setup.py build_ext --inplace")
TESTS = (
    "-c import xdist",
    "-m pytest tests -q -n 8 -o faulthandler_timeout=60 -k cuda",
    "-m pytest tests -q -n 8 -o faulthandler_timeout=60 -k triton",
    *(f"--tool {tool}" for _ in ("cuda", "triton") for tool in ("memcheck", "racecheck")),
)
TRAIN = "-m benchmarks train --device cuda"
SUITE = ("-m benchmarks run --device cuda --budget 4", "-m benchmarks.summary")


def asked_for(tmp_path: Path, **variables: str) -> tuple[list[str], str, Path]:
    """What the script asks a python for, what it says, and its folder."""
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
        FASTNORM_WHEELS=str(wheels), PATH=f"{tmp_path}:{os.environ['PATH']}", **variables,
    )  # fmt: skip
    failed = "tests" in variables.get("FASTNORM_STEPS", "tests")
    assert done.returncode == failed, done.stdout + done.stderr
    return asked.read_text().splitlines(), done.stdout, out


EVERY = "build,tests,sanitize,train,prepare,probe,tune,suite"


@pytest.mark.parametrize(
    "steps, wanted",
    [
        ("", (*SETUP, *TESTS, TRAIN, *SUITE)),
        ("build,tests,sanitize,train", (*SETUP, *TESTS, TRAIN)),
        ("probe", (*SETUP[:2], "-m benchmarks probe --device cuda --budget 4")),
        (
            "build,probe,tune",  # as much time for the one as for the other
            (
                *SETUP,
                "-m benchmarks probe --device cuda --budget 2",
                "-m benchmarks tune --device cuda --budget 4",
            ),
        ),
        (
            EVERY,
            (
                *(*SETUP, *TESTS, TRAIN),
                "-m benchmarks probe --device cuda --budget 1",
                "-m benchmarks tune --device cuda --budget 2",
                *SUITE,
            ),
        ),
    ],
)
def test_each_step_is_asked_for(steps: str, wanted: tuple[str, ...], tmp_path: Path) -> None:
    lines, _, out = asked_for(tmp_path, **({"FASTNORM_STEPS": steps} if steps else {}))
    assert len(lines) == len(wanted)
    for line, start in zip(lines, wanted, strict=True):
        assert line.startswith(start)
    assert all(path.is_file() for path in out.iterdir())
    assert len(list(out.iterdir())) <= (7 if steps == EVERY else 5)


def test_what_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    lines, said, out = asked_for(tmp_path)
    assert "failed: tests-cuda tests-triton (see their logs)" in said
    assert "failed: tests-cuda tests-triton" in (out / "summary.txt").read_text()
    assert "\n30\n-- tests-cuda: exit status 1\n" in said and "\n11\n" in said  # its last lines
    assert any(line.startswith("-m benchmarks run ") for line in lines)


def test_what_the_measurements_are_asked(tmp_path: Path) -> None:
    lines, _, out = asked_for(
        tmp_path, FASTNORM_STEPS="prepare,tune,suite", FASTNORM_SUITES="ops",
        FASTNORM_RUN="--op layer_norm --providers torch,fastnorm", FASTNORM_TUNE="--op layer_norm",
    )  # fmt: skip
    tuning, suite = (line for line in lines if line.startswith("-m benchmarks "))
    assert tuning.endswith(f" --op layer_norm --prepare 75 --out {out}/tune.json")
    assert suite.endswith(
        " --suite ops --op layer_norm --providers torch,fastnorm --prepare 75 "
        f"--out {out}/results.json"
    )


def test_what_ends_the_script_leaves_the_logs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/bash\ncase "$*" in setup.py*) kill $(cut -d" " -f4 /proc/$PPID/stat) $PPID;; esac\n'
    )  # its parent is timeout, whose parent is the script
    fake.chmod(0o755)
    done = run("--dry-run", 100, out, PYTHON=str(fake), FASTNORM_BUILD_CUDA="1")
    assert done.returncode == 143
    assert "== build: up to" in logs(out)["setup.log"]


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


def test_an_unknown_step(tmp_path: Path) -> None:
    done = run("--dry-run", 9, tmp_path / "out", FASTNORM_STEPS="build,sweep")
    assert done.returncode == 2
    assert "FASTNORM_STEPS has sweep, which is no step" in done.stderr


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
