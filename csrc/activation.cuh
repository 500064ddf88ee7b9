// Every activation as a struct of two functions of the wide pre-activation z: value and slope.
#pragma once
#include "common.cuh"

namespace fastnorm {

// ---- functions of both types of computation -----------------------------------------------------

__device__ __forceinline__ float exponential(float z) {
    return expf(z);
}
__device__ __forceinline__ double exponential(double z) {
    return exp(z);
}
__device__ __forceinline__ float exponential_minus_1(float z) {
    return expm1f(z);
}
__device__ __forceinline__ double exponential_minus_1(double z) {
    return expm1(z);
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

template <class W>
__device__ __forceinline__ W logistic(W z) {
    return reciprocal(W(1) + exponential(-z));
}

// sigmoid(z) and sigmoid(-z) from one exp; 1 - s would cancel where s is near 1.
template <class W>
struct Sigmoids {
    W s, rest;
    __device__ __forceinline__ explicit Sigmoids(W z) {
        const W e = exponential(-z);
        s = reciprocal(W(1) + e);
        rest = z > W(0) ? e * s : W(1) - s;
    }
};

// ---- the activations, each named as in Python ---------------------------------------------------

namespace activations {

#define FASTNORM_VALUE \
    template <class W> \
    static __device__ __forceinline__ W value(W z)
#define FASTNORM_SLOPE \
    template <class W> \
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
    FASTNORM_VALUE { return z <= W(0) ? exponential_minus_1(z) : z; }
    FASTNORM_SLOPE { return z <= W(0) ? exponential(z) : W(1); }
};

struct selu {
    static constexpr double alpha = 1.6732632423543772848170429916717;
    static constexpr double scale = 1.0507009873554804934193349852946;
    FASTNORM_VALUE { return W(scale) * (z <= W(0) ? W(alpha) * exponential_minus_1(z) : z); }
    FASTNORM_SLOPE { return W(scale) * (z <= W(0) ? W(alpha) * exponential(z) : W(1)); }
};

struct gelu {
    static constexpr double sqrt_half = 0.70710678118654752440;
    FASTNORM_VALUE { return W(0.5) * z * (W(1) + error_function(z * W(sqrt_half))); }
    FASTNORM_SLOPE {
        const W cdf = W(0.5) * (W(1) + error_function(z * W(sqrt_half)));
        return cdf + z * (W(0.39894228040143267794) * exponential(W(-0.5) * z * z));
    }
};

struct gelu_tanh {
    // (1 + tanh u) / 2 = sigmoid(2 u): one exp, and no cancellation in the negative tail
    static constexpr double twice_sqrt_2_over_pi = 1.5957691216057307117;
    FASTNORM_VALUE { return z * logistic(W(twice_sqrt_2_over_pi) * (z + W(0.044715) * z * z * z)); }
    FASTNORM_SLOPE {
        const Sigmoids<W> at(W(twice_sqrt_2_over_pi) * (z + W(0.044715) * z * z * z));
        return at.s + z * at.s * at.rest * (W(twice_sqrt_2_over_pi) * (W(1) + W(0.134145) * z * z));
    }
};

struct gelu_sigmoid {
    FASTNORM_VALUE { return z * logistic(W(1.702) * z); }
    FASTNORM_SLOPE {
        const Sigmoids<W> at(W(1.702) * z);
        return at.s * (W(1) + W(1.702) * z * at.rest);
    }
};

struct silu {
    FASTNORM_VALUE { return z * logistic(z); }
    FASTNORM_SLOPE {
        const Sigmoids<W> at(z);
        return at.s * (W(1) + z * at.rest);
    }
};

struct hardswish {
    FASTNORM_VALUE { return z * (z >= W(3) ? W(6) : z <= W(-3) ? W(0) : z + W(3)) * W(1.0 / 6.0); }
    FASTNORM_SLOPE { return z <= W(-3) ? W(0) : z >= W(3) ? W(1) : z * W(1.0 / 3.0) + W(0.5); }
};

struct mish {
    // tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); past 20 it is 1
    template <class W>
    static __device__ __forceinline__ W factor(W z) {
        const W e = exponential(z < W(20) ? z : W(20));
        const W n = e * (e + W(2));
        return z == z ? n * reciprocal(n + W(2)) : z;
    }
    FASTNORM_VALUE { return z * factor(z); }
    FASTNORM_SLOPE {
        const W t = factor(z);
        return t + z * logistic(z) * (W(1) - t * t);
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
    FASTNORM_VALUE { return logistic(z); }
    FASTNORM_SLOPE {
        const Sigmoids<W> at(z);
        return at.s * at.rest;
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
    template <class W>
    __device__ __forceinline__ W value(W z) const {
        return Formula::value(z);
    }
    template <class W>
    __device__ __forceinline__ W slope(W z) const {
        return Formula::slope(z);
    }
};

// ... or any of them behind a switch that all threads take the same way.
struct Any {
    Activation activation;
    __device__ __forceinline__ explicit Any(Activation which) : activation(which) {}
    template <class W>
    __device__ __forceinline__ W value(W z) const {
        W y = z;
        with_activation(activation, [&](auto formula) { y = decltype(formula)::value(z); });
        return y;
    }
    template <class W>
    __device__ __forceinline__ W slope(W z) const {
        W y = z;
        with_activation(activation, [&](auto formula) { y = decltype(formula)::slope(z); });
        return y;
    }
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
