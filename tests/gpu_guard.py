"""What keeps one bad kernel from taking the other tests' results along: a limit for every test on a
GPU, and an end for a process whose CUDA context is dead.

A kernel that never ends leaves its test in cudaDeviceSynchronize, deaf to SIGINT, and whoever waits
for that test loses what the others have said. An error like an illegal address stays: every later
call of CUDA in that process returns it, and hundreds of tests fail that have nothing wrong.
pytest-xdist names the test that ended its process and starts another one for the rest; without it
the run ends, and says why.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator

import pytest

from tests.chosen import is_chosen

# Of a test on our kernels; @pytest.mark.hangs_after(seconds) where it needs longer. The others run
# torch's at most, and some of them build packages or compile for minutes.
HANGS_AFTER_S, OTHERS_S = 30.0, 300.0
DIED = pytest.StashKey[str]()
_log = pytest.StashKey[int]()


def has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())


def dead_context() -> str:
    """Why CUDA is gone from this process; "" where it is not."""
    from benchmarks.context import dead_context

    return dead_context()


def limit(item: pytest.Item) -> float | None:
    """Seconds that a test may take; None without a GPU, where nothing of it holds a process."""
    if not has_gpu():
        return None
    marker = item.get_closest_marker("hangs_after")
    if marker is not None:
        return float(marker.args[0])
    ours = any(is_chosen(item, backend) for backend in ("triton", "cuda"))
    return HANGS_AFTER_S if ours else OTHERS_S


def pytest_configure(config: pytest.Config) -> None:
    # what pytest keeps of a test's stderr is lost with the process
    config.stash[_log] = os.dup(2)


def _watch(item: pytest.Item) -> None:
    """Begin to count. faulthandler's clock has a thread of its own, which needs no GIL."""
    seconds = limit(item)
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_log])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _watch(item)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if DIED in item.stash:
        said = f"{item.nodeid} ended the CUDA context of this process: {item.stash[DIED]}"
        if not hasattr(item.config, "workerinput"):
            pytest.exit(said, returncode=1)
        # every report of the test has been sent, and no word that it is over: it is named again
        os.write(item.config.stash[_log], f"{said}\n".encode())
        os._exit(1)
    return result


@pytest.fixture(autouse=True)
def _the_gpu_is_still_there(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if has_gpu():
        _watch(request.node)  # a test with a clock of its own has stopped it
        if said := dead_context():
            request.node.stash[DIED] = said
            pytest.fail(f"the CUDA context of this process is dead: {said}", pytrace=False)
