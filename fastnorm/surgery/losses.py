"""What a model goes on losing after a surgery, as far as its layers and sources say it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastnorm.dispatch import backends
from fastnorm.surgery.report import Note

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# function -> how a forward calls it, and the layers that replace_ would have changed
_FUNCTIONS: tuple[tuple[Callable[..., Any], str, tuple[type[nn.Module], ...]], ...] = (
    (F.gelu, "gelu", (nn.GELU,)),
    (F.silu, "silu", (nn.SiLU,)),
    (F.selu, "selu", (nn.SELU,)),
    (torch.selu, "selu", (nn.SELU,)),
    (F.layer_norm, "layer_norm", (nn.LayerNorm,)),
    (torch.layer_norm, "layer_norm", (nn.LayerNorm,)),
    (F.batch_norm, "batch_norm", _BATCH_NORMS),
    (torch.batch_norm, "batch_norm", _BATCH_NORMS),
)
_PERMUTES = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims")


def of_layer(module: nn.Module, name: str) -> Iterator[Note]:
    """What a layer that becomes ours is known to lose."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return
    if module.eps <= 0:
        yield Note(name, f"eps is {module.eps:g}: in training torch's own function serves it")
    if not module.training and module.running_mean is not None:
        yield Note(
            name,
            "in evaluation mode: for inference alone torch.nn.utils.fuse_conv_bn_eval, before "
            "replace_ and fuse_, folds it into the convolution that it follows",
        )


@functools.cache  # a model has many layers of one class
def _called(function: Any) -> tuple[Any, ...]:
    """Every function that the source of a forward calls by a global name."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            path, at = [], node.func
            while isinstance(at, ast.Attribute):
                path.append(at.attr)
                at = at.value
            known = getattr(function, "__globals__", {})
            if isinstance(at, ast.Name) and at.id in known:
                value = known[at.id]
                for attribute in reversed(path):
                    value = getattr(value, attribute, None)
                found.append(value)
    return tuple(found)


def _functions(module: nn.Module, name: str, chosen: Collection[type[nn.Module]]) -> Iterator[Note]:
    """A forward that calls, or an attribute that holds, what replace_ only finds as a layer."""
    cls = type(module)
    if cls.__module__.startswith("fastnorm."):
        return
    torchs = cls.__module__.startswith("torch.")
    called = (*(() if torchs else _called(cls.forward)), *module.__dict__.values())
    found = {
        short: layers[0].__name__
        for function, short, layers in _FUNCTIONS
        if any(one is function for one in called) and any(layer in chosen for layer in layers)
    }
    for short, layer in found.items():
        yield Note(
            name,
            f"its forward calls {short}, and replace_ changes layers alone: a {layer} would be "
            f"replaced, fastnorm.functional.{short} is ours",
        )


def of_model(
    model: nn.Module, chosen: Collection[type[nn.Module]], changed: Collection[nn.Module]
) -> Iterator[Note]:
    """What replace_ does not change though there is something of ours for it."""
    for name, module in model.named_modules():
        if module not in changed:
            yield from _functions(module, name, chosen)
        if type(module) is nn.SyncBatchNorm and any(norm in chosen for norm in _BATCH_NORMS):
            yield Note(name, "torch's SyncBatchNorm: fastnorm.convert_sync_batchnorm makes it ours")
        if _WeightNorm in chosen and any(
            isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()
        ):
            yield Note(
                name,
                "weight norm by a hook, which stays torch's: take torch.nn.utils.remove_weight_norm"
                " and fastnorm.weight_norm instead",
            )


def of_machine(changed: Collection[nn.Module]) -> Iterator[Note]:
    """What a GPU goes without where no kernel of ours can run on it; says nothing before CUDA is in
    use, since to ask the GPU would initialise it."""
    on_gpu = any(p.is_cuda for module in changed for p in module.parameters(recurse=False))
    if not on_gpu and not torch.cuda.is_initialized():
        return
    missing = backends()
    kernels = [missing["cuda"], missing["triton"]]
    if torch.version.hip is not None:
        kernels = ["the kernels are for NVIDIA's GPUs"]
    if all(kernels):
        yield Note(
            "",
            "no kernel of ours can run on this machine's GPU, torch's own functions serve: "
            + "; ".join(str(reason) for reason in kernels),
        )


def unfused(count: int) -> Iterator[Note]:
    """What replace_ leaves to fuse_."""
    if count:
        yield Note(
            "",
            f"{count} norm{'s stand' if count > 1 else ' stands'} next to an activation or an "
            "addition: fastnorm.fuse_(model) folds these in",
        )


def one_by_one(names: Collection[str]) -> Iterator[Note]:
    """What weight-normed tensors lose that are computed where they are read."""
    if len(names) > 1:
        for name in names:
            yield Note(
                name, "computed by itself: fastnorm.weight_norm_(model) computes all of them in one"
            )


_STRIDED = (
    "its input is a view by {}, read across its strides: of images it lies in rows where the model "
    "is torch.channels_last"
)


def of_call(node: fx.Node, name: str) -> Iterator[Note]:
    """What a layer norm loses by the input that a traced forward gives it."""
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node):
        target = source.target
        called = target if isinstance(target, str) else getattr(target, "__name__", "")
        if source.op in ("call_method", "call_function") and called in _PERMUTES:
            yield Note(name, _STRIDED.format(called))


def of_neighbour(before: nn.Module | None, norm: nn.Module, name: str) -> Iterator[Note]:
    """The same of a layer norm in a Sequential, by the entry before it: torchvision has a layer
    Permute, and others have their own."""
    if isinstance(norm, nn.LayerNorm) and type(before).__name__ == "Permute":
        yield Note(name, _STRIDED.format("Permute"))


_HALF = (nn.Linear, nn.modules.conv._ConvNd)  # whose input and output autocast makes half
_PASSING = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)
_VIEWS = (*_PERMUTES, "flatten", "reshape", "view", "contiguous")


def _rounded_twice(norm: nn.Module, before: nn.Module | None, after: Any) -> bool:
    """Whether autocast makes a layer norm's input half, its output fp32, and that half again."""
    weight = getattr(norm, "weight", None)
    return (
        isinstance(norm, nn.LayerNorm)
        and getattr(norm, "autocast", None) is None
        and (weight is None or weight.dtype is torch.float32)  # else no model for autocast
        and isinstance(before, _HALF)
        and isinstance(after, _HALF)
    )


