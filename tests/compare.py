"""The one comparison: ours and torch's own, both against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Relative error that is always allowed: a few roundings of the type of computation, for where torch
# happens to be exact.
FLOOR = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|; absolute where the exact value is zero."""
    scale = exact.norm().item()
    return float((actual.detach().double() - exact).norm().item() / (scale if scale > 0 else 1.0))


def run(
    function: Callable[..., Any], tensors: dict[str, Tensor | None], dy: Tensor | None
) -> dict[str, Tensor]:
    """Outputs, buffers as the call left them, and every gradient that is required."""
    given = {
        name: None
        if t is None
        else t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }
    given = {name: _like(given[name], t) for name, t in tensors.items()}
    y = function(**given)
    found = {"y": y.detach()}
    if dy is not None and y.requires_grad:
        y.backward(dy.to(y.dtype))
    for name, t in given.items():
        if t is not None and t.requires_grad and t.grad is not None:
            found[f"d{name}"] = t.grad
        elif t is not None and not t.requires_grad:
            found[name] = t
    return found


def same_bits(found: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two runs left the same, NaN's bits included."""
    return found.keys() == other.keys() and all(
        torch.equal(value.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        for name, value in found.items()
    )


def _like(copy: Tensor | None, original: Tensor | None) -> Tensor | None:
    """The copy under the strides of the original, gaps included, so that a sliced input stays
    sliced."""
    if (
        original is None
        or copy is None
        or copy.stride() == original.stride()
        or 0 in original.stride()
    ):
        return copy
    extent = 1 + sum((n - 1) * s for n, s in zip(original.shape, original.stride(), strict=True))
    storage = torch.zeros(extent, dtype=original.dtype, device=original.device)
    view = storage.as_strided(original.shape, original.stride()).copy_(original.detach())
    return view.requires_grad_(original.requires_grad)


def exact(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values in fp64; integers stay."""
    return {
        name: t.detach().double().requires_grad_(t.requires_grad)
        if t is not None and t.is_floating_point()
        else t
        for name, t in tensors.items()
    }


def assert_as_good_as_torch(
    ours: Callable[..., Any],
    torchs: Callable[..., Any],
    tensors: dict[str, Tensor | None],
    dy: Tensor | None,
    what: str = "",
) -> None:
    """Every output, gradient and buffer: at most twice the error of torch's own in the same dtype,
    both against fp64.

    Where torch's own cannot run the combination of dtypes, its error is that of the fp64 result
    rounded to the dtype.
    """
    oracle = run(torchs, exact(tensors), None if dy is None else dy.double())
    try:
        own = run(torchs, tensors, dy)
    except (RuntimeError, NotImplementedError):
        own = {}
    result = run(ours, tensors, dy)
    assert result.keys() == oracle.keys(), f"{what}: {sorted(result)} != {sorted(oracle)}"
    for name, value in result.items():
        if not value.is_floating_point():
            assert torch.equal(value, oracle[name]), f"{what} {name}: {value} != {oracle[name]}"
            continue
        target = oracle[name]
        reference = own.get(name, target.to(value.dtype))
        assert value.shape == target.shape, f"{what} {name}: shape {value.shape} != {target.shape}"
        if name in own:
            assert value.dtype == reference.dtype, (
                f"{what} {name}: {value.dtype} != {reference.dtype}"
            )
        assert torch.equal(value.isnan(), target.isnan()), (
            f"{what} {name}: NaN in other places than torch's"
        )
        finite = target.isfinite()
        error = relative_error(value[finite], target[finite])
        allowed = 2 * relative_error(reference[finite], target[finite]) + FLOOR[value.dtype]
        assert error <= allowed, f"{what} {name}: error {error:.2e}, allowed {allowed:.2e}"
