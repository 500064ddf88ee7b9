"""Pieces of layer norm's kernels: addresses of a tile, reads, the affine part, counters."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compiles what follows an early return, hence the elses.


@triton.jit
def tile_pointers(
    ptr,
    batch,
    first,
    row,
    col,
    batch_stride,
    row_stride,
    col_stride,
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A tile [ROWS, COLS]: its base in int64, columns adjacent or (TRANSPOSED) rows adjacent."""
    base = ptr + batch * batch_stride
    if TRANSPOSED:
        return base + first + row[:, None] + col[None, :].to(tl.int64) * col_stride
    elif (
        ROWS == 1
    ):  # one address for the row: the columns are then constants apart, and cost no registers
        return base + first * row_stride + col[None, :]
    else:
        return base + first * row_stride + row[:, None].to(tl.int64) * row_stride + col[None, :]


@triton.jit
def read(ptr, inside):
    """A load with a mask, or without where there is none."""
    if inside is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=inside, other=0.0)


@triton.jit
def added(x, residual_ptr, at, inside, WIDE: tl.constexpr):
    """x + residual as the sum is returned: rounded to the dtype of x."""
    if residual_ptr is None:
        return x
    else:
        return (x.to(WIDE) + read(residual_ptr + at, inside).to(WIDE)).to(x.dtype)


@triton.jit
def two_sums(a, b):
    """The sums along the rows of two tiles in one reduction, whose barriers they share."""
    return tl.split(tl.sum(tl.join(a, b), axis=1))


@triton.jit
def quotient(total, n, share):
    """total / n by n's reciprocal, which all rows share, as exact as a division: rows of one value
    have it as their mean."""
    q = total * share
    return q + (total - q * n) * share


@triton.jit
def inverse_root(variance, eps, eps_low, HALF: tl.constexpr, WIDE: tl.constexpr):
    """HALF: for 16-bit rows, whose results do not show the difference of an approximation; the
    other takes 30 instructions a row. It knows no subnormal numbers."""
    shifted = (
        variance + eps + eps_low
    )  # in fp64 the second restores the digits that eps lost as fp32
    if HALF:
        tiny = shifted < 1e-30
        return tl.rsqrt(tl.where(tiny, shifted * 2.0**40, shifted)) * tl.where(tiny, 2.0**20, 1.0)
    elif WIDE == tl.float64:  # noqa: SIM300  # no constant, but a parameter
        return 1.0 / tl.sqrt(shifted)
    else:
        return 1.0 / tl.sqrt_rn(shifted)


@triton.jit
def affine(x_hat, weight_ptr, bias_ptr, at, inside, WIDE: tl.constexpr):
    """x_hat * weight + bias of the columns `at`; None stands for 1 and 0."""
    z = x_hat
    if weight_ptr is not None:
        z = z * read(weight_ptr + at, inside).to(WIDE)
    if bias_ptr is not None:
        z = z + read(bias_ptr + at, inside).to(WIDE)
    return z


@triton.jit
def leave_zero(counters_ptr, size, programs, BLOCK: tl.constexpr):
    """The last program to finish (the others may still be spinning until then) zeroes every
    counter."""
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel") == programs - 1:
        for start in range(0, size, BLOCK):
            k = start + tl.arange(0, BLOCK)
            tl.store(counters_ptr + k, tl.zeros((BLOCK,), tl.int32), mask=k < size)


# kernels
