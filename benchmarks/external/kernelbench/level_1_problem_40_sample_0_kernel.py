"""KernelBench level 1, problem 40: layer norm over three dimensions."""

import torch
import torch.nn as nn

import fastnorm


class ModelNew(nn.Module):
    def __init__(self, normalized_shape: tuple):
        super().__init__()
        self.ln = fastnorm.LayerNorm(normalized_shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln(x)
