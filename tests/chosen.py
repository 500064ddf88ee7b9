"""That `-k triton` and `-k cuda`, by which a run on a GPU chooses its tests, choose every test that
runs those kernels: seen without a GPU, where a test that is not chosen runs like any other."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

_launched: set[str] = set()  # the backends whose kernels the test has run so far


def watch_triton() -> None:
    """Notice every launch in the interpreter."""
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__

    def noticed(self, *args, **options):  # type: ignore[no-untyped-def]
        _launched.add("triton")
        return call(self, *args, **options)

    interpreter.GridExecutor.__call__ = noticed


def _cuda_launches() -> int:
    engine = getattr(sys.modules.get("fastnorm._cuda"), "engine", None)
    return engine.launches if engine is not None else 0


def is_chosen(item: pytest.Item, backend: str) -> bool:
    """Whether `-k backend` is true of the test: it reads names, parameters and markers."""
    named = backend in item.nodeid.lower() or item.get_closest_marker(backend) is not None
    # of the compilation for the CPU itself, which no GPU has
    return named or (backend == "cuda" and "emulat" in item.nodeid)


def complaint(item: pytest.Item, launched: set[str]) -> str:
    """What is to be done where a run on a GPU would leave the test out; "" where it would not."""
    for backend in sorted(launched):
        if not is_chosen(item, backend):
            return (
                f"it runs {backend}'s kernels and `-k {backend}` does not choose it: let its name "
                f"or parameters say so, or mark it with pytest.mark.{backend}"
            )
    return ""


@pytest.fixture(autouse=True)
def _k_chooses_it(request: pytest.FixtureRequest) -> Iterator[None]:
    _launched.clear()
    before = _cuda_launches()
    yield
    if _cuda_launches() != before:
        _launched.add("cuda")
    if said := complaint(request.node, _launched):
        pytest.fail(said, pytrace=False)
