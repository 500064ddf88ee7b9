"""A forward written from a graph, for one instance."""

from __future__ import annotations

import inspect
import linecache
import re
import types
from typing import Any

from torch import fx, nn

from fastnorm.surgery.tracing import REST, Guard


def code_of(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """A graph as the source of a forward, and the globals that this source uses."""
    for node in graph.nodes:
        node.type = None  # annotations belong to the signature, which is the original's
    graph.lint()
    code = graph.python_code("self")
    source = re.sub(rf"\b{REST} = (\w+)", r"**\1", code.src)
    names = set(re.findall(r"\w+", source))
    return source, {name: value for name, value in code.globals.items() if name in names}


class FusedForward:
    """The forward of one instance, written by fuse_; deepcopy and pickle take it along.

    Attributes that the trace has read are guards: another value at call time is a RuntimeError, and
    so is a hook where there must be none.
    """

    def __init__(
        self,
        module: nn.Module,
        source: str,
        namespace: dict[str, Any],
        guards: tuple[Guard, ...],
        unhooked: tuple[tuple[str, ...], ...] = (),
        absent: tuple[str, ...] = (),
        checkpointed: bool = False,
    ) -> None:
        self.module = module
        self.source = source
        self.namespace = namespace
        self.guards = tuple(dict(guards).items())
        self.unhooked = unhooked
        self.absent = absent
        self.checkpointed = checkpointed
        self._compile()

    def _compile(self) -> None:
        name = f"<fastnorm: fused forward of {type(self.module).__name__} {hash(self.source):x}>"
        linecache.cache[name] = (
            len(self.source),
            None,
            self.source.splitlines(keepends=True),
            name,
        )
        scope = dict(self.namespace)
        exec(compile(self.source, name, "exec"), scope)  # torch.fx writes forwards as source
        self.function = scope["forward"]
        self.asserts = "torch._assert(" in self.source
        signature = inspect.signature(type(self.module).forward)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        names = list(self.__signature__.parameters)
        self.positions = [(name, names.index(name)) for name in self.absent]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._gives_way(args, kwargs):
            return type(self.module).forward(self.module, *args, **kwargs)
        for path, expected in self.guards:
            value = self._at(path)
            if value is not expected and (type(value) is not type(expected) or value != expected):
                raise RuntimeError(
                    f"{'.'.join(path)} was {expected!r} when fuse_ traced "
                    f"{type(self.module).__name__}.forward and is {value!r} now: "
                    "call fastnorm.restore_ first, and fuse_ again"
                )
        for path in self.unhooked:
            if self._at(path):
                raise RuntimeError(
                    f"{'.'.join(path)} is not empty any more: the fused forward of "
                    f"{type(self.module).__name__} gives that layer, or takes from it, more than "
                    "one tensor; call fastnorm.restore_ first, and fuse_ again"
                )
        if not self.asserts:
            return self.function(self.module, *args, **kwargs)
        try:
            return self.function(self.module, *args, **kwargs)
        except AssertionError:
            # its text was made while tracing, of what stood for the inputs: the class's own forward
            # fails in the same place with these inputs
            type(self.module).forward(self.module, *args, **kwargs)
            raise

    def _at(self, path: tuple[str, ...]) -> Any:
        value: Any = self.module
        for name in path:
            value = getattr(value, name, "missing")
        return value

    def _gives_way(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is one that the trace does not stand for."""
        for name, position in self.positions:
            value = args[position] if position < len(args) else kwargs.get(name)
            if value is not None:
                return True
        module = self.module
        return self.checkpointed and module.training and bool(module.gradient_checkpointing)

    @property
    def _torchscript_modifier(self) -> None:
        """What torch.jit.script asks first of a forward that it is about to read."""
        raise RuntimeError(
            f"the forward of {type(self.module).__name__} was written by fuse_, and TorchScript "
            "cannot read it: call fastnorm.restore_(model) before torch.jit.script"
        )

    def __getstate__(self) -> dict[str, Any]:
        named = {
            key: value.__name__
            for key, value in self.namespace.items()
            if isinstance(value, types.ModuleType)
        }
        objects = {key: value for key, value in self.namespace.items() if key not in named}
        return {
            "module": self.module,
            "source": self.source,
            "guards": self.guards,
            "unhooked": self.unhooked,
            "absent": self.absent,
            "checkpointed": self.checkpointed,
            "names": named,
            "objects": objects,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {key: __import__(name, fromlist=["*"]) for key, name in state["names"].items()}
        self.module, self.source, self.guards = state["module"], state["source"], state["guards"]
        self.unhooked = state["unhooked"]
        self.absent, self.checkpointed = state["absent"], state["checkpointed"]
        self.namespace = {**state["objects"], **modules}
        self._compile()
