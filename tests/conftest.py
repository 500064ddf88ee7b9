"""Where the tests run: on the GPU if there is one, else on the CPU, with Triton's kernels
interpreted and the CUDA sources compiled by g++."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests import chosen, emulation

if not torch.cuda.is_available():
    emulation.activate()  # before fastnorm looks for its extension

import fastnorm
from tests.chosen import _k_chooses_it  # noqa: F401  (a fixture of every test)
from tests.gpu_guard import (  # noqa: F401  (hooks and a fixture of every test)
    _the_gpu_is_still_there,
    pytest_configure,
    pytest_runtest_protocol,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _round_as_hardware_does() -> None:
    """Let the interpreter round to bf16 to nearest even, as every GPU does; its own cast truncates
    fp32, and makes of fp64 the bits of an integer."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
        wide = src.dtype.scalar in (tl.float32, tl.float64)
        if wide and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(
                rounded.view(torch.uint16).numpy().reshape(src.data.shape), tl.bfloat16
            )
        return cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


if HAS_TRITON and not torch.cuda.is_available():
    _round_as_hardware_does()
    chosen.watch_triton()

# a convolution before a layer is to give the same numbers to as many digits as on a CPU
torch.backends.cudnn.allow_tf32 = False

# What a GPU alone can tell comes first there, and of that what takes longest: where several
# processes share the tests the rest runs beside it, and where the time is over the least is lost.
FIRST = ("test_streams.py", "test_soak.py", "test_cases.py", "test_graphs.py")


def in_order(file: str) -> int:
    return FIRST.index(file) if file in FIRST else len(FIRST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        items.sort(key=lambda item: in_order(item.path.name))


AVAILABLE = [name for name, missing in fastnorm.backends().items() if missing is None]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


def _made_there(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.device(device) if device != "cpu" else contextlib.nullcontext()


@pytest.fixture
def on_the_device(device: str) -> Iterator[None]:
    """New tensors are made there: for tests that name no device."""
    with _made_there(device):
        yield


@pytest.fixture(autouse=True)
def _kernels_are_given_tensors_they_serve(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are made on the GPU, where there is one, in tests of our kernels: written on a
    CPU, some name no device."""
    case = getattr(request.node, "callspec", None)
    ours = case is not None and case.params.get("backend") in ("triton", "cuda")
    with _made_there(DEVICE if ours else "cpu"):
        yield


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that this machine has, forced."""
    with fastnorm.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _repeatable(request: pytest.FixtureRequest) -> None:
    """The same numbers in every run; of CUDA's schedules another in each test."""
    torch.manual_seed(0)
    emulation.schedule(zlib.crc32(request.node.nodeid.encode()))


HANGS_AFTER_S = 40 if DEVICE == "cuda" else 300


@pytest.fixture
def watchdog(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], None]]:
    """Told of every step: a kernel that waits for ever takes the process along, and the place is in
    the log. Not in what pytest keeps of a test's output: that would end with the process."""
    with capsys.disabled():
        log = os.fdopen(os.dup(2), "w")

    def step() -> None:
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True, file=log)

    step()
    yield step
    faulthandler.cancel_dump_traceback_later()
    log.close()
