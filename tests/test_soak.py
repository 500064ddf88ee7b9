"""Random shapes one after the other and beside other work: hangs, races, wrong numbers."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import fastnorm
from fastnorm.ops.activation import NAMES
from tests import conftest
from tests.cases.activation import swish_case
from tests.cases.batch_norm import batch_norm_pair, batch_norm_tensors
from tests.cases.case import EVERY, Case, Tensors
from tests.cases.layer_norm import layer_norm_pair, layer_norm_tensors
from tests.compare import assert_as_good_as_torch, run, same_bits
from tests.streams import closed_gate

GPU = torch.cuda.is_available()
# how many calls, for how long, and the most elements of one: a thread of an emulated GPU is slow
CALLS, SECONDS, ELEMENTS = (1000, 45, 1 << 22) if GPU else (16, 300, 1 << 12)
KERNELS = [name for name in ("triton", "cuda") if fastnorm.backends()[name] is None]

needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastnorm.backend(request.param):
        yield request.param


class Recipe(NamedTuple):
    """A call of one of the kernels that are one launch, less the size of the batch: all that a
    kernel of Triton's may be compiled for."""

    kind: str
    layout: str
    C: int
    S: int
    dtype: torch.dtype
    activation: str | None
    residual: bool
    training: bool


# what Triton's are drawn from on a GPU, which has to wait for a second or so until a kernel is
# compiled: with these, and every size of batch, for some tens of kernels instead of hundreds
FEW = (
    Recipe("batch_norm", "nchw", 64, 196, torch.bfloat16, "silu", True, True),
    Recipe("batch_norm", "nlc", 24, 49, torch.float32, None, False, True),
    Recipe("batch_norm", "nhwc", 96, 100, torch.float16, "relu", False, True),
    Recipe("batch_norm", "nchw", 17, 7, torch.float64, None, False, False),
    Recipe("layer_norm", "nchw", 17, 49, torch.bfloat16, None, True, True),
    Recipe("layer_norm", "nlc", 96, 64, torch.float32, "gelu", False, True),
    Recipe("layer_norm", "nchw", 48, 1023, torch.float16, None, False, True),  # long rows
    Recipe("swish", "nchw", 32, 100, torch.bfloat16, None, False, True),
    Recipe("swish", "nhwc", 130, 7, torch.float32, None, False, True),
)


