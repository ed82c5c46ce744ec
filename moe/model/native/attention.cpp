// Causal attention of short sequences, forward and backward; all arithmetic in float32.
//
// One thread has one key head with its query heads at a time, whose keys and values stay in its cache. ROWS queries
// meet all keys up to their own at once, so that the scores of a few rows are all that is held; what lies beyond the
// diagonal is never computed. Forward keeps the base-2 logarithm of each row's sum alone, from which backward computes
// the probabilities again (Dao et al. 2022, algorithms 1 and 4).

#include <algorithm>
#include <cmath>
#include <vector>

#include "heads.h"
#include "vectors.h"

constexpr int ROWS = 8;
static_assert(W % ROWS == 0, "the diagonal of a block of rows must lie in one vector");

// Of queries, for scores to the base of 2: e^x = 2^(x / ln 2). Backward must find forward's scores to the bit.
inline float factor_of(int width) { return float(1.4426950408889634 / std::sqrt(double(width))); }

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// One head's rows in float32: a copy of [length, width], both rounded up with zeros.
template <class T>
void read_rows(const T* from, int64_t stride, int length, int width, float factor, float* rows, int rows_padded,
               int width_padded) {
  for (int i = 0; i < length; i++) {
    int t = 0;
    for (; t + W <= width; t += W) store(rows + i * width_padded + t, load(from + i * stride + t) * factor);
    if (t < width) store(rows + i * width_padded + t, load_some(from + i * stride + t, width - t) * factor);
  }
  std::fill(rows + length * width_padded, rows + rows_padded * width_padded, 0.0f);
}

template <class T>
void write_rows(T* to, int64_t stride, int length, int width, float factor, const float* rows, int width_padded) {
  for (int i = 0; i < length; i++) {
    int t = 0;
    for (; t + W <= width; t += W) store(to + i * stride + t, load(rows + i * width_padded + t) * factor);
    if (t < width) store_some(to + i * stride + t, load(rows + i * width_padded + t) * factor, width - t);
  }
}

void transpose(const float* rows, int width_padded, int length_padded, int width, float* columns) {
  for (int t = 0; t < width; t++)
    for (int i = 0; i < length_padded; i++) columns[t * length_padded + i] = rows[i * width_padded + t];
}

// out[r][j] = Σ_t left[r][t] columns[t][j] for ROWS rows and N vectors of columns.
template <int N>
inline void dot_columns(const float* left, int width_padded, const float* columns, int length_padded, int width,
                        float* out) {
  vec sums[ROWS][N] = {};
  for (int t = 0; t < width; t++) {
    vec right[N];
    UNROLL for (int n = 0; n < N; n++) right[n] = load(columns + t * length_padded + n * W);
    UNROLL for (int r = 0; r < ROWS; r++)
      UNROLL for (int n = 0; n < N; n++) sums[r][n] += left[r * width_padded + t] * right[n];
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int n = 0; n < N; n++) store(out + r * length_padded + n * W, sums[r][n]);
}

void products_with_columns(const float* left, int width_padded, const float* columns, int length_padded, int width,
                           int n_columns, float* out) {
  int j = 0;
  for (; j + 2 * W <= n_columns; j += 2 * W)
    dot_columns<2>(left, width_padded, columns + j, length_padded, width, out + j);
  if (j < n_columns) dot_columns<1>(left, width_padded, columns + j, length_padded, width, out + j);
}

// out[r] = Σ_j left[r][j] rows[j] over j <= row + r, for ROWS rows from `row` on and N vectors of the width. What a row
// must not see is left out and not multiplied by zero, which would make NaN of an infinity.
template <int N>
inline void sum_rows(const float* left, int length_padded, const float* rows, int width_padded, int row, float* out) {
  vec sums[ROWS][N] = {};
  for (int j = 0; j < row; j++) {
    vec right[N];
    UNROLL for (int n = 0; n < N; n++) right[n] = load(rows + j * width_padded + n * W);
    UNROLL for (int r = 0; r < ROWS; r++)
      UNROLL for (int n = 0; n < N; n++) sums[r][n] += left[r * length_padded + j] * right[n];
  }
  UNROLL for (int d = 0; d < ROWS; d++) {
    vec right[N];
    UNROLL for (int n = 0; n < N; n++) right[n] = load(rows + (row + d) * width_padded + n * W);
    UNROLL for (int r = d; r < ROWS; r++)
      UNROLL for (int n = 0; n < N; n++) sums[r][n] += left[r * length_padded + row + d] * right[n];
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int n = 0; n < N; n++) store(out + r * width_padded + n * W, sums[r][n]);
}

void weighted_rows(const float* left, int length_padded, const float* rows, int width_padded, int row, float* out) {
  int t = 0;
  for (; t + 2 * W <= width_padded; t += 2 * W)
    sum_rows<2>(left, length_padded, rows + t, width_padded, row, out + t);
  if (t < width_padded) sum_rows<1>(left, length_padded, rows + t, width_padded, row, out + t);
}

