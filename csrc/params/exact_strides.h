#pragma once

#include <cstdint>

namespace shadowkv {

// Strides of the keys or the values of exact pages [num_exact, num_kv_heads, exact_tokens,
// head_size], in elements.
struct ExactStrides {
  int64_t page;
  int64_t head;
  int64_t token;
  int64_t dim;
};

}  // namespace shadowkv
