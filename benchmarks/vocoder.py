"""A generator in the style of HiFi-GAN V1, as models that are weight-normed throughout go."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        weight_norm = torch.nn.utils.parametrizations.weight_norm
        self.dilated = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, dilation=d, padding="same"))
            for d in (1, 3, 5)
        )
        self.plain = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, padding="same")) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.dilated, self.plain, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Vocoder(nn.Module):
    """A generator in the style of HiFi-GAN V1: 78 weight-normed layers, 80 mel bands to a wave."""

    def __init__(self, channels: int = 512) -> None:
        super().__init__()
        weight_norm = torch.nn.utils.parametrizations.weight_norm
        self.first = weight_norm(nn.Conv1d(80, channels, 7, padding=3))
        self.up = nn.ModuleList()
        self.mix = nn.ModuleList()
        for stride in (8, 8, 2, 2):
            self.up.append(
                weight_norm(
                    nn.ConvTranspose1d(
                        channels, channels // 2, 2 * stride, stride, padding=stride // 2
                    )
                )
            )
            channels //= 2
            self.mix.append(nn.ModuleList(_Residual(channels, kernel) for kernel in (3, 7, 11)))
        self.last = weight_norm(nn.Conv1d(channels, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, mix in zip(self.up, self.mix, strict=True):
            assert isinstance(mix, nn.ModuleList)
            x = up(F.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in mix]).mean(0)
        return torch.tanh(self.last(F.leaky_relu(x)))
