"""The twin of torch.nn.functional: every layer as a function of its input and parameters."""

from fastnorm.ops.activation import activation, gelu, selu, silu, swish
from fastnorm.ops.batch_norm import batch_norm
from fastnorm.ops.batch_norm.mean_only import mean_only_batch_norm
from fastnorm.ops.batch_norm.sync import sync_batch_norm
from fastnorm.ops.layer_norm import layer_norm
from fastnorm.ops.weight_norm import weight_norm

__all__ = [
    "activation",
    "batch_norm",
    "gelu",
    "layer_norm",
    "mean_only_batch_norm",
    "selu",
    "silu",
    "swish",
    "sync_batch_norm",
    "weight_norm",
]
