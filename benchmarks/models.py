"""Training steps of whole models, before and after our surgery: throughput and peak memory."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import fastnorm
from benchmarks import timing
from benchmarks.context import dead_context
from benchmarks.correctness import SAME
from benchmarks.measure import first_line
from benchmarks.report.lines import is_compiled, is_ours
from benchmarks.schema import Row
from benchmarks.shares import profiler
from benchmarks.zoo import AUTOCAST, PURE, Model

PROVIDERS = (
    *("torch", "fastnorm-replaced", "fastnorm"),
    *("torch.compile", "fastnorm-replaced-compiled", "fastnorm-compiled"),
)
STEPS, WARMUP = 20, 5
CHECKED = 2  # samples of the batch on which a model is checked in fp64
BRANCH = 0.2  # the weight of the last batch norm of a block
ON = 2.0  # the bias of the others
CORNER = 64  # voxels a side
# of the gradients of a whole model, beside SAME times torch's own: compiled in fp32, ours in fp64.
# An eps of 1e-4 in every batch norm of a ResNet of ten layers is 1e-5 of them
ROUNDING, FP64_ROUNDING = 1e-6, 1e-6


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
    return x.to(memory_format=format_of(x)) if model.layout == "nhwc" else x


def _parameters(model: Model, device: str) -> torch.dtype:
    pure = model.precision == PURE and device != "cpu"
    return torch.bfloat16 if pure else torch.float32


def format_of(x: Tensor) -> torch.memory_format:
    """Channels last, of images or of volumes."""
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def surgery(module: nn.Module, provider: str) -> str:
    """Do to a model what the provider does; what it did, in a word."""
    done = ""
    if is_ours(provider):
        done = f"replace_ changed {fastnorm.replace_(module).changed}"
        if not provider.startswith("fastnorm-replaced"):
            done += f", fuse_ {fastnorm.fuse_(module).changed}"
            with contextlib.suppress(ValueError):  # no layer of it has weight norm
                fastnorm.weight_norm_(module)
                done += ", weight_norm_ made one call of every weight norm"
    if is_compiled(provider):
        torch._dynamo.reset()  # a batch of another size, seen before, would make this one's dynamic
        module.compile()
    return done


def _loss(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    for name in ("logits", "last_hidden_state"):
        y = getattr(y, name, y)
    loss: Tensor = (y if y.dtype == torch.float64 else y.float()).square().mean()
    return loss


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    """Its batch norms in their order, less those of a shortcut."""
    return [
        part
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        if not ("downsample" in name or "shortcut" in name)
    ]


def _initialised(module: nn.Module) -> nn.Module:
    """The same model with numbers whose gradients rounding leaves alone, in which a wrong one is
    seen: convolutions that keep the size of a signal (He et al., 2015; some sources draw them so
    small that dozens of layers later only rounding errors are left), blocks that add little to it,
    as trained ones do, and units most of which are on, few near the kink of a ReLU. Without the
    last two, torch's own gradients of a ResNet-50 in bf16 were 1.3 times their norm off."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.bias is not None:
            nn.init.constant_(part.bias, ON)
    for part in module.modules():
        norms = _batch_norms(part)
        inner = any(len(_batch_norms(child)) > 1 for child in part.children())
        if len(norms) > 1 and not inner:  # the last of a block
            for value, number in ((norms[-1].weight, BRANCH), (norms[-1].bias, 0.0)):
                assert isinstance(value, Tensor)
                nn.init.constant_(value, number)
    return module


