"""What the launchers of kernels on planes share: arguments from a plan, workspaces, options."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastnorm.ops.batch_norm.plan import Plan


def sizes(p: Plan) -> tuple[int, ...]:
    return p.N, p.C, p.S, p.x_stride_n, p.x_stride_c, p.x_stride_s


def wide_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def workspace(x: Tensor, p: Plan) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(
        p.groups * 2 * p.constants["BLOCK_C"] * p.tiles, dtype=dtype, device=x.device
    )


def options(x: Tensor, p: Plan) -> dict[str, Any]:
    """Launch options. Left alone, ptxas sometimes spills a few bytes to fit one more program on a
    multiprocessor; where it does, a bound of its own makes it use the registers it needs."""
    found: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
    planar = not (p.constants["X_LAST"] or p.constants["Y_LAST"])
    if p.constants["X_LAST"] != p.constants["Y_LAST"] or (planar and p.constants["VEC"] == 1):
        found["maxnreg"] = 160  # transposing, or an address for every element
    elif planar and x.dtype == torch.float32:
        found["maxnreg"] = 64
    return found
