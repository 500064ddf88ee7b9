"""Layer norm: torch's numbers, errors and dtypes, on the reference path and in interpreted Triton
kernels."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastnorm import dispatch
from fastnorm.modules.layer_norm import LayerNorm
from fastnorm.ops import launch
from fastnorm.ops import layer_norm as family
from fastnorm.ops.layer_norm import layer_norm, output_dtype
from tests.conftest import AVAILABLE as BACKENDS

HALF = (torch.float16, torch.bfloat16)
NUMPY_WARNS = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of inf and 0 / 0, in which the interpreter computes
TORCH_WARNS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of its own torch.jit.script, and in its tracer


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nhwc(n, c, h, w):
    return randn(n, c, h, w).permute(0, 2, 3, 1)


def results(backend, x, shape, parameters, residual=None, dy=None, cast=None, **options):
    """[y, (sum), dx, (dresidual), (dweight), (dbias)], computed in `cast` where it is given."""

    def leaf(t):
        return None if t is None else (t.detach().to(cast) if cast else t.detach()).requires_grad_()

    x, residual, weight, bias = (leaf(t) for t in (x, residual, *parameters))
    with dispatch.backend(backend):
        outputs = layer_norm(x, shape, weight, bias, residual=residual, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        dy = randn(*x.shape, seed=3) if dy is None else dy
        gradients = [g.to(outputs[0].dtype) for g in (dy, randn(*x.shape, seed=4))]
        wanted = [t for t in (x, residual, weight, bias) if t is not None]
        return [*outputs, *torch.autograd.grad(outputs, wanted, gradients[: len(outputs)])]


def agrees(backend, x, shape, *, affine=True, residual=None, parameter_dtype=None, **options):
    """Error against fp64 at most twice torch's own."""
    kind = parameter_dtype or x.dtype
    parameters = [randn(*shape, dtype=kind, seed=s) if affine else None for s in (1, 2)]
    truth = results("auto", x, shape, parameters, residual, cast=torch.float64, **options)
    torchs = results("auto", x, shape, parameters, residual, **options)
    ours = results(backend, x, shape, parameters, residual, **options)
    floor = (
        2e-15 if x.dtype == torch.float64 else 2e-7
    )  # one rounding of the result, where torch happens to have none
    for own, theirs, true in zip(ours, torchs, truth, strict=True):
        assert own.shape == theirs.shape
        assert own.is_contiguous()
        scale = true.norm().clamp_min(1e-30)
        error, allowed = ((t.double() - true).norm() / scale for t in (own, theirs))
        assert error <= 2 * allowed + floor
        assert own.dtype == theirs.dtype


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
@pytest.mark.parametrize("columns", [128, 200, 257])
@pytest.mark.parametrize(
    "shared_row", [1, 1 << 30], ids=["many programs a row", "one program a row"]
)
@pytest.mark.parametrize("group_bytes", [1 << 20, 1], ids=["interleaved", "two phases"])
def test_long_rows(small_limits, monkeypatch, columns, shared_row, group_bytes):
    small_limits("SHARED_ROW", shared_row)
    small_limits("GROUP_BYTES", group_bytes)
    monkeypatch.setattr(launch, "INTERPRETER_PROCESSORS", 20)  # more than there are rows
    x, residual = (
        randn(18, columns) + 100,
        randn(18, columns, seed=5),
    )  # two groups of rows, the second short
    agrees("triton", x, (columns,), residual=residual, return_sum=True, activation="silu")
    agrees("triton", x, (columns,), affine=False)
    assert not launch.counters(x, 1).any(), "every launch leaves its counters zero"


def test_long_rows_need_no_more_than_asked(small_limits):
    x, weight = randn(18, 200).requires_grad_(), randn(200, seed=1).requires_grad_()
    for wanted in ([x], [weight], [x, weight]):
        gradients = []
        for backend in ("triton", "auto"):
            with dispatch.backend(backend):
                y = layer_norm(x, (200,), weight)
                gradients.append(torch.autograd.grad(y, wanted, randn(18, 200, seed=3)))
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


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


