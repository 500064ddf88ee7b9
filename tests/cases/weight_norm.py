"""The cases of weight norm, of one layer and of a group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastnorm import functional
from fastnorm.ops.weight_norm.group import weight_norm_group
from tests.cases.case import EVERY, Case, Tensors, one_sided


def weight_norm_cases() -> Iterator[Case]:
    # the last is long enough for several blocks per norm
    for shape in ((6, 5), (8, 4, 3), (33, 49), (3, 770), (5,), (1100, 8)):
        for dim in (None, *range(len(shape))):

            def make(dtype: torch.dtype, shape=shape, dim=dim) -> Tensors:  # type: ignore[no-untyped-def]
                v = (torch.rand(shape) + 0.1).to(dtype)
                g = torch.norm_except_dim(v.float(), 2, -1 if dim is None else dim).to(dtype) * 1.5
                return {"v": v.requires_grad_(), "g": g.requires_grad_()}

            def ours(v, g, dim=dim):  # type: ignore[no-untyped-def]
                return functional.weight_norm(v, g, dim)

            def torchs(v, g, dim=dim):  # type: ignore[no-untyped-def]
                return torch._weight_norm(v, g, -1 if dim is None else dim)

            dtypes = EVERY if shape == (8, 4, 3) else (torch.float32,)
            yield Case(
                "weight_norm",
                f"{'x'.join(map(str, shape))}-dim={dim}",
                ours,
                torchs,
                make,
                dtypes,
                one_sided,
            )
    yield weight_norm_group_case()


def weight_norm_group_case() -> Case:
    """Layers of several sizes in one call; of all but the first, the mean."""
    sizes = (
        ((6, 5), 0),
        ((7, 40), 1),
        ((2, 9000), 0),
        ((1200, 8), 1),
        ((30, 3, 70), 1),
        ((5, 9), -1),
    )
    dims = [dim for _, dim in sizes]

    def make(dtype: torch.dtype) -> Tensors:
        tensors: Tensors = {}
        for i, (shape, dim) in enumerate(sizes):
            v = (torch.rand(shape) + 0.1).to(dtype)
            name = str(i or "")
            tensors[f"v{name}"] = v.requires_grad_()
            g = torch.norm_except_dim(v.detach().float(), 2, dim).to(dtype) * 1.5
            tensors[f"g{name}"] = g.requires_grad_()
        return tensors

    def sum_of(w: list[Tensor]) -> Tensor:
        return w[0] + sum(x.mean() for x in w[1:])

    def ours(**tensors: Tensor) -> Tensor:
        values = list(tensors.values())
        return sum_of(weight_norm_group(values[::2], values[1::2], dims, [None] * len(dims)))

    def torchs(**tensors: Tensor) -> Tensor:
        values = list(tensors.values())
        every = zip(values[::2], values[1::2], dims, strict=True)
        return sum_of([torch._weight_norm(v, g, dim) for v, g, dim in every])

    return Case(
        "weight_norm", "group", ours, torchs, make, (torch.float64, torch.float32), one_sided
    )
