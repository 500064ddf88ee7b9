"""What can be folded into a norm: activations by all their names, sums that a trace shows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastnorm.modules import activation
from fastnorm.surgery import others
from fastnorm.surgery.edits import title

# which activation is this?

_GELU = {"none": "gelu", "tanh": "gelu_tanh", "sigmoid": "gelu_sigmoid"}
_MODULES: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.ReLU: lambda module: "relu",
    nn.ReLU6: lambda module: "relu6",
    nn.LeakyReLU: lambda module: "leaky_relu" if module.negative_slope == 0.01 else None,
    nn.ELU: lambda module: "elu" if module.alpha == 1.0 else None,
    nn.SELU: lambda module: "selu",
    nn.GELU: lambda module: _GELU.get(module.approximate),
    nn.SiLU: lambda module: "silu",
    nn.Hardswish: lambda module: "hardswish",
    nn.Mish: lambda module: "mish",
    nn.Tanh: lambda module: "tanh",
    nn.Sigmoid: lambda module: "sigmoid",
    activation.SELU: lambda module: "selu",
    activation.GELU: lambda module: _GELU.get(module.approximate),
    activation.SiLU: lambda module: "silu",
}

_INPLACE = ("inplace", False)
# function -> name and the arguments after the input, each with the value that the fused form has
# (inplace may be anything: the norm's output that it overwrites is nobody else's)
_FUNCTIONS: dict[Any, tuple[str, tuple[tuple[str, Any], ...]]] = {
    F.relu: ("relu", (_INPLACE,)),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.relu6: ("relu6", (_INPLACE,)),
    F.leaky_relu: ("leaky_relu", (("negative_slope", 0.01), _INPLACE)),
    F.leaky_relu_: ("leaky_relu", (("negative_slope", 0.01),)),
    F.elu: ("elu", (("alpha", 1.0), _INPLACE)),
    F.elu_: ("elu", (("alpha", 1.0),)),
    F.selu: ("selu", (_INPLACE,)),
    F.selu_: ("selu", ()),
    torch.selu: ("selu", ()),
    F.silu: ("silu", (_INPLACE,)),
    F.hardswish: ("hardswish", (_INPLACE,)),
    F.mish: ("mish", (_INPLACE,)),
    F.tanh: ("tanh", ()),
    torch.tanh: ("tanh", ()),
    torch.tanh_: ("tanh", ()),
    F.sigmoid: ("sigmoid", ()),
    torch.sigmoid: ("sigmoid", ()),
    torch.sigmoid_: ("sigmoid", ()),
}
_METHODS = {
    "relu": "relu",
    "relu_": "relu",
    "tanh": "tanh",
    "tanh_": "tanh",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def idle(module: nn.Module) -> bool:
    """Whether a layer gives back its input and nobody can see that it does."""
    return type(module) is nn.Identity and not hooked(module) and "forward" not in module.__dict__


def activation_of(module: nn.Module) -> tuple[str, str]:
    """(name, "") of the activation a module is, ("", why it cannot be folded) if it is none."""
    find = _MODULES.get(type(module), others.activation_name)
    name = find(module)
    if name is None and type(module) not in _MODULES:
        return "", f"followed by {title(type(module))}"
    if name is None:
        return "", f"no fused activation has the parameters of {module}"
    if hooked(module):
        return "", f"hooks on the activation ({title(type(module))})"
    if "forward" in module.__dict__:
        return "", f"a forward is bound to the activation ({title(type(module))})"
    return name, ""


def _of_call(node: fx.Node) -> tuple[str, str]:
    """The same for a call of a function or a method."""
    label = (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )
    other = "", f"followed by {label}"
    if node.op == "call_method":
        name = _METHODS.get(str(node.target), "") if len(node.args) == 1 and not node.kwargs else ""
        return (name, "") if name else other
    if node.target is F.gelu:
        options = {**dict(zip(("approximate",), node.args[1:], strict=False)), **node.kwargs}
        name = _GELU.get(str(options.pop("approximate", "none")), "")
        return (name, "") if name and not options.keys() - {"input"} else other
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return other
    name, parameters = _FUNCTIONS[node.target]
    given = {
        **dict(zip((key for key, _ in parameters), node.args[1:], strict=False)),
        **node.kwargs,
    }
    given.pop("input", None)
    for key, value in given.items():
        expected = dict(parameters).get(key, given)
        if key != "inplace" and (isinstance(value, fx.Node) or value != expected):
            return "", f"no fused activation has the parameters of {label}({key}={value})"
    return name, ""


# what a traced forward shows around a norm


class Fold(NamedTuple):
    """A norm's call and what goes into it."""

    norm: fx.Node
    activation: str
    residual: fx.Node | None
    add: fx.Node | None
    last: fx.Node  # whose value the fused norm's output is
    idle: tuple[fx.Node, ...] = ()  # the Identity layers between these
    shared: bool = False  # whether the sum before a layer norm has users beside it


