"""Layers of other packages: known where those packages are in use, never imported for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastnorm.modules import permuted

# a model has layers of a package only if this module of it is imported; ours that knows them
_PACKAGES = {
    "transformers.activations": "fastnorm.modules.transformers",
    "timm.layers.norm_act": "fastnorm.modules.timm",
}


def _in_use() -> Iterator[Any]:
    for theirs, ours in _PACKAGES.items():
        if theirs in sys.modules:
            yield importlib.import_module(ours)


def replacements() -> dict[type[nn.Module], type[nn.Module]]:
    """A package's class -> ours."""
    known = {theirs: ours for one in _in_use() for theirs, ours in one.REPLACEMENTS.items()}
    return {**known, **permuted.replacements()}


def fusible() -> dict[type[nn.Module], type[nn.Module]]:
    """The norms that take an activation and a residual as ours do: a package's class, and ours of
    it, -> ours."""
    known = {theirs: ours for one in _in_use() for theirs, ours in one.FUSIBLE.items()}
    return known | {ours: ours for ours in known.values()}


def checkpointed(forward: Any) -> Any:
    """The forward inside transformers' decorator of layers that can be checkpointed; None if this
    is none.

    The decorator calls it as it is unless ``gradient_checkpointing`` is set, in training.
    """
    layers = sys.modules.get("transformers.modeling_layers")
    maker = getattr(getattr(layers, "GradientCheckpointingLayer", None), "__init_subclass__", None)
    code = getattr(getattr(maker, "__func__", None), "__code__", None)
    if code is None or getattr(forward, "__code__", None) not in code.co_consts:
        return None
    return forward.__wrapped__


def activation_name(module: nn.Module) -> str | None:
    """The fused activation that a layer of another package is."""
    return next(
        (
            known.ACTIVATIONS[type(module)]
            for known in _in_use()
            if type(module) in known.ACTIVATIONS
        ),
        None,
    )
