#pragma once

#include <cstdint>

#include "layout.h"

namespace shadowkv {

// Shapes as in vllm_shadowkv/ops.py; exact_stride, head_stride and token_stride are those of
// exact_values, in elements.
struct StoreValuesParams {
  PageLayout layout;
  int64_t num_stored;        // n
  const int32_t* block_ids;  // [n]
  const int32_t* exact_ids;  // [n, block_size / exact_tokens]
  const void* exact_values;  // [num_exact, num_kv_heads, exact_tokens, head_size], last stride 1
  int64_t num_exact;
  int64_t exact_stride;
  int64_t head_stride;
  int64_t token_stride;
  uint8_t* pages;      // [num_blocks, page_bytes], page_stride bytes apart
  uint8_t* host_pool;  // [num_blocks, value_row_bytes], host_pool_stride bytes apart
  int64_t num_blocks;
  int64_t page_stride;
  int64_t host_pool_stride;
};

}  // namespace shadowkv
