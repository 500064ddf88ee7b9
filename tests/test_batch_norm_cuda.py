"""Batch norm's CUDA forward in each of its forms, forced, under several schedules; the statistics
of synchronised batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm import layout
from fastnorm.ops import batch_norm as family
from fastnorm.ops import launch
from fastnorm.ops.activation import NAMES
from fastnorm.ops.batch_norm import cuda, mean_only, sync
from tests.compare import FLOOR, relative_error
from tests.conftest import AVAILABLE
from tests.test_batch_norm_backward_cuda import (
    LAYOUTS,
    SEEDS,
    _cuda,  # noqa: F401  (a fixture of every test)
    configure,
    form,  # noqa: F401  (a fixture)
    many_members,  # noqa: F401  (a fixture)
)

pytestmark = [
    pytest.mark.skipif("cuda" not in AVAILABLE, reason="no CUDA backend on this machine"),
    pytest.mark.usefixtures("on_the_device"),
]

Case = tuple[list[Any], tuple[Any, ...]]


def sample(name: str) -> Tensor:
    """No mean near zero: of such a one the relative error says nothing."""
    return LAYOUTS[name]().add_(1)


def training(x: Tensor, activation: str, parameters: torch.dtype | None = None) -> Case:
    """The arguments of a forward op: its tensors, whose buffers it changes, and its settings."""
    C, kind = x.size(1), parameters or x.dtype
    residual = None
    if activation != "identity":
        residual = layout.planes_like(x).copy_(torch.randn(x.shape))
    tensors = [
        x,
        residual,
        torch.linspace(0.5, 2, C).to(kind),
        torch.linspace(-1, 1, C).to(kind),
        torch.linspace(-2, 2, C).to(kind),  # running mean and variance
        torch.linspace(0.5, 3, C).to(kind),
        torch.tensor(3),
    ]
    return tensors, (True, 0.3, 1e-5, activation)


def fresh(tensors: list[Any]) -> list[Any]:
    """The same tensors with buffers of their own, of the same strides."""
    copies = [None if t is None else torch.empty_like(t).copy_(t) for t in tensors[-3:]]
    return [*tensors[:-3], *copies]


def run(op: Callable[..., Any], tensors: list[Any], settings: tuple[Any, ...]) -> list[Any]:
    """Outputs and buffers as the CUDA kernels leave them, who leave their counters zero."""
    tensors = fresh(tensors)
    with fastnorm.backend("cuda"):
        found = op(*tensors, *settings)
    assert not any(arena.any() for arena in launch._arenas.values())
    return [*_apart(found), *tensors[-3:]]


def _apart(outputs: Any) -> list[Tensor]:
    """Mean and rstd apart: neither may hide the other's error."""
    if isinstance(outputs, tuple) and len(outputs) == 2:
        y, statistics = outputs
        return [y, *statistics]
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def check(op: Callable[..., Any], tensors: list[Any], settings: tuple[Any, ...]) -> None:
    """Against ATen in fp64; the same bits under every schedule."""
    wide = [t if t is None or not t.is_floating_point() else t.double() for t in fresh(tensors)]
    with fastnorm.backend("reference"):
        expected = op(*wide, *settings)
    expected = [*_apart(expected), *wide[-3:]]
    first = run(op, tensors, settings)
    for e, f in zip(expected, first, strict=True):
        assert (e is None) == (f is None)
        if e is not None and not f.is_floating_point():
            assert torch.equal(e, f)
        elif e is not None:
            assert relative_error(f, e) <= 4 * FLOOR[f.dtype]
    for seed in SEEDS[1:]:
        configure(seed)
        for f, again in zip(first, run(op, tensors, settings), strict=True):
            assert f is None or torch.equal(f, again), f"other bits under schedule {seed}"


# every form, every layout


