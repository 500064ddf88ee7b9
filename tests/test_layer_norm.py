"""Layer norm: torch's numbers and gradients, on the reference path and in interpreted Triton
kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnorm import dispatch
from fastnorm.ops import launch
from fastnorm.ops.layer_norm import layer_norm
from tests.conftest import AVAILABLE as BACKENDS
from tests.layer_norms import HALF, NUMPY_WARNS, agrees, nhwc, randn


# one row and several per program, odd sizes, one column, multi-dimensional shapes; KERNELS: N = 769
# at mean 1000
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "shape"), [(5, (1,)), (5, (31,)), (40, (32,)), (5, (33,)), (3, (769,)), (6, (5, 6, 2))]
)
def test_matches_torch(backend, rows, shape):
    agrees(backend, randn(rows, *shape) + (1000 if shape == (769,) else 0), shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_dtypes_with_residual_sum_and_activation(backend, dtype):
    x, residual = randn(20, 48, dtype=dtype), randn(20, 48, dtype=dtype, seed=5)
    agrees(backend, x, (48,), residual=residual, return_sum=True, activation="silu")


@pytest.mark.triton
@pytest.mark.parametrize("activation", ["relu", "gelu", "selu", "mish"])
def test_fused_activation(activation):
    agrees("triton", randn(4, 40), (40,), activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "x",
    [
        nhwc(2, 24, 5, 8),  # rows adjacent: read transposed; 7 x 7 breaks every alignment
        nhwc(2, 24, 7, 7),
        nhwc(1, 1100, 2, 2),  # too wide for that: copied
        randn(6, 8, 32)[:, ::2],
        randn(3, 10, 1100)[:, ::2],
        randn(6, 100)[:, 3:80],
        randn(6, 32, 2)[..., 0],
        randn(2, 1, 32).expand(2, 5, 32),
        randn(2, 3, 4, 8).to(memory_format=torch.channels_last),
    ],
    ids=[
        "nhwc",
        "nhwc-odd",
        "nhwc-wide",
        "every-other-row",
        "every-other-wide-row",  # a batch does not end with a program's round
        "columns",
        "strided-columns",
        "expanded",
        "channels-last",
    ],
)
def test_strides(backend, x):
    agrees(backend, x, tuple(x.shape[-1:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides(backend):
    x = randn(2, 4, 6, 24)
    for dy in (nhwc(2, 24, 4, 6), randn(24).expand(2, 4, 6, 24), randn(2, 4, 6, 48)[..., ::2]):
        agrees(backend, x, (24,), dy=dy)


# of 16-bit numbers, on 2, 4 or 8 bytes: many rows a tile, some of them beyond the last, few, one
@pytest.mark.triton
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        (9, 65, torch.bfloat16),
        (21, 130, torch.float16),
        (17, 257, torch.bfloat16),
        (5, 500, torch.bfloat16),
        (10, 769, torch.float16),
    ],
)
def test_rows_that_begin_anywhere(rows, columns, dtype):
    x, residual = randn(rows, columns, dtype=dtype), randn(rows, columns, dtype=dtype, seed=5)
    agrees("triton", x + 10, (columns,), affine=columns != 65)
    agrees("triton", x, (columns,), residual=residual, return_sum=True, activation="silu")


@pytest.mark.triton
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_frozen_parameters_of_rows_that_begin_anywhere(needs):
    tensors = [randn(*shape, dtype=torch.bfloat16) for shape in ((6, 33), (33,), (33,))]
    found = []
    for wants in (needs, (1, 1, 1)):
        leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(tensors, wants, strict=True)]
        with dispatch.backend("triton"):
            y = layer_norm(leaves[0], (33,), *leaves[1:])
            y.backward(randn(6, 33, dtype=torch.bfloat16, seed=3))
        found.append([leaf.grad for leaf in leaves])
    for frozen, whole in zip(*found, strict=True):
        assert frozen is None or torch.equal(frozen, whole)


@pytest.fixture
def small_limits(monkeypatch):
    """The forms of long rows on short ones: the interpreter takes 5 ms a program."""
    triton = pytest.importorskip("fastnorm.ops.layer_norm.triton")
    limits = {
        "FORWARD_COLS": 64,
        "BACKWARD_COLS": 64,
        "BLOCK": 32,
        "CHUNK": 64,
        "BACKWARD_BLOCK": 64,
    }
    for name, value in limits.items():
        monkeypatch.setattr(triton, name, value)
    return lambda name, value: monkeypatch.setattr(triton, name, value)


# whole blocks, a ragged end, an end of one
@pytest.mark.triton
@pytest.mark.parametrize("columns", [128, 200, 257])
@pytest.mark.parametrize(
    "shared_row", [1, 1 << 30], ids=["many programs a row", "one program a row"]
)
def test_long_rows(small_limits, monkeypatch, columns, shared_row):
    small_limits("SHARED_ROW", shared_row)
    monkeypatch.setattr(launch, "INTERPRETER_PROCESSORS", 20)  # more than there are rows
    x, residual = (
        randn(18, columns) + 100,
        randn(18, columns, seed=5),
    )  # two groups of rows, the second short
    agrees("triton", x, (columns,), residual=residual, return_sum=True, activation="silu")
    agrees("triton", x, (columns,), residual=residual.half(), return_sum=True)
    agrees("triton", x, (columns,), affine=False)
    assert not launch.counters(x, 1).any(), "every launch leaves its counters zero"


@pytest.mark.triton
# a program has every group of its columns, every other one, one; or there are more chunks than
# programs run at once
@pytest.mark.parametrize(("columns", "programs"), [(257, 5), (257, 10), (257, 40), (200, 1)])
def test_parameter_gradients_over_groups(small_limits, monkeypatch, columns, programs):
    small_limits("GROUP", 4)
    small_limits("_resident", lambda *_: programs)
    x = randn(18, columns) + 100  # five groups of rows, the last short
    agrees("triton", x, (columns,))
    assert not launch.counters(x, 1).any(), "every launch leaves its counters zero"


# all that run at once; 8 rows each; one for each processor, or row
@pytest.mark.parametrize(("rows", "programs"), [(32768, 528), (4096, 512), (500, 132), (64, 64)])
def test_programs_of_the_backward(rows, programs):
    triton = pytest.importorskip("fastnorm.ops.layer_norm.triton")
    resident = triton._resident(132, 128, 4)
    assert triton._programs(rows, rows, resident, 132) == programs


@pytest.mark.parametrize("spans", [1, 2, 3, 4])
def test_partial_sums_are_aligned_for_any_batch(spans):
    triton = pytest.importorskip("fastnorm.ops.layer_norm.triton")
    parts, *both = triton._parts(torch.empty(0), spans, 33, True, True)
    assert parts.shape == (2, spans, 33)
    assert all(part.data_ptr() % 16 == 0 and part.is_contiguous() for part in both)


@pytest.mark.triton
def test_long_rows_need_no_more_than_asked(small_limits):
    x, weight = randn(18, 200).requires_grad_(), randn(200, seed=1).requires_grad_()
    for wanted in ([x], [weight], [x, weight]):
        gradients = []
        for backend in ("triton", "auto"):
            with dispatch.backend(backend):
                y = layer_norm(x, (200,), weight)
                gradients.append(torch.autograd.grad(y, wanted, randn(18, 200, seed=3)))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@NUMPY_WARNS
@pytest.mark.triton
def test_inf_in_a_long_row(small_limits):
    x = randn(3, 200)
    x[1, 5] = float("inf")
    with dispatch.backend("triton"):
        y = layer_norm(x, (200,))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.triton
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_frozen_parameters(needs):
    tensors = [
        t.requires_grad_(bool(n))
        for t, n in zip((randn(6, 33), randn(33), randn(33)), needs, strict=True)
    ]
    wanted = [t for t in tensors if t.requires_grad]
    with dispatch.backend("triton"):
        ours = torch.autograd.grad(
            layer_norm(tensors[0], (33,), *tensors[1:]), wanted, randn(6, 33, seed=3)
        )
    torchs = torch.autograd.grad(
        F.layer_norm(tensors[0], (33,), *tensors[1:]), wanted, randn(6, 33, seed=3)
    )
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("return_sum", [False, True])
def test_gradcheck(backend, activation, return_sum):
    x, residual = (randn(3, 5, dtype=torch.float64, seed=s).requires_grad_() for s in (0, 1))
    weight, bias = (randn(5, dtype=torch.float64, seed=s).requires_grad_() for s in (2, 3))

    def f(x, residual, weight, bias):
        options = {"activation": activation, "return_sum": return_sum and residual is not None}
        return layer_norm(x, (5,), weight, bias, residual=residual, **options)

    with dispatch.backend(backend):
        for r in (None, residual):
            assert torch.autograd.gradcheck(f, (x, r, weight, bias))
            assert torch.autograd.gradgradcheck(f, (x, r, weight, bias))


# the residual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "residual", [randn(8), randn(3, 1, 8), randn(2, 3, 4, 8, dtype=torch.float64)[0]]
)
def test_a_residual_that_torch_can_add(backend, residual):
    x = randn(3, 4, 8)
    with dispatch.backend(backend):
        y, total = layer_norm(x, (8,), residual=residual, return_sum=True)
    torch.testing.assert_close((y, total), (F.layer_norm(x + residual, (8,)), x + residual))


# as under autocast: what a linear layer gives is half, what a layer norm gives fp32
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("cols", [48, 33, 36])
def test_a_residual_of_another_dtype_is_one_call(backend, half, cols):
    wide, narrow = randn(20, cols), randn(20, cols, dtype=half, seed=5)
    for x, residual in ((wide, narrow), (narrow, wide), (narrow[:, :7], wide[:, 1:8])):
        options = {"residual": residual, "return_sum": True, "parameter_dtype": torch.float32}
        agrees(backend, x, (x.size(1),), activation="silu", **options)
        with dispatch.backend(backend):
            shape, given = (x.size(1),), x.detach().requires_grad_()
            y, total = layer_norm(given, shape, residual=residual, return_sum=True)
        assert y.dtype is total.dtype is torch.float32
        assert torch.equal(total, x + residual)
        assert total.grad_fn is y.grad_fn
        assert type(y.grad_fn).__name__ == "LayerNormFunctionBackward"


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_through_a_residual_of_another_dtype(backend):
    x, residual = randn(3, 5).requires_grad_(), randn(3, 5, seed=1).bfloat16().requires_grad_()

    def second(call):
        y, total = call()
        first = torch.autograd.grad(
            (y.square() * total).sum(), (x, residual), create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), (x, residual))

    with dispatch.backend(backend):
        found = second(lambda: layer_norm(x, (5,), residual=residual, return_sum=True))
    expected = second(lambda: (F.layer_norm(x + residual, (5,)), x + residual))
    for own, theirs in zip(found, expected, strict=True):
        assert own.dtype == theirs.dtype
        torch.testing.assert_close(own, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_of_the_sum_that_is_returned(backend):
    x, residual = (
        randn(4, 64, dtype=torch.bfloat16) * 100,
        randn(4, 64, dtype=torch.bfloat16, seed=1),
    )
    with dispatch.backend(backend):
        y, total = layer_norm(x, (64,), residual=residual, return_sum=True)
        torch.testing.assert_close(y, layer_norm(total, (64,)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_sum_is_used(backend):
    x, residual = randn(4, 8).requires_grad_(), randn(4, 8, seed=1).requires_grad_()
    with dispatch.backend(backend):
        _, total = layer_norm(x, (8,), residual=residual, return_sum=True)
        dx, dresidual = torch.autograd.grad(total, (x, residual), randn(4, 8, seed=3))
        _y, same = layer_norm(x, (8,), return_sum=True)
    assert torch.equal(dx, randn(4, 8, seed=3))
    assert torch.equal(dresidual, dx)
    assert same is x
