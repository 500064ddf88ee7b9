"""Which backends exist on this machine, and which one serves a tensor."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import (
    is_functorch_wrapped_tensor,
    unwrap_if_dead,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

BACKENDS = ("reference", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)
POLICIES = ("opaque", "decompose")


class Rule(NamedTuple):
    """Who serves a CUDA tensor under "auto": the first of ``backends`` that this machine has, for
    tensors of at least ``from_elements[backend]`` elements; torch's own function for smaller ones.
    """

    backends: tuple[str, ...]
    from_elements: dict[str, int]


# Where a call of ours begins to cost less than torch's own. A Triton launch takes 10-40 us of host
# time, about as long as a copy of 2^18 elements and its launch; an extension's call takes about
# one, so that what remains is the autograd Function: 2^16.
_BY_HOST_TIME = {"cuda": 1 << 16, "triton": 1 << 18}

# One rule per family, provisional until measured on a GPU: a table of measured thresholds replaces
# it. CUDA comes first everywhere, for a reason of each family's own.
RULES = {
    # the same bytes by the same kernel: the cheaper launch decides
    "activation": Rule(("cuda", "triton"), _BY_HOST_TIME),
    # holds tiles in shared memory between the passes; reads misaligned planes 16 bytes at a time
    "batch_norm": Rule(("cuda", "triton"), _BY_HOST_TIME),
    # dweight and dbias are finished inside the launch; rows of any alignment 16 bytes at a time
    "layer_norm": Rule(("cuda", "triton"), _BY_HOST_TIME),
    # all layers of a model in one launch
    "weight_norm": Rule(("cuda", "triton"), _BY_HOST_TIME),
}


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(
            f"unknown backend {name!r} in {source}: choose one of {', '.join(CHOICES)}"
        )
    return name


_forced = _checked(os.environ.get("FASTNORM_BACKEND", "auto"), "FASTNORM_BACKEND")


def set_backend(name: str) -> None:
    """Choose the backend of the whole process: "auto", "reference", "triton" or "cuda".

    ``auto`` runs a kernel of ours for CUDA tensors large enough to gain and torch's own function
    for everything else. A forced backend that cannot serve a tensor raises RuntimeError when it is
    given one, never falls back. The choice is process-wide, because autograd runs the backward of
    CUDA tensors on other threads.

    Raises:
        ValueError: ``name`` is none of the four.

    Example:
        >>> import fastnorm
        >>> fastnorm.set_backend("auto")
    """
    global _forced
    _forced = _checked(name, "set_backend()")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend for the length of a ``with`` block; see :func:`set_backend`.

    Example:
        >>> import torch, fastnorm
        >>> with fastnorm.backend("reference"):
        ...     fastnorm.functional.silu(torch.zeros(2))
        tensor([0., 0.])
    """
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


_policy = "opaque"


class compile_policy:
    """Choose what torch.compile sees of our layers: for the process, or the length of a ``with``.

    ``"opaque"``, the default: our op, one kernel that inductor calls and does not look into.
    ``"decompose"``: the ATen formula, of which inductor makes code of its own, fused with what
    stands around the layer. It goes before a forced backend, in compiled code alone. Expect
    "opaque" to be the faster one where a layer moves much memory by itself (batch norm in training,
    a norm with a folded residual or activation), "decompose" where a light layer stands among
    pointwise operations (an activation between additions, batch norm in evaluation) or where
    tensors are small; measure both. torch.export and torch.jit.trace always see the formula: their
    programs run where this package is not installed.

    Raises:
        ValueError: ``name`` is neither of the two.

    Example:
        >>> import torch, fastnorm
        >>> with fastnorm.compile_policy("decompose"):
        ...     layer = torch.compile(fastnorm.LayerNorm(8), backend="eager")
        ...     layer(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, name: str) -> None:
        global _policy
        if name not in POLICIES:
            raise ValueError(
                f"unknown compile policy {name!r}: choose one of {', '.join(POLICIES)}"
            )
        self.before, _policy = _policy, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _policy
        _policy = self.before


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors: TRITON_INTERPRET=1 before the
    first kernel."""
    try:
        knobs = importlib.import_module("triton.knobs")
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def _too_old() -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability()
    if capability >= (8, 0):
        return None
    return f"the GPU has compute capability {capability[0]}.{capability[1]}: the kernels need 8.0"


