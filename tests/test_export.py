"""What takes a model as a program: torch.export, torch.fx, TorchScript, ONNX."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fastnorm
from tests.layers import LAYERS, assert_same, every_layer, make_input, make_layer, step, torch_warns

pytestmark = torch_warns


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    """Under "auto" a CPU runs torch's functions anyway; a forced backend shows what we arrange."""
    with fastnorm.backend("reference"):
        yield


def ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "fastnorm" in str(node.target)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_layer
def test_an_exported_program_is_made_of_torchs_operators(name: str, training: bool) -> None:
    layer, x = make_layer(name).train(training), make_input(name).detach()
    twin = copy.deepcopy(layer)
    sizes = {0: torch.export.Dim("N", min=2)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=False)
    assert not ours(program)
    lowered = program.run_decompositions()
    assert not ours(lowered)
    module = lowered.module(check_guards=False)
    for N in (3, 5):
        x = make_input(name, N).detach()
        torch.testing.assert_close(module(x), twin(x), rtol=1e-9, atol=1e-11)
    # the program has counted its batches in buffers of its own
    for buffer, value in twin.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[buffer], value)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.LayerNorm(16)]
    return nn.Sequential(*layers, nn.GELU()).double()


X = torch.randn(3, 3, 4, 4, dtype=torch.float64)


def test_a_saved_program_runs_where_this_package_is_not(tmp_path: Path) -> None:
    net = model().eval()
    fastnorm.replace_(net)
    fastnorm.fuse_(net)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(net, (X,)), path)
    code = (
        "import sys, torch; sys.modules['fastnorm'] = None; "
        f"module = torch.export.load({str(path)!r}).module(); "
        "x = torch.linspace(-1, 1, 144, dtype=torch.float64).view(3, 3, 4, 4); "
        "print(repr(module(x).sum().item()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    x = torch.linspace(-1, 1, 144, dtype=torch.float64).view(3, 3, 4, 4)
    assert float(done.stdout) == pytest.approx(net(x).sum().item(), rel=1e-9)


# torch.fx


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.weight = nn.LayerNorm(8), nn.SELU(), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x) * self.weight)


@pytest.mark.parametrize("make", [model, Tail])
def test_fx_finds_the_same_program_after_replace_(make: type[nn.Module]) -> None:
    net = make()
    nodes = [(n.op, str(n.target)) for n in fx.symbolic_trace(net).graph.nodes]
    fastnorm.replace_(net)
    traced = fx.symbolic_trace(net)
    assert [(n.op, str(n.target)) for n in traced.graph.nodes] == nodes
    x = X if make is model else torch.randn(3, 8)
    twin = copy.deepcopy(net)
    assert_same(step(traced, net, x), step(twin, twin, x))


def test_fx_takes_a_fused_layer_whole() -> None:
    net = model()
    fastnorm.replace_(net)
    fastnorm.fuse_(net)
    traced = fx.symbolic_trace(net)
    kinds = Counter(
        type(net.get_submodule(str(n.target))).__name__
        for n in traced.graph.nodes
        if n.op == "call_module"
    )
    assert kinds["BatchNormAct2d"] == 1
    torch.testing.assert_close(traced(X), net(X), rtol=1e-9, atol=1e-11)


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x) + x)


def test_fx_refuses_a_bound_forward_and_names_restore_() -> None:
    net = Add()
    fastnorm.replace_(net)
    fastnorm.fuse_(net)
    with pytest.raises(fx.proxy.TraceError, match=r"fastnorm\.restore_"):
        fx.symbolic_trace(net)
    fastnorm.restore_(net)
    fx.symbolic_trace(net)


def test_fx_refuses_a_layer_alone() -> None:
    with pytest.raises(fx.proxy.TraceError, match="trace the model it stands in"):
        fx.symbolic_trace(fastnorm.SiLU())


# TorchScript and ONNX

SCRIPTABLE = [
    name
    for name in LAYERS
    if not name.startswith(("mean_only", "swish", "weight_norm"))
    and name not in ("batch_norm_act", "layer_norm_act", "gelu_sigmoid")
]


@pytest.mark.parametrize("name", SCRIPTABLE)
def test_torchscript_gets_torchs_layer_with_our_parameters(name: str) -> None:
    layer = make_layer(name)
    kept = type(layer)
    scripted = torch.jit.script(layer)
    assert type(layer) is kept
    x = make_input(name).detach()
    torch.testing.assert_close(scripted(x), copy.deepcopy(layer)(x), rtol=1e-9, atol=1e-11)


def test_a_replaced_model_scripts() -> None:
    net = model()
    fastnorm.replace_(net)
    torch.testing.assert_close(torch.jit.script(net)(X), copy.deepcopy(net)(X))


@pytest.mark.parametrize("name", ["batch_norm_act", "layer_norm_act", "gelu_sigmoid", "mean_only"])
def test_torchscript_of_what_torch_has_no_layer_for_names_restore_(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"fastnorm\.restore_\(model\).*ONNX.*torch\.export"):
        torch.jit.script(make_layer(name))


# of Python's own comparisons of sizes, which our checks make as torch's do
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_layer
def test_a_traced_program_is_made_of_torchs_operators(name: str) -> None:
    layer, x = make_layer(name).eval(), make_input(name).detach()
    traced = torch.jit.trace(layer, (x,))
    assert "fastnorm::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dynamo", [True, False], ids=["from export", "from a trace"])
def test_onnx_gets_the_operators_that_torchs_layers_give(
    dynamo: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs the package onnxscript")
    import onnx

    kinds = []
    ours, theirs = model().eval(), model().eval()
    fastnorm.replace_(ours)
    fastnorm.fuse_(ours)
    for net in (ours, theirs):
        buffer = io.BytesIO()
        torch.onnx.export(net, (X,), buffer, dynamo=dynamo, verbose=False)
        graph = onnx.load_from_string(buffer.getvalue()).graph
        kinds.append([node.op_type for node in graph.node])
    assert kinds[0] == kinds[1]
