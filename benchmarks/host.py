"""Host time of the CUDA path up to the launch: the kernels compiled for a CPU are not run.

A call of a layer with gradient then costs what Python, the autograd Function, the allocation of
outputs and the extension's bindings and launcher cost, on any machine. `python -m benchmarks.host
FILE [OP ...]` writes it beside torch's own layers, on tensors so small that their arithmetic is
next to nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastnorm
from benchmarks import schema, timing
from benchmarks.environment import environment
from fastnorm import dispatch
from fastnorm.ops.extension import extension
from tests import emulation

STUBBED = "fastnorm, launch stubbed out"
LEAST = "an autograd Function that saves its input and allocates its output"
ROUNDS = 20  # the providers take turns: a busy moment of the machine must not hit one alone


@contextlib.contextmanager
def launches_stubbed_out() -> Iterator[None]:
    """The CUDA backend, forced, on CPU tensors; its launches are looked at and not run."""
    if "fastnorm._cuda" not in sys.modules:
        emulation.activate()
    missing = fastnorm.backends()["cuda"]
    if missing is not None or not dispatch.emulating():
        raise RuntimeError(
            "host times are taken of the CUDA kernels compiled for a CPU, which are not there: "
            f"{missing or 'this process has those for a GPU'}"
        )
    engine = extension().engine
    engine.configure(dry=True)
    try:
        with fastnorm.backend("cuda"):
            yield
    finally:
        engine.configure()


class _Least(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)


class Least(nn.Module):
    """What no layer with a Function in Python can go below."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Least.apply(x)  # type: ignore[no-untyped-call]
        return y


@dataclass(frozen=True)
class Layer:
    """A layer of ours, torch's, an input, and how much longer a call of ours may take."""

    op: str
    variant: str
    ours: Callable[[], nn.Module]
    torchs: Callable[[], nn.Module]
    shape: tuple[int, ...]
    limit: float


PLANES, ROWS = (2, 8, 4, 4), (16, 32)
LAYERS = [
    Layer("batch_norm", "plain", lambda: fastnorm.BatchNorm2d(8), lambda: nn.BatchNorm2d(8),
          PLANES, 1.3),
    Layer("batch_norm", "silu", lambda: fastnorm.BatchNormAct2d(8, activation="silu"),
          lambda: nn.Sequential(nn.BatchNorm2d(8), nn.SiLU()), PLANES, 1.3),
    Layer("layer_norm", "plain", lambda: fastnorm.LayerNorm(32), lambda: nn.LayerNorm(32),
          ROWS, 2.0),
    Layer("activation", "gelu", lambda: fastnorm.GELU(), lambda: nn.GELU(), ROWS, 2.0),
    Layer("activation", "silu", lambda: fastnorm.SiLU(), lambda: nn.SiLU(), ROWS, 2.0),
    Layer("activation", "selu", lambda: fastnorm.SELU(), lambda: nn.SELU(), ROWS, 2.0),
]  # fmt: skip


def call_of(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Callable[[], Tensor]:
    layer, x = make(), torch.randn(shape, requires_grad=True)
    return lambda: layer(x)


def measure(layer: Layer) -> Iterator[schema.Row]:
    """Rows of torch's layer, of what a layer takes at least, and of ours."""
    layout = "nchw" if layer.shape == PLANES else "rows"
    makes = {"torch": layer.torchs, LEAST: Least, STUBBED: layer.ours}
    calls = {provider: call_of(make, layer.shape) for provider, make in makes.items()}
    found: dict[str, list[timing.Timing]] = {provider: [] for provider in calls}
    for _ in range(ROUNDS):
        for provider, call in calls.items():
            found[provider].append(timing.host_time(call, "cpu"))
    for provider, timings in found.items():
        best = min(timings, key=lambda timing: timing.median)
        yield schema.Row(
            layer.op,
            layer.variant,
            "host",
            list(layer.shape),
            layout,
            "float32",
            provider,
            best.median,
            best.p20,
            best.p80,
            note=f"forward with gradient; the best of {ROUNDS} rounds",
        )


def main(path: str, *ops: str) -> None:
    torch.set_num_threads(1)
    note = "host time of forward with gradient, launches of the CUDA backend stubbed out"
    results: Any = schema.Results(environment("cpu", 0.0, note))
    with launches_stubbed_out():
        for layer in [layer for layer in LAYERS if not ops or layer.op in ops]:
            results.rows += measure(layer)
            torchs, least, ours = (row.ms_median * 1e3 for row in results.rows[-3:])
            print(
                f"{layer.op} {layer.variant}: torch {torchs:.1f} us, a Function at least "
                f"{least:.1f} us, ours {ours:.1f} us, {ours / torchs:.2f}x (at most {layer.limit}x)"
            )
    schema.save(results, Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
