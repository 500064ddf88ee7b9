"""What the launchers of kernels on planes share: arguments from a plan, workspaces, options."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastnorm.ops import launch
from fastnorm.ops.batch_norm import triton_merge
from fastnorm.ops.batch_norm.plan import Plan


def sizes(p: Plan) -> tuple[int, ...]:
    return p[: p._fields.index("groups")]  # type: ignore[return-value]


def order(p: Plan) -> tuple[int, int, int]:
    return p.groups, p.together, p.lag


def grid(p: Plan) -> tuple[int]:
    """A program for each share; with tickets, two."""
    return (p.groups * p.shares,)


def wide_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def fans(p: Plan) -> int:
    """What triton_merge.py makes of a group's shares before it has the group."""
    width: int = min(triton_merge.MERGE.value // p.constants["CHANNELS"], triton_merge.FAN.value)
    found = -(-p.shares // width)
    assert found <= width
    return found


def workspace(x: Tensor, p: Plan) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = p.groups * (p.shares + fans(p) + 1)
    return torch.empty(rows * 2 * p.constants["CHANNELS"], dtype=dtype, device=x.device)


def counters(x: Tensor, p: Plan) -> Tensor:
    """The ticket, the programs that have passed, then triton_merge.py's."""
    return launch.counters(x, 2 + p.groups * (1 + fans(p)))


def options(x: Tensor, p: Plan, light: bool = False) -> dict[str, Any]:
    """Launch options. Left alone, ptxas takes registers that one more program on a multiprocessor
    is worth more than, or spills a few bytes to fit one: a bound of its own decides. light: two
    passes over one or two operands."""
    found: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
    planar = not (p.constants["X_LAST"] or p.constants["Y_LAST"])
    if p.constants["ROWS"]:  # three programs on a multiprocessor, or two, or one
        flat = p.constants["CHANNELS"] < p.constants["BLOCK_C"]
        if x.dtype == torch.float64 or (flat and not light):
            found["maxnreg"] = 168
        else:
            found["maxnreg"] = 80 if light and x.element_size() == 2 and not flat else 128
    elif not planar or p.constants["VEC"] == 1:
        found["maxnreg"] = 160  # transposing, or an address for every element
    elif x.dtype == torch.float32:
        found["maxnreg"] = 64
    return found
