"""Cases of DistributedDataParallel and FSDP2 around our layers, on two ranks; see distributed.py.

The oracle is plain torch: the same wrapper around torch's own layers, or one process with the whole
batch.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import fastnorm
from tests.compare import relative_error
from tests.distributed import case
from tests.distributed_sync import BACKENDS as SERVING
from tests.twins import C, Residual

BACKENDS = SERVING[:2]  # a wrapper does not see who serves the layers: one of our own is enough
two = case(2)
N = 3  # samples of a rank


def network() -> nn.Sequential:
    """Every kind of layer that replace_ and fuse_ change, and one under weight norm."""
    weighed = nn.utils.parametrizations.weight_norm(nn.Linear(C * 16, 6))
    return nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.SiLU(), Residual(torch.add),
        nn.Flatten(), weighed, nn.LayerNorm(6), nn.GELU(),
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.SELU(),
    )  # fmt: skip


def pair(sync: bool = False) -> tuple[nn.Sequential, nn.Sequential]:
    """torch's model, and ours with the same state, every activation that can be folded is."""
    theirs = network().double()
    ours = copy.deepcopy(theirs)
    fastnorm.replace_(ours)
    fastnorm.fuse_(ours)
    assert ours[1].activation == "silu"
    assert ours[3].bn2.activation == "relu"
    if sync:
        fastnorm.convert_sync_batchnorm(ours)
    return theirs, ours


def fsdp(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def train(model: nn.Module, samples: slice, steps: int = 2) -> None:
    """SGD on these samples of every batch; the last gradients stay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randn(2 * N, 3, 4, 4, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        # of as many values on each rank: the mean over ranks is the mean over the batch
        model(batch[samples]).square().mean().backward()
        optimizer.step()


def own(rank: int) -> slice:
    return slice(rank * N, (rank + 1) * N)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and gradients, of all ranks where they are spread over ranks."""
    found = {**model.state_dict()}
    found |= {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t.detach() for name, t in found.items()
    }


def joined(model: nn.Module, part: str) -> Tensor:
    """What the model's state has under names that match, as one vector."""
    return torch.cat([t.double().flatten() for k, t in state(model).items() if re.match(part, k)])


def agree(theirs: nn.Module, ours: nn.Module) -> None:
    expected, found = state(theirs), state(ours)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m: f"{name}: {m}")  # noqa: B023


@two
def ddp_trains_as_plain_torch(rank: int, ranks: int) -> None:
    """Each rank its own statistics, rank 0's buffers for all; parameters and gradients equal."""
    for backend in BACKENDS:
        theirs, ours = (DistributedDataParallel(model) for model in pair())
        with fastnorm.backend(backend):
            train(ours, own(rank))
        train(theirs, own(rank))
        agree(theirs, ours)


@two
def ddp_with_synchronised_batch_norm_is_one_process(rank: int, ranks: int) -> None:
    for backend in BACKENDS:
        theirs, ours = pair(sync=True)
        wrapped = DistributedDataParallel(ours)
        with fastnorm.backend(backend):
            train(wrapped, own(rank))
        train(theirs, slice(None))
        agree(theirs, ours)


@two
def ddp_broadcasts_buffers(rank: int, ranks: int) -> None:
    """What rank 0 has seen goes to all before each forward, as of torch's layers."""
    x = torch.randn(2, N, 3, 4, 4, dtype=torch.float64)[rank]
    for sync in (False, True):
        theirs, ours = pair(sync)
        for model in (theirs, ours):
            for name, buffer in model.named_buffers():
                buffer.fill_(rank + (2.0 if name.endswith("var") else 1.0))
        if not sync:
            for model in (theirs, ours):
                DistributedDataParallel(model)(x)
            agree(theirs, ours)
        wrapped = DistributedDataParallel(ours.eval())  # sends them once
        ours[1].running_mean.fill_(rank + 5.0)
        wrapped(x)
        assert torch.equal(ours[1].running_mean, torch.full((C,), 5.0, dtype=torch.float64))


