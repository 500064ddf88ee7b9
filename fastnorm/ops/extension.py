"""The compiled extension as the CUDA backend's launchers use it: imported once."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def extension() -> Any:
    """The module fastnorm._cuda; dispatch has made sure that it can be used."""
    return importlib.import_module("fastnorm._cuda")
