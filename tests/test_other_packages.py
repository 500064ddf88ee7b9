"""Layers of timm and transformers, which replace_ knows where those packages are imported."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from fastnorm.modules import permuted
from tests.layers import assert_same, everywhere, step, torch_warns

pytestmark = torch_warns

PLANES, ROWS = (3, 4, 6, 2), (3, 2, 8)


# torch.jit.script refuses them as they come: a functools.partial, a call of super().forward
NO_SCRIPT = (
    "transformers.GELUTanh",
    *(
        f"permuted.{name}"
        for name, form in permuted._FORMS.values()
        if form is permuted._EitherFormat
    ),
)


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
    if is_now not in NO_SCRIPT:
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


@everywhere
@pytest.mark.parametrize("name", ["GELU", "GELUTanh", "QuickGELU"])
def test_timms_activations(timm: Any, name: str, backend: str) -> None:
    make = getattr(sys.modules["timm.layers.activations"], name)
    both_ways(make(), ROWS, f"timm.{name}")
    # and it is folded as well as before
    for replaced in (False, True):
        model = nn.Sequential(nn.BatchNorm2d(4), make())
        if replaced:
            assert fastnorm.replace_(model).changed == 2
        assert fastnorm.fuse_(model).changed == 2


@everywhere
def test_timms_layer_norms(timm: Any, backend: str) -> None:
    norms = sys.modules["timm.layers.norm"]
    both_ways(norms.LayerNorm(8), ROWS, "timm.LayerNorm")
    both_ways(norms.LayerNorm(8, affine=False), ROWS, "timm.LayerNorm")
    both_ways(norms.LayerNorm2d(4), PLANES, "timm.LayerNorm2d")


def test_timms_layer_norms_are_one_kernel_but_for_its_fast_norm(timm: Any) -> None:
    norms = sys.modules["timm.layers.norm"]
    for layer, x in ((norms.LayerNorm(8), ROWS), (norms.LayerNorm2d(4), PLANES)):
        twin = copy.deepcopy(layer)
        fastnorm.replace_(layer)
        with fastnorm.backend("reference"):
            assert "LayerNormFunction" in names_of_graph(layer(torch.randn(x)))
            layer._fast_norm = twin._fast_norm = True
            assert "LayerNormFunction" not in names_of_graph(layer(torch.randn(x)))
            with torch.autocast("cpu", torch.bfloat16):
                given = torch.randn(x)
                assert layer(given).dtype is twin(given).dtype is torch.bfloat16


class PreNorm(nn.Module):
    """As timm's vision_transformer.Block, of timm's parts."""

    def __init__(self, timm: Any, drop_path: nn.Module) -> None:
        super().__init__()
        norms = sys.modules["timm.layers.norm"]
        self.norm1, self.norm2 = norms.LayerNorm(8), norms.LayerNorm(8)
        self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop_path1 = self.drop_path2 = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@everywhere
@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_sum_before_timms_layer_norm(
    timm: Any, drop: float, replaced: bool, backend: str
) -> None:
    paths = importlib.import_module("timm.layers.drop")
    block = PreNorm(timm, paths.DropPath(drop) if drop else nn.Identity()).double()
    twin, was = copy.deepcopy(block), type(block.norm2)
    if replaced:
        fastnorm.replace_(block)
    report = fastnorm.fuse_(block)
    assert [row.now for row in report if not row.why_skipped] == [
        "fused forward",
        "fastnorm.LayerNorm(residual, sum)",
    ]
    for training in (True, False):
        found = []
        for net in (block, twin):
            net.train(training)
            torch.manual_seed(1)
            x = torch.linspace(-1, 2, 48, dtype=torch.float64).view(ROWS).requires_grad_()
            found.append(step(net, net, x))
        assert_same(*found)
    fastnorm.restore_(block)
    assert type(block.norm2) is was
    assert "forward" not in block.__dict__


def test_a_sum_where_timms_fast_norm_is_on(timm: Any) -> None:
    block = PreNorm(timm, nn.Identity())
    block.norm2._fast_norm = True
    why = {row.name: row.why_skipped for row in fastnorm.fuse_(block)}
    assert why["norm2"] == "timm's fast norm is on"
    block.norm2._fast_norm = False
    twin, x = copy.deepcopy(block), torch.randn(ROWS)
    assert fastnorm.fuse_(block).changed == 2
    block.norm2._fast_norm = twin.norm2._fast_norm = True  # afterwards: timm's own forward
    torch.testing.assert_close(block(x), twin(x))
    assert fastnorm.fuse_(nn.Sequential(copy.deepcopy(twin.norm1), nn.ReLU())).changed == 2
    layer = nn.Sequential(twin.norm1, nn.ReLU())
    expected = layer(x)
    fastnorm.fuse_(layer)
    with pytest.raises(RuntimeError, match="TorchScript has no layer like"):
        torch.jit.script(layer)
    assert torch.equal(layer(x), expected)
    layer[0]._fast_norm = True
    torch.testing.assert_close(layer(x), expected)


def names_of_graph(y: Tensor) -> str:
    """The backward nodes from a tensor on, as far as the first input of each."""
    names, node = [], y.grad_fn
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(names)


def test_a_target_of_a_name_that_two_packages_have(timm: Any) -> None:
    theirs = sys.modules["timm.layers.norm"].LayerNorm
    make = lambda: nn.Sequential(nn.LayerNorm(8), theirs(8))  # noqa: E731
    model = make()
    assert fastnorm.replace_(model, targets="LayerNorm").changed == 2
    assert not {type(layer) for layer in model} & {nn.LayerNorm, theirs}
    model = make()
    assert [row.name for row in fastnorm.replace_(model, targets=[theirs])] == ["1"]
    report = fastnorm.replace_(make(), targets=[nn.LayerNorm])
    assert [bool(row.why_skipped) for row in report] == [False, True]


MODELING = "transformers.models.convnext.modeling_convnext"


@everywhere
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer_norms_of_images(layout: torch.memory_format, backend: str) -> None:
    make = image_norm(MODELING, "ConvNextLayerNorm")
    both_ways(make(8), ROWS, "permuted.ConvNextLayerNorm")
    layer = make(4, data_format="channels_first")
    both_ways(layer, PLANES, "permuted.ConvNextLayerNorm")
    x = torch.randn(PLANES, dtype=torch.float64).to(memory_format=layout)
    expected = layer(x)
    fastnorm.replace_(layer)
    assert layer(x).stride() == expected.stride()


def image_norm(module: str, name: str) -> Any:
    make = getattr(pytest.importorskip(module, exc_type=ImportError), name)
    if not issubclass(make, nn.LayerNorm):
        pytest.skip("this version has a layer norm of its own")
    return make


@pytest.mark.parametrize("module", permuted._FORMS)
def test_every_layer_norm_of_images_that_is_known(module: str) -> None:
    name, form = permuted._FORMS[module]
    make = image_norm(module, name)
    options = {} if form is permuted._Images else {"data_format": "channels_first"}
    both_ways(make(4, **options), PLANES, f"permuted.{name}")


def test_a_layer_norm_of_images_is_pickled_into_a_process_without_its_package() -> None:
    layer = image_norm(MODELING, "ConvNextLayerNorm")(4, data_format="channels_first")
    fastnorm.replace_(layer)
    check = (
        "import pickle, sys, torch; layer = pickle.loads(sys.stdin.buffer.read()); "
        "print(type(layer).__module__, layer(torch.zeros(1, 4, 2, 2)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], input=pickle.dumps(layer), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == ["fastnorm.modules.permuted", *SHAPE.split()]


SHAPE = str(torch.Size((1, 4, 2, 2)))


def test_layers_that_become_ours_are_in_no_note(timm: Any) -> None:
    model = nn.Sequential(
        timm.BatchNormAct2d(4),
        sys.modules["timm.layers.norm"].LayerNorm2d(4),
        pytest.importorskip("transformers.activations").GELUActivation(),
    )
    for _ in range(2):
        assert fastnorm.replace_(model).notes == []
    fastnorm.restore_(model)
    notes = fastnorm.replace_(model, targets=[nn.BatchNorm2d, nn.GELU]).notes
    assert [note.name for note in notes] == ["0", "2"]


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
