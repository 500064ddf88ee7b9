"""Synchronised batch norm's ops in one process, the collectives standing in: also on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastnorm import functional
from fastnorm.ops.batch_norm import collectives
from tests.cases import CASES, Case
from tests.compare import assert_as_good_as_torch
from tests.test_registry import HoldToFake

TABLE = [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in CASES
    if case.op == "batch_norm" and "-eval" not in case.name
    for dtype in case.dtypes
]


@pytest.fixture
def _beside_an_empty_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has the whole batch, the one before it, which does not exist, has none."""

    def communicate(collective: str, tensor: Tensor, *_: Any) -> Tensor:
        if collective == "all_reduce":
            return tensor
        return torch.cat([torch.zeros_like(tensor), tensor])

    def batch_norm(x, running_mean, running_var, weight, bias, training, **options):  # type: ignore[no-untyped-def]
        assert training
        return functional.sync_batch_norm(x, running_mean, running_var, weight, bias, **options)

    monkeypatch.setattr(collectives, "members", lambda process_group: (2, "nobody"))
    monkeypatch.setattr(collectives, "communicate", communicate)
    monkeypatch.setattr(functional, "batch_norm", batch_norm)


# numpy's, of the infinities that the interpreter computes with
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("_beside_an_empty_rank")
@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_case_of_batch_norm(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    tensors = {
        name: None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)
        for name, t in case.make(dtype).items()
    }
    assert tensors["x"] is not None
    dy = case.dy(torch.empty(tensors["x"].shape, dtype=dtype)).to(device)
    assert_as_good_as_torch(case.ours, case.torchs, tensors, dy, f"{case} {backend}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from opcheck
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_real_outputs_are_as_the_fake_says(backend: str, dtype: torch.dtype, device: str) -> None:
    ops, wide = torch.ops.fastnorm, torch.float64 if dtype == torch.float64 else torch.float32
    for layout in (torch.contiguous_format, torch.channels_last):
        x, dy, r = (
            torch.randn(3, 5, 4, 2, dtype=dtype, device=device).to(memory_format=layout)
            for _ in range(3)
        )
        weight, bias = torch.rand(2, 5, dtype=dtype, device=device)
        running = [torch.ones(5, dtype=wide, device=device) for _ in range(2)]
        tracked = torch.tensor(0, device=device)
        with HoldToFake():
            gathered = ops.batch_norm_statistics(x).expand(3, -1).contiguous()
            mean, var, count = ops.batch_norm_merge(gathered, *running, tracked, 0.1)
            assert (count, tracked) == (3 * 24, 1)
            given = x, dy, r, weight, bias, torch.stack([mean, var])
            sums = torch.cat(ops.batch_norm_reduce(*given, "silu"))
            for needs_dresidual in (True, False):
                ops.batch_norm_apply(*given, sums, count, "silu", needs_dresidual)
    for op, inputs in (
        (ops.batch_norm_statistics, (x,)),
        (ops.batch_norm_merge, (gathered, *running, tracked, 0.1)),
        (ops.batch_norm_reduce, (*given, "silu")),
        (ops.batch_norm_apply, (*given, sums, count, "silu", True)),
    ):
        torch.library.opcheck(op.default, inputs, test_utils=("test_schema", "test_faketensor"))
