"""How a layer's forward reads its own parameters and buffers."""

from __future__ import annotations

from typing import Any


def pair(module: Any, tensors: dict[str, Any], first: str, second: str) -> tuple[Any, Any]:
    """``module.first`` and ``module.second`` from its ``_parameters`` or ``_buffers``, where
    nn.Module would find them after a search; by that search where they are not there, as in a
    parametrized layer."""
    if first in tensors and second in tensors:
        return tensors[first], tensors[second]
    return getattr(module, first, None), getattr(module, second, None)
