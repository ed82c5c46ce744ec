// What decoding computes: products of a few rows, among them the experts', and attention of one query a sequence.
//
// All are bound by reading weights, or keys and values: each is read once, and meets AT_ONCE rows at a time. Products of
// bfloat16 are taken by the units for them, where there are some, and summed in float32.

#include <algorithm>
#include <cmath>
#include <vector>

#include "activations.h"
#include "heads.h"
#include "vectors.h"

constexpr int AT_ONCE = 4;

inline int64_t whole(int64_t n) { return (n + W - 1) / W * W; }

// out[r] = Σ_i rows[r][i] weights[i] for N rows.
template <int N>
inline void dots(const float* const* rows, const float* weights, int64_t width, float* out) {
  vec sums[N] = {};
  columns(width, [&](int64_t i, int count) {
    const vec weight = read(weights + i, count);
    UNROLL for (int r = 0; r < N; r++) sums[r] += read(rows[r] + i, count) * weight;
  });
  UNROLL for (int r = 0; r < N; r++) out[r] = sum(sums[r]);
}

template <int N>
inline void dots(const bfloat16* const* rows, const bfloat16* weights, int64_t width, float* out) {
  vec sums[N] = {};
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 2 * W <= width; i += 2 * W) {
    const __m512bh weight = (__m512bh)_mm512_loadu_si512(weights + i);
    UNROLL for (int r = 0; r < N; r++) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(rows[r] + i);
      sums[r] = (vec)_mm512_dpbf16_ps((__m512)sums[r], row, weight);
    }
  }
#endif
  columns(width - i, [&](int64_t j, int count) {
    const vec weight = read(weights + i + j, count);
    UNROLL for (int r = 0; r < N; r++) sums[r] += read(rows[r] + i + j, count) * weight;
  });
  UNROLL for (int r = 0; r < N; r++) out[r] = sum(sums[r]);
}

template <class T>
inline void dots(int n_rows, const T* const* rows, const T* weights, int64_t width, float* out) {
  if (n_rows == 4) return dots<4>(rows, weights, width, out);
  if (n_rows == 3) return dots<3>(rows, weights, width, out);
  if (n_rows == 2) return dots<2>(rows, weights, width, out);
  dots<1>(rows, weights, width, out);
}

// The products of n_rows rows with n_columns rows of weights, W at most: work(r, products) for each.
template <class T, class Work>
inline void block(int n_rows, const T* const* rows, const T* weights, const T* biases, int64_t width, int n_columns,
                  Work work) {
  float products[AT_ONCE][W] = {};
  for (int j = 0; j < n_columns; j++) {
    float of_rows[AT_ONCE] = {};
    dots(n_rows, rows, weights + j * width, width, of_rows);
    for (int r = 0; r < n_rows; r++) products[r][j] = of_rows[r];
  }
  const vec bias = biases ? read(biases, n_columns) : vec{};
  for (int r = 0; r < n_rows; r++) work(r, load(products[r]) + bias);
}

// out = x Wᵀ for the weights [n_columns, width].
template <class T>
void product(const T* x, const T* weights, T* out, int64_t n_rows, int64_t width, int64_t n_columns, int64_t threads) {
  const int64_t blocks = whole(n_columns) / W;
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < blocks; item++) {
    const int64_t column = item * W;
    const int count = std::min<int64_t>(W, n_columns - column);
    for (int64_t first = 0; first < n_rows; first += AT_ONCE) {
      const int n = std::min<int64_t>(AT_ONCE, n_rows - first);
      const T* rows[AT_ONCE];
      for (int r = 0; r < n; r++) rows[r] = x + (first + r) * width;
      block<T>(n, rows, weights + column * width, nullptr, width, count,
               [&](int r, vec products) { write(out + (first + r) * n_columns + column, products, count); });
    }
  }
}

// An expert that is hit: its places are slots `first` to `first + count`.
struct Hit {
  int64_t expert, first, count;
};

