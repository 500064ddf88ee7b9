"""How a module is changed so that restore_ can change it back, and how many changes become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

ORIGIN = "_fastnorm_origin"  # the instance attribute that remembers what restore_ puts back

Filter = Callable[[nn.Module, str], bool]
Edits = list[tuple[nn.Module, Callable[[], None]]]  # each with the module that it changes


# what restore_ needs to know: in the module's own __dict__, so that it follows deepcopy and pickle


@dataclass
class Origin:
    """The class a module had, and its attributes that were set: name -> (value,), () if absent."""

    cls: type[nn.Module]
    attributes: dict[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass
class Folded:
    """The activation that an Identity of fuse_ stands for."""

    activation: nn.Module


def swap(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Give a module another class and attributes in place, remembering what it had at first."""
    fields = module.__dict__
    known = fields.get(ORIGIN)
    origin = Origin(type(module)) if known is None else Origin(known.cls, dict(known.attributes))
    for name, value in attributes.items():
        origin.attributes.setdefault(name, (fields[name],) if name in fields else ())
        fields[name] = value
    fields[ORIGIN] = origin
    module.__class__ = cls


def apply(edits: Edits) -> None:
    """Make every edit, each of the module it names, or none of them."""
    before = [
        (module, type(module), dict(module.__dict__), dict(module._modules)) for module, _ in edits
    ]
    try:
        for _, edit in edits:
            edit()
    except BaseException:
        for module, cls, attributes, children in reversed(before):
            module.__class__ = cls
            for now, then in ((module.__dict__, attributes), (module._modules, children)):
                now.clear()
                now.update(then)
        raise


def check_model(model: Any, function: str) -> None:
    """TypeError unless the model is a module whose class can be changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}() changes a torch.nn.Module in place, got {type(model).__name__}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{function}() cannot change a TorchScript module: call it before torch.jit"
        )


def title(cls: type) -> str:
    """A class as reports name it: torch's by its name, ours as fastnorm.<name>."""
    return f"fastnorm.{cls.__name__}" if cls.__module__.startswith("fastnorm.") else cls.__name__


def untouchable(module: nn.Module) -> str:
    """Why the class of a module of the right type cannot be changed; empty if it can."""
    if parametrize.is_parametrized(module):
        return "parametrized: its class is made at run time"
    if "forward" in module.__dict__:
        return "a forward is bound to this instance"
    return ""
