"""What a kernel sees of a tensor: views that hold the same numbers, copies only where none can."""

from __future__ import annotations

import pytest
import torch

from fastnorm import layout

INPUTS = {
    "nc": torch.randn(5, 6),
    "ncl": torch.randn(2, 3, 7),
    "nlc": torch.randn(2, 7, 3).transpose(1, 2),
    "nchw": torch.randn(2, 3, 4, 5),
    "nhwc": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "ndhwc": torch.randn(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
    "sliced": torch.randn(2, 3, 4, 8)[:, :, :, ::2],
    "transposed": torch.randn(2, 3, 4, 5).transpose(2, 3),
    "expanded": torch.randn(1, 3, 1, 1).expand(2, 3, 4, 5),
}


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_planes_hold_the_same_numbers(x: torch.Tensor) -> None:
    view = layout.planes(x)
    if view is not None:
        assert view.data_ptr() == x.data_ptr()
        assert torch.equal(view, x.reshape(*x.shape[:2], -1))
    assert torch.equal(layout.to_planes(x), x)
    assert layout.planes(layout.to_planes(x)) is not None


def test_planes_that_no_strides_express() -> None:
    assert layout.planes(INPUTS["transposed"]) is None
    assert layout.planes(INPUTS["sliced"]) is not None


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_outputs_are_laid_out_as_torchs(x: torch.Tensor) -> None:
    C = x.size(1)
    expected = torch.nn.functional.batch_norm(x, torch.zeros(C), torch.ones(C))
    assert layout.planes_like(x).stride() == expected.stride()


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_dense_and_match_copy_only_where_they_must(x: torch.Tensor) -> None:
    compact = layout.dense(x)
    assert torch.equal(compact, x)
    assert torch.ops.aten.is_non_overlapping_and_dense(compact)
    assert (compact is x) == torch.ops.aten.is_non_overlapping_and_dense(x)
    matched = layout.match(x, compact)
    assert torch.equal(matched, x)
    assert matched.stride() == compact.stride()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("x", [INPUTS["nchw"], INPUTS["nhwc"], INPUTS["nhwc"].permute(0, 2, 3, 1)])
def test_rows_hold_the_same_numbers(x: torch.Tensor, dims: int) -> None:
    views = layout.rows(dims, x)
    if views is None:
        x = x.contiguous()
        views = layout.rows(dims, x)
    assert views is not None
    (view,) = views
    assert view.data_ptr() == x.data_ptr()
    cols = x.shape[-dims:].numel()
    assert torch.equal(view.reshape(-1, cols), x.reshape(-1, cols))
