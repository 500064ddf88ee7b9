"""Layer norm on Triton: how the kernels of the triton_*.py beside this file are launched."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnorm import layout
from fastnorm.ops import launch
from fastnorm.ops.activation.triton_values import ACTIVATIONS
from fastnorm.ops.layer_norm import backward_outputs, forward_outputs
from fastnorm.ops.layer_norm.triton_backward import backward_kernel, finalize_kernel
from fastnorm.ops.layer_norm.triton_backward_long import backward_ticket_kernel
from fastnorm.ops.layer_norm.triton_forward import (
    normalize_kernel,
    normalize_long_kernel,
    normalize_ticket_kernel,
)
from fastnorm.ops.layer_norm.triton_misaligned import (
    VEC,
    backward_misaligned_kernel,
    cut,
    normalize_misaligned_kernel,
)
from fastnorm.ops.layer_norm.views import dense, in_place, rows_adjacent

# Columns up to which a row lives in registers: forward 32 elements a thread; backward keeps x, dy
# and the gradients of the parameters. See _in_registers for what halves them.
FORWARD_COLS, BACKWARD_COLS = 16384, 8192
# Read transposed (rows adjacent), a tile has at least 16 rows: what that leaves of columns in
# registers.
FORWARD_TRANSPOSED_COLS, BACKWARD_TRANSPOSED_COLS = 1024, 256
# Bytes of x, and of dy, that a thread of the backward holds: two loads of 16. The next ones are
# under way meanwhile: 24 to 32 KB in flight a processor. Half of it where a tile has many rows,
# whose addresses take registers: up to so many columns, and with an activation, whose slope takes
# some too.
BACKWARD_BYTES, SHORT_ROW, SHORT_ROW_SLOPE = 32, 127, 1024
# Columns up to which the backward keeps the parameters in registers too, without an activation and
# with one; not where a tile has several rows of several warps, whose sums take them.
HELD_COLS, HELD_COLS_SLOPE = 2048, 1024
# Of a thread, said explicitly: left to itself the assembler spills a little to reach the next step
# of occupancy. REGISTERS: 16 warps a processor; REGISTERS_WIDE: 12 in programs of 4, whose tiles of
# 16-bit rows need them (and fp64).
REGISTERS, REGISTERS_WIDE, REGISTER_FILE = 128, 168, 65536
# Rows of 16-bit numbers that do not begin on 16 bytes: from this many columns on, by the elements
# that an access of theirs could have, triton_misaligned.py works on their bodies, MISALIGNED
# elements a thread; the backward on half as many with an activation or outside of these columns.
LEAST_BODY, MISALIGNED, MISALIGNED_LEAST, MISALIGNED_MOST = 32, 16, 264, 2056
# Rows a program has at least, where that leaves one for every processor: each writes 8 N bytes of
# sums for its 6 N bytes (16 bit) a row.
LEAST_ROWS = 8
FINALIZE = 4096  # partial sums a program of the last kernel has in flight, 16 bytes a load
# Columns from which several programs share a row, where there are fewer rows than processors.
SHARED_ROW = 32768
BLOCK, CHUNK, BACKWARD_BLOCK = 4096, 16384, 1024
# Rows per tile and arrival counter, at most; and how far, in tiles by the resident programs, the
# first of the two phases is ahead: two quarters of them are in the midst of a tile of the first.
GROUP, LEAD_QUARTERS = 16, 2
ROWS = 4  # at once: of 16-bit elements without an activation, whose slope takes registers


def _constants(x: Tensor, **others: Any) -> dict[str, Any]:
    return dict(
        WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, enable_fp_fusion=True, **others
    )


def _flat(dims: int, *tensors: Tensor) -> list[Tensor]:
    """The tensors as [1, M, N] with adjacent columns, copied where they are not."""
    views = [(layout.rows(dims, x) or [x])[0] for x in tensors]
    good = [view.dim() == 3 and view.size(0) == 1 and view.stride(2) == 1 for view in views]
    contiguous = [x if fine else x.contiguous() for x, fine in zip(tensors, good, strict=True)]
    return layout.rows(dims, *contiguous)  # type: ignore[return-value]


def _units(bytes_each: int, *sizes: int) -> int:
    """The largest power of two, up to 16 bytes of elements, that divides all sizes."""
    return math.gcd(max(1, 16 // bytes_each), *sizes)


def _align(views: list[Tensor]) -> tuple[int, int]:
    """(ROW_ALIGN, COL_ALIGN): the units in which sizes and strides of these views are given."""
    B, S, N = views[0].shape
    narrowest = min(view.element_size() for view in views)
    transposed = [view for view in views if rows_adjacent(view)]
    plain = [view for view in views if not rows_adjacent(view)]
    row_sizes = [S, *(v.stride(2) for v in transposed), *(v.stride(0) for v in transposed if B > 1)]
    col_sizes = [N, *(v.stride(1) for v in plain if S > 1), *(v.stride(0) for v in plain if B > 1)]
    return (_units(narrowest, *row_sizes) if transposed else 1), _units(narrowest, *col_sizes)


def _strides(view: Tensor, row_align: int, col_align: int) -> tuple[int, int, int]:
    """(batch, row, column) strides in units; one that no address needs may be anything."""
    if rows_adjacent(view):
        return view.stride(0) // row_align, 0, view.stride(2) // row_align
    return view.stride(0) // col_align, view.stride(1) // col_align, 0


def _in_registers(x: Tensor, N: int, cols: int, light: bool = True) -> bool:
    """Whether rows stay in registers: of `cols` columns, half where an access or an activation
    takes registers too."""
    if x.dtype == torch.float64:
        cols //= 4
    return N <= (cols if light and N % max(1, 16 // x.element_size()) == 0 else cols // 2)  # noqa: SIM300


def _tile(N: int, thread: int, transposed: bool, warps: int) -> dict[str, int]:
    """ROWS, COLS and warps of a tile of whole rows, `thread` elements a thread where `warps` warps
    reach that far."""
    cols = triton.next_power_of_2(N)
    rows = min(
        128, max(16 if transposed else 1, 4 * 32 * thread * (2 if transposed else 1) // cols)
    )
    return {
        "ROWS": rows,
        "COLS": cols,
        "num_warps": min(warps, max(4, rows * cols // (32 * thread))),
    }


@launch.fills(forward_outputs)
def layer_norm_forward(
    x: Tensor,  # [..., *shape]
    residual: Tensor | None,  # [..., *shape]
    weight: Tensor | None,  # [*shape]
    bias: Tensor | None,  # [*shape]
    dims: int,
    eps: float,
    activation: str,
    dtype: torch.dtype,
    want_sum: bool,
    y: Tensor,  # [..., *shape]
    statistics: Tensor,  # [2, M]
    total: Tensor | None,  # [..., *shape]
) -> None:
    mean, rstd = statistics
    M, N = mean.numel(), math.prod(x.shape[x.dim() - dims :])
    if M == 0 or N == 0:
        mean.zero_()
        rstd.fill_(math.nan)
        return
    weight, bias = dense(weight), dense(bias)
    constants = _constants(x, VALUE=ACTIVATIONS[activation][0])
    inputs = (x,) if residual is None else (x, residual)
    if not _in_registers(x, N, FORWARD_COLS):
        _forward_long(inputs, weight, bias, eps, y, mean, rstd, total, M, N, dims, constants)
        return
    transposed_cols = FORWARD_TRANSPOSED_COLS if residual is None else 0
    views = in_place(dims, 0 if x.dtype == torch.float64 else transposed_cols, *inputs)
    transposed = rows_adjacent(views[0])
    B, S, _ = views[0].shape
    row_align, col_align = _align(views)
    if _misaligned(N, col_align, *views):
        light = residual is None or activation == "identity"
        tile, phases, tiles = cut(M, N, MISALIGNED, REGISTERS if light else REGISTERS_WIDE)
        programs = min(tiles, _resident_misaligned(x, tile, phases))
        normalize_misaligned_kernel[(programs,)](
            y, total, mean, rstd, views[0], None if residual is None else views[1], weight, bias,
            *launch.split(eps), M, N, phases, tiles, programs, **tile, **constants,
        )  # fmt: skip
        return
    # of adjacent rows a thread has eight, whose sums it shares with as many others
    tile = _tile(N, 32 if transposed and x.element_size() == 2 else 16, transposed, 16)
    tiles = triton.cdiv(S, tile["ROWS"])
    normalize_kernel[(B * tiles,)](
        y, total, mean, rstd, views[0], None if residual is None else views[1], weight, bias,
        *launch.split(eps),
        S // row_align, N // col_align, tiles,
        *_strides(views[0], row_align, col_align), *_strides(views[-1], row_align, col_align)[:2],
        ROW_ALIGN=row_align, COL_ALIGN=col_align, TRANSPOSED=transposed, **tile, **constants,
    )  # fmt: skip


def _forward_long(
    inputs: tuple[Tensor, ...], weight: Tensor | None, bias: Tensor | None, eps: float,
    y: Tensor, mean: Tensor, rstd: Tensor, total: Tensor | None,
    M: int, N: int, dims: int, constants: dict[str, Any],
) -> None:  # fmt: skip
    views = _flat(dims, *inputs)
    _, align = _align(views)
    outputs = (y, total, mean, rstd)
    operands = (views[0], None if len(views) == 1 else views[1], weight, bias)
    strides = (views[0].stride(1) // align, views[-1].stride(1) // align)
    constants = dict(
        constants,
        COL_ALIGN=align,
        BLOCK=BLOCK // 2 if y.dtype == torch.float64 else BLOCK,
        num_warps=8,
    )
    if y.dtype == torch.float64:  # see _backward_long
        constants["maxnreg"] = 255
    processors = launch.processors(y.get_device())
    if N < SHARED_ROW or M >= processors:  # noqa: SIM300
        normalize_long_kernel[(M,)](
            *outputs, *operands, *launch.split(eps), N // align, *strides, **constants
        )
        return
    block = constants["BLOCK"]
    blocks = max(1, CHUNK // block)
    while blocks > 1 and M * triton.cdiv(N, blocks * block) < 2 * processors:  # a short batch
        blocks //= 2
    chunks = triton.cdiv(N, blocks * block)
    lag = chunks - 1 + processors // 2
    programs = 2 * (M * chunks + lag)
    partial = torch.empty((M, chunks, 2), dtype=mean.dtype, device=y.device)
    normalize_ticket_kernel[(programs,)](
        *outputs, *operands, partial, launch.counters(y, 2 + M), *launch.split(eps),
        M, N // align, *strides, chunks, blocks, lag, programs, PARTS=256,
        **{"maxnreg": 128, **constants},  # see _backward_long
    )  # fmt: skip


@launch.fills(backward_outputs)
def layer_norm_backward(
    x: Tensor,  # [..., *shape]
    dy: Tensor,  # [..., *shape]
    dsum: Tensor | None,  # [..., *shape]
    weight: Tensor | None,  # [*shape]
    bias: Tensor | None,  # [*shape]
    statistics: Tensor,  # [2, M]
    dims: int,
    activation: str,
    needs: list[bool],
    dx: Tensor | None,  # [..., *shape]
    dweight: Tensor | None,  # [*shape]
    dbias: Tensor | None,  # [*shape]
) -> None:
    mean, rstd = statistics
    M, N = mean.numel(), math.prod(x.shape[x.dim() - dims :])
    if M == 0 or N == 0:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    dsum = None if dsum is None else dsum.contiguous()
    slope = None if activation == "identity" else ACTIVATIONS[activation][1]
    operands = (dsum, dense(weight), None if slope is None else dense(bias), mean, rstd)
    constants = _constants(x, SLOPE=slope)
    resident = _in_registers(x, N, BACKWARD_COLS, light=slope is None and x.element_size() == 2)
    launched = _backward_short if resident else _backward_long
    parts, deep = launched(
        x, dy, operands, dims, dx, dweight is not None, dbias is not None, M, N, constants
    )
    if parts is None:
        return
    wanted = [gradient is not None for gradient in (dweight, dbias)]
    halves = iter(parts.unbind(0))
    dweight_part, dbias_part = (next(halves) if want else None for want in wanted)
    # as many rows at once as there may be for this N, not for this batch
    block_p = min(256, max(4, triton.next_power_of_2(deep)))
    block_n = FINALIZE // block_p
    align = _units(parts.element_size(), N)
    finalize_kernel[(triton.cdiv(N, block_n), sum(wanted))](
        dweight, dbias, dweight_part, dbias_part, parts.size(1), N // align, COL_ALIGN=align,
        BLOCK_P=block_p, BLOCK_N=block_n, WIDE=constants["WIDE"], num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def _resident(processors: int, registers: int, warps: int) -> int:
    """The programs that run at once."""
    return processors * max(1, REGISTER_FILE // (registers * 32 * warps))


def _programs(M: int, tiles: int, resident: int, processors: int) -> int:
    """As many as run at once; in a short batch LEAST_ROWS each, but one for every processor."""
    return min(resident, tiles, max(processors, -(-M // LEAST_ROWS)))


def _misaligned(N: int, col_align: int, *views: Tensor) -> bool:
    """Whether rows of 16-bit numbers follow each other without beginning on 16 bytes, and are long
    enough for triton_misaligned.py."""
    fine = views[0].element_size() == 2 and col_align < VEC and LEAST_BODY * col_align <= N
    return fine and all(view.size(0) == 1 and view.stride()[1:] == (N, 1) for view in views)


def _resident_misaligned(x: Tensor, tile: dict[str, int], phases: int) -> int:
    """The programs that run at once, as many of each phase."""
    resident = _resident(launch.processors(x.get_device()), tile["maxnreg"], tile["num_warps"])
    return max(1, resident // phases) * phases


def _parts(
    like: Tensor, spans: int, N: int, *wanted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The workspace of partial parameter gradients [wanted, spans, N], and its part for weight and
    for bias, both aligned: a kernel is compiled for an alignment, which must not depend on M."""
    if not any(wanted):
        return None, None, None
    room = (sum(wanted), -(-spans // 4) * 4, N)
    parts = torch.empty(room, dtype=like.dtype, device=like.device)[:, :spans]
    return parts, parts[0] if wanted[0] else None, parts[-1] if wanted[1] else None


def _backward_short(
    x: Tensor, dy: Tensor, operands: tuple[Any, ...], dims: int,
    dx: Tensor | None, wants_weight: bool, wants_bias: bool, M: int, N: int,
    constants: dict[str, Any],
) -> tuple[Tensor | None, int]:  # fmt: skip
    """The partial parameter gradients, and how many there may be for rows of this length."""
    views = in_place(dims, 0 if x.dtype == torch.float64 else BACKWARD_TRANSPOSED_COLS, x, dy)
    B, S, _ = views[0].shape
    row_align, col_align = _align(views)
    if _misaligned(N, col_align, *views):
        return _backward_misaligned(views, operands, dx, wants_weight, wants_bias, M, N, constants)
    transposed = any(rows_adjacent(view) for view in views)
    short_row, held = SHORT_ROW, HELD_COLS
    if constants["SLOPE"] is not None:
        short_row, held = SHORT_ROW_SLOPE, HELD_COLS_SLOPE
    thread = BACKWARD_BYTES // x.element_size()  # elements of a row that a thread holds
    if transposed:
        thread = 16
    elif N <= short_row or col_align * x.element_size() < 16:  # noqa: SIM300
        thread //= 2
    tile = _tile(N, thread, transposed, 8 if transposed else 16)
    wide = x.dtype == torch.float64 or (thread == 16 and tile["num_warps"] == 4)
    most = REGISTER_FILE // (32 * tile["num_warps"])
    tile["maxnreg"] = min(most, REGISTERS_WIDE if wide else REGISTERS)
    if transposed:  # a program is all that a processor has, with 168 of them too
        tile["maxnreg"] = 255
    tiles = B * triton.cdiv(S, tile["ROWS"])
    processors = launch.processors(x.get_device())
    resident = _resident(processors, tile["maxnreg"], tile["num_warps"])
    programs = _programs(M, tiles, resident, processors)
    several = tile["ROWS"] > 1 and N * x.element_size() > 32 * 16
    parts, dweight, dbias = _parts(operands[-1], programs, N, wants_weight, wants_bias)
    backward_kernel[(programs,)](
        dx, dweight, dbias, *views, *operands, B, S // row_align, N // col_align, tiles // B,
        *_strides(views[0], row_align, col_align), *_strides(views[1], row_align, col_align),
        programs,
        ROW_ALIGN=row_align, COL_ALIGN=col_align,
        X_TRANSPOSED=rows_adjacent(views[0]), DY_TRANSPOSED=rows_adjacent(views[1]),
        BATCHED=B > 1, HOLD=N <= held and not several,  # noqa: SIM300
        WHOLE=tile["COLS"] == N, **tile, **constants,
    )  # fmt: skip
    return parts, resident


def _backward_misaligned(
    views: list[Tensor], operands: tuple[Any, ...], dx: Tensor | None,
    wants_weight: bool, wants_bias: bool, M: int, N: int, constants: dict[str, Any],
) -> tuple[Tensor | None, int]:  # fmt: skip
    """The partial parameter gradients, and how many there may be for rows of this length."""
    light = constants["SLOPE"] is None and MISALIGNED_LEAST <= N < MISALIGNED_MOST
    thread, registers = (MISALIGNED, REGISTERS_WIDE) if light else (MISALIGNED // 2, REGISTERS)
    tile, phases, tiles = cut(M, N, thread, registers)
    resident = _resident_misaligned(views[0], tile, phases)
    programs = _programs(M, tiles, resident, launch.processors(views[0].get_device()))
    programs = min(triton.cdiv(programs, phases) * phases, resident)
    parts, dweight, dbias = _parts(operands[-1], programs, N, wants_weight, wants_bias)
    backward_misaligned_kernel[(programs,)](
        dx, dweight, dbias, *views, *operands, M, N, phases, tiles, programs, **tile, **constants
    )
    return parts, resident


def _backward_long(
    x: Tensor, dy: Tensor, operands: tuple[Any, ...], dims: int,
    dx: Tensor | None, wants_weight: bool, wants_bias: bool, M: int, N: int,
    constants: dict[str, Any],
) -> tuple[Tensor | None, int]:  # fmt: skip
    """The partial parameter gradients, and how many there may be for rows of this length."""
    views = _flat(dims, x, dy)
    _, align = _align(views)
    block = BACKWARD_BLOCK // 2 if x.dtype == torch.float64 else BACKWARD_BLOCK
    written = ROWS if constants["SLOPE"] is None else ROWS // 2
    if x.element_size() > 2:
        written //= 2
    wide = align * x.element_size() < 16 or x.dtype == torch.float64
    registers = 255 if wide else REGISTERS
    resident = _resident(launch.processors(x.get_device()), registers, 8)
    chunks = triton.cdiv(N, block)
    rows = GROUP
    while rows > 1 and triton.cdiv(M, rows) * chunks < resident:  # a short batch
        rows //= 2
    groups, deep = triton.cdiv(M, rows), max(1, resident // chunks)
    lanes = min(groups, deep)  # programs that share a chunk of columns
    parts, dweight, dbias = _parts(operands[-1], lanes, N, wants_weight, wants_bias)
    partial, means = ((mean_like(operands[-1], M, n)) for n in (chunks, 1))
    backward_ticket_kernel[(lanes * chunks,)](
        dx, dweight, dbias, *views, *operands, partial, means, launch.counters(x, 2 + groups),
        M, N // align, *(view.stride(1) // align for view in views), chunks, groups, rows, lanes,
        resident * LEAD_QUARTERS // 4,
        COL_ALIGN=align, ROWS_SUMMED=max(2, written), ROWS=written, BLOCK=block, PARTS=128,
        num_warps=8, maxnreg=registers, **constants,
    )  # fmt: skip
    return parts, deep


def mean_like(mean: Tensor, M: int, parts: int) -> Tensor:
    """A workspace of two sums for each row and part."""
    return torch.empty((M, parts, 2), dtype=mean.dtype, device=mean.device)
