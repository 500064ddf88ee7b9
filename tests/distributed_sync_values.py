"""Cases of synchronised batch norm's numbers, on every rank; see distributed.py."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastnorm
from tests.batch_norm_twins import same_state
from tests.compare import FLOOR, relative_error
from tests.distributed_sync import (
    BACKENDS,
    SHAPE,
    compare,
    every,
    pair,
    parts,
    piece,
    two,
)


@every
def parts_of_every_size(rank: int, ranks: int) -> None:
    for how in ("even", "uneven", "first empty", "last empty", "alone"):
        compare(rank, ranks, how)


@every
def inputs_of_every_dimension(rank: int, ranks: int) -> None:
    for shape in ((5,), (5, 6), (5, 2, 3, 2)):
        compare(rank, ranks, shape=shape)
    compare(rank, ranks, "even", shape=(130, 1))  # more than one block of channels


@every
def channels_last_stays(rank: int, ranks: int) -> None:
    last, last_3d = torch.channels_last, torch.channels_last_3d
    compare(rank, ranks, "uneven", layout=last, activation="silu", residual=True)
    compare(rank, ranks, "first empty", layout=last)
    compare(rank, ranks, "even", shape=(4, 2, 3, 2), layout=last_3d)


@every
def residual_and_activation_in_the_same_pass(rank: int, ranks: int) -> None:
    compare(rank, ranks, residual=True)
    for activation in ("relu", "gelu", "hardswish"):
        compare(rank, ranks, activation=activation)
    compare(rank, ranks, "last empty", activation="silu", residual=True)


@two
def options_of_the_layer(rank: int, ranks: int) -> None:
    compare(rank, ranks, momentum=None, steps=3)
    compare(rank, ranks, momentum=0.7, steps=2)
    compare(rank, ranks, "last empty", track_running_stats=False)
    compare(rank, ranks, affine=False, activation="silu")
    compare(rank, ranks, "first empty", affine=False)
    compare(rank, ranks, eps=0.5)


@two
def frozen_parameters(rank: int, ranks: int) -> None:
    for frozen in (("weight",), ("bias",), ("weight", "bias")):
        for how in ("uneven", "last empty"):
            compare(rank, ranks, how, frozen=frozen, activation="silu", residual=True)


@every
def half_types_are_as_good_as_torchs(rank: int, ranks: int) -> None:
    """At most twice torch's own error over the whole batch, buffers in fp32 beside them."""
    sizes = parts(ranks, "uneven")
    for backend, dtype in itertools.product(BACKENDS, (torch.bfloat16, torch.float16)):
        whole = [torch.randn(sum(sizes), *SHAPE).to(dtype) for _ in range(3)]
        exact, ours = pair(SHAPE, torch.float32, activation="silu")
        ours.weight.data = ours.weight.data.to(dtype)
        ours.bias.data = ours.bias.data.to(dtype)
        with torch.no_grad():
            exact.weight.copy_(ours.weight)
            exact.bias.copy_(ours.bias)
        theirs = copy.deepcopy(exact)
        exact.double()
        own = [piece(t, sizes, rank).requires_grad_() for t in whole[:2]]
        with fastnorm.backend(backend):
            y = ours(*own)
            y.backward(piece(whole[2], sizes, rank))
        assert y.dtype == own[0].grad.dtype == own[1].grad.dtype == ours.weight.grad.dtype == dtype  # type: ignore[union-attr]
        results = []
        for layer, kind in ((exact, torch.float64), (theirs, dtype)):
            x, r, dy = (t.detach().to(kind).requires_grad_() for t in whole)
            out = F.silu(layer(x) + r)
            out.backward(dy)
            results.append([piece(t, sizes, rank) for t in (out, x.grad, r.grad)])
        for found, right, reference in zip((y, own[0].grad, own[1].grad), *results, strict=True):
            error = relative_error(found, right)
            assert error <= 2 * relative_error(reference, right) + FLOOR[dtype], error
        for name in ("running_mean", "running_var"):
            assert getattr(ours, name).dtype == torch.float32
            error = relative_error(getattr(ours, name), getattr(exact, name))
            assert error <= FLOOR[torch.float32], (name, error)


