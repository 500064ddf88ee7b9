"""timm's norms, some with an activation, on our kernels; imported by replace_ where timm is in
use."""

from __future__ import annotations

from typing import Any

from timm.layers import activations, norm, norm_act
from torch import Tensor, nn

from fastnorm.modules.activation import NamedActivation
from fastnorm.modules.batch_norm import fused
from fastnorm.modules.permuted import over_channels, over_rows
from fastnorm.modules.programs import Proxy, leaf, twin_of, unscriptable
from fastnorm.ops.activation import activation
from fastnorm.surgery.folding import activation_of, hooked


def _folded(norm: Any) -> str | None:
    """The activation that a layer of timm applies, "identity" for none; None where it is not one of
    ours, or stands behind a drop layer. Asked at every call: timm's users set ``act`` anew."""
    if type(norm.drop) is not nn.Identity or hooked(norm.drop):
        return None
    if type(norm.act) is nn.Identity and not hooked(norm.act):
        return "identity"
    return activation_of(norm.act)[0] or None


class _Norm(nn.Module):
    """What the norms of timm have in common: our kernels, timm's forward where they cannot serve,
    timm's layer for TorchScript."""

    theirs: Any

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return leaf(self, x)
        y = self._ours(x)
        if y is None:
            y = self.theirs.forward(self, x)
        return y  # type: ignore[no-any-return]  # timm is untyped where mypy sees it at all

    def _ours(self, x: Tensor) -> Any:
        """The output, None where our kernels cannot serve."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        return twin_of(self, self.theirs)


# timm is untyped where mypy sees it at all: bases are Any
class BatchNormAct2d(_Norm, norm_act.BatchNormAct2d):  # type: ignore[misc]
    """timm's, its activation in the same pass; its own forward where it has a drop layer or an
    activation that we lack."""

    theirs = norm_act.BatchNormAct2d

    def _ours(self, x: Tensor) -> Any:
        name = _folded(self)
        return None if name is None or x.dim() != 4 else fused(self, x, name)


class LayerNormAct(_Norm, norm_act.LayerNormAct):  # type: ignore[misc]
    """timm's, its activation in the same pass; its own forward where it has a drop layer, an
    activation that we lack, or timm's fast norm is on."""

    theirs = norm_act.LayerNormAct

    def _ours(self, x: Tensor) -> Any:
        name = _folded(self)
        return None if name is None or self._fast_norm else over_rows(self, x, name)


class LayerNorm(_Norm, norm.LayerNorm):  # type: ignore[misc]
    """timm's, with what fuse_ folds in; its own forward where timm's fast norm is on."""

    theirs = norm.LayerNorm
    activation: str | None = None  # of fuse_

    def forward(self, x: Tensor, residual: Tensor | None = None, return_sum: bool = False) -> Any:
        if isinstance(x, Proxy):
            return leaf(self, x, residual, return_sum or None)
        if not self._fast_norm:
            return over_rows(self, x, self.activation, residual, return_sum)
        total = x if residual is None else x + residual
        y = self.theirs.forward(self, total)
        if self.activation is not None:
            y = activation(y, self.activation)
        return (y, total) if return_sum else y

    def __prepare_scriptable__(self) -> nn.Module:
        return unscriptable(self) if self.activation else super().__prepare_scriptable__()


class LayerNorm2d(_Norm, norm.LayerNorm2d):  # type: ignore[misc]
    """timm's, over the channels of images; its own forward where timm's fast norm is on."""

    theirs = norm.LayerNorm2d

    def _ours(self, x: Tensor) -> Any:
        return None if self._fast_norm else over_channels(self, x)


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
    ours.theirs: ours
    for ours in (
        LayerNorm, LayerNorm2d, BatchNormAct2d, LayerNormAct, GELU, GELUTanh, QuickGELU
    )
}  # fmt: skip
FUSIBLE: dict[type[nn.Module], type[nn.Module]] = {norm.LayerNorm: LayerNorm}
ACTIVATIONS: dict[type[nn.Module], str] = {
    **{cls: ours.name for ours in (GELU, GELUTanh, QuickGELU) for cls in (ours, ours.theirs)},
    activations.Swish: "silu",
    activations.Mish: "mish",
    activations.Sigmoid: "sigmoid",
    activations.Tanh: "tanh",
}
