"""The activations of transformers on our kernels; imported by replace_ where transformers is in
use."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import activations

from fastnorm.modules.activation import NamedActivation

_NAMES = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "gelu_sigmoid",
    "SiLUActivation": "silu",
}


def _classes() -> dict[type[nn.Module], Any]:
    """transformers' class -> a subclass of it with our forward, for those that this version has."""
    found = {}
    for cls, name in _NAMES.items():
        theirs = getattr(activations, cls, None)
        if theirs is not None:
            ours = type(
                cls,
                (NamedActivation, theirs),
                {"name": name, "theirs": theirs, "__module__": __name__},
            )
            found[theirs] = globals()[cls] = ours
    return found


REPLACEMENTS = _classes()
FUSIBLE: dict[type[nn.Module], type[nn.Module]] = {}
ACTIVATIONS: dict[type[nn.Module], str] = {
    cls: ours.name for theirs, ours in REPLACEMENTS.items() for cls in (theirs, ours)
}
