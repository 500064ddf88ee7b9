"""Data-dependent initialisation of weight-normed layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

V_STD = 0.05
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def _weight_normed(module: nn.Module) -> bool:
    if not isinstance(module, _LAYERS) or not parametrize.is_parametrized(module, "weight"):
        return False
    chain: Any = module.parametrizations["weight"]  # type: ignore[index]
    return len(chain) == 1 and isinstance(chain[0], parametrizations._WeightNorm)


def _g_and_v(module: nn.Module) -> tuple[Tensor, Tensor]:
    originals: Any = module.parametrizations["weight"]  # type: ignore[index]
    return originals.original0, originals.original1


def _channel_dim(module: nn.Module, output: Tensor) -> int:
    """Of the output: the last for Linear, the first or second (unbatched, batched) for
    convolutions."""
    if isinstance(module, nn.Linear):
        return output.dim() - 1
    _, v = _g_and_v(module)
    return output.dim() - v.dim() + 1


class _Initialiser:
    """The hooks of one call: each layer is initialised by its own first input, the output of those
    before it."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {
            module: name for name, module in model.named_modules() if _weight_normed(module)
        }
        self.done: dict[nn.Module, str] = {}
        self.pending: set[nn.Module] = set()
        changeable = [*(t for module in self.names for t in module.parameters()), *model.buffers()]
        self.before = [(t, t.detach().clone()) for t in changeable]
        self.handles = [module.register_forward_pre_hook(self.draw) for module in self.names]
        self.handles += [
            module.register_forward_hook(self.scale, prepend=True) for module in self.names
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def restore(self) -> None:
        for tensor, value in self.before:
            tensor.copy_(value)

    def draw(self, module: nn.Module, inputs: Any) -> None:
        if module in self.done or module in self.pending:
            return
        g, v = _g_and_v(module)
        v.normal_(0, V_STD)
        g.fill_(1)
        if isinstance(module.bias, Tensor):
            module.bias.zero_()
        self.pending.add(module)

    def scale(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if module not in self.pending:
            return None
        self.pending.remove(module)
        self.done[module] = self.names[module]
        g, v = _g_and_v(module)
        t = output.double()
        channels = _channel_dim(module, t)
        others = [i for i in range(t.dim()) if i != channels]
        variance, mean = (
            torch.var_mean(t, others, correction=0, keepdim=True)
            if others
            else (torch.zeros_like(t), t)
        )
        if not torch.isfinite(variance).all():
            raise ValueError(
                f"layer {self.names[module]!r} gives NaN or infinite values (or none) on this batch"
            )
        own_dim = 1 if isinstance(module, _TRANSPOSED) else 0
        per_channel = (
            g.numel() == t.size(channels) and g.dim() == v.dim() and g.size(own_dim) == g.numel()
        )
        if not per_channel:
            variance = variance.mean()
            mean_size = (mean * mean).mean().sqrt()
        else:
            mean_size = mean.abs()
        std = variance.sqrt()
        # a channel that is constant up to rounding keeps its scale
        std = torch.where(std <= 8 * torch.finfo(output.dtype).eps * mean_size, 1.0, std)
        g.copy_((1 / std).reshape(g.shape) if per_channel else 1 / std)
        if not isinstance(module.bias, Tensor):
            return (t / std).to(output.dtype)
        module.bias.copy_((-mean / std).reshape(-1))
        return ((t - mean) / std).to(output.dtype)


def data_dependent_init_(model: nn.Module, batch: Any) -> list[str]:
    """Initialise every weight-normed layer from one batch, so that its pre-activations have mean 0
    and variance 1.

    .. math:: v \\sim N(0, 0.05^2), \\quad t = v \\cdot x / \\lVert v \\rVert, \\quad
        g = 1 / \\sigma[t], \\quad b = -\\mu[t] / \\sigma[t]

    The batch goes through the model once, without gradients and in the mode (training or eval) that
    the model is in; each layer is initialised at its first call, from what the layers before it now
    give. Mean and variance are per output channel. Where g has not one entry per output channel (a
    norm of the whole tensor or of another dim, grouped transposed convolutions), all its entries
    become 1 / sigma with sigma squared the mean variance of the channels. A layer without bias is
    scaled only; a constant channel is centred only.

    Args:
        model: layers of type Linear, Conv1-3d and ConvTranspose1-3d whose ``weight`` is
            weight-normed, by :func:`fastnorm.weight_norm` or torch's parametrization, are
            initialised; everything else stays.
        batch: a tensor; a tuple or list of positional arguments; or a dict of keyword arguments.

    Returns:
        The names of the layers initialised, in the order of their first calls; those the batch did
        not reach are not in it and have not changed.

    Raises:
        ValueError: a layer gives NaN or infinite values.
        RuntimeError: inside torch.nn.utils.parametrize.cached(), which would use the old weights.
        Whatever the model raises. In each case parameters and buffers are as before.

    Source: Salimans & Kingma, Weight Normalization, 2016, section 4,
    https://arxiv.org/abs/1602.07868

    Example:
        >>> import torch, fastnorm
        >>> layer = fastnorm.weight_norm(torch.nn.Linear(8, 4))
        >>> model = torch.nn.Sequential(layer, torch.nn.ReLU())
        >>> fastnorm.data_dependent_init_(model, torch.randn(32, 8))
        ['0']
    """
    if getattr(parametrize, "_cache_enabled", 0):
        raise RuntimeError(
            "data_dependent_init_ cannot run inside parametrize.cached(): "
            "it would use the old weights"
        )
    with torch.no_grad():
        initialiser = _Initialiser(model)
        try:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
        except BaseException:
            initialiser.restore()
            raise
        finally:
            initialiser.remove()
    return list(initialiser.done.values())
