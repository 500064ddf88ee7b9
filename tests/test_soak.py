"""Random shapes one after the other and beside other work: hangs, races, wrong numbers."""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Callable, Iterator

import pytest
import torch

import fastnorm
from fastnorm.ops.activation import NAMES
from tests.cases.activation import swish_case
from tests.cases.batch_norm import batch_norm_pair, batch_norm_tensors
from tests.cases.case import EVERY, Case, Tensors
from tests.cases.layer_norm import layer_norm_pair, layer_norm_tensors
from tests.compare import assert_as_good_as_torch, run, same_bits

GPU = torch.cuda.is_available()
# how many calls, and the most elements of one: a thread of an emulated GPU is slow
CALLS, ELEMENTS = (1000, 1 << 22) if GPU else (16, 1 << 12)
HANGS_AFTER_S = 300
KERNELS = [name for name in ("triton", "cuda") if fastnorm.backends()[name] is None]

needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """A kernel that waits for ever takes the process along: it ends with the place in the log."""
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastnorm.backend(request.param):
        yield request.param


def a_shape(chance: random.Random) -> tuple[int, int, int]:
    """[N, C, S] of at most ELEMENTS; sizes near powers of two and odd ones alike."""
    C = chance.choice([16, 17, 24, 32, 48, 64, 96, 130])
    most = int(ELEMENTS ** chance.uniform(0.5, 1.0)) // C
    S = chance.choice([1, 3, 7, 49, 64, 100, 196, 1023, 4096])
    S = min(S, max(1, most // 2))
    return max(2, most // S), C, S


def a_case(chance: random.Random) -> tuple[Case, torch.dtype]:
    """A call of one of the kernels that are one launch."""
    N, C, S = a_shape(chance)
    activation = chance.choice([None, None, *NAMES])
    residual = chance.random() < 0.3
    layout = chance.choice(["nchw", "nlc", "nhwc"])
    kind = chance.choice(["batch_norm", "batch_norm", "layer_norm", "swish"])
    name = f"{N}x{C}x{S}-{layout}-{activation}{'-residual' if residual else ''}"

    def planes() -> torch.Tensor:
        x = torch.randn(N, S, C).transpose(1, 2) if layout != "nchw" else torch.randn(N, C, S)
        if layout == "nhwc":
            return x[..., None].contiguous(memory_format=torch.channels_last)
        return x

    def rows() -> torch.Tensor:
        return torch.randn(N, C * S) if layout == "nchw" else torch.randn(N, S, C)

    if kind == "batch_norm":
        training = chance.random() < 0.8
        pair, make = batch_norm_pair(training, activation), batch_norm_tensors(planes, residual)
        case = Case(kind, name + f"-{training}", **pair, make=make)
    elif kind == "layer_norm":
        make = layer_norm_tensors(rows, residual=residual)
        case = Case(kind, name, **layer_norm_pair(activation), make=make)
    else:
        case = swish_case(name, planes, None)
    return case, chance.choice(EVERY)


def tensors_of(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensors, torch.Tensor]:
    tensors = {
        name: None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)
        for name, t in case.make(dtype).items()
    }
    assert tensors["x"] is not None
    return tensors, case.dy(tensors["x"].detach().cpu()).to(device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_shapes_one_after_the_other(backend: str, device: str) -> None:
    chance = random.Random(0)
    for call in range(CALLS):
        case, dtype = a_case(chance)
        tensors, dy = tensors_of(case, dtype, device)
        what = f"call {call}: {case} {dtype}"
        assert_as_good_as_torch(case.ours, case.torchs, tensors, dy, what)
        assert same_bits(run(case.ours, tensors, dy), run(case.ours, tensors, dy)), what


def beside(other_work: Callable[[torch.cuda.Stream], None], device: str) -> None:
    """The same bits alone and while another stream works."""
    chance = random.Random(1)
    ours, others = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(100):
        case, dtype = a_case(chance)
        tensors, dy = tensors_of(case, dtype, device)
        alone = run(case.ours, tensors, dy)
        torch.cuda.synchronize()
        other_work(others)
        with torch.cuda.stream(ours):
            crowded = run(case.ours, tensors, dy)
        torch.cuda.synchronize()
        assert same_bits(alone, crowded), f"{case} {dtype}"


@needs_gpu
def test_two_streams_at_once(backend: str, device: str) -> None:
    chance = random.Random(2)
    case, dtype = a_case(chance)
    tensors, dy = tensors_of(case, dtype, device)

    def the_same_kernels(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for _ in range(5):
                run(case.ours, tensors, dy)

    beside(the_same_kernels, device)


@needs_gpu
def test_beside_a_kernel_that_occupies_the_chip(backend: str, device: str) -> None:
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def matmuls(stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for _ in range(10):
                a @ a

    beside(matmuls, device)


@needs_gpu
def test_inside_a_captured_graph(backend: str, device: str) -> None:
    chance = random.Random(3)
    for _ in range(30):
        case, dtype = a_case(chance)
        tensors, dy = tensors_of(case, dtype, device)
        eager = run(case.ours, tensors, dy)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(case.ours, tensors, dy)  # compiles, and fills torch's caches
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(case.ours, tensors, dy)  # works on clones that it makes in the graph
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            assert same_bits(eager, captured), f"{case} {dtype}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    chance = random.Random(4)
    for _ in range(30):
        case, dtype = a_case(chance)
        tensors, dy = tensors_of(case, dtype, "cuda:1")
        assert_as_good_as_torch(case.ours, case.torchs, tensors, dy, f"{case} {dtype}")
