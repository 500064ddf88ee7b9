"""The activations of transformers on our kernels; imported by replace_ where transformers is in
use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import activations

from fastnorm.modules.programs import Proxy, leaf, twin_of
from fastnorm.ops.activation import activation

_NAMES = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "gelu_sigmoid",
    "SiLUActivation": "silu",
}


class _Activation(nn.Module):
    name: str
    theirs: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return leaf(self, input)
        return activation(input, self.name)

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of(self, self.theirs)


def _classes() -> dict[type[nn.Module], Any]:
    """transformers' class -> a subclass of it with our forward, for those that this version has."""
    found = {}
    for cls, name in _NAMES.items():
        theirs = getattr(activations, cls, None)
        if theirs is not None:
            ours = type(
                cls, (_Activation, theirs), {"name": name, "theirs": theirs, "__module__": __name__}
            )
            found[theirs] = globals()[cls] = ours
    return found


REPLACEMENTS = _classes()
ACTIVATIONS: dict[type[nn.Module], str] = {
    cls: ours.name for theirs, ours in REPLACEMENTS.items() for cls in (theirs, ours)
}
