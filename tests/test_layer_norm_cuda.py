"""Every CUDA kernel of layer norm, each way of cutting the work forced on small shapes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import backends, dispatch
from fastnorm.ops import launch
from fastnorm.ops.activation import NAMES, reference
from fastnorm.ops.layer_norm import cuda, layer_norm
from tests.compare import assert_as_good_as_torch

pytestmark = [
    pytest.mark.usefixtures("on_the_device"),
    pytest.mark.skipif(
        backends()["cuda"] is not None, reason=f"no CUDA backend here: {backends()['cuda']}"
    ),
]

# Rows of more than 64 bytes are cut into chunks of at most 64, groups have at most 3 rows.
CHUNKS = cuda.Limits(
    forward=4, backward=4, forward_chunk=4, backward_chunk=4, group=3, stream_chunk=0
)
# And where a group of rows, or in the forward a row, does not stay in L2: the second visits follow
# all the first.
IN_TURNS = CHUNKS._replace(group_bytes=0, row_bytes=0, shared_rows=2)
# Rows of more than 64 bytes and up to 2048 are shared by up to 4 blocks, which keep their chunks;
# with 16 processors, whose 32 blocks are more than some devices hold.
STREAMS = CHUNKS._replace(stream_chunk=32, stream_lag=2)
FORMS = {"rows": cuda.Limits(), "chunks": CHUNKS, "in turns": IN_TURNS, "streams": STREAMS}
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cuda, "LIMITS", FORMS[request.param])
    if request.param == "streams":
        monkeypatch.setattr(launch, "processors", lambda device: 16)
    return str(request.param)


@pytest.fixture(params=[0, 1, 7])
def schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    """Orders in which the emulation runs threads and blocks; a GPU has its own."""
    engine = getattr(sys.modules["fastnorm._cuda"], "engine", None)
    if engine is not None:
        engine.configure(seed=request.param)
    yield
    if engine is not None:
        engine.configure()


def check(
    x: Tensor,
    dims: int = 1,
    *,
    residual: Tensor | None = None,
    dy: Tensor | None = None,
    parameters: torch.dtype | None = None,
    affine: tuple[bool, bool] = (True, True),
    frozen: tuple[str, ...] = (),
    activation: str = "identity",
    return_sum: bool = False,
) -> None:
    """Outputs and gradients of the forced backend at most twice as wrong as torch's own."""
    shape = x.shape[x.dim() - dims :]
    weight, bias = (
        torch.randn(shape).to(parameters or x.dtype) if wanted else None for wanted in affine
    )
    tensors = {"x": x.detach(), "weight": weight, "bias": bias, "residual": residual}
    for name, t in tensors.items():
        if t is not None and name not in frozen:
            t.requires_grad_()

    def ours(x, weight, bias, residual):  # type: ignore[no-untyped-def]
        options = {"activation": activation, "residual": residual, "return_sum": return_sum}
        y = layer_norm(x, shape, weight, bias, **options)
        return torch.cat(y) if return_sum else y

    def torchs(x, weight, bias, residual):  # type: ignore[no-untyped-def]
        s = x if residual is None else x + residual
        wide = [None if p is None else p.to(s.dtype) for p in (weight, bias)]
        z = reference.ACTIVATIONS[activation].value(F.layer_norm(s, shape, *wide))
        return torch.cat((z, s)) if return_sum else z

    if dy is None:
        dy = torch.randn(x.shape).to(x.dtype)
    with dispatch.backend("cuda"):
        assert_as_good_as_torch(ours, torchs, tensors, torch.cat((dy, dy)) if return_sum else dy)


# columns: one vector, odd ones, whole vectors, several warps a row, more chunks than one
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("cols", [8, 31, 64, 129, 384])
def test_dtypes(form: str, cols: int, dtype: torch.dtype) -> None:
    check(torch.randn(7, cols).to(dtype))


@pytest.mark.parametrize("rows", [1, 2, 300])
def test_rows(form: str, rows: int) -> None:
    check(torch.randn(rows, 40))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("cols", [96, 97])
def test_schedules(form: str, cols: int) -> None:
    x = torch.randn(9, cols)
    check(x, residual=torch.randn_like(x), activation="silu", return_sum=True)
    check(x.bfloat16())
    assert not launch.counters(x, 1).any(), "every launch leaves its counters zero"


