"""How batch norm's CUDA kernels cut a tensor: the plan's rule, and what each form needs of a
device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastnorm import dispatch
from fastnorm.ops import batch_norm as family
from tests.test_batch_norm_backward_cuda import SEEDS, _cuda  # noqa: F401  (a fixture)
from tests.test_batch_norm_cuda import LAYOUTS, run, sample, training

pytestmark = [
    pytest.mark.skipif(
        not dispatch.emulating(), reason="a GPU has its own size; here g++ compiled no kernels"
    ),
    pytest.mark.cuda,
]

KNOBS = ("FORM", "BATCHES", "COLUMNS", "BLOCKS", "LAG", "HINTS")  # of cuda.py


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


def planned(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool = False,
    operands: int = 1,
    skip: int = 0,
    **turned: int,
) -> Any:
    """The plan on a device of 132 multiprocessors; rows of x lie `skip` elements apart."""
    from fastnorm.ops.extension import extension

    extension().engine.configure(sms=132, blocks_per_sm=3)
    _, C, S = shape
    strides = (S * C, 1, C) if last else (C * (S + skip), S + skip, 1)
    knobs = [turned.get(name, -1) for name in KNOBS]
    return extension().batch_norm_plan(
        *shape, *strides, last, dtype, "identity", operands > 1, False, operands, 0, *knobs
    )


def rule(*cut: Any, **more: Any) -> tuple[str, int]:
    """The form that the rule chooses, and the blocks of a group."""
    from fastnorm.ops.extension import extension

    p = planned(*cut, **more)
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


def test_slots_are_counted_in_32_bits_where_that_suffices() -> None:
    half = torch.bfloat16
    for shape, last in (((32, 64, 3136), False), ((32, 64, 49), False), ((32, 64, 49), True)):
        assert planned(shape, half, last).quick
    assert not planned((32, 63, 49), half, True).quick  # rows begin anywhere
    assert not planned((32, 64, 49), half, skip=1).quick
    assert not planned((2**15, 64, 1024), half).quick  # 2^31 elements


def test_what_can_be_turned() -> None:
    half = torch.bfloat16
    ticket = {"shape": (2, 32, 2097152), "dtype": torch.float32}
    assert planned((256, 64, 3136), half, COLUMNS=4).columns == 4
    assert planned((256, 64, 3136), half, True, COLUMNS=4).channels == 32
    assert planned(**ticket).lag == 3 * 132 // 4
    assert planned(**ticket, LAG=0).lag == 0
    # memory for two blocks of a multiprocessor instead of three: larger tiles
    assert planned((256, 64, 12544), half, BLOCKS=2).held > planned((256, 64, 12544), half).held
    for columns in (3, 256):
        with pytest.raises(RuntimeError, match="batch_norm_plan failed: invalid argument"):
            planned((256, 64, 3136), half, COLUMNS=columns)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("knob", "value"), [("COLUMNS", 1), ("COLUMNS", 8), ("BLOCKS", 2), ("LAG", 0), ("HINTS", 0)]
)
def test_no_result_depends_on_it(
    name: str, knob: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastnorm.ops.batch_norm import cuda
    from fastnorm.ops.extension import extension

    tensors, settings = training(sample(name), "silu")
    expected = run(family._forward, tensors, settings)
    if knob == "LAG":
        monkeypatch.setattr(cuda, "FORM", extension().BATCH_NORM_FORMS.index("ticket"))
    monkeypatch.setattr(cuda, knob, value)
    if (name, knob, value) == ("nlc", "COLUMNS", 1):  # transposed, whole vectors at a time
        with pytest.raises(RuntimeError, match="invalid argument"):
            run(family._forward, tensors, settings)
        return
    torch.testing.assert_close(run(family._forward, tensors, settings), expected)
