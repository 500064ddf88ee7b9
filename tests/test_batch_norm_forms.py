"""Batch norm compiled, and the forms of its Triton kernels on tensors of many tiles."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import fastnorm
from fastnorm import dispatch, functional
from fastnorm.layout import planes_like
from tests.batch_norm_twins import (
    agree,
    agree_with_the_cpu,
    numpy_warns,
    results,
    same_state,
    torch_warns,
    twins,
)
from tests.conftest import HAS_TRITON

pytestmark = pytest.mark.usefixtures("on_the_device")

# torch.compile


@torch_warns
@pytest.mark.parametrize("backend", ["auto", "reference"], indirect=True)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_once_for_every_batch_size(backend, momentum, training):
    layer = fastnorm.BatchNormAct2d(5, momentum=momentum, activation="silu", dtype=torch.float64)
    eager = copy.deepcopy(layer).train(training)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer.train(training), fullgraph=True, backend=counting, dynamic=True)
    counts = set()
    for N in (3, 4, 7):
        x, r = torch.randn(2, N, 5, 4, 2, dtype=torch.float64)
        for e, f in zip(
            results(eager, x, residual=r), results_of(compiled, layer, x, r), strict=True
        ):
            torch.testing.assert_close(f, e)
        same_state(eager, layer)
        counts.add(len(graphs))
    assert len(counts) == 1, "another batch size compiled again"


def results_of(compiled, layer, x, r):
    x = x.detach().requires_grad_()
    y = compiled(x, residual=r)
    return [y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))]


@torch_warns
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_mean_only_compiles(backend):
    layer = fastnorm.MeanOnlyBatchNorm2d(5, momentum=None, dtype=torch.float64)
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(compiled(x), eager(x))
    (dx,) = torch.autograd.grad(compiled(x).pow(2).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(eager(x).pow(2).sum(), x)[0])
    same_state(eager, layer)


# the forms of the Triton kernels, on tensors of many tiles

# of the plan; runs: shares of several tiles, the last ones shorter; stream: L2 holds nothing; fans:
# so many shares that they are merged in two steps
FORMS: dict[str, dict[str, int]] = {
    "owner": {"OWNER_TILES": 1 << 20},
    "ticket": {"OWNER_TILES": 0, "RUN_TILES": 1},
    "runs": {"OWNER_TILES": 0, "SHARES": 2},
    "fans": {"OWNER_TILES": 0, "RUN_TILES": 1},
    "stream": {"OWNER_TILES": 0, "IN_FLIGHT": 1 << 40, "PROGRAMS": 2},
}
MANY_TILES = {
    "nchw": lambda: torch.randn(5, 5, 4, 4) * 3 + 1,
    "nchw-odd": lambda: torch.randn(11, 8, 3, 3) * 3 + 1,
    "nchw-odd-batch": lambda: (torch.randn(11, 12, 3, 3) * 3 + 1)[:, :8],
    "nhwc": lambda: torch.randn(5, 40, 2, 2).to(memory_format=torch.channels_last),
    "nlc": lambda: torch.randn(2, 20, 6).transpose(1, 2),
    "nc": lambda: torch.randn(49, 12),
}


@pytest.fixture(params=FORMS, ids=lambda form: f"triton-{form}")
def form(request, monkeypatch) -> Iterator[str]:
    """Tiles so small that a hundred numbers are many; the plan's cache has the limits as keys."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    from fastnorm.ops.batch_norm import plan

    monkeypatch.setattr(plan, "TILE_BYTES", 512)
    for name, value in FORMS[request.param].items():
        monkeypatch.setattr(plan, name, value)
    if request.param == "fans":
        if not dispatch.interpreting():
            pytest.skip("a compiled kernel has the number that it was compiled with")
        from fastnorm.ops.batch_norm import triton_merge

        monkeypatch.setattr(triton_merge.FAN, "value", 4)
    with fastnorm.backend("triton"):
        yield request.param


def idle() -> bool:
    """Whether every launch so far has left its counters zero."""
    from fastnorm.ops import launch

    return bool(launch._arenas) and not any(arena.any() for arena in launch._arenas.values())


