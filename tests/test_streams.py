"""Launches whose blocks wait for each other, on two streams at once.

Blocks that wait hold their place on a multiprocessor; those they wait for must find one, whatever
another launch of the same kind has taken. Each plan leaves room for one other such launch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm import dispatch
from fastnorm.ops import batch_norm, launch, layer_norm, weight_norm
from tests.conftest import AVAILABLE
from tests.layers import needs_gpu
from tests.streams import CYCLES_PER_MS, closed_gate
from tests.test_small import plans  # noqa: F401  (a fixture)

ROUNDS = 4  # launches of each stream
QUEUED_MS = 300  # within which the host has filled both streams
FORMS = ("hold", "ticket", "stream")

Outputs = tuple[Tensor, ...]


class Waiting(NamedTuple):
    """Forward and backward of an op on a tensor of this shape; a form of batch norm's is forced."""

    op: str
    shape: tuple[int, ...]
    last: bool = False  # channels adjacent
    form: str = ""

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return "-".join(filter(None, (self.op, sizes, "nhwc" * self.last, self.form)))


IMAGE, LAST = (256, 64, 112, 112), (256, 1024, 14, 14)
WAITING = {
    "cuda": (
        *(Waiting("batch_norm", IMAGE, form=form) for form in FORMS),
        *(Waiting("batch_norm", LAST, last=True, form=form) for form in FORMS),
        Waiting("layer_norm", (16, 1 << 22)),
        Waiting("layer_norm", (1024, 1 << 17)),  # 32 blocks that keep their columns
        Waiting("weight_norm", (8192, 8192)),  # one norm of all
    ),
    "triton": (
        Waiting("batch_norm", IMAGE),
        Waiting("batch_norm", LAST, last=True),
        Waiting("layer_norm", (16, 1 << 22)),
    ),
}
CASES = [
    pytest.param(backend, waiting, id=f"{backend}-{waiting}")
    for backend in ("cuda", "triton")
    if backend in AVAILABLE
    for waiting in WAITING[backend]
]


def random_like(shape: tuple[int, ...], device: str, last: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if last:
        x = x.to(memory_format=torch.channels_last)
    return x.normal_(0.5, 1.5)


def batch_norm_calls(waiting: Waiting, device: str) -> dict[str, Callable[[], Outputs]]:
    x, dy = (random_like(waiting.shape, device, waiting.last) for _ in range(2))
    C = x.size(1)
    weight = torch.linspace(0.5, 2, C, device=device)
    bias = torch.linspace(-1, 1, C, device=device)

    def forward() -> Outputs:
        return tuple(
            batch_norm._forward(
                x, None, weight, bias, None, None, None, True, 0.1, 1e-5, "silu"
            )
        )  # fmt: skip

    statistics = forward()[1]

    def backward() -> Outputs:
        found = batch_norm._backward(
            x, dy, None, weight, bias, statistics, True, "silu", [True, True, True, False]
        )
        return tuple(t for t in found if t is not None)

    return {"forward": forward, "backward": backward}


def layer_norm_calls(waiting: Waiting, device: str) -> dict[str, Callable[[], Outputs]]:
    x, dy = (random_like(waiting.shape, device) for _ in range(2))
    weight, bias = (torch.linspace(a, 2, x.size(1), device=device) for a in (0.5, -1))

    def forward() -> Outputs:
        found = layer_norm._forward(
            x, None, weight, bias, 1, 1e-5, "identity", torch.bfloat16, False
        )
        return tuple(t for t in found if t is not None)

    statistics = forward()[1]

    def backward() -> Outputs:
        return tuple(
            layer_norm._backward(x, dy, None, weight, bias, statistics, 1, "identity", [True] * 3)
        )

    return {"forward": forward, "backward": backward}


def weight_norm_calls(waiting: Waiting, device: str) -> dict[str, Callable[[], Outputs]]:
    v, dw = (random_like(waiting.shape, device) for _ in range(2))
    g = torch.ones((), dtype=v.dtype, device=device)

    def forward() -> Outputs:
        return tuple(weight_norm._forward(v, g, None, None))

    norm = forward()[1]

    def backward() -> Outputs:
        return tuple(weight_norm._backward(v, g, norm, dw, None, None, [True, True]))

    return {"forward": forward, "backward": backward}


CALLS: dict[str, Callable[[Waiting, str], dict[str, Callable[[], Outputs]]]] = {
    "batch_norm": batch_norm_calls,
    "layer_norm": layer_norm_calls,
    "weight_norm": weight_norm_calls,
}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Waiting], None]:
    from fastnorm.ops.batch_norm import cuda
    from fastnorm.ops.extension import extension

    def force(waiting: Waiting) -> None:
        if waiting.form:
            position = extension().BATCH_NORM_FORMS.index(waiting.form)
            monkeypatch.setattr(cuda, "FORM", position)

    return force


