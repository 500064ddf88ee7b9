"""What is measured: one op on one tensor, in the modes that make sense for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
TRAINING = ("forward", "backward")
# until a call returns; a backward's until autograd does
HOST = ("host", "host-backward")
# wall clock of forward and backward: of one, from an idle device to an idle one; of one among many
# in a row, where the slower of host and device counts; of one that is replayed as a CUDA graph
STEP, STEPS, GRAPH = "step", "steps", "graph"
WALL = (STEP, STEPS, GRAPH)


@dataclass(frozen=True)
class Problem:
    """One op, as the rows of a results file name it; a lower importance is measured earlier."""

    op: str
    variant: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    modes: tuple[str, ...] = TRAINING
    importance: float = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.op} {self.variant} {sizes} {self.layout} {self.dtype}"
