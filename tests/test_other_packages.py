"""Layers of timm and transformers, which replace_ knows where those packages are imported."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.layers import assert_same, everywhere, step, torch_warns

pytestmark = torch_warns

PLANES, ROWS = (3, 4, 6, 2), (3, 2, 8)


def both_ways(layer: nn.Module, shape: tuple[int, ...], is_now: str) -> None:
    """replace_ gives its class and its numbers in training and evaluation, restore_ undoes it."""
    layer = layer.double()
    twin, was = copy.deepcopy(layer), type(layer)
    report = fastnorm.replace_(layer)
    assert not any(row.why_skipped for row in report), report
    assert f"{type(layer).__module__}.{type(layer).__name__}" == f"fastnorm.modules.{is_now}"
    assert isinstance(layer, was)
    for training in (True, False):
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).requires_grad_()
        layer.train(training), twin.train(training)
        assert_same(step(layer, layer, x), step(twin, twin, x))
    if was.__name__ != "GELUTanh":  # a functools.partial, which TorchScript cannot take
        scripted = torch.jit.script(layer)
        torch.testing.assert_close(scripted(x), twin(x), rtol=1e-9, atol=1e-11)
    fastnorm.restore_(layer)
    assert type(layer) is was


TRANSFORMERS = ["GELUActivation", "GELUTanh", "NewGELUActivation", "QuickGELUActivation"]


@everywhere
@pytest.mark.parametrize("name", [*TRANSFORMERS, "SiLUActivation"])
def test_activations_of_transformers(name: str, backend: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    make = getattr(activations, name, None)
    if make is None:
        pytest.skip(f"this version of transformers has no {name}")
    both_ways(make(), ROWS, f"transformers.{name}")


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm.layers alone, if torchvision, which timm imports but its layers do not use, is absent
    or made for another torch."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    before = set(sys.modules)
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("torchvision") is None:
            stack.enter_context(without_torchvision())
        yield importlib.import_module("timm.layers.norm_act")
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "timm" or name == "fastnorm.modules.timm":
            del sys.modules[name]


@contextlib.contextmanager
def without_torchvision() -> Iterator[None]:
    names = ["ops", "ops.misc", "models", "models.feature_extraction"]
    stand_ins = {f"torchvision.{name}": types.ModuleType(name) for name in names}
    misc: Any = stand_ins["torchvision.ops.misc"]
    misc.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    extraction: Any = stand_ins["torchvision.models.feature_extraction"]
    extraction.create_feature_extractor = extraction.get_graph_node_names = None
    package = types.ModuleType("timm")  # without its __init__, which imports all of its models
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    package.__path__ = list(spec.submodule_search_locations or [])
    stand_ins |= {"torchvision": types.ModuleType("torchvision"), "timm": package}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


@everywhere
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.GELU, nn.Identity])
def test_timms_batch_norm_with_activation(timm: Any, act: type[nn.Module], backend: str) -> None:
    both_ways(timm.BatchNormAct2d(4, act_layer=act), PLANES, "timm.BatchNormAct2d")


@everywhere
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.GELU])
def test_timms_layer_norm_with_activation(timm: Any, act: type[nn.Module], backend: str) -> None:
    both_ways(timm.LayerNormAct(8, act_layer=act), ROWS, "timm.LayerNormAct")


def test_timms_activation_is_folded_into_the_pass(timm: Any) -> None:
    layer = timm.BatchNormAct2d(4, act_layer=nn.SiLU)
    fastnorm.replace_(layer)
    with fastnorm.backend("reference"):
        y = layer(torch.randn(PLANES))
    assert type(y.grad_fn).__name__ == "BatchNormFunctionBackward"


def test_timms_layer_with_an_activation_that_we_lack_or_a_drop_layer(timm: Any) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    both_ways(timm.BatchNormAct2d(4, act_layer=Double), PLANES, "timm.BatchNormAct2d")
    dropping = timm.BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(1.0))
    fastnorm.replace_(dropping)
    assert dropping(torch.randn(PLANES)).abs().max() == 0
