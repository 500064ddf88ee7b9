"""The peers: an adapter of a few lines for each op that one of them has.

A peer is imported when it is first bound; whatever it raises becomes the note of its row. What it
wants prepared (parameters of another dtype, a flat view) is prepared when it is bound, outside the
time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.calls import Call, Gradients, Provider, through_autograd
from benchmarks.ops import Tensors
from benchmarks.problems import GRAPH, STEPS, Problem

BELOW_AUTOGRAD = "called below autograd, which the others go through"


@dataclass(frozen=True)
class Peer(Provider):
    """A package that may be installed, for CUDA tensors. `adapters` maps (op, variant) to a
    function that binds it, `forward_only` names those without a backward."""

    package: str = ""  # what is imported
    adapters: tuple[tuple[str, str, Callable[[Problem, Tensors], Call]], ...] = ()
    forward_only: tuple[str, ...] = ()

    def missing(self, device: str) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return f"{self.name} is not installed"
        return "it serves CUDA tensors" if device == "cpu" else None

    def serves(self, problem: Problem, mode: str) -> bool:
        if mode in (STEPS, GRAPH):  # about launches, torch's and ours
            return False
        if mode not in ("forward", "host") and problem.variant in self.forward_only:
            return False
        return self._adapter(problem) is not None

    def _adapter(self, problem: Problem) -> Callable[[Problem, Tensors], Call] | None:
        key = (problem.op, problem.variant)
        return next((bind for *names, bind in self.adapters if tuple(names) == key), None)

    def bind(self, problem: Problem, tensors: Tensors) -> Call:
        adapter = self._adapter(problem)
        assert adapter is not None, "asked only for what it serves"
        return adapter(problem, tensors)


# liger-kernel


def _liger_layer_norm(problem: Problem, tensors: Tensors) -> Call:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
    return through_autograd(lambda x, weight, bias: function(x, weight, bias, 1e-5), tensors)


# quack-kernels: rows [M, N] and fp32 parameters


def _quack_layer_norm(problem: Problem, tensors: Tensors) -> Call:
    quack = importlib.import_module("quack.rmsnorm")
    x = tensors["x"].detach().reshape(-1, problem.shape[-1])
    weight, bias = (tensors[name].detach().float() for name in ("weight", "bias"))

    def backward(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
        _, rstd, mean = result
        dx, *others = quack.layernorm_bwd(x, weight, dys[0].reshape(x.shape), rstd, mean)
        return (dx.view(problem.shape), *others)

    return Call(
        lambda: quack.layernorm_fwd(x, weight, bias, 1e-5, return_rstd=True, return_mean=True),
        backward,
        ("dx", "dweight", "dbias"),
        lambda result: result[0].view(problem.shape),
        BELOW_AUTOGRAD,
    )


# flag_gems: functions in the place of ATen's, which know no autograd


def _gems_batch_norm(problem: Problem, tensors: Tensors) -> Call:
    gems = importlib.import_module("flag_gems.ops.batch_norm")
    x, weight, bias, *running = (tensors[name].detach() for name in tensors)

    def backward(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
        return gems.batch_norm_backward(  # type: ignore[no-any-return]
            dys[0], x, weight, *running, *result[1:], True, 1e-5, [True, True, True]
        )

    return Call(
        lambda: gems.batch_norm(x, weight, bias, *running, True, 0.1, 1e-5),
        backward,
        ("dx", "dweight", "dbias"),
        lambda result: result[0],
        BELOW_AUTOGRAD,
    )


def _gems_layer_norm(problem: Problem, tensors: Tensors) -> Call:
    gems = importlib.import_module("flag_gems.ops.layernorm")
    weight, bias = tensors["weight"].detach(), tensors["bias"].detach()
    x = tensors["x"].detach().reshape(-1, *weight.shape)

    def backward(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
        dx, *others = gems.layer_norm_backward(
            dys[0].reshape(x.shape), x, weight.shape, *result[1:], weight, bias, [True] * 3
        )
        return (dx.view(problem.shape), *others)

    return Call(
        lambda: gems.layer_norm(x, weight.shape, weight, bias, 1e-5),
        backward,
        ("dx", "dweight", "dbias"),
        lambda result: result[0].view(problem.shape),
        BELOW_AUTOGRAD,
    )


def _gems_weight_norm(problem: Problem, tensors: Tensors) -> Call:
    gems = importlib.import_module("flag_gems.ops.weightnorm")
    dim = int(problem.variant.removeprefix("dim"))
    v, g = tensors["v0"].detach(), tensors["g0"].detach()

    def backward(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
        return gems.weight_norm_interface_backward(dys[0], v, g, result[1], dim)  # type: ignore[no-any-return]

    return Call(
        lambda: gems.weight_norm_interface(v, g, dim),
        backward,
        ("dv0", "dg0"),
        lambda result: result[0],
        BELOW_AUTOGRAD,
    )


def _gems_activation(name: str, **options: str) -> Callable[[Problem, Tensors], Call]:
    def bind(problem: Problem, tensors: Tensors) -> Call:
        gems = importlib.import_module(f"flag_gems.ops.{name}")
        x = tensors["x"].detach()
        forward = getattr(gems, name)
        gradient = getattr(gems, f"{name}_backward", None)

        def backward(result: Any, dys: tuple[Tensor, ...]) -> Gradients:
            return (gradient(dys[0], x, **options),)  # type: ignore[misc]

        return Call(
            lambda: forward(x, **options),
            backward if gradient else None,
            ("dx",),
            note=BELOW_AUTOGRAD,
        )

    return bind


# inplace-abn


def _inplace_abn(problem: Problem, tensors: Tensors) -> Call:
    function = importlib.import_module("inplace_abn").inplace_abn
    # written over by every call, with numbers of the same distribution
    x = tensors["x"].detach().clone(memory_format=torch.preserve_format)
    weight = tensors["weight"].detach() - 1e-5  # it adds eps to the magnitude of a weight
    others = [tensors[name].detach() for name in ("bias", "running_mean", "running_var")]
    return Call(
        lambda: function(x, weight, *others, True, 0.1, 1e-5, "identity"),
        None,
        note="writes over its input; called without gradients",
    )


# apex


def _apex_layer_norm(problem: Problem, tensors: Tensors) -> Call:
    apex = importlib.import_module("apex.normalization.fused_layer_norm")
    return through_autograd(
        lambda x, weight, bias: apex.fused_layer_norm_affine(x, weight, bias, weight.shape, 1e-5),
        tensors,
    )


# attorch: batch norm of at most four dimensions, with an activation and a residual


def _attorch_batch_norm(problem: Problem, tensors: Tensors) -> Call:
    function = importlib.import_module("attorch.batch_norm_layer").BatchNormAutoGrad.apply
    activation = problem.variant.split("+")[-1]
    name = None if activation in ("plain", "residual") else activation

    def run(x, weight, bias, running_mean, running_var, residual=None):  # type: ignore[no-untyped-def]
        return function(
            x, True, weight, bias, running_mean, running_var, 0.1, 1e-5, True, residual, name
        )

    return through_autograd(run, tensors)


def _attorch_layer_norm(problem: Problem, tensors: Tensors) -> Call:
    function = importlib.import_module("attorch.layer_norm_layer").LayerNormAutoGrad.apply
    return through_autograd(lambda x, weight, bias: function(x, weight, bias, 1e-5, False), tensors)


def _attorch_activation(problem: Problem, tensors: Tensors) -> Call:
    function = importlib.import_module("attorch.act_layers").ActFuncAutoGrad.apply
    name = {"gelu_tanh": "geluapprox"}.get(problem.variant, problem.variant)
    return through_autograd(lambda x: function(x, name, 0.0, True), tensors)


ATTORCH = (
    *("plain", "relu", "relu6", "silu", "gelu", "residual", "residual+relu", "residual+silu"),
)
PEERS = (
    Peer(
        "liger-kernel",
        package="liger_kernel",
        adapters=(("layer_norm", "plain", _liger_layer_norm),),
    ),
    Peer("apex", package="apex", adapters=(("layer_norm", "plain", _apex_layer_norm),)),
    Peer(
        "inplace-abn",
        package="inplace_abn",
        adapters=(("batch_norm", "plain", _inplace_abn),),
        forward_only=("plain",),
    ),
    Peer(
        "quack-kernels",
        slow=True,
        package="quack",
        adapters=(("layer_norm", "plain", _quack_layer_norm),),
    ),
    Peer(
        "flag_gems",
        slow=True,
        package="flag_gems",
        adapters=(
            ("batch_norm", "plain", _gems_batch_norm),
            ("layer_norm", "plain", _gems_layer_norm),
            ("layer_norm", "last3", _gems_layer_norm),
            ("weight_norm", "dim0", _gems_weight_norm),
            ("weight_norm", "dim2", _gems_weight_norm),
            ("activation", "gelu", _gems_activation("gelu", approximate="none")),
            ("activation", "gelu_tanh", _gems_activation("gelu", approximate="tanh")),
            ("activation", "silu", _gems_activation("silu")),
            ("activation", "selu", _gems_activation("selu")),
        ),
        forward_only=("selu",),
    ),
    Peer(
        "attorch",
        slow=True,
        package="attorch",
        adapters=(
            *(("batch_norm", variant, _attorch_batch_norm) for variant in ATTORCH),
            ("layer_norm", "plain", _attorch_layer_norm),
            *(
                ("activation", name, _attorch_activation)
                for name in ("gelu", "gelu_tanh", "silu", "selu")
            ),
        ),
    ),
)


def installed() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer.name] = importlib.metadata.version(peer.name)
    return found
