"""Canonical views: what a kernel sees of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x itself where it covers its storage without gaps or overlaps, else a compact copy in the
    same order."""
    return x if x.is_contiguous() or _is_dense(x) else x.clone(memory_format=torch.preserve_format)


def _is_dense(x: Tensor) -> bool:
    if not torch.compiler.is_compiling():
        return bool(torch.ops.aten.is_non_overlapping_and_dense(x))
    if x.is_contiguous():
        return True
    # the same by hand: Dynamo cannot trace an operator whose result is no tensor
    extent = 1
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and step != extent:
            return False
        extent *= size
    return True


def match(x: Tensor, like: Tensor) -> Tensor:
    """x itself where it has the strides of ``like``, else a copy that has (an expanded or
    transposed gradient, say)."""
    return restride(x, like.stride())


def overwrite(y: Tensor, x: Tensor, fill: Callable[[Tensor, Tensor], None]) -> None:
    """Let an elementwise ``fill(x, y)`` write y in place; through dense copies where their strides
    differ or leave gaps."""
    if x.stride() == y.stride() and _is_dense(y):
        fill(x, y)
        # as torch's in-place functions do: y is no longer what a backward may have saved
        if not y.is_inference():
            torch.autograd.graph.increment_version(y)
    else:
        compact = dense(x)
        result = torch.empty_like(compact)
        fill(compact, result)
        y.copy_(result)


def restride(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x itself where it has these strides, which must be dense, else a copy that has."""
    if x.stride() == strides:
        return x
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        .as_strided(x.size(), strides)
        .copy_(x)
    )


def row_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty contiguous tensor of x's shape."""
    # a keyword takes as long as four questions; strides of a size of 1 may be any in x
    if x.dtype is dtype and x.is_contiguous() and 1 not in x.shape:
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def channels_last(x: Tensor) -> bool:
    """Whether batch norm's output for x is channels_last (2-d) or channels_last_3d: x is, and is
    not contiguous too."""
    if x.is_contiguous():
        return False
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def planes_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape in the layout of batch norm's outputs and gradients:
    channels_last or contiguous."""
    if x.is_contiguous() or not channels_last(x):
        return row_major(x, x.dtype)
    form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty_like(x, memory_format=form)


def planes(x: Tensor) -> Tensor | None:
    """x of [N, C, ...] as a view [N, C, S]; None where no strides can express it."""
    if x.dim() == 2:
        return x.unsqueeze(2)
    if x.dim() == 3:
        return x
    if x.is_contiguous() or channels_last(x):
        return x.flatten(2)
    size, stride = 1, 0
    for n, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if n == 1:
            continue
        if size == 1:
            stride = step
        elif step != stride * size:
            return None
        size *= n
    return x.as_strided((x.size(0), x.size(1), size), (x.stride(0), x.stride(1), stride))


def to_planes(x: Tensor) -> Tensor:
    """x itself where a kernel reads it in place ([N, C, S] with channels or positions adjacent),
    else a dense copy."""
    if x.is_contiguous() or channels_last(x):
        return x
    view = planes(x)
    if view is not None:
        channels_adjacent = view.stride(1) == 1 and view.size(1) > 1
        if view.stride(2) == 1 or channels_adjacent or view.size(2) == 1:
            return x
    return planes_like(x).copy_(x)


def _joined(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride of adjacent dimensions read as one; None where they have none in common."""
    size, stride = 1, 1
    for n, step in zip(reversed(sizes), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            stride = step
        elif step != stride * size:
            return None
        size *= n
    return stride


def rows(dims: int, *tensors: Tensor) -> list[Tensor] | None:
    """Tensors of one shape as views [B, S, N], N the last ``dims`` dimensions; None where no
    strides can express it.

    B is 1 unless the rows have no stride in common: the NHWC view of an NCHW image has B = N, S =
    H*W.
    """
    shape = tuple(tensors[0].shape)
    last = len(shape) - dims
    if tensors[0].numel() > 0 and all(map(Tensor.is_contiguous, tensors)):
        S, N = math.prod(shape[:last]), math.prod(shape[last:])
        return [x.as_strided((1, S, N), (1, N if S > 1 else 1, 1)) for x in tensors]
    for split in range(last + 1):
        parts = (slice(0, split), slice(split, last), slice(last, None))
        sizes = [math.prod(shape[part]) for part in parts]
        views = []
        for x in tensors:
            strides = [_joined(shape[part], x.stride()[part]) for part in parts]
            if None in strides:
                break
            views.append(x.as_strided(sizes, strides))  # type: ignore[arg-type]
        if len(views) == len(tensors):
            return views
    return None


def canonical(x: Tensor) -> bool:
    """Whether dense x of [N, C, ...] is, as planes, [N, C, S] or [N, S, C] in memory."""
    if x.is_contiguous():
        return True
    last = x.movedim(1, -1)
    return last.is_contiguous()
