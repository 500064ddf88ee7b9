"""Every activation as device functions: its value and its slope, for any kernel to fuse."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.dispatch import interpreting

INTERPRETED = tl.constexpr(interpreting())

# z is the pre-activation in fp32 (fp64 for fp64). libdevice does not exist in the interpreter: exp
# and erf must do.


@triton.jit
def expm1(z):
    """exp(z) - 1 for z <= 0 without cancellation (Kahan): the rounding of u = exp(z) cancels in (u
    - 1) / log(u)."""
    u = tl.exp(z)
    near = tl.where(u == 1.0, z, (u - 1.0) * z / tl.log(tl.where(u == 1.0, 2.0, u)))
    return tl.where(z < -1.0, u - 1.0, near)


@triton.jit
def sigmoids(z):
    """(sigmoid(z), sigmoid(-z)) from one exp; 1 - s would cancel where s is near 1.

    tl.exp and a division take 13 instructions: they serve subnormal numbers too, of which nothing
    is left in a sum with 1. The two that do the work take 4 with their operands."""
    if z.dtype == tl.float32 and not INTERPRETED:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [-1.4426950408889634074 * z],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        s = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        e = tl.exp(-z)
        s = 1.0 / (1.0 + e)
    return s, tl.where(z > 0.0, e * s, 1.0 - s)


@triton.jit
def sigmoid(z):
    s, _ = sigmoids(z)
    return s


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_slope(z):
    return tl.where(z == z, 1.0, 1.0)


@triton.jit
def relu(z):
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def relu_slope(z):
    return tl.where(z <= 0.0, 0.0, 1.0)


@triton.jit
def relu6(z):
    return tl.where(z >= 6.0, 6.0, tl.where(z <= 0.0, 0.0, z))


@triton.jit
def relu6_slope(z):
    return tl.where((z <= 0.0) | (z >= 6.0), 0.0, 1.0)


@triton.jit
def leaky_relu(z):
    return tl.where(z > 0.0, z, 0.01 * z)


@triton.jit
def leaky_relu_slope(z):
    return tl.where(z > 0.0, 1.0, tl.full([], 0.01, z.dtype))


@triton.jit
def elu(z):
    return tl.where(z <= 0.0, expm1(tl.minimum(z, 0.0)), z)


@triton.jit
def elu_slope(z):
    return tl.where(z <= 0.0, tl.exp(tl.minimum(z, 0.0)), 1.0)


@triton.jit
def selu(z):
    return 1.0507009873554804934193349852946 * tl.where(
        z <= 0.0, 1.6732632423543772848170429916717 * expm1(tl.minimum(z, 0.0)), z
    )


@triton.jit
def selu_slope(z):
    return 1.0507009873554804934193349852946 * tl.where(
        z <= 0.0, 1.6732632423543772848170429916717 * tl.exp(tl.minimum(z, 0.0)), 1.0
    )


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.70710678118654752440))


@triton.jit
def gelu_slope(z):
    cdf = 0.5 * (1.0 + tl.erf(z * 0.70710678118654752440))
    return cdf + z * (0.39894228040143267794 * tl.exp(-0.5 * z * z))


@triton.jit
def gelu_tanh(z):
    # (1 + tanh u) / 2 = sigmoid(2 u): one exp, and no cancellation in the negative tail
    return z * sigmoid(1.5957691216057307117 * (z + 0.044715 * z * z * z))


@triton.jit
def gelu_tanh_slope(z):
    s, rest = sigmoids(1.5957691216057307117 * (z + 0.044715 * z * z * z))
    return s + z * s * rest * (1.5957691216057307117 * (1.0 + 0.134145 * z * z))


@triton.jit
def gelu_sigmoid(z):
    return z * sigmoid(1.702 * z)


@triton.jit
def gelu_sigmoid_slope(z):
    s, rest = sigmoids(1.702 * z)
    return s * (1.0 + 1.702 * z * rest)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_slope(z):
    s, rest = sigmoids(z)
    return s * (1.0 + z * rest)


@triton.jit
def hardswish(z):
    return z * tl.where(z >= 3.0, 6.0, tl.where(z <= -3.0, 0.0, z + 3.0)) / 6.0


@triton.jit
def hardswish_slope(z):
    return tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, z / 3.0 + 0.5))


@triton.jit
def mish(z):
    # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); past 20 it is 1
    e = tl.exp(tl.minimum(z, 20.0))
    n = e * (e + 2.0)
    return z * (n / (n + 2.0))


@triton.jit
def mish_slope(z):
    e = tl.exp(tl.minimum(z, 20.0))
    n = e * (e + 2.0)
    t = n / (n + 2.0)
    return t + z * sigmoid(z) * (1.0 - t * t)


@triton.jit
def tanh(z):
    m = expm1(-2.0 * tl.abs(z))
    t = -m / (m + 2.0)
    return tl.where(z < 0.0, -t, t)


@triton.jit
def tanh_slope(z):
    t = tanh(z)
    return 1.0 - t * t


@triton.jit
def sigmoid_slope(z):
    s, rest = sigmoids(z)
    return s * rest


# the one list of activations of this language: name -> (value, slope)
ACTIVATIONS = {
    "identity": (identity, identity_slope),
    "relu": (relu, relu_slope),
    "relu6": (relu6, relu6_slope),
    "leaky_relu": (leaky_relu, leaky_relu_slope),
    "elu": (elu, elu_slope),
    "selu": (selu, selu_slope),
    "gelu": (gelu, gelu_slope),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
    "gelu_sigmoid": (gelu_sigmoid, gelu_sigmoid_slope),
    "silu": (silu, silu_slope),
    "hardswish": (hardswish, hardswish_slope),
    "mish": (mish, mish_slope),
    "tanh": (tanh, tanh_slope),
    "sigmoid": (sigmoid, sigmoid_slope),
}
