"""Batch norm's CUDA backward in each of its forms, forced, under several schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm import layout
from fastnorm.ops import batch_norm as family
from fastnorm.ops import launch
from fastnorm.ops.activation import NAMES
from fastnorm.ops.batch_norm import mean_only, sync
from tests.compare import FLOOR, relative_error
from tests.conftest import AVAILABLE

pytestmark = [
    pytest.mark.skipif("cuda" not in AVAILABLE, reason="no CUDA backend on this machine"),
    pytest.mark.usefixtures("on_the_device"),
]

# form -> batches of a tile: several blocks share a group, the last tile is not full, and what
# streams does not fit
FORMS = {"owner": -1, "hold": 2, "ticket": 3, "stream": 4}
SEEDS = range(4)
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "nchw": lambda: torch.randn(4, 2, 64, 64) * 3 + 1,
    "nchw-7x7": lambda: torch.randn(260, 3, 7, 7),
    "misaligned": lambda: torch.randn(2, 3, 6100)[:, :, 3:6001],
    "nhwc": lambda: torch.randn(2, 40, 16, 16).to(memory_format=torch.channels_last),
    "nhwc-odd": lambda: torch.randn(2, 7, 33, 8).to(memory_format=torch.channels_last),
    "nlc": lambda: torch.randn(2, 301, 24).transpose(1, 2),
    "nc": lambda: torch.randn(600, 24),
    "nc-odd": lambda: torch.randn(300, 70)[:, 3:],
}


ROOM = {"blocks_per_sm": 8}  # for the blocks of a group


def configure(seed: int) -> None:
    """A schedule and, where the engine is the device, its size."""
    from fastnorm.ops.extension import extension

    if hasattr(extension(), "engine"):
        extension().engine.configure(seed=seed, **(ROOM if seed >= 0 else {}))


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of one batch; plans depend on the device, and this one changes."""
    from fastnorm.ops.batch_norm import cuda

    monkeypatch.setattr(cuda, "BATCHES", 1)
    cuda._plan.cache_clear()
    configure(0)
    yield
    configure(-1)
    cuda._plan.cache_clear()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from fastnorm.ops.batch_norm import cuda
    from fastnorm.ops.extension import extension

    monkeypatch.setattr(cuda, "FORM", extension().BATCH_NORM_FORMS.index(request.param))
    monkeypatch.setattr(cuda, "BATCHES", FORMS[request.param])
    return str(request.param)


def like(x: Tensor, value: Tensor) -> Tensor:
    """Values as the family's op gets them: dense, in the layout of x's output."""
    return layout.planes_like(x).copy_(value)


def given(x: Tensor, residual: bool = True, parameters: torch.dtype | None = None) -> list[Any]:
    """x, dy, residual, weight, bias, statistics of a training step."""
    C, wide = x.size(1), torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(wide), [0, *range(2, x.dim())], correction=0)
    x_hat = ((x.movedim(1, -1) - mean) / var.sqrt()).movedim(-1, 1)
    return [
        x,
        like(x, 1 + torch.rand(x.shape) + x_hat),  # neither sum cancels
        like(x, torch.randn(x.shape)) if residual else None,
        torch.linspace(0.5, 2, C).to(parameters or x.dtype),
        torch.linspace(-1, 1, C).to(parameters or x.dtype),
        torch.stack([mean, torch.rsqrt(var + 1e-5)]),
    ]


def exact(tensors: list[Any]) -> list[Any]:
    return [t.double() if t is not None else None for t in tensors]


def run(op: Callable[..., Any], *arguments: Any) -> list[Tensor | None]:
    """The results on the CUDA kernels, which have left their counters zero."""
    with fastnorm.backend("cuda"):
        found = op(*arguments)
    assert not any(arena.any() for arena in launch._arenas.values())
    return list(found) if isinstance(found, tuple) else [found]


def check(op: Callable[..., Any], tensors: list[Any], *settings: Any) -> None:
    """Against ATen in fp64; the same bits under every schedule."""
    with fastnorm.backend("reference"):
        expected = list(op(*exact(tensors), *settings))
    first = run(op, *tensors, *settings)
    for e, f in zip(expected, first, strict=True):
        assert (e is None) == (f is None)
        if e is not None and f is not None:
            assert relative_error(f, e) <= 4 * FLOOR[f.dtype]
    for seed in SEEDS[1:]:
        configure(seed)
        for f, again in zip(first, run(op, *tensors, *settings), strict=True):
            assert f is None or torch.equal(f, again), f"other bits under schedule {seed}"


