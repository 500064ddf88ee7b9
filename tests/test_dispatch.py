"""Which backend serves a call, and what is said when the one asked for cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit

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


def test_cuda_is_refused_with_the_reason() -> None:
    with (
        fastnorm.backend("cuda"),
        pytest.raises(
            RuntimeError, match=r"backend 'cuda' was forced but cannot .*(fastnorm\._cuda|on cpu)"
        ),
    ):
        functional.silu(X)


def test_auto_on_a_cpu_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("our Function was entered")

    for function in (ActivationFunction, BatchNormFunction):
        monkeypatch.setattr(function, "apply", never)
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