def whole(x, dy, residual, activation):
    """One training step through function and backward, with everything that it changes."""
    C = x.size(1)
    weight, bias = torch.linspace(0.5, 2, C).to(x.dtype), torch.linspace(-1, 1, C).to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    mean, var = torch.zeros(C, dtype=x.dtype), torch.ones(C, dtype=x.dtype)
    count = torch.tensor(1)
    y = functional.batch_norm(
        leaves[0], mean, var, *leaves[2:], True, None,
        num_batches_tracked=count, activation=activation, residual=leaves[1],
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), mean, var, count]


@pytest.mark.parametrize(
    "layout, activation",
    [
        *(("nchw", activation) for activation in ("identity", "silu")),
        *(("nhwc", activation) for activation in ("identity", "silu")),
        ("nchw-odd", "silu"),
        ("nchw-odd-batch", "identity"),
        ("nlc", "silu"),
        ("nc", "identity"),
    ],
)
def test_all_forms_of_the_kernels(form, layout, activation):
    from fastnorm.ops.batch_norm.plan import plan

    x = MANY_TILES[layout]()
    residual, dy = torch.randn(2, *x.shape)
    cut = plan(x, planes_like(x), operands=2)
    assert cut.tiles > 2
    assert cut.owner == (form == "owner")
    assert (cut.lag < 0) == (form == "stream")
    if form != "owner":
        assert (cut.run == 1) == (form in ("ticket", "fans"))
        assert cut.shares > 1
        assert cut.tiles % cut.run > 0 or form != "stream", "no shorter share"
    if layout.startswith("nchw-odd"):
        assert cut.constants["CHANNELS"] < cut.constants["BLOCK_C"]
    found = whole(x, dy, residual, activation)
    assert idle()
    with fastnorm.backend("reference"):
        exact = whole(x.double(), dy.double(), residual.double(), activation)
    for e, f in zip(exact, found, strict=True):
        torch.testing.assert_close(f.double(), e.double(), rtol=2e-5, atol=2e-5)
    again = whole(x, dy, residual, activation)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not deterministic"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_all_forms_of_mean_only(form, layout):
    x = MANY_TILES[layout]()
    layer = fastnorm.MeanOnlyBatchNorm2d(x.size(1))
    dy = torch.randn(x.shape)
    y, dx, dbias = results(layer, x, dy)
    assert idle()
    torch.testing.assert_close(y, x - x.mean((0, 2, 3), keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dy - dy.mean((0, 2, 3), keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias, dy.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_all_forms_in_evaluation(form):
    theirs, ours = (layer.eval() for layer in twins(C=5))
    agree(theirs, ours, MANY_TILES["nchw"]().double())
    assert idle()


@numpy_warns
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 3])
def test_all_forms_with_a_value_that_is_not_finite(form, value, at):
    theirs, ours = twins(C=5)
    x = MANY_TILES["nchw"]().double()
    x[at, 2, 3, 3] = value
    agree_with_the_cpu(theirs, ours, x)
    assert idle()


def test_all_forms_keep_digits_at_a_large_mean(form):
    x = MANY_TILES["nchw"]() + 1e4
    y = functional.batch_norm(x, None, None, training=True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    # half an ulp of fp32 at 1e4 is 4.9e-4, in the mean of a tile and in that of all; std is 3
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2 * 4.9e-4 / 3)


@pytest.mark.parametrize("layout", MANY_TILES)
def test_int64_offsets_give_the_same_bits(form, layout, monkeypatch):
    # what a tensor of 2^31 elements compiles, on one that the interpreter can afford
    from fastnorm.ops.batch_norm import plan

    x = MANY_TILES[layout]()[:31]  # no more shares than two steps merge
    dy, residual = torch.randn(x.shape), torch.randn(x.shape)
    short = whole(x, dy, residual, "silu")
    made = plan._plan.__wrapped__

    def long(*key):
        found = made(*key)
        return found._replace(constants={**found.constants, "LONG": True})

    monkeypatch.setattr(plan, "_plan", long)
    for a, b in zip(whole(x, dy, residual, "silu"), short, strict=True):
        assert torch.equal(a, b)