@pytest.fixture
def many_members(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """So many blocks to a group of so many channels that they do not all read what all left."""
    for name, value in {"blocks_per_sm": 2, "sms": 64, "resident": 64}.items():
        monkeypatch.setitem(ROOM, name, value)
    configure(0)
    x = (1 + torch.randn(2, 64, 56, 56)).to(torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_many_members(form: str, activation: str, many_members: Tensor) -> None:
    from fastnorm.ops.batch_norm import cuda

    x = many_members
    cut = cuda.plan(x, x, activation, True, False, 3, 0)
    assert (cut.branches > 1) == (form != "owner")
    check(family._backward, given(x), True, activation, [True] * 4)


def test_each_form_is_tested_as_what_it_is(form: str) -> None:
    from fastnorm.ops.batch_norm import cuda
    from fastnorm.ops.extension import extension

    x = LAYOUTS["nchw"]()
    cut = cuda.plan(x, x, "silu", True, False, 3, 0)
    assert extension().BATCH_NORM_FORMS[cut.form] == form
    assert (cut.members > 1) == (form != "owner"), "blocks share a group"
    assert (cut.held < cut.batches) == (form != "hold"), "some of a tile is read twice"


@pytest.mark.parametrize("activation", ["identity", "silu", "mish"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_training(form: str, name: str, activation: str) -> None:
    tensors = given(LAYOUTS[name](), residual=activation != "identity")
    check(family._backward, tensors, True, activation, [True] * 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nchw", "nchw-7x7", "misaligned", "nhwc", "nlc"])
def test_training_in_other_dtypes(form: str, name: str, dtype: torch.dtype) -> None:
    tensors = given(LAYOUTS[name]().to(dtype), parameters=torch.float32)
    check(family._backward, tensors, True, "relu", [True] * 4)


@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation: str) -> None:
    check(family._backward, given(torch.randn(3, 5, 20, 20)), True, activation, [True] * 4)


@pytest.mark.parametrize("name", ["nchw", "nchw-7x7", "nhwc", "nc"])
def test_mean_only(form: str, name: str) -> None:
    x = LAYOUTS[name]()
    check(mean_only._backward, [given(x)[1], torch.ones(x.size(1))], True, [True, True])


@pytest.mark.parametrize("name", LAYOUTS)
def test_running_statistics(name: str) -> None:
    check(family._backward, given(LAYOUTS[name]()), False, "silu", [True] * 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_only_what_is_needed(training: bool, needs: tuple[bool, ...]) -> None:
    tensors = given(torch.randn(3, 5, 30, 30))
    check(family._backward, tensors, training, "gelu", list(needs))


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("training", [True, False])
def test_mean_only_needs(training: bool, needs: list[bool]) -> None:
    dy = torch.rand(3, 5, 30, 30) + 0.5
    check(mean_only._backward, [dy, torch.ones(5)], training, needs)


@pytest.mark.parametrize("parameter", [3, 4])
def test_without_a_parameter(form: str, parameter: int) -> None:
    tensors = given(LAYOUTS["nchw"]())
    tensors[parameter] = None
    check(family._backward, tensors, True, "silu", [True] * 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_halves_of_synchronised_batch_norm(name: str) -> None:
    tensors = given(LAYOUTS[name]())
    check(sync._reduce, tensors, "silu")
    C = tensors[0].size(1)
    sums, count = torch.linspace(-50, 90, 2 * C), torch.tensor(2.5 * tensors[0].numel() / C)
    check(sync._apply, [*tensors, sums, count], "silu", True)


def test_a_gradient_at_an_odd_address(form: str) -> None:
    tensors = given(LAYOUTS["nchw"]())
    for i in (1, 2):
        room = torch.empty(tensors[i].numel() + 1)
        tensors[i] = room[1:].view(tensors[i].shape).copy_(tensors[i])
    check(family._backward, tensors, True, "silu", [True] * 4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["nchw", "nchw-7x7", "nhwc-odd", "nlc"])
def test_what_is_not_finite_stays_in_its_channel(form: str, name: str, value: float) -> None:
    tensors = given(LAYOUTS[name]())
    healthy = run(family._backward, *tensors, True, "silu", [True] * 4)
    tensors[0] = tensors[0].clone(memory_format=torch.preserve_format)
    tensors[0][-1, 1].fill_(value)
    tensors[5][:, 1] = torch.tensor([value, float("nan")])
    for f, h in zip(
        run(family._backward, *tensors, True, "silu", [True] * 4), healthy, strict=True
    ):
        assert f is not None
        assert h is not None
        channels = f.movedim(1, 0) if f.dim() > 1 else f
        assert channels[1].isnan().any()
        others = [c for c in range(channels.size(0)) if c != 1]
        assert torch.equal(channels[others], (h.movedim(1, 0) if h.dim() > 1 else h)[others])


def test_a_form_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnorm.ops.batch_norm import cuda

    monkeypatch.setattr(cuda, "FORM", 2)  # hold
    # 2048 tiles of one batch: a multiprocessor has room for eight such blocks, of which half may
    # wait, so they would need 512 multiprocessors, more than any GPU has
    x = torch.randn(1024, 1, 64, 64)
    with pytest.raises(RuntimeError, match="batch_norm_plan failed"):
        run(family._backward, *given(x), True, "identity", [True] * 4)
