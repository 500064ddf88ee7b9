"""The fewest bytes each op can move: every operand read once, every result written once.

One function per op. What a kernel saves for itself is not counted, nor what an algorithm reads a
second time: a floor does not depend on how the op is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.problems import HOST, WALL, Problem


def _moves(problem: Problem, mode: str, forward: int, backward: int) -> int:
    """Whole tensors moved by a mode, in bytes."""
    count = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return count[mode] * problem.numel * problem.itemsize


def batch_norm(problem: Problem, mode: str) -> int:
    """x -> y; x, dy -> dx. A residual is read, and where an activation hides its gradient, read
    again and that gradient written."""
    if problem.variant == "residual":
        return _moves(problem, mode, 3, 3)  # dresidual is dy itself
    if problem.variant.startswith("residual+"):
        return _moves(problem, mode, 3, 5)
    return _moves(problem, mode, 2, 3)


def mean_only_batch_norm(problem: Problem, mode: str) -> int:
    """x -> y; dy -> dx."""
    return _moves(problem, mode, 2, 2)


def layer_norm(problem: Problem, mode: str) -> int:
    """x -> y; x, dy -> dx; with a residual x, residual -> y, sum; sum, dy, dsum -> dx.

    Weight and bias count here: few long rows make them as large as a row of x.
    """
    dims = 3 if problem.variant == "last3" else 1
    parameter = math.prod(problem.shape[-dims:]) * problem.itemsize
    parameters = {"forward": 2, "backward": 3, "forward+backward": 5}[mode] * parameter
    if problem.variant == "residual":
        return _moves(problem, mode, 4, 4) + parameters
    return _moves(problem, mode, 2, 3) + parameters


def weight_norm(problem: Problem, mode: str) -> int:
    """v -> w; v, dw -> dv."""
    return _moves(problem, mode, 2, 3)


def activation(problem: Problem, mode: str) -> int:
    """x -> y; x, dy -> dx; a learnable beta is a number."""
    return _moves(problem, mode, 2, 3)


FLOORS: dict[str, Callable[[Problem, str], int]] = {
    "batch_norm": batch_norm,
    "mean_only_batch_norm": mean_only_batch_norm,
    "layer_norm": layer_norm,
    "weight_norm": weight_norm,
    "activation": activation,
}


def floor_bytes(problem: Problem, mode: str) -> int | None:
    """The floor of a mode of a problem; None for host time, which moves nothing, and for the wall
    clock of a step, which is host time too."""
    return None if mode in (*HOST, *WALL) else FLOORS[problem.op](problem, mode)
