// Sixteen floats at a time, by the vector types of GCC and Clang, which cut them up for narrower machines.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));

constexpr int W = 16;

#define UNROLL _Pragma("GCC unroll 8")  // or sums would not stay in registers

typedef float float32;

struct bfloat16 {
  uint16_t bits;
};

inline vec splat(float x) { return vec{} + x; }

inline vec load(const float* at) {
  vec x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

inline vec load(const bfloat16* at) {
  hvec half;
  std::memcpy(&half, at, sizeof half);
  return (vec)(__builtin_convertvector(half, uvec) << 16);
}

inline void store(float* at, vec x) { std::memcpy(at, &x, sizeof x); }

// To nearest, of two equally near to the even one; what is no number stays none. The units for it make zero of what is
// below 2^-126.
inline void store(bfloat16* at, vec x) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
  uvec bits = (uvec)x;
  uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uvec quiet = (bits >> 16) | 0x40u;
  hvec half = __builtin_convertvector((uvec)(x == x ? (ivec)rounded : (ivec)quiet), hvec);
#endif
  std::memcpy(at, &half, sizeof half);
}

// The first `count` lanes, and zeros.
template <class T>
inline vec load_some(const T* at, int count) {
  T all[W] = {};
  std::memcpy(all, at, count * sizeof(T));
  return load(all);
}

template <class T>
inline void store_some(T* at, vec x, int count) {
  T all[W];
  store(all, x);
  std::memcpy(at, all, count * sizeof(T));
}

// Of all lanes, by halves.
template <class Half, class Whole, class Join>
inline Half halved(Whole x, Join join) {
  Half low, high;
  std::memcpy(&low, &x, sizeof low);
  std::memcpy(&high, (const char*)&x + sizeof low, sizeof high);
  return join(low, high);
}

template <class Join>
inline float all_lanes(vec x, Join join) {
  typedef float eight __attribute__((vector_size(32)));
  typedef float four __attribute__((vector_size(16)));
  const four y = halved<four>(halved<eight>(x, join), join);
  return join(join(y[0], y[2]), join(y[1], y[3]));
}

inline float sum(vec x) {
  return all_lanes(x, [](auto a, auto b) { return a + b; });
}

inline float greatest(vec x) {
  return all_lanes(x, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x to 2e-7 of itself for x <= 127; below -126 it stays at 2^-126, and NaN stays NaN. The nearest integer n is left in the low bits of
// x + 1.5 * 2^23, 2^(x - n) is its Taylor series, and n is added to the exponent.
inline vec exp2(vec x) {
  x = x < -126.0f ? splat(-126.0f) : x;
  const vec shifted = x + 12582912.0f;
  const vec f = x - (shifted - 12582912.0f);
  vec p = splat(1.5252734e-5f);
  p = p * f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const vec power = (vec)((ivec)p + ((ivec)shifted << 23));
  return x == x ? power : x;
}

// Sixteen columns at a time, the last ones `count` of them.
template <class Work>
inline void columns(int64_t width, Work work) {
  int64_t j = 0;
  for (; j + W <= width; j += W) work(j, W);
  if (j < width) work(j, int(width - j));
}

template <class T>
inline vec read(const T* at, int count) {
  return count == W ? load(at) : load_some(at, count);
}

template <class T>
inline void write(T* at, vec x, int count) {
  if (count == W)
    store(at, x);
  else
    store_some(at, x, count);
}
