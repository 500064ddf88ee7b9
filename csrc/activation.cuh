// Every activation as a struct of two functions of the wide pre-activation z: value and slope.
#pragma once
#include "common.cuh"

namespace fastnorm {

// ---- functions of the type of computation -------------------------------------------------------
//
// T is what the result is rounded to. Where that keeps 11 bits or fewer, an approximation with 20
// will do: it costs a third of the instructions, of which memory leaves time for some 30.

template <class T>
constexpr bool kRounded = sizeof(T) == 2;

// The smaller one; of NaN, NaN.
template <class W>
__device__ __forceinline__ W not_above(W z, W most) {
    return z > most ? most : z;
}

template <class T, class W = Wide<T>>
__device__ __forceinline__ W exponential(W z) {
    if constexpr (kRounded<T>) {
        return exp2_approximate(z * W(1.44269504088896340736));
    } else if constexpr (std::is_same_v<W, double>) {
        return exp(z);
    } else {
        return expf(z);
    }
}

template <class T, class W = Wide<T>>
__device__ __forceinline__ W exponential_minus_1(W z) {
    if constexpr (kRounded<T>) {
        // near 0 the difference would cancel: there, Taylor's
        const W near = z * (W(1) + z * (W(0.5) + z * W(1.0 / 6.0)));
        return z > W(-0.03125) ? near : exponential<T>(z) - W(1);
    } else if constexpr (std::is_same_v<W, double>) {
        return expm1(z);
    } else {
        return expm1f(z);
    }
}

__device__ __forceinline__ float error_function(float z) {
    return erff(z);
}
__device__ __forceinline__ double error_function(double z) {
    return erf(z);
}
__device__ __forceinline__ float hyperbolic_tangent(float z) {
    return tanhf(z);
}
__device__ __forceinline__ double hyperbolic_tangent(double z) {
    return ::tanh(z);
}

// 1 / (1 + e) for e >= 0. Of a quarter of the sum where subnormal results, which reciprocal() has
// not, are to be kept.
template <class T, class W = Wide<T>>
__device__ __forceinline__ W reciprocal_of_1_plus(W e) {
    return kRounded<T> ? reciprocal(W(1) + e) : W(0.25) * reciprocal(e * W(0.25) + W(0.25));
}

template <class T, class W = Wide<T>>
__device__ __forceinline__ W logistic(W z) {
    return reciprocal_of_1_plus<T>(exponential<T>(-z));
}

// sigmoid(z) and sigmoid(-z) from one exp. The second is for what adds it to 1 or more: 1 - s
// cancels where s is near 1, which shows only where the result keeps more than 11 bits.
template <class T, class W = Wide<T>>
struct Sigmoids {
    W s, rest;
    __device__ __forceinline__ explicit Sigmoids(W z) {
        const W e = exponential<T>(-z);
        s = reciprocal_of_1_plus<T>(e);
        rest = !kRounded<T> && z > W(0) ? e * s : W(1) - s;
    }
};

// The normal distribution: its function and, up to a factor, its density exp(-z^2 / 2).
template <class T, class W = Wide<T>>
struct Normal {
    W below, density;
    __device__ __forceinline__ explicit Normal(W z) {
        constexpr W sqrt_half = W(0.70710678118654752440);
        if constexpr (!kRounded<T>) below = W(0.5) * (W(1) + error_function(z * sqrt_half));
        density = exponential<T>(W(-0.5) * z * z);
        if constexpr (kRounded<T>) {
            // of that same exp, as Abramowitz & Stegun (1964), 7.1.26, with coefficients for which
            // the tail has a relative error below 3e-5 down to -13
            const W distance = z < W(0) ? -z : z;
            const W t = reciprocal(W(0.375) * distance + W(1));
            const W series = W(0.14902823) +
                             t * (W(0.15803988) +
                                  t * (W(0.08259561) + t * (W(0.20153111) + t * W(-0.09120457))));
            const W beyond = t * series * density;
            below = z < W(0) ? beyond : W(1) - beyond;
        }
    }
};

// ---- the activations, each named as in Python ---------------------------------------------------

namespace activations {

#define FASTNORM_VALUE                    \
    template <class T, class W = Wide<T>> \
    static __device__ __forceinline__ W value(W z)
#define FASTNORM_SLOPE                    \
    template <class T, class W = Wide<T>> \
    static __device__ __forceinline__ W slope([[maybe_unused]] W z)

struct identity {
    FASTNORM_VALUE { return z; }
    FASTNORM_SLOPE { return W(1); }
};

struct relu {
    FASTNORM_VALUE { return z <= W(0) ? W(0) : z; }
    FASTNORM_SLOPE { return z <= W(0) ? W(0) : W(1); }
};

struct relu6 {
    FASTNORM_VALUE { return z >= W(6) ? W(6) : z <= W(0) ? W(0) : z; }
    FASTNORM_SLOPE { return z <= W(0) || z >= W(6) ? W(0) : W(1); }
};

struct leaky_relu {
    FASTNORM_VALUE { return z > W(0) ? z : W(0.01) * z; }
    FASTNORM_SLOPE { return z > W(0) ? W(1) : W(0.01); }
};

struct elu {
    FASTNORM_VALUE { return z <= W(0) ? exponential_minus_1<T>(not_above<W>(z, 0)) : z; }
    FASTNORM_SLOPE { return z <= W(0) ? exponential<T>(z) : W(1); }
};

struct selu {
    static constexpr double alpha = 1.6732632423543772848170429916717;
    static constexpr double scale = 1.0507009873554804934193349852946;
    FASTNORM_VALUE {
        const W below = W(alpha) * exponential_minus_1<T>(not_above<W>(z, 0));
        return W(scale) * (z <= W(0) ? below : z);
    }
    FASTNORM_SLOPE { return W(scale) * (z <= W(0) ? W(alpha) * exponential<T>(z) : W(1)); }
};

struct gelu {
    FASTNORM_VALUE { return z * Normal<T>(z).below; }
    FASTNORM_SLOPE {
        const Normal<T> at(z);
        return at.below + z * (W(0.39894228040143267794) * at.density);
    }
};

struct gelu_tanh {
    // (1 + tanh u) / 2 = sigmoid(2 u): one exp, and no cancellation in the negative tail
    static constexpr double twice_sqrt_2_over_pi = 1.5957691216057307117;
    FASTNORM_VALUE {
        return z * logistic<T>(W(twice_sqrt_2_over_pi) * (z + W(0.044715) * z * z * z));
    }
    FASTNORM_SLOPE {
        const Sigmoids<T> at(W(twice_sqrt_2_over_pi) * (z + W(0.044715) * z * z * z));
        return at.s + z * at.s * at.rest * (W(twice_sqrt_2_over_pi) * (W(1) + W(0.134145) * z * z));
    }
};

struct gelu_sigmoid {
    FASTNORM_VALUE { return z * logistic<T>(W(1.702) * z); }
    FASTNORM_SLOPE {
        const Sigmoids<T> at(W(1.702) * z);
        return at.s * (W(1) + W(1.702) * z * at.rest);
    }
};

struct silu {
    FASTNORM_VALUE { return z * logistic<T>(z); }
    FASTNORM_SLOPE {
        const Sigmoids<T> at(z);
        return at.s * (W(1) + z * at.rest);
    }
};

struct hardswish {
    FASTNORM_VALUE { return z * (z >= W(3) ? W(6) : z <= W(-3) ? W(0) : z + W(3)) * W(1.0 / 6.0); }
    FASTNORM_SLOPE { return z <= W(-3) ? W(0) : z >= W(3) ? W(1) : z * W(1.0 / 3.0) + W(0.5); }
};

struct mish {
    // tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); past 20 it is 1
    FASTNORM_VALUE {
        const W e = exponential<T>(not_above<W>(z, 20)), n = e * (e + W(2));
        return z * n * reciprocal(n + W(2));
    }
    FASTNORM_SLOPE {
        const W low = not_above<W>(z, 20), e = exponential<T>(low), n = e * (e + W(2));
        const W r = reciprocal(n + W(2));
        return r * (n + W(4) * low * (e * (e + W(1)) * r));
    }
};

struct tanh {
    FASTNORM_VALUE { return hyperbolic_tangent(z); }
    FASTNORM_SLOPE {
        const W t = hyperbolic_tangent(z);
        return W(1) - t * t;
    }
};

struct sigmoid {
    FASTNORM_VALUE { return logistic<T>(z); }
    FASTNORM_SLOPE {
        // even in z: nothing cancels or overflows on this side
        const W e = exponential<T>(z < W(0) ? z : -z), s = reciprocal_of_1_plus<T>(e);
        return z == z ? e * s * s : z;
    }
};

#undef FASTNORM_VALUE
#undef FASTNORM_SLOPE

}  // namespace activations

// ---- from a name at run time to a type ----------------------------------------------------------

// Calls f with the activation's struct, on the device; every thread takes the same way.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, F f) {
    switch (activation) {
#define FASTNORM_CASE(name)     \
    case Activation::name:      \
        f(activations::name{}); \
        break;
        FASTNORM_ACTIVATIONS(FASTNORM_CASE)
#undef FASTNORM_CASE
    }
}

