// What the experts do between their products, each in one pass over rows: float32 inside, whatever is read and written.
// Row by row what moe/model/experts/row_passes.py defines.

#include <algorithm>
#include <vector>

#include "activations.h"
#include "vectors.h"

// The rows of segments.py: a segment an expert, of `step` rows or a multiple, and in it its assignments in the order of
// tokens. Returns in `ends` each segment's; expert n_experts or more, or one that is not executed, has no row.
extern "C" void lay_out(const int64_t* selected, const bool* executed, int64_t* token_of_row, int64_t* row_of_assignment,
                        int64_t* ends, int64_t n_tokens, int64_t top_k, int64_t n_experts, int64_t n_rows, int64_t step,
                        int64_t) {
  const int64_t n_assignments = n_tokens * top_k;
  std::vector<int64_t> next(n_experts + 1, 0);
  auto expert_of = [&](int64_t a) {
    const bool computed = selected[a] >= 0 && selected[a] < n_experts && (!executed || executed[a]);
    return computed ? selected[a] : n_experts;
  };
  for (int64_t a = 0; a < n_assignments; a++) next[expert_of(a)]++;
  int64_t end = 0;
  for (int64_t expert = 0; expert < n_experts; expert++) {
    const int64_t length = (next[expert] + step - 1) / step * step;
    next[expert] = end;
    ends[expert] = end += length;
  }
  std::fill(token_of_row, token_of_row + n_rows, n_tokens);
  for (int64_t a = 0; a < n_assignments; a++) {
    const int64_t expert = expert_of(a);
    const int64_t row = expert < n_experts ? next[expert]++ : n_rows;
    row_of_assignment[a] = row;
    if (row < n_rows) token_of_row[row] = a / top_k;
  }
}

// out[row] = x[token of row], zeros for token n_tokens.
template <class X, class T>
void gather(const X* x, const int64_t* token_of_row, T* out, int64_t n_tokens, int64_t n_rows, int64_t width,
            int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t token = token_of_row[row];
    T* to = out + row * width;
    if (token == n_tokens)
      std::fill(to, to + width, T{});
    else
      columns(width, [&](int64_t j, int count) { write(to + j, read(x + token * width + j, count), count); });
  }
}

// out[t] = Σ_k weight_tk · rows[row of (t, k)], choice by choice; row n_rows is one of zeros.
template <class T, class Y>
void sum_choices(const T* rows, const int64_t* row_of_assignment, const float* weights, Y* out, int64_t n_tokens,
                 int64_t top_k, int64_t n_rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < n_tokens; t++)
    columns(width, [&](int64_t j, int count) {
      vec total = {};
      for (int64_t k = t * top_k; k < (t + 1) * top_k; k++)
        if (row_of_assignment[k] < n_rows) {
          const vec row = read(rows + row_of_assignment[k] * width + j, count);
          total += weights ? weights[k] * row : row;
        }
      write(out + t * width + j, total, count);
    });
}

template <Kind KIND, class T>
void activation(const T* hidden, T* inner, int64_t n_rows, int64_t d_ff, int64_t threads) {
  const int64_t wide = gated(KIND) ? 2 * d_ff : d_ff;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n_rows; row++)
    columns(d_ff, [&](int64_t j, int count) {
      const T* gate = hidden + row * wide + j;
      const vec value = gated(KIND) ? read(gate + d_ff, count) : vec{};
      write(inner + row * d_ff + j, activate<KIND>(read(gate, count), value).inner, count);
    });
}

// From the gradient g of an unweighted A = activation(hidden) and the row's weight w: w A, the gradient of hidden for
// w g, and ⟨g, A⟩.
template <Kind KIND, class T>
void activation_gradient(const T* hidden, const T* grad_inner, const float* weight_of_row, T* weighted, T* grad_hidden,
                         float* dots, int64_t n_rows, int64_t d_ff, int64_t threads) {
  const int64_t wide = gated(KIND) ? 2 * d_ff : d_ff;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n_rows; row++) {
    const float weight = weight_of_row[row];
    vec dot = {};
    columns(d_ff, [&](int64_t j, int count) {
      const int64_t at = row * wide + j;
      const vec value = gated(KIND) ? read(hidden + at + d_ff, count) : vec{};
      const Activated a = activate<KIND>(read(hidden + at, count), value);
      const vec grad = read(grad_inner + row * d_ff + j, count);
      dot += grad * a.inner;
      write(weighted + row * d_ff + j, weight * a.inner, count);
      write(grad_hidden + at, weight * grad * a.slope_of_gate, count);
      if (gated(KIND)) write(grad_hidden + at + d_ff, weight * grad * a.slope_of_value, count);
    });
    dots[row] = sum(dot);
  }
}

#define DEFINE_FOR_TWO(A, B)                                                                                           \
  extern "C" void gather_##A##_##B(const A* x, const int64_t* token_of_row, B* out, int64_t n_tokens, int64_t n_rows,  \
                                   int64_t width, int64_t threads) {                                                       \
    gather(x, token_of_row, out, n_tokens, n_rows, width, threads);                                                    \
  }                                                                                                                    \
  extern "C" void sum_choices_##A##_##B(const A* rows, const int64_t* row_of_assignment, const float* weights, B* out, \
                                        int64_t n_tokens, int64_t top_k, int64_t n_rows, int64_t width, int64_t threads) { \
    sum_choices(rows, row_of_assignment, weights, out, n_tokens, top_k, n_rows, width, threads);                       \
  }

#define DEFINE_FOR_KIND(KIND, NAME, T)                                                                             \
  extern "C" void activation_##NAME##_##T(const T* hidden, T* inner, int64_t n_rows, int64_t d_ff, int64_t threads) {  \
    activation<KIND>(hidden, inner, n_rows, d_ff, threads);                                                        \
  }                                                                                                                \
  extern "C" void activation_gradient_##NAME##_##T(const T* hidden, const T* grad_inner, const float* weight_of_row, \
                                                   T* weighted, T* grad_hidden, float* dots, int64_t n_rows,       \
                                                   int64_t d_ff, int64_t threads) {                                    \
    activation_gradient<KIND>(hidden, grad_inner, weight_of_row, weighted, grad_hidden, dots, n_rows, d_ff,        \
                              threads);                                                                            \
  }

#define DEFINE_FOR(T)                   \
  DEFINE_FOR_TWO(T, float32)            \
  DEFINE_FOR_TWO(T, bfloat16)           \
  DEFINE_FOR_KIND(RELU, relu, T)        \
  DEFINE_FOR_KIND(GELU, gelu, T)        \
  DEFINE_FOR_KIND(GELU_TANH, gelu_tanh, T) \
  DEFINE_FOR_KIND(SWIGLU, swiglu, T)    \
  DEFINE_FOR_KIND(SWIGLU_CLAMPED, swiglu_clamped, T)

DEFINE_FOR(float32)
DEFINE_FOR(bfloat16)