_ADDS = (operator.add, operator.iadd, torch.add)
_SCALARS = (
    "size",
    "dim",
    "item",
    "numel",
    "tolist",
    "ndimension",
    "stride",
    "nelement",
    "is_contiguous",
)


def _tensor(node: Any) -> bool:
    """Whether a node is surely a tensor, as far as its forward was called with tensors."""
    if not isinstance(node, fx.Node) or node.op == "output":
        return False
    if node.op == "placeholder":
        # one with a default may be anything
        return not node.args and not str(node.target).startswith("*")
    if node.op == "call_method":
        return node.target not in _SCALARS and _tensor(node.args[0])
    if node.op == "call_function":
        return node.target is not getattr and any(
            _tensor(source) for source in node.all_input_nodes
        )
    return True


def _terms(node: fx.Node) -> tuple[Any, Any] | None:
    """The two operands if a node adds two tensors and does nothing else."""
    method = node.op == "call_method" and node.target in ("add", "add_")
    function = node.op == "call_function" and node.target in _ADDS
    if not (method or function) or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    return (first, second) if _tensor(first) and _tensor(second) and first is not second else None


def _added_in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def _mutates(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call may change one of its inputs."""
    if node.op == "call_module":
        return any(
            getattr(module, "inplace", False)
            for module in root.get_submodule(str(node.target)).modules()
        )
    name = str(getattr(node.target, "__name__", node.target))
    if name.endswith("_") and not name.endswith("__"):
        return True
    if (
        node.op == "call_function"
        and name.startswith("i")
        and node.target is getattr(operator, name, None)
    ):
        return True
    return (
        "out" in node.kwargs or True in node.args or node.kwargs.get("inplace", False) is not False
    )


def _disturbed(first: fx.Node, last: fx.Node, root: nn.Module) -> bool:
    """Whether anything between two nodes may change a tensor in place."""
    node = first.next
    while node is not last:
        if _mutates(node, root):
            return True
        node = node.next
    return False


def _past_idle(node: fx.Node, root: nn.Module) -> tuple[fx.Node, ...]:
    """The node, and the Identity layers after it for as long as each is the only user."""
    chain = [node]
    while len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if user.op != "call_module" or user.args != (chain[-1],) or user.kwargs:
            break
        if not idle(root.get_submodule(str(user.target))):
            break
        chain.append(user)
    return tuple(chain)


def _following(node: fx.Node, root: nn.Module) -> tuple[str, str, tuple[fx.Node, ...]]:
    """The activation that a node's only user is, past Identity layers: its name, else why there is
    none, and the nodes up to the user."""
    chain = _past_idle(node, root)
    users = chain[-1].users
    if len(users) != 1:
        return "", f"its output has {len(users)} users" if users else "its output is not used", ()
    user = next(iter(users))
    if user.op == "output":
        return "", "nothing follows it in its forward", ()
    if user.op == "call_module":
        return *activation_of(root.get_submodule(str(user.target))), (*chain, user)
    return *_of_call(user), (*chain, user)


def match(node: fx.Node, root: nn.Module) -> Fold | str:
    """What can be folded into the norm that a node calls, or why nothing can."""
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return "it is called with more than its input"
    if isinstance(root.get_submodule(str(node.target)), nn.LayerNorm):
        return _match_layer_norm(node, root)
    chain = _past_idle(node, root)
    if len(chain[-1].users) == 1:
        add = next(iter(chain[-1].users))
        terms = _terms(add)
        if terms is not None:
            return _match_add(chain, add, terms, root)
    name, reason, path = _following(node, root)
    return Fold(node, name, None, None, path[-1], path[1:-1]) if name else reason


def _match_add(
    chain: tuple[fx.Node, ...], add: fx.Node, terms: tuple[Any, Any], root: nn.Module
) -> Fold | str:
    """What is added to the last of a chain, which a norm begins."""
    norm, last = chain[0], chain[-1]
    if _added_in_place(add) and terms[0] is not last:
        return "it is added in place into another tensor"
    if _disturbed(norm, add, root):
        return "an in-place operation stands between the norm and the addition"
    name, reason, path = _following(add, root)
    if "hooks" in reason:
        return reason
    residual = terms[1] if terms[0] is last else terms[0]
    after = path[1:-1] if name else ()
    return Fold(
        norm, name or "identity", residual, add, path[-1] if name else add, (*chain[1:], *after)
    )


_LOOKS = ("retain_grad", "register_hook", "backward")


def _seen(add: fx.Node) -> bool:
    """Whether a sum's own gradient may be looked at: one call makes sum and norm, so that what the
    norm sends back to the sum is not part of it."""
    return any(user.op == "output" or user.target in _LOOKS for user in add.users)


def _passes_others(first: fx.Node, last: fx.Node, root: nn.Module) -> bool:
    """Whether a module that may change a tensor in place unseen stands between two nodes."""
    node = first.next
    while node is not last:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if not type(module).__module__.startswith("torch.nn."):
                return True
        node = node.next
    return False


def _match_layer_norm(node: fx.Node, root: nn.Module) -> Fold | str:
    name, reason, path = _following(node, root)
    add: Any = node.args[0]
    terms = _terms(add)
    plain = terms is not None and not _added_in_place(add)
    last, between = (path[-1], path[1:-1]) if name else (node, ())
    if terms is not None and plain and not _disturbed(add, node, root) and "hooks" not in reason:
        shared = len(add.users) > 1
        if not _passes_others(add, node, root) and not (shared and _seen(add)):
            return Fold(node, name or "identity", terms[1], add, last, between, shared)
        reason = "its sum is returned, or a module stands between" if not name else reason
    return Fold(node, name, None, None, last, between) if name else reason


def _position(fold: Fold, before: bool) -> fx.Node:
    """Before which node the one call stands: there its inputs are known, and no output is used."""
    if fold.add is None:
        return fold.norm
    if not before:
        return fold.add
    node = fold.add.next
    while node is not fold.norm:
        if node in fold.add.users:
            return fold.add
        node = node.next
    return fold.norm


def rewrite(fold: Fold, root: nn.Module) -> None:
    """Change the graph: one call in place of the norm, the addition and the activation."""
    graph, norm = fold.norm.graph, fold.norm
    before = isinstance(root.get_submodule(str(norm.target)), nn.LayerNorm)
    with graph.inserting_before(_position(fold, before)):
        source, residual = norm.args[0], fold.residual
        if fold.add is not None and before:
            source = fold.add.args[0]
        elif fold.add is not None and _added_in_place(fold.add):
            # the sum keeps the dtype of the norm's output, which is its input's
            dtype = graph.call_function(getattr, (source, "dtype"))
            residual = graph.call_method("to", (residual, dtype))
        arguments = (source,) if residual is None else (source, residual)
        if fold.shared and fold.add is not None:
            both = graph.call_module(str(norm.target), (*arguments, True))
            fused, total = (graph.call_function(operator.getitem, (both, k)) for k in (0, 1))
            fold.add.replace_all_uses_with(total)
        else:
            fused = graph.call_module(str(norm.target), arguments)
    fold.last.replace_all_uses_with(fused)
    folded = {fold.last, norm, fold.add, *fold.idle}
    for node in reversed(graph.nodes):  # users before what they use
        if node in folded:
            graph.erase_node(node)
