"""Model surgery: activations and residual additions into the norms before them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

from torch import nn

from fastnorm.modules import batch_norm, layer_norm, sync_batch_norm
from fastnorm.surgery import losses, others
from fastnorm.surgery.edits import (
    ORIGIN,
    Edits,
    Filter,
    Folded,
    apply,
    check_model,
    swap,
    title,
    untouchable,
)
from fastnorm.surgery.folding import Fold, activation_of, hooked, match, rewrite
from fastnorm.surgery.forward import FusedForward, code_of
from fastnorm.surgery.report import Note, Report, Row
from fastnorm.surgery.tracing import Guard, Trace, trace

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: batch_norm.BatchNormAct1d,
    nn.BatchNorm2d: batch_norm.BatchNormAct2d,
    nn.BatchNorm3d: batch_norm.BatchNormAct3d,
    batch_norm.BatchNorm1d: batch_norm.BatchNormAct1d,
    batch_norm.BatchNorm2d: batch_norm.BatchNormAct2d,
    batch_norm.BatchNorm3d: batch_norm.BatchNormAct3d,
    sync_batch_norm.SyncBatchNorm: sync_batch_norm.SyncBatchNorm,
    nn.LayerNorm: layer_norm.LayerNorm,
    layer_norm.LayerNorm: layer_norm.LayerNorm,
}


def _plain_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _container(module: nn.Module) -> bool:
    """Whether a module is only called through its parent: a ModuleList, a ModuleDict."""
    return type(module).forward is nn.Module.forward and "forward" not in module.__dict__


def _attribute(norm: nn.Module, name: str) -> str | None:
    """The attribute `activation` of a fused norm."""
    return None if name == "identity" and isinstance(norm, nn.LayerNorm) else name


def _put(parent: nn.Module, key: str, child: nn.Module) -> None:
    parent._modules[key] = child


class _Plan:
    """What fuse_ would change in a model and what it leaves alone; planning touches nothing."""

    def __init__(self, model: nn.Module, wanted: Filter | None) -> None:
        self.rows: list[Row] = []
        self.notes: list[Note] = []
        self.advice: list[Note] = []  # notes that replace_ gives too
        self.edits: Edits = []
        self.folds = 0
        self.parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        self.names = {module: name for name, module in model.named_modules()}
        self.traces: dict[nn.Module, Trace] = {}
        self.fused = {**_NORMS, **others.fusible()}
        for parent in self.names:
            for key, child in parent._modules.items():
                if child is not None:
                    self.parents.setdefault(child, []).append((parent, key))
        owned: dict[nn.Module, list[nn.Module]] = {}
        for norm, name in self.names.items():
            if type(norm) not in self.fused or getattr(norm, "activation", None) is not None:
                continue
            reason = self._refusal(norm) or (
                "" if wanted is None or wanted(norm, name) else "left out by filter_fn"
            )
            if reason:
                self._skip(norm, reason)
                continue
            parent, key = self.parents[norm][0]
            if _plain_sequential(parent):
                self._plan_neighbours(norm, parent, key)
                continue
            owner = self._owner(parent, _container)
            if owner is None:
                self._skip(norm, "no forward that calls it can be found")
            else:
                owned.setdefault(owner, []).append(norm)
        for owner, norms in owned.items():
            self._plan_forward(owner, norms)
        every = model.named_modules(remove_duplicate=False)
        order = {name: position for position, (name, _) in enumerate(every)}
        self.rows.sort(key=lambda row: order[row.name])

    def _skip(self, norm: nn.Module, reason: str) -> None:
        self.rows.append(Row(self.names[norm], title(type(norm)), title(type(norm)), reason))

    def _refusal(self, norm: nn.Module) -> str:
        if untouchable(norm):
            return untouchable(norm)
        if hooked(norm):
            return "hooks on the norm"
        if getattr(norm, "_fast_norm", False):
            return "timm's fast norm is on"
        places = len(self.parents.get(norm, ()))
        if places == 0:
            return "it is the model itself: nothing follows it"
        return "" if places == 1 else f"shared by {places} places of the model"

    def _owner(self, module: nn.Module, passes: Callable[[nn.Module], bool]) -> nn.Module | None:
        """The module whose forward calls a module's children; None if there is no single one."""
        while passes(module):
            above = self.parents.get(module, ())
            if len(above) != 1:
                return None
            module = above[0][0]
        return module

    def _trace(self, owner: nn.Module) -> Trace:
        if owner not in self.traces:
            self.traces[owner] = trace(owner)
        return self.traces[owner]

    def _fold(self, norm: nn.Module, name: str, residual: bool, shared: bool = False) -> None:
        self.folds += 1
        cls, value = self.fused[type(norm)], _attribute(norm, name)
        attributes = {} if value is None else {"activation": value}
        terms = [name for name, there in (("residual", residual), ("sum", shared)) if there]
        folded = ", ".join((*attributes.values(), *terms))
        self.rows.append(Row(self.names[norm], title(type(norm)), f"{title(cls)}({folded})"))
        self.notes += losses.of_layer(norm, self.names[norm])
        self.edits.append((norm, functools.partial(swap, norm, cls, **attributes)))

    def _plan_neighbours(self, norm: nn.Module, parent: nn.Module, key: str) -> None:
        """A norm in a Sequential and the entry after it."""
        keys = list(parent._modules)
        position = keys.index(key) + 1
        before = parent._modules[keys[position - 2]] if position > 1 else None
        self.notes += losses.of_neighbour(before, norm, self.names[norm])
        if type(norm) in _NORMS:
            entries = [entry for entry in parent._modules.values() if entry is not None]
            self.advice += losses.of_row(entries, entries.index(norm), self.names[norm])
        following = parent._modules[keys[position]] if position < len(keys) else None
        if following is None:
            return self._skip(norm, "nothing follows it in its Sequential")
        name, reason = activation_of(following)
        if reason:
            return self._skip(norm, reason)
        if self._tapped(norm, following, parent):
            return self._skip(norm, "its output is used outside its Sequential")
        identity = nn.Identity().train(following.training)
        identity.__dict__[ORIGIN] = Folded(following)
        self._fold(norm, name, residual=False)
        path = f"{self.names[parent]}.{keys[position]}".lstrip(".")
        self.rows.append(Row(path, title(type(following)), "Identity"))
        self.edits.append((parent, functools.partial(_put, parent, keys[position], identity)))

    def _tapped(self, norm: nn.Module, following: nn.Module, parent: nn.Module) -> bool:
        """Whether a forward above a Sequential calls its norm, and not only for the activation."""
        owner = self._owner(parent, lambda module: _container(module) or _plain_sequential(module))
        if owner is None:
            return False
        traces = [self._trace(owner)]
        if traces[0].absent:  # and what it does where it is given: of several, any may be
            traces.append(trace(owner, assume=False))
            if len(traces[0].absent) > 1 or traces[1].graph is None:
                return True
        nodes = [node for one in traces if one.graph is not None for node in one.graph.nodes]
        for node in nodes:
            if node.op == "call_module" and owner.get_submodule(node.target) is norm:
                users = [user for user in node.users if user.op == "call_module"]
                if (
                    len(node.users) != 1
                    or not users
                    or owner.get_submodule(users[0].target) is not following
                ):
                    return True
        return False

    def _closed(self, owner: nn.Module) -> str:
        """Why the forward of a module cannot be replaced; empty if it can."""
        kind = type(owner).__name__
        bound = owner.__dict__.get("forward")
        if isinstance(bound, FusedForward):
            return f"the forward of its parent ({kind}) is fused: restore_ first to fuse more"
        if bound is not None:
            return f"a forward is bound to its parent ({kind})"
        refusal = self._trace(owner).refusal
        return f"{kind}: {refusal}" if refusal else ""

    def _plan_forward(self, owner: nn.Module, norms: list[nn.Module]) -> None:
        """The norms that one forward calls: a new forward if anything can be folded."""
        kind, reason = type(owner).__name__, self._closed(owner)
        graph = None if reason else self._trace(owner).graph
        if graph is None:
            for norm in norms:
                self._skip(norm, reason)
            return
        modules = {
            node: owner.get_submodule(node.target)
            for node in graph.nodes
            if node.op == "call_module"
        }
        guards: list[Guard] = []
        unhooked: list[tuple[str, ...]] = []
        for norm in norms:
            calls = [node for node, module in modules.items() if module is norm]
            if calls and isinstance(norm, nn.LayerNorm):
                self.notes += losses.of_call(calls[0], self.names[norm])
                if len(calls) == 1 and type(norm) in _NORMS:
                    self.advice += losses.of_rounding(calls[0], owner, self.names[norm])
            fold: Fold | str = f"called {len(calls)} times by its parent ({kind})"
            if len(calls) == 1:
                fold = match(calls[0], owner)
                own = self._trace(owner).gives_way
                if own and isinstance(fold, Fold) and _attribute(norm, fold.activation) is not None:
                    fold = f"{kind}: its forward {own}, and would apply the activation twice"
            if isinstance(fold, str):
                self._skip(norm, fold)
                continue
            self._fold(norm, fold.activation, fold.residual is not None, fold.shared)
            # what the new forward relies on: a norm that was converted, or another activation put
            # where the folded one was, has to be an error
            path = *str(fold.norm.target).split("."), "activation"
            guards.append((path, _attribute(norm, fold.activation)))
            # hooks would be given, or give back, something else than the layer's input and output
            if fold.residual is not None:
                unhooked.append((*path[:-1], "_forward_pre_hooks"))
            if fold.shared:
                unhooked.append((*path[:-1], "_forward_hooks"))
            last = str(fold.last.target)
            if fold.last in modules and fold.last is not fold.norm and "." not in last:
                guards.append(((last,), modules[fold.last]))
            guards += [((*str(node.target).split("."),), modules[node]) for node in fold.idle]
            rewrite(fold, owner)
        if guards:
            traced = self._trace(owner)
            all_guards = (*traced.guards, *guards)
            forward = FusedForward(
                owner,
                *code_of(graph),
                all_guards,
                tuple(unhooked),
                traced.absent,
                traced.checkpointed,
            )
            where = " and ".join(f"{name} is None" for name in traced.absent)
            now = f"fused forward where {where}" if where else "fused forward"
            self.rows.append(Row(self.names[owner], f"{kind}.forward", now))
            edit = functools.partial(owner.__dict__.__setitem__, "forward", forward)
            self.edits.append((owner, edit))


