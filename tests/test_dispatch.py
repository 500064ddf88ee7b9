"""Which backend serves a call, and what is said when the one asked for cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

import fastnorm
from fastnorm import dispatch, functional
from fastnorm.ops.activation import ActivationFunction
from fastnorm.ops.batch_norm import BatchNormFunction

X = torch.randn(4, 3, 8)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_block_ends_where_it_began() -> None:
    before = dispatch._forced
    with fastnorm.backend("reference"), pytest.raises(KeyError):  # noqa: PT012
        assert dispatch._forced == "reference"
        with fastnorm.backend("triton"):
            assert dispatch._forced == "triton"
            raise KeyError
    assert dispatch._forced == before


def test_set_backend_stays() -> None:
    with fastnorm.backend("auto"):
        fastnorm.set_backend("reference")
        assert dispatch._forced == "reference"


@pytest.mark.parametrize("name", ["Triton", "", "hip"])
def test_an_unknown_name_lists_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match="auto, reference, triton, cuda"):
        fastnorm.set_backend(name)


def test_the_environment_chooses() -> None:
    code = "import fastnorm.dispatch as d; print(d._forced)"
    assert python(code, FASTNORM_BACKEND="reference").stdout.strip() == "reference"
    said = python(code, FASTNORM_BACKEND="gpu").stderr
    assert "unknown backend 'gpu' in FASTNORM_BACKEND" in said
    assert "auto, reference, triton, cuda" in said


def test_backends_tell_why_not() -> None:
    found = fastnorm.backends()
    assert list(found) == ["reference", "triton", "cuda"]
    assert found["reference"] is None
    assert all(reason is None or len(reason) > 20 for reason in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton needs no interpreter")
def test_triton_without_a_gpu_or_interpreter_is_refused() -> None:
    code = (
        "import torch, fastnorm; fastnorm.set_backend('triton'); "
        "fastnorm.functional.silu(torch.zeros(4))"
    )
    said = python(code).stderr
    assert "RuntimeError: backend 'triton' was forced but cannot serve this call" in said
    assert "TRITON_INTERPRET=1" in said or "pip install triton" in said


def test_cuda_without_the_extension_or_a_gpu_is_refused() -> None:
    code = (
        "import torch, fastnorm; fastnorm.set_backend('cuda'); "
        "fastnorm.functional.silu(torch.zeros(4))"
    )
    said = python(code).stderr
    assert "RuntimeError: backend 'cuda' was forced but cannot serve this call" in said
    assert any(
        reason in said
        for reason in ("FASTNORM_BUILD_CUDA=1", "no NVIDIA driver", "no device", "is on cpu")
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A machine that lacks some backends, for the reasons given."""

    def lacking(**missing: str) -> None:
        dispatch._first_that_is_here.cache_clear()
        found = {name: missing.get(name) for name in ("reference", "triton", "cuda")}
        monkeypatch.setattr(dispatch, "backends", lambda: found)

    yield lacking
    dispatch._first_that_is_here.cache_clear()


@pytest.mark.parametrize("family", dispatch.RULES)
def test_the_rule_of_a_family(family: str, machine: Callable[..., None]) -> None:
    rule = dispatch.RULES[family]
    assert set(rule.backends) == set(rule.from_elements) == {"cuda", "triton"}
    machine()
    assert dispatch._preferred(family) == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        machine(cuda="no extension")
        assert dispatch._preferred(family) == "triton"
        machine(cuda="no extension", triton="no triton")
        assert dispatch._preferred(family) is None


def test_an_extension_that_cannot_be_used_is_said_once(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_has_extension", lambda: True)
    machine(cuda="the driver of this test is too old")
    with pytest.warns(UserWarning, match="triton serves instead: the driver of this test") as said:
        assert {dispatch._preferred(family) for family in dispatch.RULES} == {"triton"}
    assert len(said) == 1


def test_the_choice_is_a_constant_to_torch_compile(machine: Callable[..., None]) -> None:
    machine()

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if dispatch._preferred("activation") == "cuda" else x - 1

    assert chosen(torch.zeros(1)).item() == 1


def test_auto_on_a_cpu_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("our Function was entered")

    for function in (ActivationFunction, BatchNormFunction):
        monkeypatch.setattr(function, "forward", never)
    with fastnorm.backend("auto"):
        x = X.clone().requires_grad_()
        y = functional.batch_norm(x, None, None, training=True) + functional.silu(x)
        assert "fastnorm" not in type(y.grad_fn).__module__
        y.sum().backward()
    assert x.grad is not None
    with fastnorm.backend("reference"), pytest.raises(AssertionError, match="was entered"):
        functional.silu(X)


def test_auto_on_a_cpu_costs_at_most_5_us_more() -> None:
    pairs = {
        "silu": (lambda: functional.silu(X), lambda: torch.nn.functional.silu(X)),
        "layer_norm": (
            lambda: functional.layer_norm(X, (8,)),
            lambda: torch.nn.functional.layer_norm(X, (8,)),
        ),
        "batch_norm": (
            lambda: functional.batch_norm(X, None, None, training=True),
            lambda: torch.nn.functional.batch_norm(X, None, None, training=True),
        ),
    }

    def microseconds(function: object) -> float:
        return min(timeit.repeat(function, number=100, repeat=60)) / 100 * 1e6  # type: ignore[arg-type]

    with fastnorm.backend("auto"):
        for name, (ours, torchs) in pairs.items():
            extra = microseconds(ours) - microseconds(torchs)
            assert extra <= 5, f"{name}: {extra:.1f} us more than torch's"


def test_importing_touches_neither_triton_nor_a_gpu() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastnorm; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] == 'triton' or m == 'fastnorm._cuda'], "
        "torch.cuda.is_initialized())"
    )
    done = python(code)
    assert done.stdout.strip() == "[] False", done.stderr