class Branches(nn.Module):
    """One of two heads is used in a forward, the other has no gradients then."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.SiLU())
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, 2, 1), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(2)
        )

    def forward(self, x: Tensor, head: int) -> Tensor:
        y: Tensor = self.heads[head](self.body(x))
        return y


@two
def ddp_finds_unused_parameters(rank: int, ranks: int) -> None:
    for sync in (False, True):
        theirs = Branches().double()
        ours = copy.deepcopy(theirs)
        fastnorm.replace_(ours)
        fastnorm.fuse_(ours)
        if sync:
            fastnorm.convert_sync_batchnorm(ours)
        wrap = functools.partial(DistributedDataParallel, find_unused_parameters=True)
        mine = wrap(ours)
        plain, samples = (theirs, slice(None)) if sync else (wrap(theirs), own(rank))
        x = torch.randn(2 * N, 3, 4, 4, dtype=torch.float64)
        for head in (0, 1, 1):
            for model, given in ((mine, x[own(rank)]), (plain, x[samples])):
                model.zero_grad()
                model(given, head).square().mean().backward()
            agree(theirs, ours)


@two
def ddp_around_a_compiled_model(rank: int, ranks: int) -> None:
    """One graph, collectives included, inside DDP, which Dynamo does not trace into."""
    theirs, ours = pair(sync=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    train(DistributedDataParallel(compiled), own(rank))
    train(theirs, slice(None))
    agree(theirs, ours)


@two
def fsdp_trains_as_plain_torch(rank: int, ranks: int) -> None:
    for backend in BACKENDS:
        theirs, ours = (fsdp(model) for model in pair())
        with fastnorm.backend(backend):
            train(ours, own(rank))
        train(theirs, own(rank))
        agree(theirs, ours)


@two
def fsdp_with_synchronised_batch_norm_is_one_process(rank: int, ranks: int) -> None:
    for backend in BACKENDS:
        theirs, ours = pair(sync=True)
        fsdp(ours)
        with fastnorm.backend(backend):
            train(ours, own(rank))
        train(theirs, slice(None))
        agree(theirs, ours)


@two
def fsdp_with_bf16_parameters_keeps_fp32_buffers(rank: int, ranks: int) -> None:
    """The error of bf16, at most twice plain torch's, where batch norm's parameters have to stay
    fp32: torch takes no bf16 ones beside fp32 buffers."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x = torch.randn(2 * N, 3, 4, 4).bfloat16()
    for backend, sync in itertools.product(BACKENDS, (False, True)):
        exact, ours = pair(sync)
        for p, q in zip(exact.parameters(), ours.float().parameters(), strict=True):
            p.data = p.data.bfloat16().double()
            q.data.copy_(p)
        theirs = copy.deepcopy(exact).bfloat16()
        for layer in theirs.modules():
            if isinstance(layer, _BatchNorm):
                layer.float()
        fsdp(ours, mp_policy=policy)
        with fastnorm.backend(backend):
            y = ours(x[own(rank)])
            y.float().square().mean().backward()
        assert y.dtype == torch.bfloat16
        assert {buffer.dtype for buffer in ours.buffers()} == {torch.float32, torch.int64}
        for model, dtype in ((exact, torch.float64), (theirs, torch.bfloat16)):
            given, plain = x.to(dtype), model if sync else DistributedDataParallel(model)
            plain(given if sync else given[own(rank)]).to(torch.float64).square().mean().backward()
        # gradients as one vector: of one that is zero but for rounding, as of a bias before a batch
        # norm, a relative error says nothing
        for part in ("d", ".*running"):
            right, reference, found = (joined(model, part) for model in (exact, theirs, ours))
            error, allowed = relative_error(found, right), 2 * relative_error(reference, right)
            assert error <= allowed, (backend, sync, part, error, allowed)
