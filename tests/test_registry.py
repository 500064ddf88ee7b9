"""Real outputs of every op look as its fake says: dtypes, shapes and strides, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import CASES, Case

PICKED = {case.op + case.name.split("-")[0] + case.name[-5:]: case for case in CASES}
SEEN: set[str] = set()


def look(outputs: Any) -> list[Any]:
    values = pytree.tree_leaves(outputs)
    return [None if t is None else (t.dtype, tuple(t.shape), t.stride()) for t in values]


def on_meta(a: Any) -> Any:
    if not isinstance(a, torch.Tensor):
        return a
    return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")


class HoldToFake(TorchDispatchMode):
    """Compares each op of ours, as it runs, with itself on meta tensors."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = op(*args, **(kwargs or {}))
        if op.namespace == "fastnorm":
            assert look(outputs) == look(op(*pytree.tree_map(on_meta, args))), op
            tensors = [a for a in pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
            given = {a.untyped_storage().data_ptr() for a in tensors}
            for t in pytree.tree_leaves(outputs):
                assert t is None or t.untyped_storage().data_ptr() not in given, f"{op}: an alias"
            SEEN.add(op._schema.name.removeprefix("fastnorm::"))
        return outputs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", PICKED.values(), ids=str)
def test_real_outputs_are_as_the_fake_says(case: Case, backend: str, device: str) -> None:
    tensors = {
        name: None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)
        for name, t in case.make(case.dtypes[0]).items()
    }
    with HoldToFake():
        y = case.ours(**tensors)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    shown = tensors["v" if "v" in tensors else "x"]
    assert shown is not None
    assert (y.dtype, y.shape) == (shown.dtype, shown.shape)
    assert shown.grad is None or shown.grad.shape == shown.shape
