"""timm's norms, some with an activation, on our kernels; imported by replace_ where timm is in
use."""

from __future__ import annotations

from typing import Any

from timm.layers import activations, norm, norm_act
from torch import Tensor, nn

from fastnorm.modules.activation import NamedActivation
from fastnorm.modules.batch_norm import fused
from fastnorm.modules.permuted import over_channels, over_rows
from fastnorm.modules.programs import Proxy, leaf, twin_of
from fastnorm.ops.layer_norm import layer_norm
from fastnorm.surgery.folding import activation_of, hooked


def _folded(norm: Any) -> str | None:
    """The activation that a layer of timm applies, "identity" for none; None where it is not one of
    ours, or stands behind a drop layer. Asked at every call: timm's users set ``act`` anew."""
    if type(norm.drop) is not nn.Identity or hooked(norm.drop):
        return None
    if type(norm.act) is nn.Identity and not hooked(norm.act):
        return "identity"
    return activation_of(norm.act)[0] or None


class BatchNormAct2d(norm_act.BatchNormAct2d):  # type: ignore[misc]
    """timm's, its activation in the same pass; its own forward where it has a drop layer or an
    activation that we lack."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return leaf(self, x)
        name = _folded(self)
        if name is None or x.dim() != 4:
            return super().forward(x)  # type: ignore[no-any-return]
        return fused(self, x, name)

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of(self, norm_act.BatchNormAct2d)


class LayerNormAct(norm_act.LayerNormAct):  # type: ignore[misc]
    """timm's, its activation in the same pass; its own forward where it has a drop layer, an
    activation that we lack, or timm's fast norm is on."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return leaf(self, x)
        name = _folded(self)
        if name is None or self._fast_norm:
            return super().forward(x)  # type: ignore[no-any-return]
        shape, weight, bias = self.normalized_shape, self.weight, self.bias
        y: Any = layer_norm(x, shape, weight, bias, self.eps, activation=name)
        return y  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of(self, norm_act.LayerNormAct)


# timm is untyped where mypy sees it at all: bases and what their forward returns are Any
class LayerNorm(norm.LayerNorm):  # type: ignore[misc]
    """timm's; its own forward where timm's fast norm is on."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return leaf(self, x)
        if self._fast_norm:
            return super().forward(x)  # type: ignore[no-any-return]
        return over_rows(self, x)

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of(self, norm.LayerNorm)


class LayerNorm2d(norm.LayerNorm2d):  # type: ignore[misc]
    """timm's, over the channels of images; its own forward where timm's fast norm is on."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return leaf(self, x)
        if self._fast_norm:
            return super().forward(x)  # type: ignore[no-any-return]
        return over_channels(self, x)

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of(self, norm.LayerNorm2d)


class GELU(NamedActivation, activations.GELU):  # type: ignore[misc]
    """timm's."""

    name, theirs = "gelu", activations.GELU


class GELUTanh(NamedActivation, activations.GELUTanh):  # type: ignore[misc]
    """timm's."""

    name, theirs = "gelu_tanh", activations.GELUTanh


class QuickGELU(NamedActivation, activations.QuickGELU):  # type: ignore[misc]
    """timm's."""

    name, theirs = "gelu_sigmoid", activations.QuickGELU


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    norm.LayerNorm: LayerNorm,
    norm.LayerNorm2d: LayerNorm2d,
    norm_act.BatchNormAct2d: BatchNormAct2d,
    norm_act.LayerNormAct: LayerNormAct,
    **{ours.theirs: ours for ours in (GELU, GELUTanh, QuickGELU)},
}
ACTIVATIONS: dict[type[nn.Module], str] = {
    **{cls: ours.name for ours in (GELU, GELUTanh, QuickGELU) for cls in (ours, ours.theirs)},
    activations.Swish: "silu",
    activations.Mish: "mish",
    activations.Sigmoid: "sigmoid",
    activations.Tanh: "tanh",
}