// sums[j] += Σ_r left[r][j] rows[r] for ROWS rows and N vectors of the width.
template <int N>
inline void add_outer(const float* left, int length_padded, const float* rows, int width_padded, int n_columns,
                      float* sums) {
  vec right[ROWS][N];
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int n = 0; n < N; n++) right[r][n] = load(rows + r * width_padded + n * W);
  for (int j = 0; j < n_columns; j++) {
    float* at = sums + j * width_padded;
    vec even[N], odd[N] = {};
    UNROLL for (int n = 0; n < N; n++) even[n] = load(at + n * W);
    UNROLL for (int r = 0; r < ROWS; r += 2)
      UNROLL for (int n = 0; n < N; n++) {
        even[n] += left[r * length_padded + j] * right[r][n];
        odd[n] += left[(r + 1) * length_padded + j] * right[r + 1][n];
      }
    UNROLL for (int n = 0; n < N; n++) store(at + n * W, even[n] + odd[n]);
  }
}

void add_outer_products(const float* left, int length_padded, const float* rows, int width_padded, int n_columns,
                        float* sums) {
  int t = 0;
  for (; t + 2 * W <= width_padded; t += 2 * W)
    add_outer<2>(left, length_padded, rows + t, width_padded, n_columns, sums + t);
  if (t < width_padded) add_outer<1>(left, length_padded, rows + t, width_padded, n_columns, sums + t);
}

// The lanes of the vector that ends a row's columns which lie after the row's own key.
inline ivec after(int row, int n_columns) {
  ivec lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane + (n_columns - W) > row;
}

// scores -> probabilities exp2(score - log), zero beyond the diagonal.
inline void probabilities_of(float* scores, int row, int n_columns, float log) {
  int j = 0;
  for (; j < n_columns - W; j += W) store(scores + j, exp2(load(scores + j) - log));
  const vec last = exp2(load(scores + j) - log);
  store(scores + j, after(row, n_columns) ? vec{} : last);
}

template <class T>
void forward(const T* queries, Strides q, const T* keys, Strides k, const T* values, Strides v, T* output, Strides o,
             float* logs, Sizes size, int64_t threads) {
  const int length = size.length, width = size.width;
  const int length_padded = round_up(length, W), width_padded = round_up(width, W);
  const int64_t heads = size.key_heads * size.repeats;
  const float factor = factor_of(width);
#pragma omp parallel num_threads(threads)
  {
    const int matrix = length_padded * width_padded;
    std::vector<float> space(4 * matrix + ROWS * (length_padded + width_padded));
    float *rows = space.data(), *columns = rows + matrix, *seen = columns + matrix, *out = seen + matrix;
    float* scores = out + matrix;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < size.batch * size.key_heads; item++) {
      const int64_t b = item / size.key_heads, g = item % size.key_heads;
      read_rows(keys + b * k.batch + g * k.head, k.token, length, width, 1.0f, rows, length_padded, width_padded);
      transpose(rows, width_padded, length_padded, width, columns);
      read_rows(values + b * v.batch + g * v.head, v.token, length, width, 1.0f, seen, length_padded, width_padded);
      for (int64_t h = g * size.repeats; h < (g + 1) * size.repeats; h++) {
        read_rows(queries + b * q.batch + h * q.head, q.token, length, width, factor, rows, length_padded,
                  width_padded);
        for (int i = 0; i < length; i += ROWS) {
          const int n_columns = round_up(i + ROWS, W);
          products_with_columns(rows + i * width_padded, width_padded, columns, length_padded, width, n_columns,
                                scores);
          float inverse[ROWS];
          for (int r = 0; r < ROWS; r++) {
            float* row = scores + r * length_padded;
            const int last = n_columns - W;
            vec most = after(i + r, n_columns) ? splat(-INFINITY) : load(row + last);
            for (int j = 0; j < last; j += W) {
              const vec x = load(row + j);
              most = most > x ? most : x;
            }
            const float top = greatest(most);
            probabilities_of(row, i + r, n_columns, top);
            vec total = {};
            for (int j = 0; j < n_columns; j += W) total += load(row + j);
            const float whole = sum(total);
            inverse[r] = 1 / whole;
            if (i + r < length) logs[(b * heads + h) * length + i + r] = top + std::log2(whole);
          }
          weighted_rows(scores, length_padded, seen, width_padded, i, out + i * width_padded);
          for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < width_padded; t += W) {
              float* at = out + (i + r) * width_padded + t;
              store(at, load(at) * inverse[r]);
            }
        }
        write_rows(output + b * o.batch + h * o.head, o.token, length, width, 1.0f, out, width_padded);
      }
    }
  }
}