def a_recipe(chance: random.Random) -> Recipe:
    """Sizes near powers of two and odd ones alike."""
    C = chance.choice([16, 17, 24, 32, 48, 64, 96, 130])
    S = min(chance.choice([1, 3, 7, 49, 64, 100, 196, 1023, 4096]), ELEMENTS // (4 * C))
    return Recipe(
        chance.choice(["batch_norm", "batch_norm", "layer_norm", "swish"]),
        chance.choice(["nchw", "nlc", "nhwc"]), C, S,
        chance.choice(EVERY), chance.choice([None, None, *NAMES]),
        residual=chance.random() < 0.3, training=chance.random() < 0.8,
    )  # fmt: skip


def recipes(chance: random.Random, backend: str) -> Iterator[Recipe]:
    """Without end."""
    while True:
        few = GPU and backend == "triton"
        yield chance.choice(FEW) if few else a_recipe(chance)


def a_case(chance: random.Random, recipe: Recipe) -> Case:
    """With a batch that makes it any size up to ELEMENTS, of which large ones are rare."""
    kind, layout, C, S, dtype, activation, residual, training = recipe
    N = max(2, int(ELEMENTS ** chance.uniform(0.5, 1.0)) // (C * S))
    name = f"{N}x{C}x{S}-{layout}-{activation}{'-residual' if residual else ''}"

    def planes() -> torch.Tensor:
        x = torch.randn(N, S, C).transpose(1, 2) if layout != "nchw" else torch.randn(N, C, S)
        if layout == "nhwc":
            return x[..., None].contiguous(memory_format=torch.channels_last)
        return x

    def rows() -> torch.Tensor:
        return torch.randn(N, C * S) if layout == "nchw" else torch.randn(N, S, C)

    if kind == "batch_norm":
        pair, make = batch_norm_pair(training, activation), batch_norm_tensors(planes, residual)
        return Case(kind, name + f"-{training}", **pair, make=make, dtypes=(dtype,))
    if kind == "layer_norm":
        make = layer_norm_tensors(rows, residual=residual)
        return Case(kind, name, **layer_norm_pair(activation), make=make, dtypes=(dtype,))
    return swish_case(name, planes, None)


class Call(NamedTuple):
    case: Case
    tensors: Tensors
    dy: torch.Tensor
    what: str

    def __call__(self) -> dict[str, torch.Tensor]:
        return run(self.case.ours, self.tensors, self.dy)


def calls(seed: int, backend: str, device: str) -> Iterator[Call]:
    """Random ones, without end, with their tensors on that device."""
    chance = random.Random(seed)
    for number, recipe in enumerate(recipes(chance, backend)):
        case = a_case(chance, recipe)
        tensors = {
            name: None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)
            for name, t in case.make(recipe.dtype).items()
        }
        x = tensors["x"]
        assert x is not None
        what = f"call {number}: {case} {recipe.dtype}"
        yield Call(case, tensors, case.dy(x.detach()).to(device), what)


def some(
    count: int, seed: int, backend: str, device: str, watchdog: Callable[[], None]
) -> Iterator[Call]:
    """The first calls of a seed; each may take so long."""
    for call in itertools.islice(calls(seed, backend, device), count):
        watchdog()
        yield call


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_shapes_one_after_the_other(
    backend: str, device: str, watchdog: Callable[[], None]
) -> None:
    start = time.monotonic()
    for call in some(CALLS, 0, backend, device, watchdog):
        case, tensors, dy, what = call
        assert_as_good_as_torch(case.ours, case.torchs, tensors, dy, what)
        assert same_bits(call(), call()), what
        if time.monotonic() - start > SECONDS:
            break


def beside(
    other_work: Callable[[Call], None], backend: str, device: str, watchdog: Callable[[], None]
) -> None:
    """The same bits alone and while another stream works: both begin when all is queued."""
    ours, others = torch.cuda.Stream(), torch.cuda.Stream()
    for call in some(100, 1, backend, device, watchdog):
        alone = call()
        torch.cuda.synchronize()
        gate = closed_gate(20)
        for stream in (ours, others):
            stream.wait_event(gate)
        with torch.cuda.stream(others):
            other_work(call)
        with torch.cuda.stream(ours):
            crowded = call()
        torch.cuda.synchronize()
        assert same_bits(alone, crowded), call.what


@needs_gpu
def test_two_streams_at_once(backend: str, device: str, watchdog: Callable[[], None]) -> None:
    def the_same_kernels(call: Call) -> None:
        for _ in range(5):
            call()

    beside(the_same_kernels, backend, device, watchdog)


@needs_gpu
def test_beside_a_kernel_that_occupies_the_chip(
    backend: str, device: str, watchdog: Callable[[], None]
) -> None:
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def matmuls(call: Call) -> None:
        for _ in range(10):
            a @ a

    beside(matmuls, backend, device, watchdog)


@needs_gpu
def test_inside_a_captured_graph(backend: str, device: str, watchdog: Callable[[], None]) -> None:
    for call in some(30, 3, backend, device, watchdog):
        eager = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # compiles, and fills torch's caches
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()  # works on clones that it makes in the graph
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            assert same_bits(eager, captured), call.what


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_device_that_is_not_the_current_one(backend: str, watchdog: Callable[[], None]) -> None:
    for case, tensors, dy, what in some(30, 4, backend, "cuda:1", watchdog):
        assert_as_good_as_torch(case.ours, case.torchs, tensors, dy, what)


HANG = """
import time
from tests import conftest

watchdog = conftest.watchdog
conftest.HANGS_AFTER_S = 1

def test_hang(watchdog):
    time.sleep(60)
"""


def test_what_hangs_ends_and_the_log_says_where(tmp_path: Path) -> None:
    (tmp_path / "test_hang.py").write_text(HANG)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "in test_hang" in done.stderr


def test_what_a_gpu_alone_can_tell_comes_first_there(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    for name in conftest.FIRST:
        assert (here / name).exists()
    items: list[Any] = [
        SimpleNamespace(path=here / name) for name in ("test_activation.py", *conftest.FIRST[::-1])
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    conftest.pytest_collection_modifyitems(items)
    assert [item.path.name for item in items] == [*conftest.FIRST, "test_activation.py"]
