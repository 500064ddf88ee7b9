"""Layer norm on the CUDA extension (csrc/layer_norm*.cu): which kernel, cut how, and what its
launchers are given."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm.ops import launch
from fastnorm.ops.activation.reference import wide_dtype
from fastnorm.ops.extension import extension
from fastnorm.ops.layer_norm import backward_outputs, outputs_of_rows
from fastnorm.ops.layer_norm.views import in_place, rows_adjacent


class Limits(NamedTuple):
    """What the plans below are made of; sizes of rows in vectors of 16 bytes."""

    # Rows up to which a row lives in the registers of at most 512 threads: 4 vectors each in the
    # forward, in the backward 2 (fp64: 1) of x and dy and the sums of dweight and dbias.
    forward: int = 2048
    backward: int = 1024
    # Chunks of longer rows, of 256 threads; in the backward those of streams of rows, which blocks
    # keep (0: there are no streams), and those of rows in two visits.
    forward_chunk: int = 1024
    stream_chunk: int = 512
    backward_chunk: int = 256
    # Streams: rows between the visits of one, and which part of the processors (2 blocks each) may
    # have blocks that wait for each other: a small one, so that some such launches at once cannot
    # take each other's place for ever.
    stream_lag: int = 4
    stream_share: int = 4
    # Rows of a tile of chunks in the backward, and the bytes of x and dy between two visits that
    # L2 keeps; where not even `least_group` rows are so few, the two phases follow each other.
    group: int = 32
    least_group: int = 4
    group_bytes: int = 24 << 20
    # What L2 keeps of a row of the forward and of the parameters beside it, and how many rows share
    # parameters where it does not.
    row_bytes: int = 28 << 20
    shared_rows: int = 4
    # Columns of matrices whose rows are adjacent, up to which a tile of whole rows is turned round
    # in that much shared memory.
    transposed_cols: int = 1024
    staged_bytes: int = 64 << 10


LIMITS = Limits()


class Shape(NamedTuple):
    """What decides a plan, beside the limits."""

    rows: int
    batch_rows: int
    cols: int
    size: int  # bytes of an element of x
    transposed: int  # matrices whose rows are adjacent
    processors: int


def _power_of_2(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


def _plan(**fields: int) -> Any:
    plan = extension().LayerNormPlan()
    for name, value in fields.items():
        setattr(plan, name, value)
    return plan


def in_registers(cols: int, size: int, limits: Limits, backward: bool) -> bool:
    """Whether whole rows of elements of ``size`` bytes live in registers."""
    vectors = limits.backward // (2 if size == 8 else 1) if backward else limits.forward
    return cols * size <= 16 * vectors


def _whole_rows(shape: Shape, each: int, block: int, limits: Limits) -> dict[str, int]:
    """Rows in registers: as few threads a row as hold it with `each` vectors a thread, but adjacent
    vectors in eight threads; several rows a block where they are short."""
    vectors = -(-shape.cols * shape.size // 16)
    threads = max(_power_of_2(-(-vectors // each)), min(_power_of_2(vectors), 8))
    tile = max(block // threads, 1)
    staged = 0
    if shape.transposed:  # lines of 128 bytes, if that much shared memory is to be had
        fits = limits.staged_bytes // (shape.cols * shape.size * shape.transposed)
        tile = max(tile, min(128 // shape.size, 1 << max(fits.bit_length() - 1, 0)))
        staged = tile * (shape.cols | 1) * shape.size * shape.transposed
    run = shape.batch_rows if shape.transposed else shape.rows
    return {
        "block": max(block, threads),
        "threads": threads,
        "tile": tile,
        "tiles": -(-run // tile),
        "shared_bytes": staged,
    }


def _chunked(shape: Shape, most: int, least: int = 1) -> dict[str, int]:
    """Chunks of at most `most` vectors of a row, and at least that many of them; even ones, whole
    lines of 128 bytes."""
    vectors = -(-shape.cols * shape.size // 16)
    line = min(8, most)
    chunk = -(-vectors // max(-(-vectors // most), least))
    chunk = -(-chunk // line) * line * 16 // shape.size
    return {"ticket": 1, "block": 256, "chunk": chunk, "chunks": -(-shape.cols // chunk)}


def _by_columns(shape: Shape, parameters: int, limits: Limits) -> bool:
    """Whether less moves if all statistics come first: x is read twice, but each parameter once."""
    row, ahead = shape.cols * shape.size, shape.processors * limits.forward_chunk * 16
    if row + ahead > limits.row_bytes:  # read twice anyway
        return shape.rows > 1
    # L2 keeps the row, but not the parameters too, which are read again for every row
    again = parameters * (shape.rows - 1)
    return (1 + parameters) * row + ahead > limits.row_bytes and again > shape.rows


def forward_plan(shape: Shape, parameters: int, limits: Limits) -> Any:
    """The rule of the forward: whole rows in registers as long as they fit, else chunks."""
    if in_registers(shape.cols, shape.size, limits, backward=False):
        fields = _whole_rows(shape, 4, 256 if shape.transposed else 128, limits)
        return _plan(**fields, blocks=fields["tiles"] * _batches(shape))
    fields = _chunked(shape, limits.forward_chunk)
    chunks = fields["chunks"]
    if _by_columns(shape, parameters, limits):
        lag, span = shape.rows * chunks, limits.shared_rows
        blocks = lag + chunks * -(-shape.rows // span)
        return _plan(**fields, by_columns=1, lag=lag, span=span, blocks=blocks)
    # as many tiles apart as are under way at once, so that no block waits for long
    lag = chunks - 1 + shape.processors
    return _plan(**fields, lag=lag, span=1, blocks=shape.rows * chunks + lag)


def _batches(shape: Shape) -> int:
    return shape.rows // shape.batch_rows if shape.transposed else 1


def backward_plan(shape: Shape, dy_size: int, wants_dx: bool, wanted: int, limits: Limits) -> Any:
    """The rule of the backward: whole rows in the registers of persistent blocks, else chunks.

    ``wanted`` gradients of parameters are finished by the last blocks, 32 columns at a time.
    """
    finishers = min(wanted * -(-shape.cols // 32), 2 * shape.processors)
    if in_registers(shape.cols, shape.size, limits, backward=True):
        fields = _whole_rows(shape, 1 if shape.size == 8 else 2, 256, limits)
        block, groups = fields["block"], fields["block"] // fields["threads"]
        fields["tiles"] *= _batches(shape)
        # as many as are resident, 16 rows each at least once every processor has one: the partial
        # sums that a block leaves are worth one and a half rows of traffic in 16-bit types
        workers = min(
            fields["tiles"],
            shape.processors * (512 // block),
            max(shape.processors, shape.rows // 16),
        )
        if wanted and groups > 1:  # where the groups of threads merge their sums
            fields["shared_bytes"] = max(
                fields["shared_bytes"], groups * shape.cols * max(shape.size, 4)
            )
        return _plan(**fields, workers=workers, parts=workers, blocks=workers + finishers)
    if limits.stream_chunk and shape.size < 8 and dy_size == shape.size:
        plan = _streams(shape, wants_dx, finishers, limits)
        if plan is not None:
            return plan
    fields = _chunked(shape, limits.backward_chunk)
    chunks = fields["chunks"]
    # between two visits: the tiles of the lag below, and two for each processor under way
    between = chunks - 1 + 3 * shape.processors
    group = limits.group_bytes // (between * fields["chunk"] * (shape.size + dy_size))
    in_turns = group < min(limits.least_group, shape.rows)
    if in_turns:
        group = limits.group
    # few rows: small groups, so that there are tiles for all processors
    group = min(group, limits.group, shape.rows * chunks // (2 * shape.processors))
    group = max(group, 1)
    groups = -(-shape.rows // group)
    span = groups if in_turns else 1
    lag = groups * chunks if in_turns else chunks - 1 + shape.processors
    if not wants_dx:  # nothing to wait for
        lag = 0
    tiles = groups // span * chunks  # of the second visit
    workers = lag + tiles
    # as many rows of sums as blocks are at one chunk at a time, two on each processor
    parts = min(groups // span, -(-2 * shape.processors // chunks))
    if span == groups:  # a tile has all rows, and nothing is left to finish
        parts = finishers = 0
    return _plan(
        **fields, group=group, groups=groups, span=span, lag=lag, workers=workers, parts=parts,
        blocks=workers + finishers,
    )  # fmt: skip


def _streams(shape: Shape, wants_dx: bool, finishers: int, limits: Limits) -> Any:
    """The plan of blocks that keep a chunk of the columns for a stream of rows, all of them
    resident; None where a row would need too many. Few rows are cut finer."""
    resident, most = 2 * shape.processors, max(shape.processors // limits.stream_share, 2)
    least = min(most, resident // shape.rows, shape.cols * shape.size // 1024)
    fields = _chunked(shape, limits.stream_chunk, max(least, 1))
    chunks = fields["chunks"]
    if chunks > most:
        return None
    streams = min(resident // chunks, shape.rows)
    return _plan(
        **fields, streams=1, parts=streams, workers=streams * chunks,
        lag=limits.stream_lag if wants_dx else 0, blocks=streams * chunks + finishers,
        shared_bytes=2 * 2 * 256 * 16 // shape.size * 4,
    )  # fmt: skip


def _turned(x: Tensor, dims: int, backward: bool, limits: Limits) -> int:
    """Up to how many columns adjacent rows are read in place: where whole rows are in registers."""
    cols = math.prod(x.shape[x.dim() - dims :])
    return limits.transposed_cols if in_registers(cols, x.element_size(), limits, backward) else 0


def _views(dims: int, backward: bool, limits: Limits, tensors: Sequence[Tensor]) -> list[Tensor]:
    alone = backward or len(tensors) == 1  # a forward with a residual has no room for tiles of both
    turned = _turned(tensors[0], dims, backward, limits) if alone else 0
    views = in_place(dims, turned, *tensors)
    batches, rows, _ = views[0].shape
    if batches > 1 and batches * rows >= 1 << 31:  # kernels tell batches apart in 32 bits
        views = in_place(dims, 0, *(x.contiguous() for x in tensors))
    return views


class Cut(NamedTuple):
    """What kernels see of x and the tensor beside it (residual or dy), both of one shape."""

    shape: Shape
    view: Any  # the same for the extension, with the strides of both
    plan: Any  # None where there are no elements
    ticket: int  # the plan's
    copied: bool  # they see copies


class Wants(NamedTuple):
    """What a pass is for, beside its tensors: how many parameters the forward has, or of how many
    the backward gives gradients, and whether of x too."""

    backward: bool
    parameters: int
    dx: bool = False


_FORWARD = tuple(Wants(False, parameters) for parameters in range(3))


def _cut_views(
    views: Sequence[Tensor], device: int, wants: Wants, limits: Limits, copied: bool
) -> Cut:
    x, beside = views[0], views[-1]
    shape = Shape(
        rows=x.size(0) * x.size(1),
        batch_rows=x.size(1),
        cols=x.size(2),
        size=x.element_size(),
        transposed=sum(map(rows_adjacent, views)),
        processors=launch.processors(device),
    )
    if not wants.backward:
        plan = forward_plan(shape, wants.parameters, limits)
    else:
        plan = backward_plan(shape, beside.element_size(), wants.dx, wants.parameters, limits)
    strides = (x.stride(), beside.stride())
    view = extension().LayerNormView(shape.rows, shape.batch_rows, shape.cols, *strides)
    return Cut(shape, view, plan, plan.ticket, copied)


@functools.lru_cache(maxsize=4096)
def _cut(
    dims: int, wants: Wants, limits: Limits, device: int, shape: torch.Size, *layouts: Any
) -> Cut:
    """How kernels read tensors of one shape and these strides and dtypes, one after the other.
    Decided on tensors without data: shapes and strides are all that a call looks at."""
    if 0 in shape:
        rows = math.prod(shape[: len(shape) - dims])
        return Cut(Shape(rows, rows, 0, 0, 0, 0), None, None, 0, False)
    tensors = [
        torch.empty(shape, dtype=dtype, device="meta")
        if strides is None  # contiguous
        else torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        for strides, dtype in zip(layouts[::2], layouts[1::2], strict=True)
    ]
    views = _views(dims, wants.backward, limits, tensors)
    copied = any(
        view.untyped_storage()._cdata != x.untyped_storage()._cdata
        for x, view in zip(tensors, views, strict=True)
    )
    return _cut_views(views, device, wants, limits, copied)


def _copies(dims: int, wants: Wants, *tensors: Tensor | None) -> tuple[Any, Any, Cut]:
    """x and the tensor beside it as kernels can read them, and what they see of them."""
    there = [t for t in tensors if t is not None]
    views = _views(dims, wants.backward, LIMITS, there)
    cut = _cut_views(views, views[0].get_device(), wants, LIMITS, True)
    return views[0], views[1] if len(views) > 1 else None, cut


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    layouts: tuple[Any, ...] = (None if x.is_contiguous() else x.stride(), x.dtype)
    if residual is not None:
        layouts += (residual.stride(), residual.dtype)
    wants = _FORWARD[(weight is not None) + (bias is not None)]
    cut = _cut(dims, wants, LIMITS, x.get_device(), x.shape, *layouts)
    outputs = outputs_of_rows(x, cut.shape.rows, dtype, want_sum)
    y, statistics, total = outputs
    if cut.plan is None:
        statistics[0].zero_()
        statistics[1].fill_(math.nan)
        return outputs
    if cut.copied:
        x, residual, cut = _copies(dims, wants, x, residual)
    shape, view, plan, ticket, _ = cut
    partials = counters = None
    if ticket:
        partials = torch.empty((shape.rows, plan.chunks, 2), dtype=wide_dtype(x), device=x.device)
        counters = launch.counters(x, 2 + shape.rows)
    extension().layer_norm_forward(
        y, total, statistics, x, residual, weight, bias, partials, counters, eps,
        activation, view, plan,
    )  # fmt: skip
    return outputs


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
    wanted = (dweight is not None) + (dbias is not None)
    if x.numel() == 0 or (dx is None and wanted == 0):
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    if dy.dtype != x.dtype and (dy.dtype != torch.float32 or x.element_size() != 2):
        dy = dy.to(x.dtype)
    if dy.dtype != x.dtype:  # tiles are turned round in the dtype of x
        dy = dy.contiguous()
    wants = Wants(True, wanted, dx is not None)
    layouts = (x.stride(), x.dtype, dy.stride(), dy.dtype)
    cut = _cut(dims, wants, LIMITS, x.get_device(), x.shape, *layouts)
    if cut.copied:
        x, dy, cut = _copies(dims, wants, x, dy)
    shape, plan = cut.shape, cut.plan
    wide, M, N = wide_dtype(x), shape.rows, shape.cols
    parts = partials = totals = counters = None
    if wanted and plan.parts:
        parts = torch.empty((wanted, plan.parts, N), dtype=wide, device=x.device)
    if plan.ticket and dx is not None:
        partials = torch.empty((M, plan.chunks, 2), dtype=wide, device=x.device)
        if not plan.streams:
            totals = torch.empty((M, 2), dtype=wide, device=x.device)
    if plan.streams:
        counters = launch.counters(x, 3 + M)
    elif wanted or plan.ticket:
        sums = plan.parts * plan.chunks if wanted else 0
        counters = launch.counters(x, 3 + plan.groups + sums)
    dsum = None if dsum is None else dsum.contiguous()
    extension().layer_norm_backward(
        dx, dweight, dbias, x, dy, dsum, weight, bias, statistics,
        parts, partials, totals, counters, activation, cut.view, plan,
    )  # fmt: skip
