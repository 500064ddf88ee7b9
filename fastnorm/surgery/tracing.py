"""torch.fx traces that can replace a forward: what a trace would freeze or lose is found and named.

torch.fx runs the forward once on proxies. What does not pass through a proxy is decided then, for
good: a look at ``self.training``, ``x is None``, ``isinstance(x, tuple)``, a context manager, a
random number. So the traced module is a shadow that sees every attribute read, a profiler sees
every Python function entered and every builtin called, a function mode sees torch calls without a
proxy, and the sources of all functions entered are searched for tests that no proxy can see. Plain
values that were read become guards, checked at every call of the new forward.
"""

from __future__ import annotations

import builtins
import gc
import inspect
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastnorm.surgery import others
from fastnorm.surgery.source import rest_of, tested_for_none, unsafe_source

# where an attribute is, seen from the traced module, and the value it had
Guard = tuple[tuple[str, ...], Any]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_ENTRIES = (
    "torch.nn.modules.",
    "torch.nn.functional",
    "torch.functional",
    "torch._tensor",
    "torch.fx.",
    "torch.overrides",
    "torch._jit_internal",  # nn.functional's pooling goes through it
)
# the rest of torch.nn.modules are forwards like any other
_MACHINERY = ("torch.nn.modules.container", "torch.nn.modules.module")
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_WATCH = "_fastnorm_watch"
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class Trace(NamedTuple):
    """A forward's graph (None where torch.fx fails), why it must not be used, and its guards.

    It stands for the forward where the ``absent`` arguments are None; of a checkpointed one, for
    that inside the decorator, see others.checkpointed.
    """

    graph: fx.Graph | None
    refusal: str
    guards: tuple[Guard, ...]
    absent: tuple[str, ...] = ()
    checkpointed: bool = False

    @property
    def gives_way(self) -> str:
        """Why the class's own forward has to stay as good as the new one; empty if it need not."""
        if self.absent:
            return f"tests whether {self.absent[0]} is None"
        return "can be checkpointed" if self.checkpointed else ""


class _Watch:
    """What a trace has seen."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.guards: dict[tuple[str, ...], Any] = {}
        self.codes: dict[types.CodeType, tuple[str, ...] | None] = {}  # see unsafe_source
        self.running = False

    def refuse(self, reason: str) -> None:
        if self.running:
            self.refusals.append(reason)

    def read(self, path: tuple[str, ...], name: str, value: Any, own: bool) -> None:
        """An attribute that is neither a module, a parameter nor a buffer was read."""
        if not self.running or name in _INTERNAL or name == _WATCH:
            return
        if name == "training":
            self.refuse("its forward reads training, which a trace would freeze")
        elif _plain(value) or (own and inspect.isroutine(value)):
            self.guards[(*path, name)] = value
        elif own:
            self.refuse(
                f"its forward reads {'.'.join((*path, name))} ({type(value).__name__}), "
                "which a trace would freeze"
            )

    def profile(self, frame: types.FrameType, event: str, argument: Any) -> None:
        """Called by the interpreter for every Python function entered and every builtin called."""
        code, caller = frame.f_code, frame.f_back
        if event == "c_call" and code in self.codes and not _traceable_builtin(argument):
            name = getattr(argument, "__qualname__", repr(argument))
            self.refuse(f"its forward calls {name}, whose result a trace would freeze")
        if event != "call" or caller is None or code.co_filename == __file__:
            return
        by_property = (
            caller.f_code.co_filename == __file__ and caller.f_code.co_name == "__getattribute__"
        )
        if caller.f_code not in self.codes and not by_property:
            return  # entered by torch for itself
        name = frame.f_globals.get("__name__", "")
        layer = name.startswith("torch.nn.modules.") and not name.startswith(_MACHINERY)
        if layer or not code.co_filename.startswith(_TORCH):
            self.codes.setdefault(code, None)
        elif not name.startswith(_ENTRIES) and code is not torch._assert.__code__:
            self.refuse(f"its forward calls {name}.{code.co_name}, which a trace would lose")


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _traceable_builtin(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    if owner is builtins or owner is operator:
        return True
    if isinstance(owner, (str, list, tuple, dict, set, int, float, fx.Proxy)):
        return True
    module = getattr(function, "__module__", None) or ""
    if module == "math" or isinstance(owner, type):
        return True
    # the function mode sees torch's functions of tensors, but not its questions about the process
    return module.startswith("torch") and not function.__name__.lstrip("_").startswith(
        ("is_", "get_", "set_", "has_")
    )


class _Constants(TorchFunctionMode):
    """Sees torch functions called without a proxy: their result would become a constant."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, function: Any, classes: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        if not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            name = getattr(function, "__name__", repr(function))
            self.watch.refuse(
                f"its forward calls {name} on no input, whose result a trace would freeze"
            )
        return function(*args, **(kwargs or {}))


