"""Model surgery: our layers in place of torch's, in the same objects, and back again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations

from fastnorm.fuse import foldable
from fastnorm.modules import activation as activations
from fastnorm.modules import batch_norm, layer_norm, sync_batch_norm, weight_norm
from fastnorm.modules.weight_norm_group import group_of, ungroup
from fastnorm.surgery import losses, others
from fastnorm.surgery.edits import (
    ORIGIN,
    Edits,
    Filter,
    Folded,
    Origin,
    apply,
    check_model,
    swap,
    title,
    untouchable,
)
from fastnorm.surgery.forward import FusedForward
from fastnorm.surgery.report import Note, Report, Row

__all__ = ["Report", "Row", "replace_", "restore_"]


def replacements() -> dict[type[nn.Module], type[nn.Module]]:
    """torch's class, or another package's that is in use -> ours, for all that replace_ can
    replace."""
    return {
        nn.BatchNorm1d: batch_norm.BatchNorm1d,
        nn.BatchNorm2d: batch_norm.BatchNorm2d,
        nn.BatchNorm3d: batch_norm.BatchNorm3d,
        nn.LayerNorm: layer_norm.LayerNorm,
        nn.GELU: activations.GELU,
        nn.SiLU: activations.SiLU,
        nn.SELU: activations.SELU,
        parametrizations._WeightNorm: weight_norm.WeightNorm,
        **others.replacements(),
    }


def _selected(targets: Any) -> dict[type[nn.Module], type[nn.Module]]:
    accepted = replacements()
    if targets is None:
        return accepted
    by_name: dict[str, list[type[nn.Module]]] = {}  # timm has a LayerNorm too
    for cls in accepted:
        by_name.setdefault(cls.__name__.lstrip("_"), []).append(cls)
    chosen: dict[type[nn.Module], type[nn.Module]] = {}
    for target in (
        [targets]
        if isinstance(targets, (str, type)) or not isinstance(targets, Iterable)
        else targets
    ):
        named = by_name.get(target.lstrip("_"), []) if isinstance(target, str) else [target]
        if not named or any(not isinstance(cls, type) or cls not in accepted for cls in named):
            raise ValueError(
                f"cannot replace {target!r}: targets are classes of torch.nn or their names, "
                f"any of {', '.join(by_name)}"
            )
        chosen.update((cls, accepted[cls]) for cls in named)
    return chosen


def _refusal(
    module: nn.Module,
    name: str,
    chosen: dict[type[nn.Module], type[nn.Module]],
    wanted: Filter | None,
) -> str:
    """Why replace_ leaves an instance of a chosen class alone; empty if it is replaced."""
    reason = untouchable(module)
    if reason:
        return reason
    if type(module) not in chosen:
        base = next(cls for cls in chosen if isinstance(module, cls))
        return f"a subclass of {base.__name__}: only the class itself is replaced"
    if wanted is not None and not wanted(module, name):
        return "left out by filter_fn"
    return ""


def replace_(
    model: nn.Module,
    targets: Iterable[type[nn.Module] | str] | None = None,
    filter_fn: Filter | None = None,
    dry_run: bool = False,
) -> Report:
    """Replace torch's layers by ours, in place: the same objects with another class.

    Parameters, buffers, hooks, names and state_dict stay as they are, so an optimizer built before
    goes on working and checkpoints load both ways. Only modules whose type is exactly torch's class
    are replaced, subclasses are reported. Call it before DDP, FSDP or torch.compile wrap the model;
    :func:`restore_` undoes it.

    Args:
        model: any module; a layer itself is replaced too.
        targets: classes or their names among BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm,
            GELU, SiLU, SELU and WeightNorm (the parametrization behind
            torch.nn.utils.parametrizations.weight_norm); where those packages are imported, also
            timm's BatchNormAct2d, LayerNorm, LayerNorm2d, LayerNormAct, GELU, GELUTanh and
            QuickGELU, torchvision's LayerNorm2d, and transformers' GELUActivation, GELUTanh,
            NewGELUActivation, QuickGELUActivation, SiLUActivation and the layer norms of its
            ConvNeXts and SAMs (ConvNextLayerNorm, SamLayerNorm); all of them by default. A name
            stands for every class of this name.
        filter_fn: called as ``filter_fn(module, name)``; only modules it returns true for are
            replaced.
        dry_run: report what would be replaced, change nothing.

    Returns:
        A report with one row per module replaced or left alone, and notes on what is lost all the
        same: an activation called as a function, torch's SyncBatchNorm, weight norm by a hook, a
        batch norm in evaluation mode, a GPU without a kernel of ours; and on what :func:`fuse_`
        would fold, for which it traces the forwards around the norms as fuse_ does.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module.
        ValueError: a target is none of those above.

    Example:
        >>> import torch, fastnorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> print(fastnorm.replace_(model))
        name  was        is                  why skipped
        ----  ---------  ------------------  -----------
        1     LayerNorm  fastnorm.LayerNorm
        1 changed, 0 skipped
    """
    check_model(model, "replace_")
    chosen = _selected(targets)
    ours = owned_classes()
    rows: list[Row] = []
    edits: Edits = []
    notes: list[Note] = []
    weights: list[str] = []
    bases = tuple(chosen)
    for name, module in model.named_modules():
        was: type[nn.Module] = type(module)
        if was in ours or not issubclass(was, bases):
            continue
        reason = _refusal(module, name, chosen, filter_fn)
        rows.append(Row(name, title(was), title(was) if reason else title(chosen[was]), reason))
        if not reason:
            edits.append((module, functools.partial(swap, module, chosen[was])))
            notes += losses.of_layer(module, name)
            if was is parametrizations._WeightNorm:
                weights.append(name)
    changed = {module for module, _ in edits}
    notes += losses.one_by_one(weights)
    if filter_fn is None:
        notes += losses.of_model(model, chosen, changed)
    if changed:
        count, advice = foldable(model, changed)
        notes += [*losses.unfused(count), *advice, *losses.of_machine(changed)]
    if not dry_run:
        apply(edits)
    return Report(rows, dry_run, notes)


def owned_classes() -> frozenset[type[nn.Module]]:
    """Every class that replace_, fuse_ or convert_sync_batchnorm can have given a module."""
    fused = (batch_norm.BatchNormAct1d, batch_norm.BatchNormAct2d, batch_norm.BatchNormAct3d)
    return frozenset((*replacements().values(), *fused, sync_batch_norm.SyncBatchNorm))


def _restore_class(module: nn.Module, origin: Origin) -> None:
    fields = module.__dict__
    if fields.pop(ORIGIN, None) is None:
        return  # an activation that stood in two places
    for name, before in origin.attributes.items():
        fields.pop(name, None)
        if before:
            fields[name] = before[0]
    module.__class__ = origin.cls


def _restore_child(parent: nn.Module, key: str, folded: nn.Module, original: nn.Module) -> None:
    original.train(folded.training)
    parent._modules[key] = original


def _plan_restore(module: nn.Module, name: str, rows: list[Row], edits: Edits) -> None:
    """Add what brings a module's own class and forward back."""
    was, origin = title(type(module)), module.__dict__.get(ORIGIN)
    if isinstance(module.__dict__.get("forward"), FusedForward):
        rows.append(Row(name, "fused forward", f"{was}.forward"))
        edits.append((module, functools.partial(module.__dict__.pop, "forward")))
    if group_of(module) is not None:
        rows.append(Row(name, "weight norm group", was))
        edits.append((module, functools.partial(ungroup, module)))
    if isinstance(origin, Origin):
        foreign = (
            ""
            if type(module) in owned_classes()
            else "its class was changed after replace_ or fuse_"
        )
        rows.append(Row(name, was, was if foreign else title(origin.cls), foreign))
        if not foreign:
            edits.append((module, functools.partial(_restore_class, module, origin)))


