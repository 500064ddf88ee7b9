"""Weight norm as a function: torch's numbers for every dim, on the reference path and in
interpreted Triton kernels."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from fastnorm import dispatch
from fastnorm.ops import weight_norm as family
from fastnorm.ops.weight_norm import weight_norm as function
from tests.conftest import AVAILABLE, DEVICE

# torch's own: from torch.func and opcheck; from Dynamo, of every autograd Function
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

# rows that are held and looped, columns alone, in groups and longer than a block, odd sizes, one
# element per norm
SHAPES = [
    ((3, 40), (0, 1, None)),
    ((5, 769), (0, None)),
    ((31, 33, 7), (1, 2, -2)),
    ((6, 4, 3, 2), (0, 1, 2, None)),
    ((300, 7), (1,)),
    ((40, 3, 130), (1,)),
    ((2, 9000), (0,)),
    ((5,), (0, None)),
]
CASES = [(shape, dim) for shape, dims in SHAPES for dim in dims]


def torch_dim(dim):
    return -1 if dim is None else dim


def inputs(shape, dim, dtype):
    seeded = torch.Generator().manual_seed
    v = torch.randn(shape, generator=seeded(0), device="cpu").to(DEVICE, dtype)
    g = torch.rand_like(torch.norm_except_dim(v, 2, torch_dim(dim))) + 0.5
    dw = torch.randn(shape, generator=seeded(1), device="cpu").to(DEVICE, dtype)
    return v, g, dw


def results(f, v, g, dw):
    v, g = v.detach().clone().requires_grad_(), g.detach().clone().requires_grad_()
    w = f(v, g)
    return [w.detach(), *torch.autograd.grad(w, (v, g), dw)]


def composite_rows(v, g, dim, eps):
    """The formula in fp64, written once more."""
    dims = [i for i in range(v.dim()) if dim is None or i != dim % v.dim()]
    norm = (v * v).sum(dims, keepdim=True).sqrt() if dims else v.abs()
    if eps is not None:
        norm = norm.clamp_min(eps)
    return g * v / norm


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, dim", CASES)
def test_values_and_gradients(shape, dim, dtype, backend):
    v, g, dw = inputs(shape, dim, dtype)
    exact = results(
        lambda v, g: composite_rows(v, g, dim, None), v.double(), g.double(), dw.double()
    )
    native = results(lambda v, g: torch._weight_norm(v, g, torch_dim(dim)), v, g, dw)
    with dispatch.backend(backend):
        ours = results(lambda v, g: function(v, g, dim), v, g, dw)
    for name, x, y, z in zip(("w", "dv", "dg"), ours, native, exact, strict=True):
        assert x.dtype == dtype and x.shape == z.shape and x.is_contiguous()
        # floor: a rounding of each of three factors (g, v, 1/norm; in dv of what is subtracted); dg
        # is a sum that may cancel, of a size up to |dw|, in the type of computation
        floor = 3 * torch.finfo(dtype).eps * (dw.double() if name == "dv" else z).norm()
        if name == "dg":
            floor += (
                8
                * torch.finfo(ours[0].dtype if dtype == torch.float64 else torch.float32).eps
                * dw.double().norm()
            )
        assert (x - z).norm() <= 2 * (y - z).norm() + floor, (name, (x - z).norm())


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
@pytest.mark.parametrize("shape, dim", [((3, 40), 0), ((6, 4, 3), 1), ((12, 5), 1), ((3, 8), None)])
def test_eps_bounds_the_norm(shape, dim, backend):
    v, g, dw = inputs(shape, dim, torch.float64)
    v[0] *= 1e-3
    norms = torch.norm_except_dim(v, 2, torch_dim(dim))
    for eps in (1e-12, float(norms.flatten().median()) * 1.01):
        exact = results(lambda v, g, eps=eps: composite_rows(v, g, dim, eps), v, g, dw)
        with dispatch.backend(backend):
            ours = results(lambda v, g, eps=eps: function(v, g, dim, eps), v, g, dw)
        for x, z in zip(ours, exact, strict=True):
            torch.testing.assert_close(x, z, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value):RuntimeWarning"
)  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
def test_a_zero_row_is_nan_as_torchs_unless_eps(backend):
    v, g = torch.randn(3, 4), torch.ones(3, 1)
    v[1] = 0
    with dispatch.backend(backend):
        assert function(v, g).isnan().all(1).tolist() == [False, True, False]
        v.requires_grad_()
        w = function(v, g, eps=1e-3)
        assert torch.equal(w[1], torch.zeros(4))
        (dv,) = torch.autograd.grad(w.sum(), v)
        torch.testing.assert_close(dv[1], torch.full((4,), 1e3))


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
@pytest.mark.parametrize("eps", [None, 1.5])
@pytest.mark.parametrize(
    "shape, dim", [((3, 2, 4), 0), ((3, 2, 4), 1), ((3, 2, 4), 2), ((3, 2, 4), None), ((4,), 0)]
)
def test_gradcheck_and_gradgradcheck(shape, dim, eps, backend):
    v, g, _ = inputs(shape, dim, torch.float64)
    v, g = v.requires_grad_(), g.requires_grad_()
    with dispatch.backend(backend):
        assert torch.autograd.gradcheck(
            lambda v, g: function(v, g, dim, eps), (v, g), fast_mode=backend in ("triton", "cuda")
        )
        assert torch.autograd.gradgradcheck(lambda v, g: function(v, g, dim, eps), (v, g))


def test_torchs_own_double_backward_is_wrong():
    """Why the fused dims take our Function under `auto` too; when this fails, torch has been
    repaired."""
    v, g, _ = inputs((3, 2, 4), 0, torch.float64)
    with pytest.raises(GradcheckError):
        torch.autograd.gradgradcheck(
            lambda v, g: torch._weight_norm(v, g, 0), (v.requires_grad_(), g.requires_grad_())
        )


@pytest.mark.triton
@pytest.mark.parametrize("parts", ["sum", "apply"])
@pytest.mark.parametrize(
    "shape, dim",
    [((3, 4000), 0), ((4001,), None), ((500, 7), 1), ((50, 3, 6), 1), ((40, 2, 130), 1)],
)
def test_split_ranges_agree_with_whole_ones(shape, dim, parts, monkeypatch):
    from fastnorm.ops.weight_norm import triton as kernels

    for name, value in (("SPLIT_FROM", 0), ("LOOP_ELEMENTS", 512), ("HELD_ELEMENTS", 256)):
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels.launch, "processors", lambda device: 8)
    v, g, dw = inputs(shape, dim, torch.float64)
    exact = results(lambda v, g: composite_rows(v, g, dim, None), v, g, dw)
    with dispatch.backend("triton"):
        if parts == "apply":
            ours = results(lambda v, g: function(v, g, dim), v, g, dw)
        else:  # the length's gradient alone: the second launch merges, and writes no dv
            g = g.requires_grad_()
            ours = [*exact[:2], torch.autograd.grad(function(v, g, dim), g, dw)[0]]
    for x, z in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_frozen_input_gets_no_gradient(dim, frozen, backend):
    v, g, dw = inputs((6, 5), dim, torch.float64)
    exact = results(lambda v, g: composite_rows(v, g, dim, None), v, g, dw)[1:]
    leaves = [v.requires_grad_(frozen != 0), g.requires_grad_(frozen != 1)]
    with dispatch.backend(backend):
        function(v, g, dim).backward(dw)
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, exact[1 - frozen])


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_any_strides(dim, backend):
    v, g, dw = inputs((6, 5, 4), dim, torch.float64)
    exact = results(lambda v, g: composite_rows(v, g, dim, None), v, g, dw)
    strided = torch.empty(4, 6, 5, dtype=v.dtype).permute(1, 2, 0).copy_(v).requires_grad_()
    with dispatch.backend(backend):
        w = function(strided, g.requires_grad_(), dim)
        assert w.is_contiguous()
        gradients = torch.autograd.grad(
            w, (strided, g), torch.empty(5, 4, 6, dtype=v.dtype).permute(2, 0, 1).copy_(dw)
        )
        expanded = torch.autograd.grad(function(strided, g, dim).sum(), strided)[0]
        assert torch.autograd.gradgradcheck(
            lambda v: function(v, g.detach(), dim), strided, fast_mode=True
        )
    for x, z in zip((w, *gradients), exact, strict=True):
        torch.testing.assert_close(x, z)
    torch.testing.assert_close(
        expanded, results(lambda v, g: composite_rows(v, g, dim, None), v, g, dw * 0 + 1)[1]
    )


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
def test_dtypes_promote_as_torchs_middle_dim(backend):
    for v_dtype, g_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.half),
    ):
        for dim in (0, 1, 2, None):
            v, g, _ = inputs((3, 4, 5), dim, torch.float64)
            v, g = v.to(v_dtype), g.to(g_dtype)
            with dispatch.backend(backend):
                w = function(v, g, dim)
            assert w.dtype == (v * g).dtype
            tolerance = (
                {"rtol": 1e-2, "atol": 1e-2}
                if w.dtype == torch.bfloat16
                else {"rtol": 1e-5, "atol": 1e-6}
            )
            torch.testing.assert_close(
                w.double(), composite_rows(v.double(), g.double(), dim, None), **tolerance
            )


@pytest.mark.parametrize("backend", AVAILABLE)
def test_ops_pass_opcheck_and_keep_norms_in_fp32(backend):
    v, g, dw = inputs((4, 6), 0, torch.bfloat16)
    with dispatch.backend(backend):
        w, norm = torch.ops.fastnorm.weight_norm_forward.default(v, g, 0, None)
        assert (w.dtype, norm.dtype, norm.shape) == (torch.bfloat16, torch.float32, (4, 1))
        torch.library.opcheck(
            torch.ops.fastnorm.weight_norm_forward.default,
            (v, g, 0, None),
            test_utils=("test_schema", "test_faketensor"),
        )
        torch.library.opcheck(
            torch.ops.fastnorm.weight_norm_backward.default,
            (v, g, norm, dw, 0, None, [True, False]),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("backend", ["auto", *AVAILABLE])
@pytest.mark.parametrize(
    "shape, dim", [((0, 3), 0), ((0, 3), 1), ((4, 0), 0), ((0, 3), None), ((2, 0, 3), 1), ((0,), 0)]
)
def test_empty_does_not_crash(shape, dim, backend):
    v = torch.randn(shape, requires_grad=True)
    g = torch.ones(family.norm_shape(v, dim), requires_grad=True)
    with dispatch.backend(backend):
        w = function(v, g, dim)
        w.sum().backward()
    assert w.shape == shape and v.grad.shape == shape
    assert torch.equal(g.grad, torch.zeros_like(g))


def test_errors():
    v = torch.randn(3, 4)
    for dim in (2, -3):
        with pytest.raises(IndexError, match="Dimension out of range"):
            function(v, torch.ones(3, 1), dim)
    with pytest.raises(IndexError, match="no dimensions"):
        function(torch.tensor(1.0), torch.tensor(1.0), None)
    with pytest.raises(TypeError):
        function(v, torch.ones(3, 1), 0.5)
    for g in (
        torch.ones(3),
        torch.ones(4, 1),
        torch.ones(()),
        torch.ones(1, 4),
    ):  # torch reads out of bounds here
        with pytest.raises(RuntimeError, match=r"expected g of shape \[3, 1\]"):
            function(v, g, 0)
    with pytest.raises(NotImplementedError):
        function(v.int(), torch.ones(3, 1))
    with pytest.raises(NotImplementedError):
        function(v, torch.ones(3, 1, dtype=torch.complex64))
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive eps"):
            function(v, torch.ones(3, 1), 0, eps)
    with pytest.raises(RuntimeError, match="on meta"):
        function(v, torch.ones(3, 1, device="meta"))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole(dim, backend):
    v, g, dw = inputs((4, 6), dim, torch.float32)
    exact = results(lambda v, g: function(v, g, dim), v, g, dw)
    torch.compiler.reset()
    with dispatch.backend(backend):
        compiled = torch.compile(
            lambda v, g: function(v, g, dim), fullgraph=True, backend="aot_eager"
        )
        for x, z in zip(results(compiled, v, g, dw), exact, strict=True):
            torch.testing.assert_close(x, z)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_function_transforms(dim, backend):
    v, g, dw = inputs((3, 4), dim, torch.float64)
    with dispatch.backend(backend):
        _, tangent = torch.func.jvp(lambda v: function(v, g, dim), (v,), (dw,))
        (dv,) = torch.func.vjp(lambda v: function(v, g, dim), v)[1](dw)
        jacobian = torch.func.jacrev(lambda v: function(v, g, dim))(v).reshape(12, 12)
    torch.testing.assert_close(tangent.flatten(), jacobian @ dw.flatten())
    torch.testing.assert_close(dv.flatten(), jacobian.T @ dw.flatten())