template <class T>
void backward(const T* grad, Strides g_, const T* queries, Strides q, const T* keys, Strides k, const T* values,
              Strides v, const T* output, Strides o, const float* logs, T* grad_queries, Strides gq, T* grad_keys,
              Strides gk, T* grad_values, Strides gv, Sizes size,
              int64_t threads) {
  const int length = size.length, width = size.width;
  const int length_padded = round_up(length, W), width_padded = round_up(width, W);
  const int64_t heads = size.key_heads * size.repeats;
  const float scale = float(1 / std::sqrt(double(width))), factor = factor_of(width);
#pragma omp parallel num_threads(threads)
  {
    const int matrix = length_padded * width_padded;
    std::vector<float> space(9 * matrix + 2 * ROWS * length_padded);
    float *key_rows = space.data(), *key_columns = key_rows + matrix, *value_columns = key_columns + matrix;
    float *rows = value_columns + matrix, *grads = rows + matrix, *outs = grads + matrix;
    float *to_queries = outs + matrix, *to_keys = to_queries + matrix, *to_values = to_keys + matrix;
    float *scores = to_values + matrix, *slopes = scores + ROWS * length_padded;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < size.batch * size.key_heads; item++) {
      const int64_t b = item / size.key_heads, g = item % size.key_heads;
      read_rows(values + b * v.batch + g * v.head, v.token, length, width, 1.0f, rows, length_padded, width_padded);
      transpose(rows, width_padded, length_padded, width, value_columns);
      read_rows(keys + b * k.batch + g * k.head, k.token, length, width, 1.0f, key_rows, length_padded, width_padded);
      transpose(key_rows, width_padded, length_padded, width, key_columns);
      std::fill(to_keys, to_keys + 2 * matrix, 0.0f);
      for (int64_t h = g * size.repeats; h < (g + 1) * size.repeats; h++) {
        read_rows(queries + b * q.batch + h * q.head, q.token, length, width, factor, rows, length_padded,
                  width_padded);
        read_rows(grad + b * g_.batch + h * g_.head, g_.token, length, width, 1.0f, grads, length_padded,
                  width_padded);
        read_rows(output + b * o.batch + h * o.head, o.token, length, width, 1.0f, outs, length_padded, width_padded);
        for (int i = 0; i < length; i += ROWS) {
          const int n_keys = std::min(length, i + ROWS), n_columns = round_up(n_keys, W);
          const float *row = rows + i * width_padded, *grad_row = grads + i * width_padded;
          products_with_columns(row, width_padded, key_columns, length_padded, width, n_columns, scores);
          products_with_columns(grad_row, width_padded, value_columns, length_padded, width, n_columns, slopes);
          for (int r = 0; r < ROWS; r++) {
            float *p = scores + r * length_padded, *slope = slopes + r * length_padded;
            if (i + r >= length) {
              std::fill(p, p + n_columns, 0.0f);
              std::fill(slope, slope + n_columns, 0.0f);
              continue;
            }
            probabilities_of(p, i + r, n_columns, logs[(b * heads + h) * length + i + r]);
            vec dot = {};
            for (int t = 0; t < width_padded; t += W)
              dot += load(grad_row + r * width_padded + t) * load(outs + (i + r) * width_padded + t);
            const float mean = sum(dot);
            for (int j = 0; j < n_columns; j += W) store(slope + j, load(p + j) * (load(slope + j) - mean));
            // The slope at a later value that is infinite would be no number.
            const int last = n_columns - W;
            store(slope + last, after(i + r, n_columns) ? vec{} : load(slope + last));
          }
          weighted_rows(slopes, length_padded, key_rows, width_padded, i, to_queries + i * width_padded);
          add_outer_products(slopes, length_padded, row, width_padded, n_keys, to_keys);
          add_outer_products(scores, length_padded, grad_row, width_padded, n_keys, to_values);
        }
        write_rows(grad_queries + b * gq.batch + h * gq.head, gq.token, length, width, scale, to_queries,
                   width_padded);
      }
      // The queries had been multiplied by scale / ln 2.
      write_rows(grad_keys + b * gk.batch + g * gk.head, gk.token, length, width, 0.69314718f, to_keys, width_padded);
      write_rows(grad_values + b * gv.batch + g * gv.head, gv.token, length, width, 1.0f, to_values, width_padded);
    }
  }
}

#define DEFINE(T)                                                                                                      \
  extern "C" void attention_forward_##T(const T* queries, Strides q, const T* keys, Strides k, const T* values,        \
                                        Strides v, T* output, Strides o, float* logs, Sizes size, int64_t threads) {   \
    forward(queries, q, keys, k, values, v, output, o, logs, size, threads);                                           \
  }                                                                                                                    \
  extern "C" void attention_backward_##T(                                                                              \
      const T* grad, Strides g, const T* queries, Strides q, const T* keys, Strides k, const T* values, Strides v,     \
      const T* output, Strides o, const float* logs, T* grad_queries, Strides gq, T* grad_keys, Strides gk,            \
      T* grad_values, Strides gv, Sizes size, int64_t threads) {                                                       \
    backward(grad, g, queries, q, keys, k, values, v, output, o, logs, grad_queries, gq, grad_keys, gk, grad_values,   \
             gv, size, threads);                                                                                       \
  }

DEFINE(float32)
DEFINE(bfloat16)
