// How the heads of attention lie in memory: what __init__.py passes as Sizes and Strides.

#pragma once

#include <cstdint>

// `key_heads` with `repeats` query heads each; `length` keys, and rows of `width`.
struct Sizes {
  int64_t batch, key_heads, repeats, length, width;
};

// Elements from one sequence, head, token to the next; the width is contiguous.
struct Strides {
  int64_t batch, head, token;
};
