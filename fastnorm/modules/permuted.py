"""Layer norms over the channels of images, as torchvision and transformers write them, on our
kernels."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor, nn

from fastnorm.modules.programs import Proxy, leaf, twin_of
from fastnorm.ops.layer_norm import layer_norm


def over_rows(module: Any, x: Tensor, *folded: Any) -> Any:
    """Layer norm of the last dimensions with a layer's parameters, and what is folded in: an
    activation, a residual, whether the sum is wanted too."""
    options = dict(zip(("activation", "residual", "return_sum"), folded, strict=False))
    shape, weight, bias = module.normalized_shape, module.weight, module.bias
    return layer_norm(x, shape, weight, bias, module.eps, **options)


def over_channels(module: Any, x: Tensor) -> Tensor:
    """Layer norm of ``[N, C, H, W]`` over C, of whatever strides; the output is channels_last, as
    torch's of the permuted view."""
    y: Tensor = over_rows(module, x.permute(0, 2, 3, 1))
    return y.permute(0, 3, 1, 2)


class _Images(nn.Module):
    """torchvision's LayerNorm2d."""

    theirs: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        return leaf(self, x) if isinstance(x, Proxy) else over_channels(self, x)

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of(self, self.theirs)


class _EitherFormat(_Images):
    """transformers' layer norm with a ``data_format``."""

    data_format: str

    def forward(self, features: Tensor) -> Tensor:
        if isinstance(features, Proxy):
            return leaf(self, features)
        if self.data_format == "channels_first":
            return over_channels(self, features)
        y: Tensor = over_rows(self, features)
        return y


# a package's module -> its class and the forward of it; a class that is no nn.LayerNorm, as in
# transformers before version 5, is left alone
_FORMS: dict[str, tuple[str, type[nn.Module]]] = {
    "torchvision.models.convnext": ("LayerNorm2d", _Images),
    **{
        f"transformers.models.{model}.modeling_{model}": (f"{prefix}LayerNorm", _EitherFormat)
        for model, prefix in (
            ("convnext", "ConvNext"),
            ("convnextv2", "ConvNextV2"),
            ("dinov3_convnext", "DINOv3ConvNext"),
            ("sam", "Sam"),
            ("sam2", "Sam2"),
            ("sam2_video", "Sam2Video"),
            ("sam_hq", "SamHQ"),
            ("seggpt", "SegGpt"),
        )
    },
}


_made: dict[Any, Any] = {}


def _ours(theirs: Any, form: Any) -> Any:
    """A subclass of a package's class with our forward, where pickle finds it."""
    if theirs not in _made:
        name = theirs.__name__
        ours = type(name, (form, theirs), {"theirs": theirs, "__module__": __name__})
        _made[theirs] = globals()[name] = ours
    return _made[theirs]


def replacements() -> dict[type[nn.Module], type[nn.Module]]:
    """A package's class -> ours, for those whose module is imported."""
    found: dict[type[nn.Module], type[nn.Module]] = {}
    for module, (name, form) in _FORMS.items():
        theirs = getattr(sys.modules.get(module), name, None)
        if isinstance(theirs, type) and issubclass(theirs, nn.LayerNorm):
            found[theirs] = _ours(theirs, form)
    return found


def __getattr__(name: str) -> Any:
    """What pickle asks for in a process that has not imported the package."""
    for module, (cls, form) in _FORMS.items():
        if cls == name:
            return _ours(getattr(importlib.import_module(module), name), form)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
