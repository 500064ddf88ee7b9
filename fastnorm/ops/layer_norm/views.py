"""What the kernels of layer norm see of tensors."""

from __future__ import annotations

from torch import Tensor

from fastnorm import layout


def rows_adjacent(view: Tensor) -> bool:
    """Whether rows, not columns, are adjacent."""
    return view.size(2) > 1 and view.stride(2) != 1 and view.stride(1) == 1


def in_place(dims: int, transposed_cols: int, *tensors: Tensor) -> list[Tensor]:
    """The tensors as [B, S, N] that a kernel reads in place, copied row-major where it cannot: it
    reads rows with adjacent columns, and adjacent rows of up to ``transposed_cols`` columns."""
    found = layout.rows(dims, *tensors)
    if found is not None:
        cols = found[0].size(2)
        good = [
            view.stride(2) == 1 or cols == 1 or (rows_adjacent(view) and cols <= transposed_cols)
            for view in found
        ]
        if all(good):
            return found
        tensors = tuple(
            x if fine else x.contiguous() for x, fine in zip(tensors, good, strict=True)
        )
    else:
        tensors = tuple(x.contiguous() for x in tensors)
    found = layout.rows(dims, *tensors)
    assert found is not None
    return found


def dense(parameter: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it: dense."""
    return None if parameter is None else parameter.contiguous()
