"""Whether a provider computes the op at all, before its time means anything.

Outputs, gradients and running statistics are compared with torch's expression in fp64, by relative
norm. The oracle is computed in parts, so that a tensor that fills the device can still be checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.ops import OPS, Tensors
from benchmarks.problems import Problem

PART = 1 << 26  # elements of one part of the oracle
# Relative error that is a rounding of the result, of the type it is stored in.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# How many times torch's own error still counts as the same function. Not a judgement of accuracy,
# which tests/ holds to twice torch's: the two errors stand beside each other in every row.
SAME = 8.0


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """y0, y1, ... of what an op returned."""
    given = result if isinstance(result, tuple) else (result,)
    return {f"y{i}": y.detach() for i, y in enumerate(given)}


def gradients_like(outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """A random gradient for each output, in its layout."""
    return tuple(torch.randn_like(y) for y in outputs.values())


@dataclass
class Oracle:
    """torch's expression of a problem in fp64, on given tensors and output gradients."""

    problem: Problem
    tensors: Tensors
    dys: tuple[Tensor, ...]
    with_gradients: bool = True
    _kept: list[tuple[slice, dict[str, Tensor]]] = field(default_factory=list)

    def shapes(self, with_gradients: bool) -> dict[str, torch.Size]:
        """Every result of the problem: outputs, gradients where wanted, running statistics. A
        parameter that is frozen is none."""
        found = {f"y{i}": dy.shape for i, dy in enumerate(self.dys)}
        for name, t in self.tensors.items():
            if not t.requires_grad:
                found |= {name: t.shape} if name.startswith("running_") else {}
            elif with_gradients and self.with_gradients:
                found[f"d{name}"] = t.shape
        return found

    def parts(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """(part of the split dimension, exact results); a single part is computed once."""
        if self._kept:
            yield from self._kept
            return
        dims = OPS[self.problem.op].split
        size = self.tensors["x"].size(dims["x"]) if dims else 1
        step = max(1, min(size, PART * size // self.problem.numel))
        for start in range(0, size, step):
            part = slice(start, min(start + step, size))
            found = self._part(part, dims)
            if step >= size:
                self._kept.append((part, found))
            yield part, found

    def _part(self, part: slice, dims: Mapping[str, int]) -> dict[str, Tensor]:
        inputs = {
            name: take(t.detach(), dims.get(name), part).double().requires_grad_(t.requires_grad)
            for name, t in self.tensors.items()
        }
        result = OPS[self.problem.op].torch(self.problem)(**inputs)
        found = outputs_of(result)
        if self.with_gradients:
            wanted = {name: t for name, t in inputs.items() if t.requires_grad}
            given = result if isinstance(result, tuple) else (result,)
            dys = [
                take(dy, dims.get(name), part).double()
                for name, dy in zip(found, self.dys, strict=True)
            ]
            gradients = torch.autograd.grad(given, list(wanted.values()), dys)
            found |= {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
        return found | {n: t.detach() for n, t in inputs.items() if not t.requires_grad}


def take(x: Tensor, dim: int | None, part: slice) -> Tensor:
    """The part of a tensor along a dimension; all of it where it is not split."""
    return x if dim is None else x.narrow(dim, part.start, part.stop - part.start)


def errors(
    results: dict[str, Tensor], oracle: Oracle, with_gradients: bool = True
) -> dict[str, float]:
    """The relative error of every result that the problem has; infinite where it is not there, not
    a number or of another shape. A call without a backward owes no gradients."""
    dims = OPS[oracle.problem.op].split
    shapes = oracle.shapes(with_gradients)
    there = {n for n, shape in shapes.items() if n in results and results[n].shape == shape}
    off: dict[str, float] = {n: 0.0 if n in there else math.inf for n in shapes}
    scale: dict[str, float] = dict.fromkeys(shapes, 0.0)
    sums: dict[str, Tensor] = {}

    def compare(name: str, actual: Tensor, exact: Tensor) -> None:
        off[name] += float((actual.double() - exact).square().sum())
        scale[name] += float(exact.square().sum())

    for part, exact in oracle.parts():
        for name in there:
            dim = dims.get(name, dims.get(name[1:]))  # of a gradient: that of its tensor
            if dim is None:
                sums[name] = sums[name] + exact[name] if name in sums else exact[name]
            else:
                compare(name, take(results[name], dim, part), exact[name])
    for name, total in sums.items():
        compare(name, results[name], total)
    relative = {n: math.sqrt(off[n] / (scale[n] or 1.0)) for n in shapes}
    return {name: math.inf if math.isnan(e) else e for name, e in relative.items()}


def wrong(
    found: dict[str, float],
    torchs: dict[str, float],
    results: dict[str, Tensor],
    dtype: torch.dtype,
) -> str:
    """What is wrong with these errors, "" if nothing: more than a rounding and far more than
    torch's own. Of a half type a parameter's gradient may be off by that type's rounding, fp32 as
    it is: who rounds x_hat on the way computes the same function, less accurately."""

    def allowed(name: str) -> float:
        return SAME * torchs[name] + max(ROUNDING[results[name].dtype], ROUNDING[dtype])

    complaints = [
        f"{name}: error {error:.1e} (torch's is {torchs[name]:.1e})"
        if name in results
        else f"{name} was not returned"
        for name, error in found.items()
        if name not in results or not error <= allowed(name)
    ]
    return "wrong result: " + ", ".join(complaints) if complaints else ""
