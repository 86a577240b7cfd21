#pragma once

#include <cstdint>

#include "layout.h"
#include "params/rotary_table.h"

namespace shadowkv {

// Arrays are contiguous unless a stride is named; shapes as in vllm_shadowkv/ops.py.
struct ExpandBlocksParams {
  PageLayout layout;
  int64_t num_expanded;            // n
  const int32_t* block_ids;        // [n]
  const int32_t* first_positions;  // [n]
  const uint8_t* pages;            // [num_blocks, page_bytes], page_stride bytes apart
  int64_t num_blocks;
  int64_t page_stride;
  const uint8_t* host_pool;  // [num_blocks, value_row_bytes], host_pool_stride bytes apart
  int64_t host_pool_stride;
  RotaryTable rotary;
  void* keys;    // [n, block_size, num_kv_heads, head_size]
  void* values;  // [n, block_size, num_kv_heads, head_size]
};

}  // namespace shadowkv