// work(expert, column, n_columns, slot, n_slots) for the columns of each hit expert, W at a time, and its slots, AT_ONCE
// at a time; shared out among the threads of the parallel region that calls it, which wait for each other at its end.
template <class Work>
void each_block(const std::vector<Hit>& hits, int64_t width, Work work) {
  const int64_t blocks = whole(width) / W;
#pragma omp for schedule(dynamic, 4)
  for (int64_t item = 0; item < int64_t(hits.size()) * blocks; item++) {
    const Hit hit = hits[item / blocks];
    const int64_t column = item % blocks * W, end = hit.first + hit.count;
    const int n_columns = std::min<int64_t>(W, width - column);
    for (int64_t slot = hit.first; slot < end; slot += AT_ONCE)
      work(hit.expert, column, n_columns, slot, int(std::min<int64_t>(AT_ONCE, end - slot)));
  }
}

// y[t] = Σ_k weight_tk · expert_tk(x_t); an expert that is none of E adds nothing. The places t K + k are taken expert by
// expert, so that what an expert's weights are multiplied with lies together.
template <Kind KIND, class T>
void few_experts(const T* x, const int64_t* expert_of_place, const float* combine_weights, const T* w_in, const T* b_in,
                 const T* w_out, const T* b_out, float* y, int64_t n_tokens, int64_t top_k, int64_t n_experts,
                 int64_t d_model, int64_t d_ff, int64_t threads) {
  const int64_t wide = gated(KIND) ? 2 * d_ff : d_ff, n_places = n_tokens * top_k;
  std::vector<Hit> hits;
  std::vector<int64_t> places, slot_of_place(n_places, -1);
  for (int64_t expert = 0; expert < n_experts; expert++) {
    const int64_t first = places.size();
    for (int64_t place = 0; place < n_places; place++)
      if (expert_of_place[place] == expert) {
        slot_of_place[place] = places.size();
        places.push_back(place);
      }
    if (int64_t(places.size()) > first) hits.push_back({expert, first, int64_t(places.size()) - first});
  }
  std::vector<T> inner(places.size() * d_ff);
  std::vector<float> outputs(places.size() * d_model);
#pragma omp parallel num_threads(threads)
  {
    each_block(hits, d_ff, [&](int64_t expert, int64_t column, int n_columns, int64_t slot, int n) {
      const int64_t row = expert * wide + column;
      const T* rows[AT_ONCE];
      for (int r = 0; r < n; r++) rows[r] = x + places[slot + r] / top_k * d_model;
      vec gates[AT_ONCE], values[AT_ONCE] = {};
      block(n, rows, w_in + row * d_model, b_in ? b_in + row : nullptr, d_model, n_columns,
            [&](int r, vec products) { gates[r] = products; });
      if (gated(KIND))
        block(n, rows, w_in + (row + d_ff) * d_model, b_in ? b_in + row + d_ff : nullptr, d_model, n_columns,
              [&](int r, vec products) { values[r] = products; });
      for (int r = 0; r < n; r++)
        write(&inner[(slot + r) * d_ff + column], activate<KIND>(gates[r], values[r]).inner, n_columns);
    });
    each_block(hits, d_model, [&](int64_t expert, int64_t column, int n_columns, int64_t slot, int n) {
      const int64_t row = expert * d_model + column;
      const T* rows[AT_ONCE];
      for (int r = 0; r < n; r++) rows[r] = &inner[(slot + r) * d_ff];
      block(n, rows, w_out + row * d_ff, b_out ? b_out + row : nullptr, d_ff, n_columns,
            [&](int r, vec products) { write(&outputs[(slot + r) * d_model + column], products, n_columns); });
    });
  }
  for (int64_t t = 0; t < n_tokens; t++)
    columns(d_model, [&](int64_t j, int count) {
      vec total = {};
      for (int64_t k = t * top_k; k < (t + 1) * top_k; k++)
        if (slot_of_place[k] >= 0) total += combine_weights[k] * read(&outputs[slot_of_place[k] * d_model + j], count);
      write(y + t * d_model + j, total, count);
    });
}

