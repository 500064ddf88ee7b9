"""DistributedDataParallel and FSDP2 around our layers, on two gloo ranks."""

from __future__ import annotations

from tests.distributed import outcome, parametrize


@parametrize("tests.distributed_wrappers")
def test_wrapper(module: str, ranks: int, name: str) -> None:
    wrong = outcome(module, ranks, name)
    assert not wrong, wrong
