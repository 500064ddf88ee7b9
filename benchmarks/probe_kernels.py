"""Kernels that ask the memory of a GPU what the forms of batch norm depend on, and nothing else.

They move bf16 in tiles of BLOCK elements, as the norms do, and every value that they read is copied
or summed, so that a test can tell whether each element was read and written.
"""

import triton
import triton.language as tl

BLOCK = 8192  # elements of a tile: 16 KiB of bf16
WARPS = 8


@triton.jit
def copy_segments_kernel(
    y_ptr,  # [M, C]
    x_ptr,  # [M, C]
    C: tl.constexpr,
    chunks,  # of STEPS * BLOCK_R rows, in M
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # the segment: what is read of a row at once
    STEPS: tl.constexpr,
    FAR: tl.constexpr,
):
    """A program copies BLOCK_C columns of a chunk of rows. FAR: a column block's chunks follow each
    other, and the neighbour in a row comes a whole column later; else the neighbours do."""
    program = tl.program_id(0)
    if FAR:
        column, chunk = program // chunks, program % chunks
    else:
        column, chunk = program % (C // BLOCK_C), program // (C // BLOCK_C)
    cols = column * BLOCK_C + tl.arange(0, BLOCK_C)
    for step in range(STEPS):
        rows = (chunk * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = rows[:, None].to(tl.int64) * C + cols[None, :]
        tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def reread_kernel(
    sums_ptr,  # [programs]
    y_ptr,  # [passes, tiles, BLOCK]
    x_ptr,  # [tiles, BLOCK]
    tiles,
    passes,
    BLOCK: tl.constexpr,
    WRITES: tl.constexpr,
    POLICY: tl.constexpr,  # of the stores
):
    """Read all of x again and again, each time another program; WRITES: and store it elsewhere."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(program, tiles * passes, tl.num_programs(0)):
        # past L1, which would hold a part of a small x
        x = tl.load(x_ptr + (i % tiles) * BLOCK + lanes, cache_modifier=".cg")
        total += x.to(tl.float32)
        if WRITES:
            tl.store(y_ptr + tl.cast(i, tl.int64) * BLOCK + lanes, x, eviction_policy=POLICY)
    tl.store(sums_ptr + program, tl.sum(total))


@triton.jit
def window_kernel(
    sums_ptr,  # [tiles]
    y_ptr,  # [tiles, BLOCK]
    x_ptr,  # [tiles, BLOCK]
    tiles,
    lag,  # tiles between the two reads of one
    BLOCK: tl.constexpr,
    POLICY: tl.constexpr,  # of the second read and of the store
):
    """The ticket form's traffic without its waiting: reduce a tile, and copy the one that was
    reduced `lag` tiles ago."""
    i = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    if i < tiles:
        x = tl.load(x_ptr + i * BLOCK + lanes)
        tl.store(sums_ptr + i, tl.sum(x.to(tl.float32)))
    if i >= lag:
        at = (i - lag) * BLOCK + lanes
        tl.store(y_ptr + at, tl.load(x_ptr + at, eviction_policy=POLICY), eviction_policy=POLICY)