def restore_(model: nn.Module, dry_run: bool = False) -> Report:
    """Undo every :func:`replace_`, :func:`fuse_` and :func:`weight_norm_` on a model: nothing of
    ours remains in it.

    Layers that were built from our classes stay. Call it before quantisation, torch.fx, ONNX or
    TorchScript.

    Args:
        model: the model that was changed, a part of it, or a deepcopy of it.
        dry_run: report what would be restored, change nothing.

    Returns:
        A report with one row per module restored.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module.

    Example:
        >>> import torch, fastnorm
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
        >>> report = fastnorm.replace_(model), fastnorm.restore_(model)
        >>> type(model[0])
        <class 'torch.nn.modules.normalization.LayerNorm'>
    """
    check_model(model, "restore_")
    rows: list[Row] = []
    edits: Edits = []
    for name, module in model.named_modules():
        _plan_restore(module, name, rows, edits)
        for key, child in module._modules.items():
            folded = None if child is None else child.__dict__.get(ORIGIN)
            if isinstance(folded, Folded) and child is not None:
                path = f"{name}.{key}".lstrip(".")
                activation = folded.activation
                origin = activation.__dict__.get(ORIGIN)
                now = origin.cls if isinstance(origin, Origin) else type(activation)
                rows.append(Row(path, title(type(child)), title(now)))
                edits.append(
                    (module, functools.partial(_restore_child, module, key, child, activation))
                )
                _plan_restore(activation, path, [], edits)
    every = model.named_modules(remove_duplicate=False)
    order = {name: position for position, (name, _) in enumerate(every)}
    rows.sort(key=lambda row: order[row.name])
    if not dry_run:
        apply(edits)
    return Report(rows, dry_run)
