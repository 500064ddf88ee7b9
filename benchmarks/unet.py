"""A 3-D U-Net for volumes, as Çiçek et al. (2016, https://arxiv.org/abs/1606.06650) made it:
batch norm before every ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _twice(inputs: int, between: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv3d(inputs, between, 3, padding=1, bias=False),
        nn.BatchNorm3d(between),
        nn.ReLU(),
        nn.Conv3d(between, outputs, 3, padding=1, bias=False),
        nn.BatchNorm3d(outputs),
        nn.ReLU(),
    )


class UNet3d(nn.Module):
    """Four resolutions, from `width` channels to 16 times as many; sides are multiples of 8."""

    def __init__(self, width: int = 32, classes: int = 3) -> None:
        super().__init__()
        widths = [2 * width << level for level in range(4)]
        inputs = [1, *widths[:-1]]
        self.down = nn.ModuleList(_twice(i, w // 2, w) for i, w in zip(inputs, widths, strict=True))
        self.pool = nn.MaxPool3d(2)
        lower = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose3d(i, i, 2, 2) for i, _ in lower)
        self.mix = nn.ModuleList(_twice(i + w, w, w) for i, w in lower)
        self.last = nn.Conv3d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, D, H, W]
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            kept.append(x)
        for up, mix, beside in zip(self.up, self.mix, kept[-2::-1], strict=True):
            x = mix(torch.cat([up(x), beside], 1))
        y: Tensor = self.last(x)
        return y
