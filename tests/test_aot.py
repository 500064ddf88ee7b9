"""A part of tests/aot.py in the ordinary run, in processes of their own: here kernels are
interpreted."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HAS_TRITON

ROOT = Path(__file__).parent.parent
JOBS = (
    "batch_norm-nchw-float16-silu", "synchronised-nchw-float16-silu",
    "batch_norm-nchw-tiny-float16", "activation_alone-gelu-float32",
    "swish-nchw-float32-True", "layer_norm-4096-1024-float16", "layer_norm-8192-769-float16",
    "layer_norm-512-40960-float16",
    "layer_norm-4-262144-float16", "layer_norm_bare-4096-1024-bfloat16-none",
    "layer_norm_bare-512-32768-bfloat16-none", "layer_norm_bare-4-262144-bfloat16-none",
    "weight_norm-(512,1152)-0-float16", "weight_norm-(512,1152)-1-float16",
)  # fmt: skip


def kernels() -> set[str]:
    """The names of all @triton.jit functions that are launched."""
    return {
        node.name
        for path in ROOT.glob("fastnorm/ops/*/triton*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_kernel_compiles_for_sm_90_without_spilling() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot", "--capability", "90", "--only", *JOBS],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert kernels() - set(done.stdout.split()) == set()
