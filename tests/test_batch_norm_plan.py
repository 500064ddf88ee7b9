"""How batch norm's CUDA kernels cut a tensor: the plan's rule, and what each form needs of a
device."""

from __future__ import annotations

import pytest
import torch

from fastnorm import dispatch
from fastnorm.ops import batch_norm as family
from tests.test_batch_norm_backward_cuda import SEEDS, _cuda  # noqa: F401  (a fixture)
from tests.test_batch_norm_cuda import run, sample, training

pytestmark = [
    pytest.mark.skipif(
        not dispatch.emulating(), reason="a GPU has its own size; here g++ compiled no kernels"
    ),
    pytest.mark.cuda,
]


@pytest.mark.parametrize("seed", SEEDS)
def test_one_block_at_a_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for nobody, or only for who began before it, needs no company."""
    from fastnorm.ops.batch_norm import cuda
    from fastnorm.ops.extension import extension

    tensors, settings = training(sample("nchw"), "silu")
    expected = run(family._forward, tensors, settings)
    for name in ("owner", "ticket"):
        monkeypatch.setattr(cuda, "FORM", extension().BATCH_NORM_FORMS.index(name))
        extension().engine.configure(seed=seed, resident=1)
        torch.testing.assert_close(run(family._forward, tensors, settings), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["hold", "stream"])
def test_only_the_blocks_of_a_group_at_a_time(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastnorm.ops.batch_norm import cuda
    from fastnorm.ops.extension import extension

    tensors, settings = training(torch.randn(4, 9, 64, 64), "silu")
    expected = run(family._forward, tensors, settings)
    monkeypatch.setattr(cuda, "FORM", extension().BATCH_NORM_FORMS.index(name))
    extension().engine.configure(seed=seed, resident=4, blocks_per_sm=4)
    assert cuda.plan(tensors[0], tensors[0], "silu", False, False, 1, 1).members == 4
    torch.testing.assert_close(run(family._forward, tensors, settings), expected)


def rule(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool = False, operands: int = 1
) -> tuple[str, int]:
    """The form that the rule chooses on a device of 132 multiprocessors, and the blocks of a
    group."""
    from fastnorm.ops.extension import extension

    extension().engine.configure(sms=132, blocks_per_sm=3)
    _, C, S = shape
    strides = (S * C, 1, C) if last else (C * S, S, 1)
    p = extension().batch_norm_plan(
        *shape, *strides, last, dtype, "identity", operands > 1, False, operands, 0, -1, 0
    )
    return extension().BATCH_NORM_FORMS[p.form], p.members


def test_the_rule() -> None:
    half, single = torch.bfloat16, torch.float32
    # one launch of few blocks, whatever the layout
    assert rule((1, 16, 64), half)[0] == "owner"
    assert rule((32, 2048, 49), half)[0] == "owner"
    # groups that fit the chip together, in blocks of 64 KB
    assert rule((256, 64, 12544), half) == ("hold", 98)
    # at most 132 of them wait for each other: larger tiles, two on a multiprocessor
    assert rule((256, 64, 12544), half, operands=2) == ("hold", 131)
    assert rule((256, 1024, 196), half)[0] == "hold"
    assert rule((256, 1024, 196), half, last=True)[0] == "hold"
    # groups that L2 has room for
    assert rule((2, 32, 2097152), single) == ("ticket", 1024)
    # groups that fit nowhere
    assert rule((112, 64, 262144), single)[0] == "stream"
    assert rule((256, 64, 12544), half, last=True)[0] == "stream"


def test_a_column_of_too_many_slots_is_refused() -> None:
    with pytest.raises(RuntimeError, match="batch_norm_plan failed: invalid argument"):
        rule((2**32, 2, 1), torch.float32, last=True)
