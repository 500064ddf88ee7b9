"""A test that hangs or ends the CUDA context costs its own result and no other's; and no test of
our kernels is left out on a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnorm
from tests import chosen, gpu_guard

ROOT = Path(__file__).parents[1]

# deaf to SIGINT and with the GIL in its hands, as a process is in cudaDeviceSynchronize
CONFTEST = """
import ctypes, signal
import pytest
from tests import gpu_guard
from tests.gpu_guard import *
from tests.gpu_guard import _the_gpu_is_still_there

context = []
gpu_guard.has_gpu = lambda: True
gpu_guard.dead_context = lambda: "".join(context)

def pytest_configure(config):
    gpu_guard.pytest_configure(config)
    config.addinivalue_line("markers", "hangs_after(seconds)")

@pytest.fixture
def hangs():
    def hang():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(100)
    return hang

@pytest.fixture
def poisoned():
    yield
    context.append("misaligned address")

@pytest.fixture(autouse=True)
def _works():
    assert not context, "somebody else's error"
"""

TESTS = """
import pytest

@pytest.mark.parametrize("n", range(4))
def test_before(n):
    assert n is None, f"said by {n} before"

@pytest.mark.hangs_after(3)
def test_bad(FIXTURE):
    CALL

@pytest.mark.parametrize("n", range(4))
def test_after(n):
    assert n is None, f"said by {n} after"
"""


def ran(tmp_path: Path, fixture: str, call: str, *options: str) -> tuple[int, str, str]:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    text = TESTS.replace("FIXTURE", fixture).replace("CALL", call)
    (tmp_path / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", *options, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def failures(said: str) -> set[str]:
    return set(re.findall(r"^E +AssertionError: (said by .*)", said, re.MULTILINE))


BEFORE = {f"said by {n} before" for n in range(4)}
AFTER = {f"said by {n} after" for n in range(4)}


@pytest.mark.parametrize("fixture, call", [("hangs", "hangs()"), ("poisoned", "pass")])
def test_every_other_failure_has_its_text(tmp_path: Path, fixture: str, call: str) -> None:
    pytest.importorskip("xdist", reason="without it there is no process to replace")
    status, said, errors = ran(tmp_path, fixture, call, "-n", "1")
    assert status == 1
    assert failures(said) == BEFORE | AFTER
    assert re.search(r"worker 'gw\d' crashed while running 'test_it.py::test_bad'", said)
    if fixture == "hangs":
        assert "Timeout (0:00:03)!" in errors and "in hang\n" in errors
        assert "9 failed" in said
    else:
        dead = "the CUDA context of this process is dead: misaligned address"
        assert dead in said
        ended = "test_it.py::test_bad ended the CUDA context of this process: misaligned address"
        assert ended in errors
        assert "9 failed, 1 passed, 1 error" in said


def test_without_another_process_the_run_ends_and_says_why(tmp_path: Path) -> None:
    status, said, _ = ran(tmp_path, "poisoned", "pass", "-p", "no:xdist")
    assert status == 1
    assert failures(said) == BEFORE
    assert "Exit: test_it.py::test_bad ended the CUDA context of this process" in said


@pytest.mark.parametrize(
    "gpu, name, seconds",
    [
        (True, "triton", gpu_guard.HANGS_AFTER_S),
        (True, "torch", gpu_guard.OTHERS_S),
        pytest.param(True, "cuda", 7.0, marks=pytest.mark.hangs_after(7)),
        (False, "cuda", None),
    ],
)
def test_how_long_a_test_may_take(
    gpu: bool, name: str, seconds: float | None, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_guard, "has_gpu", lambda: gpu)
    assert gpu_guard.limit(request.node) == seconds


# -k


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are noticed where there is no GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_launch_is_noticed(backend: str) -> None:
    if (missing := fastnorm.backends()[backend]) is not None:
        pytest.skip(missing)
    before = chosen._cuda_launches()
    with fastnorm.backend(backend):
        fastnorm.functional.silu(torch.randn(8))
    assert ("triton" in chosen._launched) == (backend == "triton")
    assert (chosen._cuda_launches() > before) == (backend == "cuda")


@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=pytest.mark.triton)])
def test_a_test_that_is_not_chosen_is_told(marked: bool, request: pytest.FixtureRequest) -> None:
    assert chosen.complaint(request.node, set()) == ""
    said = chosen.complaint(request.node, {"triton"})
    assert said == "" if marked else "mark it with pytest.mark.triton" in said
    assert "mark it with pytest.mark.cuda" in chosen.complaint(request.node, {"cuda", "triton"})


def test_k_reads_the_marker(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_one(): pass\n\n@pytest.mark.triton\ndef test_two(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", "triton"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
         f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "test_two" in done.stdout and "test_one" not in done.stdout, done.stdout + done.stderr