def same(found: Outputs, expected: Outputs) -> bool:
    return all(map(torch.equal, found, expected))


def on_both(call: Callable[[], Outputs], streams: tuple[Any, Any], gate: Any) -> list[Outputs]:
    """The results of both streams, the second of which begins each of its launches at another
    moment of the first's and goes before it where there is room for one block."""
    chance = random.Random(0)
    found = []
    for stream in streams:
        stream.wait_event(gate)
    for _ in range(ROUNDS):
        for stream in streams:
            with torch.cuda.stream(stream):
                if stream is streams[1]:
                    torch.cuda._sleep(int(chance.random() * CYCLES_PER_MS))
                found.append(call())
    return found


@needs_gpu
@pytest.mark.parametrize("backend, waiting", CASES)
def test_two_such_launches_at_once(
    backend: str,
    waiting: Waiting,
    forced: Callable[[Waiting], None],
    watchdog: Callable[[], None],
) -> None:
    forced(waiting)
    streams = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    with fastnorm.backend(backend):
        for name, call in CALLS[waiting.op](waiting, "cuda").items():
            watchdog()
            alone = call()
            torch.cuda.synchronize()
            # once before: memory, counters and compiled kernels are had without the host waiting
            on_both(call, streams, closed_gate(1))
            torch.cuda.synchronize()
            watchdog()
            gate = closed_gate(QUEUED_MS)
            found = on_both(call, streams, gate)
            assert not gate.query(), "the host was too slow: nothing ran at once"
            torch.cuda.synchronize()
            for number, outputs in enumerate(found):
                assert same(outputs, alone), f"{name}: launch {number} is not what it is alone"
            del alone, found
        torch.cuda.empty_cache()
    assert not any(arena.any() for arena in launch._arenas.values()), "counters are left zero"


@pytest.mark.skipif(not dispatch.emulating(), reason="asks the emulated device for plans")
@pytest.mark.parametrize("waiting", WAITING["cuda"], ids=str)
def test_their_blocks_wait_on_an_h100(
    waiting: Waiting,
    forced: Callable[[Waiting], None],
    plans: list[Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastnorm.ops.extension import extension

    def untouched(shape: tuple[int, ...], device: str, last: bool = False) -> Tensor:
        form = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=torch.bfloat16, memory_format=form)

    monkeypatch.setitem(globals(), "random_like", untouched)
    forced(waiting)
    with fastnorm.backend("cuda"):
        for call in CALLS[waiting.op](waiting, "cpu").values():
            call()
    assert len(plans) > 1  # forward and backward
    for plan in plans:
        if waiting.op == "batch_norm":
            assert extension().BATCH_NORM_FORMS[plan.form] == waiting.form
            assert plan.members > 16
        elif waiting.op == "layer_norm":
            assert plan.chunks >= waiting.shape[1] // 8192 > 1
        else:
            assert plan.counters > 0
