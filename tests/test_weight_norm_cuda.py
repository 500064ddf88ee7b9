"""Weight norm in CUDA C++: how blocks are cut from the layers, parts that wait for each other, and
tables of many layers."""

from __future__ import annotations

import sys

import pytest
import torch

import fastnorm
from fastnorm.ops import launch
from fastnorm.ops.extension import extension
from fastnorm.ops.weight_norm import group as family
from fastnorm.ops.weight_norm import norm_shape
from tests.conftest import AVAILABLE

pytestmark = pytest.mark.skipif("cuda" not in AVAILABLE, reason="no CUDA backend on this machine")

# v's shape and dim, for every way to cut blocks: `held` is what a block of 256 threads holds, 8192
# elements (2048 of fp64)
FORMS = {
    "a thread per row": ((300, 5), 0),
    "eight lanes per row": ((70, 27), 0),
    "half a warp per row": ((5, 512), 0),
    "two warps per row": ((6, 1536), 0),
    "two warps per row, misaligned": ((5, 1537), 0),
    "four warps per row": ((3, 4096), 0),
    "a block per row": ((2, 8192), 0),
    "parts of a row": ((2, 8200), 0),
    "parts of several tiles": ((1, 100000), 0),
    "parts of a misaligned row": ((2, 9001), 0),
    "the whole tensor": ((3, 5, 7), None),
    "the whole tensor in parts": ((3, 50, 77), None),
    "columns": ((70, 16), 1),
    "columns in parts": ((3000, 8), 1),
    "several groups of columns": ((33, 300), 1),
    "misaligned columns": ((1100, 7), 1),
    "more than one tile of misaligned columns": ((2100, 3), 1),
    "columns of three": ((40, 24, 3), 1),
    "columns of three, channels over vectors": ((40, 8, 3), 1),
    "columns of 63, of which eight end on a boundary": ((9, 17, 63), 1),
    "one channel, many runs": ((40, 3, 64), 1),
    "one channel, many runs in parts": ((300, 2, 130), 1),
    "one channel, long runs": ((3, 2, 3000), 1),
    "a single channel": ((7, 1, 9), 1),
    "one element": ((1,), 0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(params=[2, 8, 16], ids="{} processors".format)
def processors(request, monkeypatch):
    """Devices on which a norm has up to two, four or eight parts: the emulated one has eight blocks
    in flight."""
    monkeypatch.setattr(launch, "processors", lambda device: request.param)
    return request.param


def layers(shapes, dtypes, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    v, g, dw, dims = [], [], [], []
    for i, (shape, dim) in enumerate(shapes):
        dtype = dtypes[i % len(dtypes)]
        v.append((torch.rand(shape, generator=generator) + 0.1).to(device, dtype))
        g.append((torch.rand(norm_shape(v[-1], dim), generator=generator) + 0.5).to(device, dtype))
        dw.append((torch.rand(shape, generator=generator) + 0.5).to(device, dtype))
        dims.append(dim)
    return v, g, dw, dims


def results(v, g, dw, dims, eps=None, backend="cuda"):
    v, g = ([x.detach().requires_grad_() for x in part] for part in (v, g))
    with fastnorm.backend(backend):
        w = family.weight_norm_group(v, g, dims, [eps] * len(v))
        gradients = torch.autograd.grad(w, [*v, *g], dw)
    return [x.detach() for x in (*w, *gradients)]


def exact(v, g, dw, dims):
    wide = [[x.double() for x in part] for part in (v, g, dw)]
    return results(*wide, dims, backend="reference")


def assert_close(found, expected):
    for x, y in zip(found, expected, strict=True):
        eps = torch.finfo(x.dtype).eps if x.dtype != torch.float64 else 1e-15
        # dv is what remains of dw: as large as that, and its error as that of the subtraction
        torch.testing.assert_close(
            x.double(), y, rtol=20 * eps, atol=20 * eps * float(y.abs().max() + 1)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, dtype, processors, device):
    given = layers([FORMS[form]], [dtype], device)
    assert_close(results(*given), exact(*given))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16, torch.float64)])
def test_all_forms_in_one_launch(dtypes, processors, device):
    given = layers(FORMS.values(), dtypes, device)
    assert_close(results(*given), exact(*given))


def test_the_same_bits_in_every_run_and_counters_left_zero(device):
    given = layers(FORMS.values(), (torch.float32,), device)
    first = results(*given)
    for _ in range(3):
        for x, y in zip(results(*given), first, strict=True):
            assert torch.equal(x, y)
    for arena in launch._arenas.values():
        assert not arena.any()