// softmax(q Kᵀ / √d) V of one query a sequence and head over the keys that `visible` [B, L] says (none: all).
template <class T>
void attend_to_cache(const T* queries, Strides q, const T* keys, Strides k, const T* values, Strides v,
                     const bool* visible, T* output, Sizes size, int64_t threads) {
  const int64_t heads = size.key_heads * size.repeats;
  const float factor = float(1.4426950408889634 / std::sqrt(double(size.width)));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores(size.length), total(size.width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < size.batch * heads; item++) {
      const int64_t b = item / heads, h = item % heads, g = h / size.repeats;
      const T* row = queries + b * q.batch + h * q.head;
      float top = -INFINITY;
      for (int64_t l = 0; l < size.length; l++) {
        if (visible && !visible[b * size.length + l]) {
          scores[l] = -INFINITY;
          continue;
        }
        dots<1>(&row, keys + b * k.batch + g * k.head + l * k.token, size.width, &scores[l]);
        scores[l] *= factor;
        top = std::max(top, scores[l]);
      }
      vec sums = {};
      columns(size.length, [&](int64_t l, int count) {
        const vec score = read(&scores[l], count), power = exp2(score - top);
        const vec p = score == -INFINITY ? vec{} : power;
        write(&scores[l], p, count);
        sums += read(&scores[l], count);
      });
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t l = 0; l < size.length; l++) {
        if (visible && !visible[b * size.length + l]) continue;
        const T* value = values + b * v.batch + g * v.head + l * v.token;
        columns(size.width, [&](int64_t j, int count) {
          write(&total[j], read(&total[j], count) + scores[l] * read(value + j, count), count);
        });
      }
      const float inverse = 1 / sum(sums);
      columns(size.width, [&](int64_t j, int count) {
        write(output + (b * heads + h) * size.width + j, read(&total[j], count) * inverse, count);
      });
    }
  }
}

#define DEFINE_FOR_KIND(KIND, NAME, T)                                                                               \
  extern "C" void few_experts_##NAME##_##T(                                                                          \
      const T* x, const int64_t* expert_of_place, const float* combine_weights, const T* w_in, const T* b_in,        \
      const T* w_out, const T* b_out, float* y, int64_t n_tokens, int64_t top_k, int64_t n_experts, int64_t d_model, \
      int64_t d_ff, int64_t threads) {                                                                               \
    few_experts<KIND>(x, expert_of_place, combine_weights, w_in, b_in, w_out, b_out, y, n_tokens, top_k, n_experts,  \
                      d_model, d_ff, threads);                                                                       \
  }

#define DEFINE_FOR(T)                                                                                                 \
  DEFINE_FOR_KIND(RELU, relu, T)                                                                                      \
  DEFINE_FOR_KIND(GELU, gelu, T)                                                                                      \
  DEFINE_FOR_KIND(GELU_TANH, gelu_tanh, T)                                                                            \
  DEFINE_FOR_KIND(SWIGLU, swiglu, T)                                                                                  \
  DEFINE_FOR_KIND(SWIGLU_CLAMPED, swiglu_clamped, T)                                                                  \
  extern "C" void product_##T(const T* x, const T* weights, T* out, int64_t n_rows, int64_t width, int64_t n_columns, \
                              int64_t threads) {                                                                      \
    product(x, weights, out, n_rows, width, n_columns, threads);                                                      \
  }                                                                                                                   \
  extern "C" void attend_to_cache_##T(const T* queries, Strides q, const T* keys, Strides k,                \
                                      const T* values, Strides v, const bool* visible, T* output,                \
                                      Sizes size, int64_t threads) {                                             \
    attend_to_cache(queries, q, keys, k, values, v, visible, output, size, threads);                                  \
  }

DEFINE_FOR(float32)
DEFINE_FOR(bfloat16)
