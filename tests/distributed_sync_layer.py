"""Cases of synchronised batch norm as a layer among others, on every rank; see distributed.py."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fastnorm
from tests.batch_norm_twins import same_state
from tests.distributed import Collectives
from tests.distributed_sync import (
    BACKENDS,
    GATHER,
    REDUCE,
    SHAPE,
    every,
    pair,
    parts,
    piece,
    same_gradients,
    two,
)
from tests.twins import C, Residual


@every
def evaluation_asks_nobody(rank: int, ranks: int) -> None:
    for track in (True, False):
        theirs, ours = pair(SHAPE, track_running_stats=track)
        x = torch.randn(2 + rank, *SHAPE, dtype=torch.float64)
        with Collectives() as collectives:
            y = ours.eval()(x.clone().requires_grad_())
            y.sum().backward()
            assert collectives.take() == {}
        torch.testing.assert_close(y, theirs.eval()(x))  # without buffers: of this rank's batch
        same_state(theirs, ours)


@two
def used_twice_and_out_of_order(rank: int, ranks: int) -> None:
    """One layer twice in a graph, its buffers moving between a forward and its backward."""
    sizes = parts(ranks, "uneven")
    for backend in BACKENDS:
        theirs, ours = pair(SHAPE)
        x = torch.randn(sum(sizes), *SHAPE, dtype=torch.float64)
        whole, own = x.clone().requires_grad_(), piece(x, sizes, rank).requires_grad_()
        theirs(theirs(whole).sin() * 2).square().sum().backward()
        with fastnorm.backend(backend):
            ours(ours(own).sin() * 2).square().sum().backward()
        assert whole.grad is not None
        torch.testing.assert_close(own.grad, piece(whole.grad, sizes, rank))
        same_gradients(ours, theirs)
        same_state(theirs, ours)


@two
def a_residual_that_the_kernel_cannot_add(rank: int, ranks: int) -> None:
    theirs, ours = pair(SHAPE, torch.float32, activation="relu")
    x = torch.randn(4, *SHAPE)
    for r in (torch.randn(SHAPE, dtype=torch.float64), torch.randn(1, 1, 1, 2)):
        with Collectives() as collectives:
            y = ours(x[2 * rank : 2 * rank + 2], r)
            assert collectives.take() == GATHER
        expected = F.relu(theirs(x) + r)[2 * rank : 2 * rank + 2]
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y.float(), expected.float())  # normalised in fp32


@two
def only_what_is_needed_is_computed(rank: int, ranks: int) -> None:
    """Without a gradient of the input no rank has anything to ask; without any, no graph."""
    for backend, activation in itertools.product(BACKENDS, (None, "silu")):
        theirs, ours = pair(SHAPE, activation=activation)
        function = F.silu if activation else (lambda z: z)
        x, r = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
        mine = slice(2 * rank, 2 * rank + 2)
        whole, own = r.clone().requires_grad_(), r[mine].clone().requires_grad_()
        function(theirs(x) + whole).square().sum().backward()
        with fastnorm.backend(backend), Collectives() as collectives:
            y = ours(x[mine], own)
            collectives.take()
            y.square().sum().backward()
            assert collectives.take() == {}
            with torch.no_grad():
                ours(x[mine])
            assert collectives.take() == GATHER
        assert whole.grad is not None
        torch.testing.assert_close(own.grad, whole.grad[mine])
        same_gradients(ours, theirs)
        theirs(x)
        same_state(theirs, ours)


def recorder(sent: list[dict[str, int]]) -> Callable[..., Any]:
    """A compiler that leaves graphs as they are and notes what each sends to other ranks."""

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        collectives = Collectives()
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                collectives.note(node.target)
        sent.append(collectives.take())
        return make_boxed_func(graph.forward)

    return compiler


@every
def groups_share_among_themselves(rank: int, ranks: int) -> None:
    """The even and the odd ranks: each group its own statistics, a group of one is batch norm."""
    groups = [dist.new_group(range(start, ranks, 2)) for start in (0, 1)]
    mine = list(range(rank % 2, ranks, 2))
    x = torch.randn(ranks, 2, *SHAPE, dtype=torch.float64)
    theirs, ours = pair(SHAPE)
    ours.process_group = groups[rank % 2]
    whole, own = x[mine].clone().requires_grad_(), x[rank].clone().requires_grad_()
    y = theirs(whole.flatten(0, 1)).view_as(whole)
    y.square().sum().backward()
    with Collectives() as collectives:
        found = ours(own)
        found.square().sum().backward()
        assert collectives.take() == ({} if len(mine) == 1 else {**GATHER, **REDUCE})
    torch.testing.assert_close(found, y[mine.index(rank)])
    assert whole.grad is not None
    torch.testing.assert_close(own.grad, whole.grad[mine.index(rank)])
    same_state(theirs, ours)
    twin = copy.deepcopy(nn.Sequential(ours))[0]
    assert twin.process_group is ours.process_group
    assert twin.weight is not ours.weight
    torch.testing.assert_close(twin(own), found)
    # outside its group a layer is batch norm, as torch's
    theirs, ours = pair(SHAPE)
    ours.process_group = groups[1 - rank % 2]
    torch.testing.assert_close(ours(own), theirs(own))


@two
def second_derivatives(rank: int, ranks: int) -> None:
    """A gradient penalty over the whole batch."""
    sizes = parts(ranks, "last empty")
    for sizes in (parts(ranks, "uneven"), parts(ranks, "last empty")):
        theirs, ours = pair(SHAPE, activation="silu")
        x, r = torch.randn(2, sum(sizes), *SHAPE, dtype=torch.float64)

        def penalty(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return dx.square().sum() + y.sum()

        whole, own = x.clone().requires_grad_(), piece(x, sizes, rank).requires_grad_()
        penalty(theirs, whole, F.silu(theirs(whole) + r)).backward()
        penalty(ours, own, ours(own, piece(r, sizes, rank))).backward()
        assert whole.grad is not None
        torch.testing.assert_close(own.grad, piece(whole.grad, sizes, rank))
        same_gradients(ours, theirs)


@two
def compiles_as_one_graph(rank: int, ranks: int) -> None:
    """Forward and backward, collectives included, one graph for every batch size."""
    for momentum, group in ((0.1, None), (None, dist.new_group())):
        theirs, ours = pair(SHAPE, activation="silu", momentum=momentum)
        ours.process_group = group
        sent: list[dict[str, int]] = []
        torch._dynamo.reset()
        compiled = torch.compile(
            ours, backend=aot_autograd(fw_compiler=recorder(sent)), fullgraph=True, dynamic=True
        )
        for n in (3, 6, 7):  # no other size of x, which dynamic=True would tie to n
            x, r = torch.randn(2, 2 * n, *SHAPE, dtype=torch.float64)
            whole, own = x.clone().requires_grad_(), x.split(n)[rank].clone().requires_grad_()
            F.silu(theirs(whole) + r).square().sum().backward()
            y = compiled(own, r.split(n)[rank])
            y.square().sum().backward()
            assert whole.grad is not None
            torch.testing.assert_close(own.grad, whole.grad.split(n)[rank])
            same_gradients(ours, theirs)
            same_state(theirs, ours)
            nn.ModuleList([theirs, ours]).zero_grad()
        assert sent == [GATHER, REDUCE], sent


@every
def what_torch_refuses_is_refused_before_anybody_waits(rank: int, ranks: int) -> None:
    def fails(error: type[Exception], text: str, x: Tensor, **options: Any) -> None:
        _, ours = pair((3,), torch.float32, **options)
        with Collectives() as collectives, pytest.raises(error, match=text):
            ours(x)
        assert collectives.take() == {}

    fails(ValueError, r"expected at least 2D input \(got 1D input\)", torch.zeros(3))
    fails(ValueError, "input channels should be non-zero", torch.zeros(3, 0))
    fails(RuntimeError, "running_mean should contain 4 elements not 3", torch.zeros(2, 4))
    fails(
        RuntimeError, "weight should contain 4 elements not 3", torch.zeros(2, 4),
        track_running_stats=False,
    )  # fmt: skip
    fails(NotImplementedError, "Long|int64", torch.zeros(2, 3, dtype=torch.long))
    fails(ValueError, "eps must be positive during training, but got 0", torch.zeros(2, 3), eps=0.0)
    _, ours = pair((3,), torch.float32)
    with pytest.raises(RuntimeError, match="size of tensor"):
        ours(torch.zeros(2, 3), torch.zeros(2, 4))
    ours.running_var = None
    with pytest.raises(ValueError, match="must either both be None or neither"):
        ours(torch.zeros(2, 3))
    _, ours = pair((3,), torch.float32)
    x = torch.randn(2, 3)
    for transform in (
        lambda: torch.func.grad(lambda x: ours(x).sum())(x),
        lambda: torch.jit.trace(ours, x),
        lambda: torch.export.export(ours, (x,)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace's, about every size that is compared
            with pytest.raises(RuntimeError, match="does not work under"):
                transform()


@two
def a_group_for_another_device_is_named(rank: int, ranks: int) -> None:
    _, ours = pair((3,), torch.float32)
    ours.process_group = dist.new_group(backend="cuda:gloo")
    with pytest.raises(RuntimeError, match=r"no backend for tensors on cpu: init_process_group"):
        ours(torch.zeros(2, 3))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.SiLU(), Residual(torch.add),
        nn.Flatten(), nn.Linear(C * 16, 6), nn.SyncBatchNorm(6),
    ).double()  # fmt: skip


@every
def models_converted_before_and_after_surgery(rank: int, ranks: int) -> None:
    """Equal to the plain model on the whole batch, whichever way the layers became ours."""
    sizes = parts(ranks, "uneven")
    plain = network()
    x = torch.randn(sum(sizes), 3, 4, 4, dtype=torch.float64)
    orders = (
        (fastnorm.convert_sync_batchnorm,),
        (fastnorm.replace_, fastnorm.fuse_, fastnorm.convert_sync_batchnorm),
        (fastnorm.convert_sync_batchnorm, fastnorm.replace_, fastnorm.fuse_),
    )
    models = [copy.deepcopy(plain) for _ in orders]
    plain[-1] = nn.BatchNorm1d(6).double()  # on the whole batch there is nobody to ask
    y = plain(x)
    y.square().sum().backward()
    for order, model in zip(orders, models, strict=True):
        for change in order:
            change(model)
        with Collectives() as collectives:
            found = model(piece(x, sizes, rank))
            found.square().sum().backward()
            assert collectives.take() == {"all_gather_into_tensor": 4, "all_reduce": 4}
        norms = [layer for layer in model.modules() if isinstance(layer, fastnorm.SyncBatchNorm)]
        folded = [None] * 4 if len(order) == 1 else ["silu", "relu", "relu", None]
        assert [layer.activation for layer in norms] == folded
        torch.testing.assert_close(found, piece(y, sizes, rank))
        same_gradients(model, plain)
        same_state(plain, model)
        fastnorm.restore_(model)
        assert type(model[1]) is nn.BatchNorm2d
        assert type(model[-1]) is nn.SyncBatchNorm
