"""The largest batch of a model with which one training step fits into a device's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.context import dead_context
from benchmarks.measure import Bench, first_line
from benchmarks.schema import Row
from benchmarks.zoo import MODELS

OP = "largest_batch"  # of rows that have no time, and say it in their note
ELEMENTS = 2**31 - 1  # of one tensor, from where on indices of 32 bits end
PROVIDERS = ("torch", "fastnorm")
CHOSEN = ("efficientnet_b4",)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that fits, where all below one that fits do: doubling from 1,
    then bisection. 0 if none does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def elements(module: nn.Module, x: Tensor, half: bool) -> int:
    """Of the largest tensor that any layer returns for a sample of this batch."""
    found = [x.numel()]

    def hook(_: nn.Module, given: object, y: object) -> None:
        if isinstance(y, Tensor):
            found.append(y.numel())

    hooks = [part.register_forward_hook(hook) for part in module.modules()]
    models.step_of(module, x, half)
    for one in hooks:
        one.remove()
    return -(-max(found) // x.size(0))


def _fits(module: nn.Module, one: Tensor, half: bool, batch: int) -> bool:
    """Whether a step of this batch ends; what it allocated is given back either way."""
    try:
        x = one.repeat(batch, *(1 for _ in one.shape[1:]))
        x = x.contiguous(memory_format=models.format_of(x)) if _is_last(one) else x
        models.step_of(module, x, half)
        torch.cuda.synchronize()
    except RuntimeError as error:  # torch's own, cuDNN's or Triton's
        if not any(word in str(error) for word in ("out of memory", "ALLOC_FAILED")):
            raise
        return False
    finally:
        module.zero_grad(set_to_none=True)
        x = one  # of the batch nothing is held
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _is_last(x: Tensor) -> bool:
    return x.dim() in (4, 5) and x.is_contiguous(memory_format=models.format_of(x))


@dataclass(frozen=True)
class LargestJob:
    """The largest batch of a model, before or after our surgery."""

    name: str
    provider_name: str
    device: str

    family = OP
    rank = 2.0  # after every model that is not compiled
    limit_s = 150.0

    def missing(self, device: str) -> str | None:
        return None

    def failed(self, note: str) -> Row:
        row = models.blank(MODELS[self.name], self.provider_name, self.device, note, ok=False)
        row.op = OP
        return row

    def rows(self, bench: Bench) -> Iterator[Row]:
        bench.forget()
        row = self.failed("")
        try:
            row.note, row.ok = self._found(), True
        except Exception as error:
            row.note = first_line(error)
            if dead_context():
                yield row
                raise
        yield row

    def _found(self) -> str:
        source, module, x, half = models.ready(MODELS[self.name], self.device)
        models.surgery(module, self.provider_name)
        few = x[: models.CHECKED].clone(memory_format=torch.preserve_format)
        del x
        most = ELEMENTS // elements(module, few, half)
        one = few[:1].clone(memory_format=torch.preserve_format)
        found = largest(lambda batch: _fits(module, one, half, batch), most)
        total = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        end = ", where indices of 32 bits end" if found == most else ""
        return f"{source}; {found} samples fit into {total:.0f} GiB{end}"

    def __str__(self) -> str:
        return f"{OP} {self.name} {self.provider_name}"
