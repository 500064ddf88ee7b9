"""The compiled extension as the CUDA backend's launchers use it: its lists, the stream."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor


@functools.cache
def extension() -> Any:
    """The module fastnorm._cuda; dispatch has made sure that it can be used."""
    return importlib.import_module("fastnorm._cuda")


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The position of a dtype in the extension's list."""
    names: tuple[str, ...] = extension().DTYPES
    return names.index(str(dtype).removeprefix("torch."))


@functools.cache
def activation_code(name: str) -> int:
    """The position of an activation in the extension's list."""
    names: tuple[str, ...] = extension().ACTIVATIONS
    return names.index(name)


def stream(x: Tensor) -> int:
    """The handle of the current stream of a tensor's device; 0 for a CPU tensor, which the tests
    give to kernels compiled for the CPU."""
    if not x.is_cuda:
        return 0
    return torch._C._cuda_getCurrentRawStream(x.get_device())