def _chances(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where dropout of any kind has a probability above zero."""
    for part in module.modules():
        for name in ("p", "drop_prob", "dropout"):
            value = getattr(part, name, None)
            if isinstance(value, float) and value > 0:
                yield part, name


def _without_chance(module: nn.Module) -> nn.Module:
    """The same model without dropout, whose numbers differ between dtypes."""
    for part, name in list(_chances(module)):
        setattr(part, name, 0.0)
    return module


def _gradients(module: nn.Module, x: Tensor, half: bool = False) -> Tensor:
    """The loss and every gradient of a training step, as one vector in fp64."""
    loss = step_of(module, x, half)
    found = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat([loss.detach().double().reshape(1), *found])


def step_of(module: nn.Module, x: Tensor, half: bool) -> Tensor:
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
    whether ours is the same function is seen in fp64, for which nothing is compiled, which would
    take another minute: what is compiled there is seen where it is not."""
    twin = _without_chance(copy.deepcopy(module))
    changed = copy.deepcopy(twin)
    surgery(changed, provider)
    wide = x if x.dtype == torch.int64 else x.double()
    found, torchs = _gradients(changed, x, half), _gradients(copy.deepcopy(twin), x, half)
    exact = _gradients(twin.double(), wide)

    def error(g: Tensor) -> float:
        return float((g - exact).norm() / exact.norm())

    if is_compiled(provider):
        return error(found), error(torchs), 0.0
    return error(found), error(torchs), error(_gradients(changed.double(), wide))


def _check_compiled(
    plain: nn.Module, compiled: nn.Module, x: Tensor, half: bool
) -> tuple[float, float, float]:
    """As `_check`, of a model that is compiled for the batch that is timed, and once: against torch
    on that whole batch, in fp32 where fp64 would not fit."""
    found, torchs = _gradients(compiled, x, half), _gradients(plain, x, half)
    parameter = next(plain.parameters())
    wider = torch.float32 if half or parameter.dtype == torch.bfloat16 else torch.float64
    exact = _gradients(plain.to(wider), x if x.dtype == torch.int64 else x.to(wider))

    def error(g: Tensor) -> float:
        return float((g - exact).norm() / exact.norm())

    return error(found), error(torchs), 0.0


def _checked(
    module: nn.Module, provider: str, x: Tensor, half: bool
) -> tuple[str, tuple[float, float, float]]:
    """(what the surgery on this model did, its errors). What is left to chance when it is timed is
    compiled once more without, to be checked."""
    if provider == "torch":
        return "", (0.0, 0.0, 0.0)
    if is_compiled(provider) and next(_chances(module), None) is None:
        plain = copy.deepcopy(module)
        done = surgery(module, provider)
        return done, _check_compiled(plain, module, x, half)
    errors = _check(module, provider, few(x), half)
    return surgery(module, provider), errors


def rows(model: Model, provider: str, device: str) -> Iterator[Row]:
    """The row of a training step, forward and backward; one that says why where it fails."""
    try:
        row = _row(model, provider, device)
        # before and after: of what is compiled, no kernel has the name of an op
        if row.ok and device != "cpu" and provider in ("torch", "fastnorm"):
            row.note += f"; {profiler(device).told(model.variant, provider)}"
        yield row
    except Exception as error:
        yield blank(model, provider, device, first_line(error), ok=False)
        if dead_context():
            raise  # this process can measure nothing more


def ready(model: Model, device: str) -> tuple[str, nn.Module, Tensor, bool]:
    """(where the model is from, the model, its input, whether under autocast), before surgery."""
    torch.manual_seed(0)
    source, module = model.build()
    x = _inputs(model, device)
    module = _initialised(module).to(device, _parameters(model, device)).train()
    if model.layout == "nhwc":
        # torch's overloads of Module.to have memory_format with tensors only
        module = module.to(memory_format=format_of(x))  # type: ignore[call-overload]
    return source, module, x, device != "cpu" and model.precision == AUTOCAST


def stepping(model: Model, provider: str, device: str) -> Callable[[], Tensor]:
    """A training step as it is timed."""
    _, module, x, half = ready(model, device)
    surgery(module, provider)
    return partial(step_of, module, x, half)


def _row(model: Model, provider: str, device: str) -> Row:
    source, module, x, half = ready(model, device)
    row = blank(model, provider, device, source)
    done, (error, torch_error, in_fp64) = _checked(module, provider, x, half)
    if provider != "torch":
        row.error, row.torch_error = error, torch_error
        if not (row.error <= SAME * row.torch_error + ROUNDING and in_fp64 <= FP64_ROUNDING):
            row.ok = False
            row.note = (
                f"wrong result: error {row.error:.1e} (torch's is {row.torch_error:.1e}), "
                f"{in_fp64:.1e} in fp64"
            )
            return row
    row.note = f"{source}; {done}" if done else source
    gc.collect()  # the twins of the check are no memory of a step

    def step() -> None:
        step_of(module, x, half)

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