def _inplace(name: str) -> Callable[[fx.Proxy, Any], Any]:
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is; torch.fx's own records ``x + y``."""


for _name in (
    "iadd",
    "isub",
    "imul",
    "imatmul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _inplace(_name))


REST = "_fastnorm_rest"  # stands in a graph for the key in f(**kwargs)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, watch: _Watch, absent: tuple[str, ...]) -> None:
        super().__init__()
        self.watch, self.absent = watch, absent

    def create_args_for_root(self, root_fn: Any, *others: Any, **options: Any) -> Any:
        function, given = super().create_args_for_root(root_fn, *others, **options)
        self.watch.codes[function.__code__] = self.absent  # another one where there are **kwargs
        names = root_fn.__code__.co_varnames
        return function, [
            None if name in self.absent else value
            for name, value in zip(names, given, strict=False)
        ]

    def keys(self, obj: fx.Proxy) -> Any:
        """What Python asks for in f(**kwargs); no other use of kwargs is let through."""
        return [REST] if str(obj.node.target).startswith("**") else super().keys(obj)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (dict, list)) and type(a).__module__ not in (
            "builtins",
            "torch.fx.immutable_collections",
        ):
            raise TypeError(f"a {type(a).__name__} would become a plain container")
        return super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _handed_on(graph: fx.Graph) -> None:
    """kwargs in the place of kwargs[REST], for code_of to write as f(**kwargs)."""
    for node in graph.nodes:
        if node.target is operator.getitem and node.args[1] == REST:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _shadow(
    module: nn.Module, watch: _Watch, path: tuple[str, ...], known: dict[int, nn.Module]
) -> nn.Module:
    """A copy of a module and its children, sharing all, that reports reads and refuses writes."""
    if id(module) in known:
        return known[id(module)]
    cls = type(module)

    def __getattribute__(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if not name.startswith("__"):
            fields = object.__getattribute__(self, "__dict__")
            watch.read(path, name, value, name in fields)
        return value

    def __setattr__(self: Any, name: str, value: Any) -> None:
        watch.refuse(f"its forward sets {'.'.join((*path, name))}")

    seen = type.__new__(
        type(cls),
        cls.__name__,
        (cls,),
        {
            "__getattribute__": __getattribute__,
            "__setattr__": __setattr__,
            "__module__": cls.__module__,
        },
    )
    known[id(module)] = copy = object.__new__(seen)
    children = {
        key: None if child is None else _shadow(child, watch, (*path, key), known)
        for key, child in module._modules.items()
    }
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = children
    return copy


def _unsafe_signature(forward: Any) -> str:
    """Why a forward's signature cannot be kept; empty if it can."""
    if not isinstance(forward, types.FunctionType):
        return "its forward is not a plain function"
    if hasattr(forward, "__wrapped__"):
        return "its forward is decorated"
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_KEYWORD):
            return f"its forward takes {str(parameter).split(':')[0]}"
        if parameter.default is not parameter.empty and not isinstance(
            parameter.default, (bool, int, float, str, type(None))
        ):
            return f"its forward has a default for {parameter.name} that a trace cannot write"
    return ""


def trace(module: nn.Module, assume: bool = True) -> Trace:
    """Trace the forward of a module with its children as leaves; the module is not touched.

    ``assume``: arguments that it tests for None are None.
    """
    inner = others.checkpointed(type(module).forward)
    forward = inner or type(module).forward
    refusal = _unsafe_signature(forward)
    if refusal:
        return Trace(None, refusal, ())
    watch, absent = _Watch(), tested_for_none(forward) if assume else ()
    profiler, collecting = sys.getprofile(), gc.isenabled()
    graph = None
    gc.disable()  # a generator that it closes would seem to be entered by the forward
    try:
        shadow = _shadow(module, watch, (), {})
        type.__setattr__(type(shadow), "forward", forward)
        watch.codes[forward.__code__] = absent
        with _Constants(watch):
            sys.setprofile(watch.profile)
            watch.running = True
            graph = _Tracer(watch, absent).trace(shadow)
            _handed_on(graph)
    except Exception as error:  # a forward can fail on proxies in any way
        what = str(error).partition("\n")[0]
        watch.refusals.append(f"torch.fx cannot trace its forward ({type(error).__name__}: {what})")
    finally:
        watch.running = False
        sys.setprofile(profiler)
        if collecting:
            gc.enable()
    refusals = [
        reason for code, names in watch.codes.items() for reason in unsafe_source(code, names)
    ] + watch.refusals
    if rest_of(forward.__code__):
        refusals += [
            f"its forward hands on to {code.co_name} what may be an argument of it"
            for code, names in watch.codes.items()
            if names is None and rest_of(code)
        ]
    first = refusals[0] if refusals else ""
    return Trace(graph, first, tuple(watch.guards.items()), absent, inner is not None)
