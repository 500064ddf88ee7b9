"""How batch norm's Triton kernels cut a tensor, on a device of an H100's size."""

from __future__ import annotations

import pytest

from benchmarks import suites
from benchmarks.problems import Problem
from tests.conftest import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

SMS, L2 = 132, 50 << 20
WIDE = 4  # bytes of a statistic

PROBLEMS = [
    problem
    for problem in suites.problems(["quick", "ops", "kernelbench", "host"], "cuda")
    if problem.op in ("batch_norm", "mean_only_batch_norm")
]


def cut(shape, itemsize, layout="nchw", operands=1, one_pass=False):
    from fastnorm.ops.batch_norm import plan

    N, C, *rest = shape
    S = 1
    for size in rest:
        S *= size
    strides = {
        "nchw": (C * S, S, 1, S),
        "nhwc": (C * S, 1, C, 1),
        "nlc": (C * S, 1, C, S),
        "rows": (C, 1, 1, 1),
    }[layout]
    return plan._plan((N, C, S), strides, itemsize, operands, one_pass, plan._limits(), SMS, L2)


def bytes_of(problem: Problem, operands: int) -> int:
    return problem.numel * problem.itemsize * operands


@pytest.mark.parametrize("operands", [1, 2, 3])
def test_merging_moves_a_fraction_of_the_data(operands: int) -> None:
    """Every share stores two numbers per channel, and one program reads them, once."""
    assert len(PROBLEMS) > 100
    for problem in PROBLEMS:
        p = cut(problem.shape, problem.itemsize, problem.layout, operands)
        if not p.owner:
            moved = 2 * p.groups * p.shares * 2 * p.constants["CHANNELS"] * WIDE
            assert moved <= bytes_of(problem, operands) / 8, problem  # partials are 1/16 at most
            assert 1 <= p.run <= p.tiles
            assert p.shares <= max(512, 8 * SMS), problem


@pytest.mark.parametrize("operands", [1, 2, 3])
def test_what_waits_for_its_second_read_has_room_in_l2(operands: int) -> None:
    for problem in PROBLEMS:
        p = cut(problem.shape, problem.itemsize, problem.layout, operands)
        group = bytes_of(problem, operands) // p.groups
        if p.owner:
            assert group <= 2 * 4 * 16384, problem
        elif p.lag >= 0:
            tile = group // p.tiles
            assert p.together == 1 or p.together * group <= 6 << 20
            assert p.together * group + p.lag * p.run * tile <= L2 // 8 * 5, problem
        else:
            assert p.together in (1, p.groups)


def form(shape, itemsize=2, layout="nchw", operands=1):
    p = cut(shape, itemsize, layout, operands)
    return "owner" if p.owner else "ticket" if p.lag >= 0 else "stream"


def test_the_rule() -> None:
    # few groups: one launch in which nobody waits
    assert form((32, 64, 7, 7)) == "owner"
    assert form((32, 1024, 14, 14)) == "owner"
    # groups that L2 has room for
    assert form((256, 64, 112, 112)) == form((256, 64, 112, 112), operands=2) == "ticket"
    assert form((256, 1024, 14, 14), layout="nhwc") == "ticket"
    assert form((8192, 1024), layout="rows") == "ticket"
    # groups that fit nowhere
    assert form((64, 64, 512, 512), itemsize=4) == "stream"
    assert form((256, 64, 112, 112), layout="nhwc") == "stream"


@pytest.mark.parametrize("side, itemsize", [(7, 2), (14, 2), (7, 4), (17, 2)])
def test_planes_that_are_no_whole_vectors_are_read_sixteen_bytes_at_a_time(side, itemsize) -> None:
    p = cut((64, 1024, side, side), itemsize)
    assert p.constants["ROWS"]
    assert p.constants["C_ALIGN"] * itemsize == p.constants["X_ALIGN"] * itemsize == 16
    assert p.constants["CHANNELS"] * side * side <= p.constants["BLOCK_C"]
    # 35 x 35 takes 8 channels, 9800 positions: no row for one tile
    assert not cut((64, 1024, 35, 35), 2).constants["ROWS"]


def test_no_compile_key_depends_on_the_batch_size() -> None:
    for problem in PROBLEMS:
        N, *rest = problem.shape
        for one_pass in (False, True):
            keys = [
                cut((n, *rest), problem.itemsize, problem.layout, 2, one_pass).constants
                for n in (2, N, 2 * N + 1)
            ]
            # but for offsets that int32 does not hold
            keys = [{**key, "LONG": False} for key in keys]
            assert keys[0] == keys[1] == keys[2], problem


if HAS_TRITON:
    import torch
    import triton
    import triton.language as tl

    from fastnorm.ops.batch_norm.triton_tiles import ticket_share

    @triton.jit
    def order_kernel(out_ptr, groups, shares, together, lag):
        ticket = tl.program_id(0)
        reduces, group, share = ticket_share(ticket, groups, shares, together, lag)
        tl.store(out_ptr + 3 * ticket, reduces.to(tl.int32))
        tl.store(out_ptr + 3 * ticket + 1, group)
        tl.store(out_ptr + 3 * ticket + 2, share)


def order(device: str, *sizes: int) -> list[tuple[bool, int, int]]:
    """What tickets stand for."""
    count = 2 * sizes[0] * sizes[1]
    out = torch.full((count, 3), -1, dtype=torch.int32, device=device)
    order_kernel[(count,)](out, *sizes)
    return [(bool(reduces), group, share) for reduces, group, share in out.tolist()]


@pytest.mark.parametrize("groups, shares, together", [(1, 5, 1), (5, 3, 2), (7, 2, 7), (4, 4, 1)])
@pytest.mark.parametrize("lag", [-1, 0, 3, 1000])
def test_a_ticket_waits_only_for_smaller_ones(device, groups, shares, together, lag) -> None:
    found = order(device, groups, shares, together, lag)
    every = {(group, share) for group in range(groups) for share in range(shares)}
    for reduces in (True, False):
        mine = [place for first, *place in found if first == reduces]
        assert sorted(map(tuple, mine)) == sorted(every)
    for i, (reduces, group, _) in enumerate(found):
        if not reduces:
            before = sum(first and other == group for first, other, _ in found[:i])
            assert before == shares
    if lag < 0:  # in phases, the second from its end
        width = min(together, groups) * shares
        phase = [place for _, *place in found[: 2 * width]]
        assert phase[:width] == phase[width:][::-1]
