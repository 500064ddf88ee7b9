"""Training steps of whole models, before and after our surgery: throughput and peak memory."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastnorm
from benchmarks import timing
from benchmarks.correctness import SAME
from benchmarks.measure import first_line
from benchmarks.schema import Row
from benchmarks.zoo import AUTOCAST, PURE, Model

PROVIDERS = ("torch", "fastnorm-replaced", "fastnorm", "torch.compile")
STEPS, WARMUP = 20, 5
CHECKED = 2  # samples of the batch on which a model is checked in fp64
CORNER = 64  # voxels a side
ROUNDING, FP64_ROUNDING = 1e-4, 1e-6  # of the gradients of a whole model in fp32, in fp64


def few(x: Tensor) -> Tensor:
    """What a model is checked on in fp64: a few samples, of volumes the corner."""
    return x[:CHECKED] if x.dim() < 5 else x[:CHECKED, :, :CORNER, :CORNER, :CORNER].contiguous()


def _shape(model: Model, device: str) -> tuple[int, ...]:
    return model.cpu_shape if device == "cpu" else model.shape


def blank(model: Model, provider: str, device: str, note: str = "", ok: bool = True) -> Row:
    """A row of a model with nothing measured yet."""
    return Row(
        op="model", variant=model.variant, mode="step", shape=list(_shape(model, device)),
        layout=model.layout, dtype="float32" if device == "cpu" else model.dtype,
        provider=provider, ok=ok, note=note,
    )  # fmt: skip


def _inputs(model: Model, device: str) -> Tensor:
    shape = _shape(model, device)
    if model.tokens:
        return torch.randint(0, 30000, shape, device=device)
    x = torch.randn(shape, device=device, dtype=_parameters(model, device))
    return x.to(memory_format=_format(x)) if model.layout == "nhwc" else x


def _parameters(model: Model, device: str) -> torch.dtype:
    pure = model.precision == PURE and device != "cpu"
    return torch.bfloat16 if pure else torch.float32


def _format(x: Tensor) -> torch.memory_format:
    """Channels last, of images or of volumes."""
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def _surgery(module: nn.Module, provider: str) -> str:
    """Do to a model what the provider does; what it did, in a word."""
    if provider == "torch":
        return ""
    if provider == "torch.compile":
        torch._dynamo.reset()  # a batch of another size, seen before, would make this one's dynamic
        module.compile()
        return ""
    done = f"replace_ changed {fastnorm.replace_(module).changed}"
    if provider == "fastnorm":
        done += f", fuse_ {fastnorm.fuse_(module).changed}"
        with contextlib.suppress(ValueError):  # no layer of it has weight norm
            fastnorm.weight_norm_(module)
            done += ", weight_norm_ made one call of every weight norm"
    return done


def _loss(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    for name in ("logits", "last_hidden_state"):
        y = getattr(y, name, y)
    loss: Tensor = (y if y.dtype == torch.float64 else y.float()).square().mean()
    return loss


def _initialised(module: nn.Module) -> nn.Module:
    """The same model with convolutions that keep the size of a signal (He et al., 2015): some
    sources draw them so small that dozens of layers later only rounding errors are left."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return module


def _without_chance(module: nn.Module) -> nn.Module:
    """The same model without dropout of any kind, whose numbers differ between dtypes."""
    for part in module.modules():
        for name in ("p", "drop_prob", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module


def _gradients(module: nn.Module, x: Tensor, half: bool = False) -> Tensor:
    """The loss and every gradient of a training step, as one vector in fp64."""
    loss = _step(module, x, half)
    found = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat([loss.detach().double().reshape(1), *found])


def _step(module: nn.Module, x: Tensor, half: bool) -> Tensor:
    """A training step as it is timed, under autocast to bf16 if `half`; its loss."""
    module.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        loss = _loss(module, x)
    loss.backward()
    return loss


def _check(
    module: nn.Module, provider: str, x: Tensor, half: bool = False
) -> tuple[float, float, float]:
    """(the provider's error, torch's, the provider's where everything is fp64): of the gradients
    against torch's in fp64. Layout and autocast are those that are timed, the samples a few of
    them, and nothing is left to chance. An untrained network multiplies a rounding by thousands:
    whether ours is the same function is seen in fp64, for which torch.compile, which would take
    another minute for it, is not asked."""
    twin = _without_chance(copy.deepcopy(module))
    changed = copy.deepcopy(twin)
    _surgery(changed, provider)
    wide = x if x.dtype == torch.int64 else x.double()
    found, torchs = _gradients(changed, x, half), _gradients(copy.deepcopy(twin), x, half)
    exact = _gradients(twin.double(), wide)

    def error(g: Tensor) -> float:
        return float((g - exact).norm() / exact.norm())

    if provider == "torch.compile":
        return error(found), error(torchs), 0.0
    return error(found), error(torchs), error(_gradients(changed.double(), wide))


def rows(model: Model, provider: str, device: str) -> Iterator[Row]:
    """The row of a training step, forward and backward; one that says why where it fails."""
    try:
        yield _row(model, provider, device)
    except Exception as error:
        yield blank(model, provider, device, first_line(error), ok=False)
        if "CUDA error" in str(error):
            raise


def _row(model: Model, provider: str, device: str) -> Row:
    torch.manual_seed(0)
    source, module = model.build()
    x = _inputs(model, device)
    module = _initialised(module).to(device, _parameters(model, device)).train()
    row = blank(model, provider, device, source)
    if model.layout == "nhwc":
        module = module.to(memory_format=_format(x))  # type: ignore[call-overload]
    half = device != "cpu" and model.precision == AUTOCAST
    if provider != "torch":
        row.error, row.torch_error, in_fp64 = _check(module, provider, few(x), half)
        if not (row.error <= SAME * row.torch_error + ROUNDING and in_fp64 <= FP64_ROUNDING):
            row.ok = False
            row.note = (
                f"wrong result: error {row.error:.1e} (torch's is {row.torch_error:.1e}), "
                f"{in_fp64:.1e} in fp64"
            )
            return row
    done = _surgery(module, provider)
    row.note = f"{source}; {done}" if done else source
    gc.collect()  # the twins of the check are no memory of a step

    def step() -> None:
        _step(module, x, half)

    steps, warmup = (STEPS, WARMUP) if device != "cpu" else (3, 1)
    found = timing.step_time(step, device, steps, warmup)
    row.ms_median, row.ms_p20, row.ms_p80 = found
    row.samples_per_second = x.size(0) / found.median * 1e3
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row.peak_memory_mib = torch.cuda.max_memory_allocated() / 2**20
    return row
