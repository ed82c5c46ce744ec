// The activations of moe/model/feed_forward.py and their slopes, sixteen hidden units at a time.

#pragma once

#include "vectors.h"

enum Kind { RELU, GELU, GELU_TANH, SWIGLU, SWIGLU_CLAMPED };

// Of the hyperbolic and the error function what exp2 gives; arguments are kept where 2^x is a float32.
inline vec sigmoid(vec x) {
  const vec power = x * -1.4426950408889634f;
  return 1.0f / (1.0f + exp2(power > 126.0f ? splat(126.0f) : power));
}

inline vec tanh(vec x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

inline vec exp_of_minus_square(vec x) { return exp2(x * x * -1.4426950408889634f); }

// To 1.5e-7 (Abramowitz and Stegun 1964, eq. 7.1.26).
inline vec erf(vec x) {
  const vec size = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * size);
  vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec positive = 1.0f - p * t * exp_of_minus_square(size);
  return x < 0.0f ? -positive : positive;
}

constexpr bool gated(Kind kind) { return kind == SWIGLU || kind == SWIGLU_CLAMPED; }

struct Activated {
  vec inner, slope_of_gate, slope_of_value;
};

template <Kind KIND>
inline Activated activate(vec gate, vec value) {
  if constexpr (KIND == SWIGLU) {
    const vec s = sigmoid(gate), silu = gate * s;
    return {silu * value, value * (s + silu * (1.0f - s)), silu};
  } else if constexpr (KIND == SWIGLU_CLAMPED) {
    constexpr float CLAMP = 7.0f, SLOPE = 1.702f;
    const vec low = gate > CLAMP ? splat(CLAMP) : gate, bounded = value > CLAMP ? splat(CLAMP) : value;
    const vec one_more = (bounded < -CLAMP ? splat(-CLAMP) : bounded) + 1.0f;
    const vec s = sigmoid(SLOPE * low), silu = low * s;
    const vec slope = one_more * (s + SLOPE * silu * (1.0f - s));
    // At the bound itself the gradient passes, as through torch's clamp.
    return {silu * one_more, gate > CLAMP ? vec{} : slope, (value > CLAMP) | (value < -CLAMP) ? vec{} : silu};
  } else if constexpr (KIND == GELU) {
    const vec below = 0.5f * (1.0f + erf(gate * 0.70710678f));
    return {gate * below, below + gate * exp_of_minus_square(gate * 0.70710678f) * 0.39894228f, vec{}};
  } else if constexpr (KIND == GELU_TANH) {
    constexpr float ROOT = 0.79788456f, CUBIC = 0.044715f;
    const vec t = tanh(ROOT * (gate + CUBIC * gate * gate * gate));
    const vec slope = ROOT * (1.0f + 3 * CUBIC * gate * gate) * (1.0f - t * t);
    return {0.5f * gate * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * gate * slope, vec{}};
  } else {
    return {gate < 0.0f ? vec{} : gate, gate > 0.0f ? splat(1.0f) : vec{}, vec{}};
  }
}
