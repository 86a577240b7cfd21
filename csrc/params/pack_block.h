#pragma once

#include <cstdint>

#include "layout.h"

namespace shadowkv {

// Arrays are contiguous unless a stride is named; shapes as in vllm_shadowkv/ops.py. Factors are
// not looked at when rank is 0.
struct PackBlockParams {
  PageLayout layout;
  int64_t num_packed;         // n
  const int32_t* block_ids;   // [n]
  const void* keys;           // [n, block_size, num_kv_heads, head_size]
  const float* query_scales;  // [num_kv_heads * head_size]
  const float* mean;          // [n, num_kv_heads * head_size]
  const float* coefficients;  // [n, block_size, rank]
  const float* basis;         // [n, rank, num_kv_heads * head_size], from -127 to 127
  uint8_t* pages;             // [num_blocks, page_bytes], page_stride bytes apart
  int64_t num_blocks;
  int64_t page_stride;
};

}  // namespace shadowkv
