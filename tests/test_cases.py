"""Every case of the table on every backend: outputs, gradients and buffers against fp64."""

from __future__ import annotations

import pytest
import torch

import fastnorm
from fastnorm import dispatch
from tests import emulation
from tests.cases import CASES, Case
from tests.compare import assert_as_good_as_torch, run, same_bits

PARAMETERS = [
    pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
    for case in CASES
    for dtype in case.dtypes
]


# numpy's, of the infinities that the interpreter computes with
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("case", "dtype"), PARAMETERS)
def test_case(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    tensors = {
        name: None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)
        for name, t in case.make(dtype).items()
    }
    shape_of = tensors["v" if "v" in tensors else "x"]
    assert shape_of is not None
    dy = case.dy(torch.empty(shape_of.shape, dtype=dtype)).to(device)
    assert_as_good_as_torch(case.ours, case.torchs, tensors, dy, f"{case} {backend}")


# in order, in reverse, and two at random
SCHEDULES = (0, 1, 2, 3)


@pytest.mark.cuda
@pytest.mark.skipif(
    not dispatch.emulating(), reason="a GPU chooses its schedule; here g++ compiled no kernels"
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_schedule_gives_the_same_bits(case: Case) -> None:
    tensors = case.make(case.dtypes[0])
    shape_of = tensors["v" if "v" in tensors else "x"]
    assert shape_of is not None
    dy = case.dy(torch.empty(shape_of.shape, dtype=case.dtypes[0]))
    found = []
    for seed in SCHEDULES:
        emulation.schedule(seed)
        with fastnorm.backend("cuda"):
            found.append(run(case.ours, tensors, dy))
    for seed, other in zip(SCHEDULES, found, strict=True):
        assert same_bits(found[0], other), f"{case} depends on the schedule: {seed}"


def test_every_family_is_in_the_table() -> None:
    assert {case.op for case in CASES} == {
        "activation",
        "batch_norm",
        "layer_norm",
        "mean_only",
        "swish",
        "weight_norm",
    }