@functools.cache
def _triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton"
    if interpreting():
        return None
    if torch.cuda.is_available():
        return _too_old()
    return (
        "no CUDA device: set TRITON_INTERPRET=1 before the first kernel "
        "to interpret the kernels on CPU tensors"
    )


@functools.cache
def _extension() -> Any:
    return importlib.import_module("fastnorm._cuda")


@functools.cache
def _has_extension() -> bool:
    try:
        _extension()
    except ImportError:
        return False
    return True


@functools.cache
def emulating() -> bool:
    """Whether the CUDA backend is the tests' build for the CPU, which serves CPU tensors."""
    return _has_extension() and bool(getattr(_extension(), "emulated", False))


@functools.cache
def _cuda_missing() -> str | None:
    try:
        reason: str | None = _extension().unavailable()
    except ImportError as error:
        return (
            f"this installation has no compiled extension ({error}): install it where nvcc is "
            "found, with FASTNORM_BUILD_CUDA=1 pip install --force-reinstall --no-deps "
            "fastnorm-torch, or use backend 'triton'"
        )
    if reason is None and not emulating() and torch.cuda.is_available():
        return _too_old()
    return reason


def backends() -> dict[str, str | None]:
    """Tell which backends this machine has: name -> None where it is available, otherwise the
    reason why not.

    Example:
        >>> import fastnorm
        >>> fastnorm.backends()["reference"] is None
        True
    """
    return {"reference": None, "triton": _triton_missing(), "cuda": _cuda_missing()}


@functools.cache
def _serves(name: str, is_cuda: bool, is_cpu: bool) -> bool:
    """Whether this machine's backend of that name serves such tensors."""
    if name == "reference":
        return True
    missing = _triton_missing() if name == "triton" else _cuda_missing()
    on_cpu = interpreting() if name == "triton" else emulating()
    return missing is None and (is_cuda or (on_cpu and is_cpu))


def _refusal(name: str, x: Tensor) -> str | None:
    """Why backend `name` cannot serve x; None if it can."""
    if _serves(name, x.is_cuda, x.is_cpu):
        return None
    missing = _triton_missing() if name == "triton" else _cuda_missing()
    return missing or f"it serves CUDA tensors, and this one is on {x.device}"


@functools.cache
def _first_that_is_here(family: str) -> str | None:
    """The backend of ours that serves CUDA tensors under "auto"; None where this machine has
    none."""
    if torch.version.hip is not None:
        return None
    missing = backends()
    found = next((name for name in RULES[family].backends if missing[name] is None), None)
    if found != "cuda" and _has_extension():
        _say_once(
            f"fastnorm's CUDA backend cannot be used, {found or 'torch'} serves instead: "
            f"{missing['cuda']}"
        )
    return found


def _preferred(family: str) -> str | None:
    return _first_that_is_here(family)


# what torch.compiler.assume_constant_result does, which would import torch._dynamo and triton here
_preferred._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _for_torch_alone() -> bool:
    return (
        _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )


def exporting() -> bool:
    """Whether torch.export is at work: its flag, because under torch 2.11's Dynamo
    torch.compiler.is_exporting() is true in every compilation."""
    return torch.compiler._is_exporting_flag


def transformed() -> bool:
    """Whether a call has to be made of torch's functions alone: torch.func, forward-mode AD and
    torch.jit.trace do not see through ours, and what torch.export writes has to run without us."""
    if is_compiling():
        return _policy == "decompose" or exporting()
    return _for_torch_alone()