def test_a_layer_has_the_same_bits_in_a_group_as_alone(device):
    v, g, dw, dims = layers(FORMS.values(), (torch.float32,), device)
    together = results(v, g, dw, dims)
    count = len(v)
    for i in range(count):
        w, dv, dg = results([v[i]], [g[i]], [dw[i]], [dims[i]])
        assert torch.equal(w, together[i])
        assert torch.equal(dv, together[count + i])
        assert torch.equal(dg, together[2 * count + i])


@pytest.mark.parametrize("count", [28, 29, 230])
def test_more_layers_than_a_small_table_holds_and_than_any_does(count, device):
    long, short = (FORMS["columns of three"], FORMS["parts of a row"]), (((3, 9), 0), ((4,), 0))
    shapes = [short[i % 2] if i % 60 else long[i // 60 % 2] for i in range(count)]
    given = layers(shapes, (torch.float32,), device)
    assert_close(results(*given), exact(*given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the emulated launches")
def test_launches():
    engine = sys.modules["fastnorm._cuda"].engine

    def launches(count, dtypes):
        given = layers([((3, 9), 0)] * count, dtypes)
        before = engine.launches
        results(*given)
        return engine.launches - before

    assert launches(1, (torch.float32,)) == 2
    assert launches(227, (torch.float32, torch.float16)) == 2
    assert launches(228, (torch.float32,)) == 4
    assert launches(20, (torch.float32, torch.float64)) == 4


@pytest.mark.parametrize("offset", [1, 3])
def test_addresses_off_a_16_byte_boundary(offset, device):
    v, g, dw, dims = layers([((6, 64), 0), ((40, 8), 1), ((30, 2, 64), 1)], DTYPES[:1], device)

    def shifted(x):
        room = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
        return room[offset:].view(x.shape).copy_(x)

    given = [shifted(x) for x in v], g, [shifted(x) for x in dw], dims
    assert_close(results(*given), exact(*given))


@pytest.mark.parametrize("frozen", ["v", "g"])
def test_only_one_of_the_gradients(frozen, processors, device):
    v, g, dw, dims = layers(FORMS.values(), (torch.float32,), device)
    expected = exact(v, g, dw, dims)[len(v) :]
    half = expected[: len(v)] if frozen == "g" else expected[len(v) :]
    learned = [x.requires_grad_() for x in (v if frozen == "g" else g)]
    with fastnorm.backend("cuda"):
        w = family.weight_norm_group(v, g, dims, [None] * len(v))
        assert_close(torch.autograd.grad(w, learned, dw), half)


def test_eps_zeros_and_infinities_in_parts_of_a_norm(processors, device):
    v = torch.ones(4, 9000, device=device)
    v[0] = 0
    v[1, 8999] = float("inf")
    v[2, 17] = float("nan")
    g, dw = torch.ones(4, 1, device=device), torch.ones(4, 9000, device=device)
    for eps in (None, 1e-3):
        found = results([v], [g], [dw], [0], eps)
        for x, y in zip(found, results([v], [g], [dw], [0], eps, "reference"), strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)


def test_mixed_dtypes_of_v_and_g(device):
    for v_dtype, g_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        v, g, dw, dims = layers(FORMS.values(), (torch.float32,), device)
        v, g = [x.to(v_dtype) for x in v], [x.to(g_dtype) for x in g]
        dw = [x.to((a * b).dtype) for x, a, b in zip(dw, v, g, strict=True)]
        assert_close(results(v, g, dw, dims), exact(v, g, dw, dims))


def test_a_list_of_another_length_is_refused():
    plan = extension().WeightNormPlan([(1, 2, 3, 0.0, *[torch.float32] * 3)], 2)
    x = torch.ones(1)
    with pytest.raises(ValueError, match="one tensor per layer"):
        extension().weight_norm_forward(plan, [], [x], [x], x, [0], None, None)
    with pytest.raises(ValueError, match="one place per layer"):
        extension().weight_norm_forward(plan, [x], [x], [x], x, [], None, None)


def test_workspace_for_any_mixture_of_aligned_and_misaligned_layers():
    more_if_misaligned, more_if_aligned = (2704, 28, 6), (986, 40, 9)

    def plan(*sizes):
        return extension().WeightNormPlan(
            [(*size, 0.0, *[torch.float32] * 3) for size in sizes], 16
        )

    both = plan(more_if_misaligned, more_if_aligned)
    each = [plan(size) for size in (more_if_misaligned, more_if_aligned)]
    assert both.partials == sum(x.partials for x in each)
    assert both.counters == sum(x.counters for x in each) - 1  # one ticket for all