# SEMANTICS, layer norm 1


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    "arguments",
    [
        (randn(2, 4), []),
        (randn(2, 4), [5]),
        (randn(2, 4), [1, 2, 4]),
        (randn(2, 4), [4], randn(3)),
        (randn(2, 4), [4], None, randn(2, 2)),
        (torch.tensor(1.0), [1]),
        (torch.ones(2, 4, dtype=torch.int64), [4]),
    ],
)
def test_errors_are_torchs(backend, arguments):
    with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
        F.layer_norm(*arguments)
    with dispatch.backend(backend), pytest.raises(type(theirs.value)) as ours:
        layer_norm(*arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    x = randn(2, 4)
    with dispatch.backend(backend):
        with pytest.raises(
            ValueError, match="unknown activation 'swash': choose one of identity, relu"
        ):
            layer_norm(x, (4,), activation="swash")
        with pytest.raises(ValueError, match="unknown autocast 'output'"):
            layer_norm(x, (4,), autocast="output")
        with pytest.raises(RuntimeError, match="same device"):
            layer_norm(x, (4,), torch.ones(4, device="meta"))
        with pytest.raises(RuntimeError, match="must match"):
            layer_norm(x, (4,), residual=randn(2, 3))
    with pytest.raises(ValueError, match="unknown activation"):
        LayerNorm(4, activation="swash")
    with pytest.raises(ValueError, match="unknown autocast"):
        LayerNorm(4, autocast="output")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "bias"), [(randn(5), None), (None, randn(5)), (None, None)])
def test_one_parameter_or_none(backend, weight, bias):
    with dispatch.backend(backend):
        torch.testing.assert_close(
            layer_norm(randn(3, 5), (5,), weight, bias),
            F.layer_norm(randn(3, 5), (5,), weight, bias),
        )


@pytest.mark.parametrize(
    ("arguments", "options"), [((4,), {}), (([2, 3],), {"eps": 1e-3}), ((4,), {"bias": False})]
)
def test_module_is_torchs(arguments, options):
    ours, theirs = LayerNorm(*arguments, **options), torch.nn.LayerNorm(*arguments, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    fused = LayerNorm(*arguments, **options, activation="gelu", autocast="input")
    assert "activation='gelu', autocast='input'" in repr(fused)
    x = randn(3, *ours.normalized_shape)
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(clone(x), F.gelu(theirs(x)))
    y, total = fused(x, x, return_sum=True)
    torch.testing.assert_close((y, total), (F.gelu(theirs(2 * x)), 2 * x))


# SEMANTICS, layer norm 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5)])
def test_empty(backend, shape):
    x = torch.empty(shape, requires_grad=True)
    parameters = [torch.ones(shape[-1:], requires_grad=True) for _ in range(2)]
    with dispatch.backend(backend):
        y = layer_norm(x, shape[-1:], *parameters)
        gradients = torch.autograd.grad(y.sum(), [x, *parameters])
    assert y.shape == x.shape
    assert [g.shape for g in gradients] == [t.shape for t in (x, *parameters)]
    assert not any(g.any() for g in gradients)


@NUMPY_WARNS
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_rows(backend):
    with dispatch.backend(backend):
        bias = torch.tensor([3.0])
        assert torch.equal(layer_norm(randn(4, 1), (1,), torch.ones(1), bias), bias.expand(4, 1))
        assert layer_norm(torch.ones(2, 4), (4,), eps=0.0).isnan().all()
        assert torch.equal(layer_norm(torch.full((2, 33), 1e4), (33,)), torch.zeros(2, 33))
        torch.testing.assert_close(
            layer_norm(randn(2, 4), (4,), eps=0.0), F.layer_norm(randn(2, 4), (4,), eps=0.0)
        )
        rows = randn(3, 40)
        rows[1, 7], rows[2, 3] = float("inf"), float("nan")
        y = layer_norm(rows, (40,))
        assert y[0].isfinite().all()
        assert y[1:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_and_outlier(backend):
    agrees(backend, randn(4, 100) + 1e4, (100,))
    x = randn(4, 100)
    x[:, 0] = 1e4
    agrees(backend, x, (100,))


@NUMPY_WARNS
def test_inf_in_a_long_row(small_limits):
    x = randn(3, 200)
    x[1, 5] = float("inf")
    with dispatch.backend("triton"):
        y = layer_norm(x, (200,))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


# SEMANTICS, layer norm 4 and 5


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_mixed_dtypes(backend):
    for kind, parameter in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x, weight, bias = (
            randn(6, 33, dtype=kind),
            randn(33, dtype=parameter),
            randn(33, dtype=parameter, seed=1),
        )
        y, *gradients = results(backend, x, (33,), (weight, bias))
        assert [t.dtype for t in (y, *gradients)] == [kind, kind, parameter, parameter]
        true = F.layer_norm(x.double(), (33,), weight.double(), bias.double())
        assert (y.double() - true).norm() <= (2e-7 if kind == torch.float32 else 1e-2) * true.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_statistics_are_wide(backend, dtype):
    with dispatch.backend(backend):
        _, statistics, total = torch.ops.fastnorm.layer_norm_forward(
            randn(2, 3, 8, dtype=dtype), None, None, None, 1, 1e-5, "identity", dtype, False
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (statistics.dtype, tuple(statistics.shape)) == (wide, (2, 6))
    assert total is None


class OnCuda:
    """What output_dtype asks of a tensor, of one on a GPU."""

    is_cuda = True

    def __init__(self, dtype):
        self.dtype = dtype


def test_autocast_gives_fp32_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for dtype in HALF:
        assert output_dtype(OnCuda(dtype), None) == torch.float32
        assert output_dtype(OnCuda(dtype), "input") == dtype
    assert output_dtype(OnCuda(torch.float64), None) == torch.float64
    assert output_dtype(randn(1, dtype=torch.bfloat16), None) == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_output_of_half_input(backend, monkeypatch):
    """What CUDA autocast asks of the kernels: bf16 read, fp32 written, and a bf16 gradient of an
    fp32 one."""
    monkeypatch.setattr(family, "output_dtype", lambda input, autocast: torch.float32)
    x, weight = randn(4, 40, dtype=torch.bfloat16).requires_grad_(), randn(40).requires_grad_()
    with dispatch.backend(backend):
        y = layer_norm(x, (40,), weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), randn(4, 40, seed=3), retain_graph=True)
        (again,) = torch.autograd.grad(y, x, randn(4, 40, seed=3), create_graph=True)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, F.layer_norm(x.float(), (40,), weight))
    torch.testing.assert_close(dx, again, rtol=2e-2, atol=1e-2)


# SEMANTICS, layer norm 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_may_change_and_the_input_may_not(backend):
    x = randn(4, 40).requires_grad_()
    with dispatch.backend(backend):
        y = layer_norm(x, (40,), randn(40), activation="silu")
        expected = torch.autograd.grad(y, x, randn(4, 40, seed=3), retain_graph=True)
        before = y.grad_fn
        with torch.no_grad():
            y.zero_()
        assert torch.equal(
            torch.autograd.grad(y, x, randn(4, 40, seed=3), retain_graph=True)[0], expected[0]
        )
        assert y.grad_fn is before
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, x, randn(4, 40, seed=3))


