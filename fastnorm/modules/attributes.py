"""How a layer's forward reads its own parameters and buffers."""

from __future__ import annotations

from typing import Any


def read(module: Any, tensors: dict[str, Any], name: str) -> Any:
    """``module.name`` from its ``_parameters`` or ``_buffers``, where nn.Module would find it after
    a search; by that search where it is not there, as in a parametrized layer."""
    return tensors[name] if name in tensors else getattr(module, name, None)
