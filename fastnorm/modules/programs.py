"""What torch.fx and TorchScript, which read source or class, are told about a layer of ours."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from torch import Tensor, fx, nn

Proxy = fx.Proxy


def leaf(module: nn.Module, *inputs: Any) -> Tensor:
    """A call of the layer as one node of a torch.fx graph, as the layers of torch.nn are: a Proxy,
    which stands for the output."""
    tracer: Any = next(x for x in inputs if isinstance(x, Proxy)).tracer
    kind = type(tracer.root).__name__
    if "forward" in tracer.root.__dict__:
        raise fx.proxy.TraceError(
            f"torch.fx reads the forward of the class {kind}, not the one that fuse_ bound to this "
            "instance: call fastnorm.restore_ first"
        )
    path = tracer.path_of_module(module)
    if not path:
        raise fx.proxy.TraceError(
            f"{kind} is a layer, which torch.fx takes whole: trace the model it stands in"
        )
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    output: Tensor = tracer.create_proxy("call_module", path, inputs, {})
    return output


def twin_of(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """The layer as one of ``cls``, which it was derived from: the same parameters, nothing of
    ours."""
    twin = copy.copy(module)
    for name in ("_fastnorm_origin", "activation", "autocast"):
        twin.__dict__.pop(name, None)
    twin.__class__ = cls
    return twin


def unscriptable(module: nn.Module) -> NoReturn:
    """The error of torch.jit.script of a layer that only we have."""
    raise RuntimeError(
        f"TorchScript has no layer like {module!r}: call fastnorm.restore_(model) before "
        "torch.jit.script, and before ONNX made of it, to undo fuse_; or use torch.export, "
        "torch.jit.trace or torch.onnx.export, which take the model as it is"
    )


class Scriptable:
    """Gives torch.jit.script torch's own layer, with the same parameters, for one of ours."""

    def __prepare_scriptable__(self) -> nn.Module:
        module: Any = self
        torchs = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch."))
        activation = getattr(self, "activation", None)
        if torchs is nn.Module or activation or getattr(self, "approximate", None) == "sigmoid":
            unscriptable(module)
        return twin_of(module, torchs)