DISPATCHER = "dispatcher"  # the way of a call through torch's dispatcher
# the ways to a backend whose kernels launch on the current device, for tensors that are not on it
ELSEWHERE = {name: f"{name} elsewhere" for name in ("triton", "cuda")}

_current_device = getattr(torch._C, "_cuda_getDevice", None)  # absent in a build for the CPU


def _watched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch's dispatcher, given these, would do more than come back to us: for a mode or a
    profiler; for a tensor that is more than its data, as a subclass, what torch.func has left of a
    tensor, or a view that negates.
    """
    if _len_torch_dispatch_stack() > 0 or _profiler_enabled():
        return True
    for t in tensors:
        if t is not None:
            kind = type(t)
            if t.is_neg() or (
                kind is not Parameter and (kind is not Tensor or is_functorch_wrapped_tensor(t))
            ):
                return True
    return False


@functools.cache
def _served(forced: str, family: str, is_cuda: bool, is_cpu: bool) -> tuple[str | None, int]:
    """The way of tensors on such a device that are no more than their data, and from how many
    elements they take it."""
    if forced == "auto":
        backend = _preferred(family) if is_cuda else None
        return backend, 0 if backend is None else RULES[family].from_elements[backend]
    # elsewhere nothing is computed, or the backend does not serve: which the dispatcher says, after
    # the family's checks
    straight = (is_cuda or is_cpu) and _serves(forced, is_cuda, is_cpu)
    return forced if straight else DISPATCHER, 0


def way(family: str, *tensors: Tensor | None, elements: int | None = None) -> str | None:
    """How a call is made, decided before any Function or op of ours is entered: by torch's own
    function (None), by our op through torch's dispatcher (DISPATCHER), or straight by the backend
    of that name (ELSEWHERE's name for it), where the dispatcher would add nothing but time.

    The first of ``tensors``, x, decides for all. ``elements``: of all that one launch serves, where
    x is not the only one.
    """
    x = tensors[0]
    assert x is not None
    if is_compiling():  # a size would become a guard: one compiled graph serves every batch size
        ours = _forced != "auto" or (x.is_cuda and _preferred(family) is not None)
        return DISPATCHER if ours and not transformed() else None
    on_cuda = x.is_cuda
    found, least = _served(_forced, family, on_cuda, x.is_cpu)
    if found is None or (least and (x.numel() if elements is None else elements) < least):
        return None
    if _for_torch_alone():
        return None
    if _watched(tensors):
        return None if _escaped(x) else DISPATCHER
    return _placed(found, x) if on_cuda else found


def _placed(backend: str, x: Tensor) -> str:
    """The way to a backend that serves x, on CUDA."""
    if x.get_device() != _current_device():  # type: ignore[misc]
        return ELSEWHERE.get(backend, backend)
    return backend


def _escaped(x: Tensor) -> bool:
    """Whether x has left the vmap that made it: torch's functions say what to do then."""
    return is_functorch_wrapped_tensor(x) and is_functorch_wrapped_tensor(unwrap_if_dead(x))


def way_to_op(family: str, x: Tensor, *others: Tensor | None) -> str:
    """The way of a call that torch has no function for."""
    if is_compiling() or x.is_meta or _watched((x, *others)):
        return DISPATCHER
    return way_to_backend(family, x)


def way_to_backend(family: str, x: Tensor) -> str:
    """The way of a call that torch's dispatcher has nothing to do with any more."""
    backend = select(family, x)
    return _placed(backend, x) if x.is_cuda else backend


def select(family: str, x: Tensor) -> str:
    """The backend that serves x inside an op; raises RuntimeError when the forced one cannot."""
    if _forced == "auto":
        return (_preferred(family) if x.is_cuda else None) or "reference"
    if not _serves(_forced, x.is_cuda, x.is_cpu):
        raise RuntimeError(
            f"backend {_forced!r} was forced but cannot serve this call: {_refusal(_forced, x)}"
        )
    return _forced