def foldable(model: nn.Module, norms: Collection[nn.Module]) -> tuple[int, list[Note]]:
    """How many of these norms of a model fuse_ would fold something into, and advice on them."""
    plan = _Plan(model, lambda norm, name: norm in norms)
    return plan.folds, plan.advice


def fuse_(model: nn.Module, filter_fn: Filter | None = None, dry_run: bool = False) -> Report:
    """Fold activations, and additions where the forward shows them, into the norms before them.

    .. math:: y = f(\\operatorname{bn}(x) + r) \\qquad y = f(\\operatorname{layer\\_norm}(x + r))

    A sum that is used again after its layer norm, as in pre-norm transformers, is written by the
    norm's kernel too; not where it is returned, as its own gradient would lack what the norm adds.

    Norms become BatchNormAct1d, -2d, -3d or LayerNorm with an activation: the same objects,
    parameters and state_dict. In a Sequential the folded activation becomes an Identity. Elsewhere
    torch.fx traces the forward of each parent, and where it changes, a new one is bound to that
    instance: parents keep class, keys and hooks. A forward is left alone, and the report says why,
    when a trace would freeze or lose part of it: it reads ``training``, tests the type of an
    argument, has a ``with`` statement, depends on data. Where it tests whether an optional argument
    is None, the new one serves calls in which it is and the class's own the others, and no
    activation is folded, as that one would apply it again. Plain attributes that were read while
    tracing must keep their values, otherwise the next call is a RuntimeError. Hooks added to a norm
    later see the activated output.

    Call it before DDP, FSDP or torch.compile wrap the model; :func:`restore_` undoes it, and has to
    before quantisation, torch.fx, ONNX or TorchScript, which read the class's own forward, and
    before ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and ``fuse_conv_bn_eval``, which drop
    the activation.

    Args:
        model: any module with layers of torch's or of ours in it.
        filter_fn: called as ``filter_fn(norm, name)``; only norms it returns true for are fused.
        dry_run: report what would be fused, change nothing.

    Returns:
        A report with a row per norm, per activation that became an Identity, per forward that
        changed.

    Raises:
        TypeError: ``model`` is not a module, or is a TorchScript module.

    Example:
        >>> import torch, fastnorm
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> print(fastnorm.fuse_(model))
        name  was          is                             why skipped
        ----  -----------  -----------------------------  -----------
        0     BatchNorm2d  fastnorm.BatchNormAct2d(relu)
        1     ReLU         Identity
        2 changed, 0 skipped
    """
    check_model(model, "fuse_")
    plan = _Plan(model, filter_fn)
    if not dry_run:
        apply(plan.edits)
    return Report(plan.rows, dry_run, [*plan.notes, *plan.advice])
