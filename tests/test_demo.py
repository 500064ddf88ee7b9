"""The demo agrees where it should, fails where it should, and says what is missing."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import demo, demo_kernels


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on its own ResNet, without the kernels: the large models are the Quick start's."""
    monkeypatch.setattr(demo, "build_model", lambda: ("a small ResNet", demo.own_resnet()))
    monkeypatch.setattr(demo, "check_kernels", lambda device: True)


@pytest.mark.usefixtures("small")
def test_the_same_steps_agree_through_torch_and_through_our_ops(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert demo.run(steps=2, batch=4, size=16)
    told = capsys.readouterr().out
    assert "They agree." in told
    assert "BatchNorm2d" in told
    assert told.count("\nfastnorm") == 2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["batch_norm_forward", "batch_norm_backward"])
def test_a_slightly_wrong_kernel_fails_the_demo(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastnorm.ops import batch_norm

    by = {"batch_norm_forward": batch_norm._forward, "batch_norm_backward": batch_norm._backward}
    right = by[name].by["reference"]

    def wrong(*inputs: object) -> object:
        outputs = right(*inputs)
        return (outputs[0] * (1 + 1e-4), *outputs[1:])

    monkeypatch.setitem(by[name].by, "reference", wrong)
    assert not demo.run(steps=1, batch=4, size=16)
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["sklearn", "tqdm"])
def test_a_missing_package_is_named_with_what_to_type(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def absent(name: str) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(demo.importlib, "import_module", absent)
    monkeypatch.setattr(demo, "build_model", lambda: ("a small ResNet", demo.own_resnet()))
    assert demo.main() == 2
    assert 'pip install "fastnorm-torch[demo]"' in capsys.readouterr().err


def test_the_model_is_the_best_known_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = demo.build_model()
    assert source.endswith("ResNet-50")
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 53
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    source, model = demo.build_model()
    assert source == "a small ResNet of our own"
    assert demo._logits(model(torch.randn(2, 3, 16, 16))).shape == (2, 10)


def test_every_family_has_a_layer_in_the_demo() -> None:
    shown = {type(build()).__mro__[0] for build in demo_kernels.layers().values()}
    assert {fastnorm.BatchNormAct2d, fastnorm.MeanOnlyBatchNorm2d, fastnorm.LayerNorm} <= shown
    assert {fastnorm.GELU, fastnorm.Swish} <= shown
    assert any(
        nn.utils.parametrize.is_parametrized(build()) for build in demo_kernels.layers().values()
    )


def test_the_kernels_of_every_family_agree_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    done = subprocess.run(
        [sys.executable, "-m", "fastnorm", "demo", "--layers"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in demo_kernels.layers())


def test_memory_held_counts_what_backward_needs_once() -> None:
    x = torch.randn(8, 4)
    layer = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    # tanh saves its output, which the second Linear saves too: one storage of 8 x 16 floats
    assert demo.held_for_backward(layer, x) == 8 * 16 * 4


def test_a_folded_silu_holds_one_tensor_less_than_torchs() -> None:
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU())
    before = demo.held_for_backward(model, x)
    fastnorm.replace_(model)
    fastnorm.fuse_(model)
    with fastnorm.backend("reference"):
        assert demo.held_for_backward(model, x) == before - 4 * x.numel()
