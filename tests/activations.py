"""What the tests of activations share: torch's functions by name, and inputs of every layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TORCHS = {
    "identity": lambda z: z * 1,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu_sigmoid": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
LAYOUTS = {
    "0-d": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6).t(),
    "sliced": lambda: torch.randn(4, 9)[:, 2:7],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
}
