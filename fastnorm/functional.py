"""The twin of torch.nn.functional: every layer as a function of its input and parameters."""

from fastnorm.ops.activation import activation, gelu, selu, silu, swish
from fastnorm.ops.layer_norm import layer_norm
from fastnorm.ops.weight_norm import weight_norm

__all__ = [
    "activation",
    "gelu",
    "layer_norm",
    "selu",
    "silu",
    "swish",
    "weight_norm",
]