@pytest.mark.parametrize("activation", NAMES)
def test_activations(form: str, activation: str) -> None:
    check(torch.randn(4, 65), activation=activation)
    check(torch.randn(4, 64).bfloat16(), activation=activation)


# sizes of KERNELS that no power of two divides, at a mean that a sum of squares would lose
@pytest.mark.parametrize("cols", [769, 1000, 4095])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_columns(form: str, cols: int, dtype: torch.dtype) -> None:
    check((torch.randn(5, cols) + (1000 if dtype == torch.float32 else 10)).to(dtype))


# up to 512 threads a row, and the first size beyond
@pytest.mark.parametrize("cols", [4096, 8192, 8196])
def test_registers_end(cols: int) -> None:
    check(torch.randn(3, cols))
    check(torch.randn(3, 2 * cols).bfloat16())


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_parameters_of_another_dtype(
    form: str, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    for cols in (32, 33):
        check(torch.randn(6, cols).to(dtype), parameters=parameters, activation="silu")


@pytest.mark.parametrize("affine", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",), ("weight", "bias")])
def test_absent_and_frozen(form: str, affine: tuple[bool, bool], frozen: tuple[str, ...]) -> None:
    for cols, activation in ((48, "identity"), (49, "gelu")):
        if frozen == ("x",) and not any(affine):
            continue  # nothing requires a gradient
        check(torch.randn(20, cols), affine=affine, frozen=frozen, activation=activation)


# kernels of aligned rows: more rows than a worker has at a time, rows that share
# a block, that are one and that end within a warp; dsum, sums nobody wants, no parameters
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu"])
@pytest.mark.parametrize("cols", [40, 512, 1032])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_aligned(cols: int, dtype: torch.dtype, activation: str) -> None:
    x = (torch.randn(70, cols) + 3).to(dtype)
    other = torch.randn(x.shape).to(dtype)
    check(x, activation=activation)
    check(x[:37], residual=other[:37], activation=activation, return_sum=True)
    check(x[:9], frozen=("weight", "bias"), activation=activation)
    check(x[:9], frozen=("x",), activation=activation)
    for affine in ((True, False), (False, True), (False, False)):
        check(x[:5], affine=affine, activation=activation)


def test_halves_of_one_number() -> None:
    """The mean is rounded; what is left of the distances to it must not be told from zero."""
    for cols in (8, 200, 1000):
        x = torch.full((2, cols), 9984.0, dtype=torch.bfloat16)
        with dispatch.backend("cuda"):
            y = layer_norm(x, (cols,), bias=torch.ones(cols, dtype=x.dtype))
        assert torch.equal(y, torch.ones_like(x))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("cols", [64, 65])
def test_sums_over_many_groups(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a chunk take turns at fewer rows of partial sums than there are tiles."""
    monkeypatch.setattr(cuda, "LIMITS", CHUNKS._replace(group=1))
    shape = cuda.Shape(90, 90, cols, 4, 0, launch.processors(-1))
    plan = cuda.backward_plan(shape, 4, True, 2, cuda.LIMITS)
    assert 2 * plan.parts < plan.groups
    check(torch.randn(90, cols))
    check(torch.randn(90, 2 * cols).bfloat16())
    assert not launch.counters(torch.empty(0), 1).any(), "every launch leaves its counters zero"


STRIDED = {
    "slice": lambda: torch.randn(9, 80)[:, 7:71],
    "aligned slice": lambda: torch.randn(9, 96)[:, 16:80],
    "every other row": lambda: torch.randn(6, 8, 32)[:, ::2],
    "columns apart": lambda: torch.randn(6, 32, 2)[..., 0],
    "expanded": lambda: torch.randn(2, 1, 32).expand(2, 5, 32),
    "batches": lambda: torch.randn(3, 7, 5, 24)[:, 1:5, 2],
    "nhwc": lambda: torch.randn(2, 24, 5, 8).permute(0, 2, 3, 1),
    "nhwc 7x7": lambda: torch.randn(3, 24, 7, 7).permute(0, 2, 3, 1),
    "nhwc of many": lambda: torch.randn(1, 24, 9, 8).permute(0, 2, 3, 1),
    "nhwc of few channels": lambda: torch.randn(2, 3, 3, 3).permute(0, 2, 3, 1),
    "nhwc too wide": lambda: torch.randn(1, 1030, 2, 2).permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", STRIDED)
def test_strides(form: str, layout: str, dtype: torch.dtype) -> None:
    check(STRIDED[layout]().to(dtype))
    x = STRIDED[layout]().to(dtype)
    other = torch.randn(x.shape).to(dtype)
    check(other, dy=x.detach())
    check(x, residual=other, return_sum=True)
    if dtype == torch.float32:  # see fast() in csrc/layer_norm.cu, and chunks read it twice
        check(other, residual=STRIDED[layout]().bfloat16(), return_sum=True)
        check(x, residual=other.half())
    if x._is_view() and 0 not in x.stride():
        check(other, residual=x.detach(), dy=STRIDED[layout]().to(dtype))


def test_permuted_inputs_are_read_in_place() -> None:
    x = torch.randn(2, 24, 5, 8, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    (view,) = cuda.in_place(1, cuda.LIMITS.transposed_cols, x)
    assert view.data_ptr() == x.data_ptr()
    assert cuda.rows_adjacent(view)


@pytest.mark.parametrize("cols", [64, 65])
@pytest.mark.parametrize("dtype", HALVES)
def test_fp32_output_and_gradient(form: str, cols: int, dtype: torch.dtype) -> None:
    """What CUDA autocast asks of the kernels."""
    x, dy = torch.randn(6, cols).to(dtype), torch.randn(6, cols)
    weight, bias = torch.randn(cols), torch.randn(cols)
    found = []
    for backend in ("cuda", "reference"):
        with dispatch.backend(backend):
            y, statistics, _ = torch.ops.fastnorm.layer_norm_forward(
                x, None, weight, bias, 1, 1e-5, "silu", torch.float32, False
            )
            gradients = torch.ops.fastnorm.layer_norm_backward(
                x, dy, None, weight, bias, statistics, 1, "silu", [True, True, True]
            )
        found.append((y, *statistics, *gradients))
    assert found[0][0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-5)


def test_edges(form: str) -> None:
    with dispatch.backend("cuda"):
        for cols in (1, 200):
            y = layer_norm(torch.full((2, cols), 1e4), (cols,), torch.ones(cols), torch.ones(cols))
            assert torch.equal(y, torch.ones(2, cols))
        assert layer_norm(torch.ones(2, 200), (200,), eps=0.0).isnan().all()
        rows = torch.randn(4, 200)
        rows[1, 7], rows[2, 3] = float("inf"), float("nan")
        y = layer_norm(rows, (200,))
        assert y[[0, 3]].isfinite().all()
        assert y[[1, 2]].isnan().all()
        for shape in ((0, 200), (3, 0)):
            x = torch.empty(shape, requires_grad=True)
            weight = torch.ones(shape[1:], requires_grad=True)
            layer_norm(x, shape[1:], weight).sum().backward()
            assert weight.grad is not None
            assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cols", "value", "eps"), [(64, 2.0**121, 1e-5), (256, 2.0**110, 1e-12)])
def test_nothing_beyond_a_row_is_multiplied(
    form: str, cols: int, value: float, eps: float, dtype: torch.dtype
) -> None:
    """mean * rstd is infinite there, and times the zeros of dy none."""
    x = torch.full((1, cols), value, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, cols).to(dtype)
    with dispatch.backend("cuda"):
        (dx,) = torch.autograd.grad(layer_norm(x, (cols,), eps=eps), x, dy)
    (expected,) = torch.autograd.grad(
        F.layer_norm(wide := x.double(), (cols,), eps=eps), wide, dy.double()
    )
    torch.testing.assert_close(dx.double(), expected, rtol=2e-2, atol=2e-2 * eps**-0.5)


def test_rstd_may_be_as_large_as_it_gets(form: str) -> None:
    x = (torch.randn(8, 64) * 1e-20).requires_grad_()
    with dispatch.backend("cuda"):
        (dx,) = torch.autograd.grad(layer_norm(x, (64,), eps=0.0), x, torch.randn(8, 64))
    assert dx.isfinite().all()


def test_the_same_bits_every_time(form: str) -> None:
    """Under schedules that let blocks finish in any order."""
    engine = getattr(sys.modules["fastnorm._cuda"], "engine", None)
    x, weight = torch.randn(40, 90), torch.randn(90).requires_grad_()
    found = []
    for seed in range(4):
        if engine is not None:
            engine.configure(seed=seed)
        with dispatch.backend("cuda"):
            y = layer_norm(x, (90,), weight)
            found.append((y, *torch.autograd.grad(y.square().sum(), weight)))
    if engine is not None:
        engine.configure()
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_the_rule() -> None:
    """Which form serves which size on a device of 132 processors."""

    def shape(rows: int, cols: int, size: int) -> cuda.Shape:
        return cuda.Shape(rows, rows, cols, size, 0, 132)

    assert not cuda.forward_plan(shape(4096, 16384, 2), 2, cuda.LIMITS).ticket
    assert cuda.forward_plan(shape(4096, 16392, 2), 2, cuda.LIMITS).ticket
    assert not cuda.backward_plan(shape(4096, 8192, 2), 2, True, 2, cuda.LIMITS).ticket
    # blocks that keep their chunks, as many as are resident: rows of 3, and of 33 at most
    long = cuda.backward_plan(shape(4096, 8200, 2), 2, True, 2, cuda.LIMITS)
    assert long.ticket
    assert long.streams
    assert (long.chunks, long.chunk, long.parts, long.workers) == (3, 2752, 88, 264)
    assert cuda.backward_plan(shape(4096, 33 * 4096, 2), 2, True, 2, cuda.LIMITS).streams
    # a few rows are cut finer, so that there is work for all
    assert cuda.backward_plan(shape(8, 32768, 2), 2, True, 2, cuda.LIMITS).workers == 8 * 32
    # dy of another dtype, and rows that too many blocks would share: two visits by tickets
    long = cuda.backward_plan(shape(4096, 8200, 2), 4, True, 2, cuda.LIMITS)
    assert (long.streams, long.span, long.groups, long.chunks, long.parts) == (0, 1, 683, 5, 53)
    longer = cuda.backward_plan(shape(4096, 1 << 18, 2), 2, True, 2, cuda.LIMITS)
    assert (longer.streams, longer.span, longer.chunks) == (0, 1, 128)
    # what is read between its two visits: x and dy of 523 tiles
    assert 523 * longer.group * longer.chunk * 4 < 24 << 20
    # a row of KernelBench's, 16 MB of x and as much of dy: L2 does not hold a group of them
    huge = cuda.backward_plan(shape(16, 1 << 22, 4), 4, True, 2, cuda.LIMITS)
    assert huge.span == huge.groups
    assert huge.parts == 0
    assert huge.blocks == huge.workers


def test_the_rule_of_huge_rows() -> None:
    """Which rows are normalised after the statistics of all: parameters are then read once."""

    def by_columns(rows: int, cols: int, size: int, parameters: int = 2) -> bool:
        shape = cuda.Shape(rows, rows, cols, size, 0, 132)
        return bool(cuda.forward_plan(shape, parameters, cuda.LIMITS).by_columns)

    assert not by_columns(4096, 65536, 2), "L2 holds a row and its parameters"
    # KernelBench's: 16.8 MB of x and 33.5 of parameters a row in fp32, half of that in bf16
    assert by_columns(16, 1 << 22, 4)
    assert not by_columns(16, 1 << 22, 2)
    assert not by_columns(16, 1 << 22, 4, parameters=0)
    # x three times and parameters once are more than twice and twice
    assert not by_columns(2, 1 << 22, 4)
    # a row that L2 does not hold is read twice whatever the order
    assert by_columns(2, 1 << 23, 4, parameters=0)
    assert not by_columns(1, 1 << 23, 4)
    plan = cuda.forward_plan(cuda.Shape(18, 18, 1 << 22, 4, 0, 132), 2, cuda.LIMITS)
    assert (plan.chunks, plan.lag, plan.span) == (1024, 18 * 1024, 4)
    assert plan.blocks == 18 * 1024 + 5 * 1024


def test_blocks_of_backward() -> None:
    def shape(rows: int, cols: int, size: int) -> cuda.Shape:
        return cuda.Shape(rows, rows, cols, size, 0, 132)

    for rows in (1, 100, 1 << 20):
        plan = cuda.backward_plan(shape(rows, 768, 2), 2, True, 2, cuda.LIMITS)
        assert 1 <= plan.workers <= min(plan.tiles, 2 * 132)
        assert plan.blocks == plan.workers + 2 * 768 // 32
