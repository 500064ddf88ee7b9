"""What tests/aot.py compiles: the public functions on CPU tensors of a GPU's sizes, whose values
nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnorm import functional
from fastnorm.ops.activation import NAMES
from fastnorm.ops.batch_norm import sync

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Job:
    """`run()` launches kernels; `aligned`: each row of memory is a multiple of 16 bytes."""

    name: str
    run: Callable[[], None]
    aligned: bool


def differentiate(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    for x in inputs:
        x.requires_grad_()
    y = function(*inputs)
    torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)


def planes(layout: str) -> Callable[[torch.dtype], Tensor]:
    """An empty [N, C, ...] tensor in one of the layouts of batch norm."""
    last = torch.channels_last
    makers: dict[str, Callable[[torch.dtype], Tensor]] = {
        "nchw": lambda t: torch.empty(32, 64, 56, 56, dtype=t),
        "nchw-tiny": lambda t: torch.empty(4, 512, 8, 8, dtype=t),
        "nchw-odd": lambda t: torch.empty(64, 512, 7, 7, dtype=t),
        "nhwc": lambda t: torch.empty(32, 256, 14, 14, dtype=t, memory_format=last),
        "nlc": lambda t: torch.empty(16, 512, 256, dtype=t).transpose(1, 2),
        "nc": lambda t: torch.empty(4096, 512, dtype=t),
    }
    return makers[layout]


def batch_norm(layout: str, dtype: torch.dtype, activation: str | None, training: bool) -> None:
    x = planes(layout)(dtype)
    weight, bias, mean, var = (torch.empty(x.size(1), dtype=dtype) for _ in range(4))
    residual = [] if activation is None else [torch.empty_like(x)]

    def function(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return functional.batch_norm(
            x, mean, var, weight, bias, training, activation=activation,
            residual=residual[0] if residual else None,
            num_batches_tracked=torch.empty((), dtype=torch.long),
        )  # fmt: skip

    differentiate(function, x, weight, bias, *residual)


def mean_only(layout: str, dtype: torch.dtype, training: bool) -> None:
    x = planes(layout)(dtype)
    bias, mean = (torch.empty(x.size(1), dtype=dtype) for _ in range(2))
    differentiate(lambda x, b: functional.mean_only_batch_norm(x, mean, b, training), x, bias)


def synchronised(layout: str, dtype: torch.dtype, activation: str | None) -> None:
    """What comes before and after the two collectives of synchronised batch norm."""
    x, ranks = planes(layout)(dtype), 4
    residual = None if activation is None else torch.empty_like(x)
    weight, bias, running_mean, running_var = (
        torch.empty(x.size(1), dtype=dtype) for _ in range(4)
    )
    statistics = sync._statistics(x)
    gathered = statistics.expand(ranks, -1).contiguous()
    tracked = torch.empty((), dtype=torch.long)
    mean, var, count = sync._merge(gathered, running_mean, running_var, tracked, None)
    given = x, torch.empty_like(x), residual, weight, bias, torch.stack([mean, var])
    f = activation or "identity"
    sums = torch.cat(sync._reduce(*given, f))
    sync._apply(*given, sums, count, f, activation is not None)


def layer_norm(rows: int, cols: int, dtype: torch.dtype, activation: str | None) -> None:
    x = torch.empty(rows, cols, dtype=dtype)
    weight, bias = (torch.empty(cols, dtype=dtype) for _ in range(2))
    residual = [] if activation is None else [torch.empty_like(x)]

    def function(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return functional.layer_norm(
            x, (cols,), weight, bias, activation=activation,
            residual=residual[0] if residual else None,
        )  # fmt: skip

    differentiate(function, x, weight, bias, *residual)


def layer_norm_mixed(rows: int, cols: int, half: torch.dtype) -> None:
    """fp32 and a residual that is half, as under autocast."""
    x, residual = torch.empty(rows, cols), torch.empty(rows, cols, dtype=half)
    weight, bias = torch.empty(cols), torch.empty(cols)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return functional.layer_norm(x, (cols,), weight, bias, residual=residual)

    differentiate(function, x, weight, bias, residual)


def layer_norm_bare(rows: int, cols: int, dtype: torch.dtype, given: str) -> None:
    """No residual and no activation; the parameters that are `given`, frozen ones among them."""
    x = torch.empty(rows, cols, dtype=dtype)
    weight = None if given == "none" else torch.empty(cols, dtype=dtype)
    bias = None if given in ("none", "weight") else torch.empty(cols, dtype=dtype)
    if weight is None or given == "frozen":
        differentiate(lambda x: functional.layer_norm(x, (cols,), weight, bias), x)
    elif bias is None:
        differentiate(lambda x, w: functional.layer_norm(x, (cols,), w), x, weight)
    else:
        differentiate(lambda x, w, b: functional.layer_norm(x, (cols,), w, b), x, weight, bias)


def layer_norm_of_images(
    channels: int, side: int, dtype: torch.dtype, activation: str | None
) -> None:
    """Rows adjacent: the channels of an NCHW image."""
    x = torch.empty(32, channels, side, side, dtype=dtype).permute(0, 2, 3, 1)
    weight, bias = (torch.empty(channels, dtype=dtype) for _ in range(2))
    differentiate(
        lambda x, w, b: functional.layer_norm(x, (channels,), w, b, activation=activation),
        x, weight, bias,
    )  # fmt: skip


def weight_norm(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype) -> None:
    kept = [n if i == dim else 1 for i, n in enumerate(shape)]
    g = torch.empty(kept if dim is not None else (), dtype=dtype)
    v = torch.empty(shape, dtype=dtype)
    differentiate(lambda v, g: functional.weight_norm(v, g, dim), v, g)


def swish(layout: str, dtype: torch.dtype, per_channel: bool) -> None:
    x = planes(layout)(dtype)
    beta = torch.empty(x.size(1) if per_channel else 1, dtype=dtype)
    differentiate(functional.swish, x, beta)


def activation_alone(name: str, dtype: torch.dtype) -> None:
    differentiate(lambda x: functional.activation(x, name), torch.empty(1 << 20, dtype=dtype))


def jobs(full: bool) -> Iterator[Job]:
    """Each kernel x layout x dtype with one activation, each activation once; all of it if full."""

    def job(function: Callable[..., None], *values: Any, aligned: bool = True) -> Job:
        said = "-".join(str(v).removeprefix("torch.").replace(" ", "") for v in values)
        return Job(f"{function.__name__}-{said}", lambda: function(*values), aligned)

    fused = (None, *NAMES[1:]) if full else (None, "silu")
    for dtype in FLOATS:
        for layout in ("nchw", "nchw-tiny", "nchw-odd", "nhwc", "nlc", "nc"):
            aligned = layout != "nchw-odd"
            if not full and dtype == torch.float64 and layout not in ("nchw", "nhwc"):
                continue
            for training in (True, False):
                if not full and not training and layout.startswith("nchw-"):
                    continue  # in eval mode they differ from nchw in numbers alone
                for activation in fused if full or (training and layout == "nchw") else ("silu",):
                    yield job(batch_norm, layout, dtype, activation, training, aligned=aligned)
                    if training:
                        yield job(synchronised, layout, dtype, activation, aligned=aligned)
                if full or (layout in ("nchw", "nhwc") and dtype == torch.float32):
                    yield job(mean_only, layout, dtype, training, aligned=aligned)
            if full or layout in ("nchw", "nchw-odd", "nhwc"):
                for per_channel in (True, False):
                    yield job(swish, layout, dtype, per_channel, aligned=aligned)
        for rows, cols in ((8192, 64), (8192, 769), (4096, 1024), (512, 40960), (4, 1 << 18)):
            for activation in fused if full else ("silu",):
                # 16-bit rows that begin anywhere are cut at 16 bytes
                aligned = cols % 16 == 0 or dtype.itemsize == 2
                yield job(layer_norm, rows, cols, dtype, activation, aligned=aligned)
        for rows, cols in ((4096, 768), (4096, 769), (512, 40960), (4, 1 << 18)):
            if dtype != torch.float32 and (full or dtype == torch.bfloat16):
                yield job(layer_norm_mixed, rows, cols, dtype, aligned=cols % 16 == 0)
        # a parameter, a residual or a gradient that is None takes branches of its own
        if full or dtype == torch.bfloat16:
            for rows, cols in ((4096, 1024), (512, 32768), (4, 1 << 18)):
                for given in ("both", "weight", "none", "frozen"):
                    yield job(layer_norm_bare, rows, cols, dtype, given)
            # many rows a tile, several rows of several warps, a row of all warps; and the same
            # of rows that do not begin on 16 bytes
            for cols in (96, 512, 8192, 65, 257, 500, 4095):
                yield job(layer_norm_bare, 4096, cols, dtype, "both")
        if dtype in (torch.float32, torch.bfloat16):
            # not 192 channels of fp32: ptxas spills 16 bytes of them on sm_100 with 255 registers
            for channels, side in ((96, 56), (192, 28))[: 1 if dtype == torch.float32 else 2]:
                for activation in fused if full else (None,):
                    yield job(layer_norm_of_images, channels, side, dtype, activation)
        for shape, dim in (
            ((512, 1152), 0),
            ((512, 1152), 1),
            ((768, 48, 128), 2),
            ((64, 64), None),
        ):
            yield job(weight_norm, shape, dim, dtype)
    for name in NAMES[1:]:
        for dtype in FLOATS if full or name == "gelu" else FLOATS[:1]:
            yield job(activation_alone, name, dtype)