def _advice(name: str, after: nn.Module) -> Note:
    return Note(
        name,
        f"under autocast its input is half, its output fp32, and the {type(after).__name__} after "
        "it rounds that to half: where it is a LayerNorm of ours with autocast='input' its kernel "
        "rounds instead, once as before, and a step moves 10 bytes an element in place of 26",
    )


def of_rounding(node: fx.Node, root: nn.Module, name: str) -> Iterator[Note]:
    """What autocast="input" would save of a layer norm that a traced forward calls."""
    norm, source = root.get_submodule(str(node.target)), node.args[0] if node.args else None
    before = None
    while isinstance(source, fx.Node) and source.args and before is None:
        if source.op == "call_module":
            module = root.get_submodule(str(source.target))
            if not isinstance(module, _PASSING):
                before = module
        elif str(getattr(source.target, "__name__", source.target)) not in _VIEWS:
            return
        source = source.args[0]
    users = [user for user in node.users if user.op == "call_module"]
    after = root.get_submodule(str(users[0].target)) if users else None
    if after is not None and len(node.users) == 1 and _rounded_twice(norm, before, after):
        yield _advice(name, after)


def of_row(entries: Sequence[nn.Module], position: int, name: str) -> Iterator[Note]:
    """The same of a layer norm in a Sequential."""
    before = (
        entry
        for entry in reversed(entries[:position])
        if not isinstance(entry, _PASSING) and type(entry).__name__ != "Permute"
    )
    after = entries[position + 1] if position + 1 < len(entries) else None
    if after is not None and _rounded_twice(entries[position], next(before, None), after):
        yield _advice(name, after)