// An activation as kernels take it: a type of its own (the frequent ones, chosen at compile time)
// ...
template <class Formula>
struct Fixed {
    __device__ __forceinline__ explicit Fixed(Activation) {}
    template <class T, class W = Wide<T>>
    __device__ __forceinline__ W value(W z) const {
        return Formula::template value<T>(z);
    }
    template <class T, class W = Wide<T>>
    __device__ __forceinline__ W slope(W z) const {
        return Formula::template slope<T>(z);
    }
};

// ... or any of them behind a switch that all threads take the same way.
struct Any {
    Activation activation;
    __device__ __forceinline__ explicit Any(Activation which) : activation(which) {}
};

// A type as a value, for what cannot be made on the host.
template <class T>
struct Type {
    using type = T;
};

// Calls f with Type<Fixed<...>> for what people train with, Type<Any> for the rest and for fp64.
template <class T, class F>
cudaError_t with_activation_type(Activation activation, F f) {
    if constexpr (!std::is_same_v<T, double>) {
        switch (activation) {
            case Activation::identity:
                return f(Type<Fixed<activations::identity>>{});
            case Activation::relu:
                return f(Type<Fixed<activations::relu>>{});
            case Activation::silu:
                return f(Type<Fixed<activations::silu>>{});
            case Activation::gelu:
                return f(Type<Fixed<activations::gelu>>{});
            default:
                break;
        }
    }
    return f(Type<Any>{});
}

}  // namespace fastnorm
