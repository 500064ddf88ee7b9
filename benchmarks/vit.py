"""A small vision transformer, norms first, for images of 32 x 32."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, TOKENS = 4, 64


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # no bias: that of the keys has no gradient, and an optimizer would train it on roundings
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [N, tokens, width]
        heads = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """LayerNorm and GELU as in ViT (Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929)."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        # as large as the patches: with the usual 0.02, plain SGD learns little in 300 steps
        self.positions = nn.Parameter(0.5 * torch.randn(1, TOKENS, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32]
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return y


def exchanged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the same function, of this model or a convolutional one, of images whose rows
    are their columns; its own inverse."""

    def one(name: str, t: Tensor) -> Tensor:
        if name == "positions":  # [1, rows * columns, width]
            side = math.isqrt(t.size(1))
            grid: Tensor = t.unflatten(1, (side, side))
            return grid.transpose(1, 2).flatten(1, 2)
        return t.transpose(2, 3).contiguous() if t.dim() == 4 else t

    return {name: one(name, t) for name, t in state.items()}