@every
def large_means_keep_their_digits(rank: int, ranks: int) -> None:
    """Ranks whose means lie far apart, and far from zero, in fp32."""
    for backend, how in itertools.product(BACKENDS, ("first empty", "last empty")):
        sizes = parts(ranks, how)
        theirs, ours = pair(SHAPE, torch.float32)
        exact = copy.deepcopy(theirs).double()
        x = torch.randn(sum(sizes), *SHAPE) + 1e4
        x[: sizes[0] or sizes[1] - 1] += 100
        dy = torch.randn_like(x)
        results = []
        for layer, kind in ((exact, torch.float64), (theirs, torch.float32)):
            given = x.to(kind).requires_grad_()
            out = layer(given)
            out.backward(dy.to(kind))
            results.append([out.detach(), given.grad])
        own = piece(x, sizes, rank).requires_grad_()
        with fastnorm.backend(backend):
            y = ours(own)
            y.backward(piece(dy, sizes, rank))
        for found, right, reference in zip((y, own.grad), *results, strict=True):
            assert found is not None
            # the mean itself is rounded once to fp32, which is 1e4 / 2^24 of a standard deviation
            allowed = 2 * relative_error(reference, right) + 1e4 / 2**24
            error = relative_error(found, piece(right, sizes, rank))
            assert error <= allowed, (error, allowed)
        # ranks tell each other their means in fp32: the same rounding, in the variance between them
        for name in ("running_mean", "running_var"):
            right = getattr(exact, name)
            allowed = 2 * relative_error(getattr(theirs, name), right) + FLOOR[torch.float32]
            if name == "running_var":
                allowed += 2 * 1e4 / 2**24 / right.max().sqrt().item()
            error = relative_error(getattr(ours, name), right)
            assert error <= allowed, (name, error, allowed)


@every
def nothing_anywhere_moves_nothing(rank: int, ranks: int) -> None:
    """No sample on any rank, and one value in all: no statistics, as with an empty batch."""
    for backend, samples in itertools.product(BACKENDS, (0, 1)):
        for momentum in (0.1, None):
            _, ours = pair((3,), torch.float32, momentum=momentum)
            before = copy.deepcopy(ours.state_dict())
            x = torch.ones(samples if rank == 0 else 0, 3, requires_grad=True)
            with fastnorm.backend(backend):
                y = ours(x)
                y.sum().backward()
            torch.testing.assert_close(y, ours.bias.detach().expand(x.shape))
            assert x.grad is not None
            assert not x.grad.any()
            after = ours.state_dict()
            assert after.pop("num_batches_tracked") == 1
            for name, value in after.items():
                assert torch.equal(value, before[name]), name


@every
def one_value_per_channel_and_rank(rank: int, ranks: int) -> None:
    compare(rank, ranks, "even", shape=(5, 1, 1))
    sizes = [1] * ranks
    theirs, ours = pair((5,))
    x = torch.randn(ranks, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(piece(x, sizes, rank)), piece(theirs(x), sizes, rank))
    same_state(theirs, ours)


@every
def infinities_are_where_torch_has_them(rank: int, ranks: int) -> None:
    for backend, where in itertools.product(BACKENDS, (0, ranks - 1)):
        _, ours = pair(SHAPE, torch.float32)
        x = torch.randn(2, *SHAPE)
        if rank == where:
            x[0, 1, 0, 0] = torch.inf
        with fastnorm.backend(backend), np.errstate(invalid="ignore"):  # inf - inf
            y = ours(x)
        nan = torch.zeros(SHAPE[0], dtype=torch.bool)
        nan[1] = True
        assert torch.equal(ours.running_mean.isinf(), nan)
        assert torch.equal(ours.running_var.isnan(), nan)
        assert torch.equal(y.isnan().flatten(2).all(2).all(0), nan)


@every
def every_rank_has_the_same_bits_twice(rank: int, ranks: int) -> None:
    sizes = parts(ranks, "uneven")
    for backend in BACKENDS:
        x = torch.randn(sum(sizes), *SHAPE)
        _, first = pair(SHAPE, torch.float32, activation="silu")
        second = copy.deepcopy(first)
        runs = []
        for layer in (first, second):
            own = piece(x, sizes, rank).requires_grad_()
            with fastnorm.backend(backend):
                y = layer(own)
                y.square().sum().backward()
            runs.append([y, own.grad, layer.weight.grad, *layer.buffers()])
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)
        for buffer in first.buffers():
            everywhere = [torch.empty_like(buffer) for _ in range(ranks)]
            dist.all_gather(everywhere, buffer)
            assert all(torch.equal(buffer, other) for other in everywhere)


@two
def any_strides(rank: int, ranks: int) -> None:
    """Sliced, transposed and expanded inputs, residuals and gradients."""
    sizes = [2, 3]
    for backend in BACKENDS:
        theirs, ours = pair((6, 4), activation="silu")
        wide = torch.randn(5, 4, 12, dtype=torch.float64).transpose(1, 2)
        for x in (wide[:, ::2], wide[:, :6], wide[:, :1, :1].expand(5, 6, 4)):
            r = torch.randn(6, 5, 4, dtype=torch.float64).transpose(0, 1)
            whole = x.detach().requires_grad_()
            F.silu(theirs(whole) + r).sum().backward()
            own = x.split(sizes)[rank].detach().requires_grad_()
            with fastnorm.backend(backend):
                y = ours(own, r.split(sizes)[rank])
                y.sum().backward()  # an expanded gradient
            assert y.is_contiguous()
            assert whole.grad is not None
            torch.testing.assert_close(own.grad, whole.grad.split(sizes)[rank])
            same_state(theirs, ours)