@pytest.mark.parametrize("activation", ["identity", "silu", "mish"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_training(form: str, name: str, activation: str) -> None:  # noqa: F811
    check(family._forward, *training(sample(name), activation))


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_many_members(form: str, activation: str, many_members: Tensor) -> None:  # noqa: F811
    x = many_members
    assert (cuda.plan(x, x, activation, False, False, 1, 0).branches > 1) == (form != "owner")
    check(family._forward, *training(x, activation))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nchw", "nchw-7x7", "misaligned", "nhwc", "nlc"])
def test_training_in_other_dtypes(form: str, name: str, dtype: torch.dtype) -> None:  # noqa: F811
    check(family._forward, *training(sample(name).to(dtype), "relu", torch.float32))


@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation: str) -> None:
    check(family._forward, *training(1 + torch.randn(3, 5, 20, 20), activation))


@pytest.mark.parametrize("name", LAYOUTS)
def test_mean_only(form: str, name: str) -> None:  # noqa: F811
    x = sample(name)
    C = x.size(1)

    def op(x: Tensor, bias: Tensor, mean: Tensor, _: None, count: Tensor) -> Any:
        return mean_only._forward(x, bias, mean, count, True, 0.3)

    tensors = [x, torch.linspace(-1, 1, C), torch.linspace(-2, 2, C), None, torch.tensor(3)]
    check(op, tensors, ())


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_running_statistics(name: str, activation: str) -> None:
    tensors, settings = training(sample(name), activation)
    tensors[-1] = None
    check(family._forward, tensors, (False, *settings[1:]))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_cumulative_average(form: str, count: int) -> None:  # noqa: F811
    tensors, settings = training(sample("nchw"), "identity")
    tensors[-1] = torch.tensor(count)
    check(family._forward, tensors, (True, None, *settings[2:]))


@pytest.mark.parametrize("absent", [[2], [3], [2, 3], [4, 5], [6], [4, 5, 6]])
def test_without(form: str, absent: list[int]) -> None:  # noqa: F811
    tensors, settings = training(sample("nchw"), "silu")
    for i in absent:
        tensors[i] = None
    check(family._forward, tensors, settings)


def test_parameters_and_buffers_with_gaps() -> None:
    tensors, settings = training(sample("nhwc"), "silu")
    tensors[2:6] = [torch.stack([t, t], 1)[:, 0] for t in tensors[2:6]]
    with fastnorm.backend("cuda"):
        family._forward(*tensors, *settings)
    expected = run(family._forward, *training(tensors[0], "identity"))
    torch.testing.assert_close(tensors[4:6], expected[3:5])


@pytest.mark.parametrize("name", ["nchw", "nchw-7x7", "nhwc"])
def test_tensors_at_odd_addresses(form: str, name: str) -> None:  # noqa: F811
    tensors, settings = training(sample(name), "silu")
    for i in (0, 1):
        t = tensors[i]
        tensors[i] = torch.empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
    check(family._forward, tensors, settings)


def test_offsets_that_need_64_bits(form: str) -> None:  # noqa: F811
    # memory that is never touched costs nothing
    x = torch.empty(2**31 + 2**20, dtype=torch.float16)
    x = x.as_strided((2, 3, 4000), (2**31, 4000, 1))
    check(family._forward, *training(x.copy_(1 + torch.randn(x.shape)), "relu", torch.float32))


# values


@pytest.mark.parametrize("name", ["nchw", "nchw-7x7", "nhwc", "nlc"])
def test_a_large_mean_keeps_its_digits(form: str, name: str) -> None:  # noqa: F811
    x = sample(name) + 1e4
    tensors, settings = training(x, "identity")
    _, mean, rstd, *_ = run(family._forward, tensors, settings)
    dims = [0, *range(2, x.dim())]
    var, exact_mean = torch.var_mean(x.double(), dims, correction=0)
    assert ((mean - exact_mean).abs() <= 4.9e-4).all()  # half an ulp
    assert relative_error(rstd, torch.rsqrt(var + 1e-5)) <= 4 * FLOOR[torch.float32]


def test_an_outlier_as_pivot(form: str) -> None:  # noqa: F811
    x = torch.randn(4, 3, 64, 64)
    x[0, :, 0, 0] = 1e4
    check(family._forward, *training(x, "identity"))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["nchw", "nchw-7x7", "nhwc-odd", "nlc"])
def test_what_is_not_finite_stays_in_its_channel(
    form: str,  # noqa: F811
    name: str,
    value: float,
) -> None:
    tensors, settings = training(sample(name), "silu")
    healthy = run(family._forward, tensors, settings)
    tensors[0] = tensors[0].clone(memory_format=torch.preserve_format)
    tensors[0][-1, 1].view(-1)[-1] = value
    for what, (f, h) in enumerate(
        zip(run(family._forward, tensors, settings)[:5], healthy, strict=False)
    ):
        channels = f.movedim(1, 0) if f.dim() > 1 else f
        if what in (1, 3):  # the mean, the running mean
            assert str(float(channels[1])) == str(value)
        else:
            assert channels[1].isnan().any()
        others = [c for c in range(channels.size(0)) if c != 1]
        assert torch.equal(channels[others], (h.movedim(1, 0) if h.dim() > 1 else h)[others])


# synchronised batch norm


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics(name: str, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnorm.ops.batch_norm import cuda

    monkeypatch.setattr(cuda, "BATCHES", batches)
    check(lambda x, *_: sync._statistics(x), [sample(name), None, None, None], ())


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("channels", [3, 600])
def test_merge(channels: int, momentum: float | None) -> None:
    gathered = torch.rand(5, 2 * channels + 1) + 100
    gathered[:, -1] = torch.tensor([3, 0, 7, 1, 2])
    gathered[1, :-1] = float("nan")  # of no values
    running = [torch.randn(channels), torch.rand(channels), torch.tensor(4)]
    tensors = [gathered.nan_to_num(), *running]
    check(sync._merge, tensors, (momentum,))
    for f, e in zip(
        run(sync._merge, [gathered, *running], (momentum,)),
        run(sync._merge, tensors, (momentum,)),
        strict=True,
    ):
        assert torch.equal(f, e)
