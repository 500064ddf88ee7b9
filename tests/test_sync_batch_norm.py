"""Synchronised batch norm: on 2, 3 and 4 ranks, equal to one process with the whole batch; and as a
layer in one process."""

from __future__ import annotations

from tests.distributed import outcome, parametrize


@parametrize("tests.distributed_sync_values", "tests.distributed_sync_layer")
def test_every_rank(module: str, ranks: int, name: str) -> None:
    wrong = outcome(module, ranks, name)
    assert not wrong, wrong
