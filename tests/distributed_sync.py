"""What the cases of synchronised batch norm share.

The oracle is one process with the whole batch on torch's own layer: every rank makes the same whole
batch, computes it alone, and compares its part of it with what ours gives for that part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from fastnorm import dispatch
from tests.batch_norm_twins import same_state, twins
from tests.conftest import AVAILABLE
from tests.distributed import RANKS, Collectives, case

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPE = (5, 4, 2)
GATHER, REDUCE = {"all_gather_into_tensor": 1}, {"all_reduce": 1}
every = case(*RANKS)
two = case(2)


# "auto" is the reference on a CPU; gloo's ranks have CPU tensors only
BACKENDS = ("auto", *(b for b in AVAILABLE[1:] if dispatch._refusal(b, torch.empty(0)) is None))


def parts(ranks: int, kind: str) -> list[int]:
    """How many samples each rank holds."""
    return {
        "even": [2] * ranks,
        "uneven": [3, 1, 2, 1][:ranks],
        "first empty": [0, 3, 1, 2][:ranks],
        "last empty": [*[2, 3, 1][: ranks - 1], 0],
        "alone": [*[0] * (ranks - 1), 4],
    }[kind]


def piece(whole: Tensor, sizes: list[int], rank: int) -> Tensor:
    """A rank's samples, in the layout of the whole."""
    found = whole.split(sizes)[rank].detach()
    return found if found.stride() == whole.stride() else found.clone()


def pair(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    activation: str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """torch's layer for the whole batch, and ours with the same state."""
    theirs, ours = twins(KINDS[len(shape) + 1], shape[0], dtype, **options)
    fastnorm.convert_sync_batchnorm(ours).activation = activation
    assert type(ours) is fastnorm.SyncBatchNorm
    return theirs, ours


def total(t: Tensor | None, like: Tensor) -> Tensor:
    """The sum over ranks, as DDP makes it."""
    assert t is not None
    assert t.dtype == like.dtype
    found = t.detach().clone()
    dist.all_reduce(found)
    return found


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Of the parameters, each rank's share summed."""
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(total(p.grad, p), q.grad)


def compare(
    rank: int,
    ranks: int,
    how: str = "uneven",
    shape: tuple[int, ...] = SHAPE,
    layout: torch.memory_format = torch.contiguous_format,
    residual: bool = False,
    steps: int = 1,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Outputs, gradients, buffers, number of collectives: ours on a part, torch's on the whole."""
    sizes = parts(ranks, how)
    function = getattr(F, options.get("activation") or "", lambda z: z)
    for backend in BACKENDS:
        theirs, ours = pair(shape, **options)
        for name in frozen:
            for layer in (theirs, ours):
                getattr(layer, name).requires_grad_(False)
        for _ in range(steps):
            x, r, dy = (
                torch.randn(sum(sizes), *shape, dtype=torch.float64).to(memory_format=layout)
                for _ in range(3)
            )
            inputs = [x.requires_grad_(), *([r.requires_grad_()] if residual else [])]
            y = function(theirs(x) + r if residual else theirs(x))
            y.backward(dy)
            own = [piece(t, sizes, rank).requires_grad_() for t in inputs]
            with fastnorm.backend(backend), Collectives() as collectives:
                found = ours(*own)
                assert collectives.take() == GATHER
                found.backward(piece(dy, sizes, rank))
                assert collectives.take() == REDUCE
            torch.testing.assert_close(found, piece(y, sizes, rank))
            if found.numel() > 0:
                assert found.is_contiguous(memory_format=layout)
            for mine, whole in zip(own, inputs, strict=True):
                assert mine.grad is not None
                assert whole.grad is not None
                torch.testing.assert_close(mine.grad, piece(whole.grad, sizes, rank))
                if mine.numel() > 0:
                    assert mine.grad.is_contiguous(memory_format=layout)
            same_gradients(ours, theirs)
            same_state(theirs, ours)
            nn.ModuleList([theirs, ours]).zero_grad()