@TORCH_WARNS
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_and_forward_mode(backend):
    x, weight = randn(3, 4, 8), randn(8, seed=1)
    with dispatch.backend(backend):
        torch.testing.assert_close(
            torch.func.vmap(lambda row: layer_norm(row, (8,), weight))(x),
            F.layer_norm(x, (8,), weight),
        )
        _, tangent = torch.func.jvp(
            lambda x: layer_norm(x, (8,), weight), (x,), (torch.ones_like(x),)
        )
        assert tangent.abs().max() < 1e-4


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


# torch.compile, and the operators themselves


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend):
    x, residual, weight = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    checks = ("test_schema", "test_faketensor")
    with dispatch.backend(backend):
        forward = (x, residual, weight, weight, 1, 1e-5, "silu", torch.float32, True)
        torch.library.opcheck(
            torch.ops.fastnorm.layer_norm_forward.default, forward, test_utils=checks
        )
        _, statistics, total = torch.ops.fastnorm.layer_norm_forward(*forward)
        backward = (total, x, residual, weight, weight, statistics, 1, "silu", [True, True, True])
        torch.library.opcheck(
            torch.ops.fastnorm.layer_norm_backward.default, backward, test_utils=checks
        )


@TORCH_WARNS
def test_compiles():
    def f(x, residual, weight, bias):
        y, total = layer_norm(
            x, (8,), weight, bias, residual=residual, return_sum=True, activation="silu"
        )
        return y * 2 + total

    inputs = [
        randn(*shape, seed=s).requires_grad_()
        for s, shape in enumerate(((3, 8), (3, 8), (8,), (8,)))
    ]
    with dispatch.backend("reference"):
        found = []
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            out = g(*inputs)
            found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    torch.testing.assert_close(*found)
