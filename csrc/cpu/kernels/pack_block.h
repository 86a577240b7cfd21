#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "layout.h"

namespace shadowkv {

// Arrays are contiguous unless a stride is named; shapes as in vllm_shadowkv/ops.py. Factors are
// not looked at when rank is 0.
struct PackBlockParams {
  PageLayout layout;
  const int32_t* block_ids;   // [n]
  const void* keys;           // [n, block_size, num_kv_heads, head_size]
  const float* mean;          // [n, num_kv_heads * head_size]
  const float* coefficients;  // [n, block_size, rank]
  const float* basis;         // [n, rank, num_kv_heads * head_size]
  uint8_t* pages;             // [num_blocks, page_bytes], page_stride bytes apart
  int64_t num_blocks;
  int64_t page_stride;
};

// Writes parts [begin, end); part i * num_kv_heads + head is block i's keys of this head, and the
// head's share of the block's coefficient and basis rows.
SHADOWKV_DECLARE_KERNEL(void pack_block_kernel(const PackBlockParams& p, int64_t begin,
                                               int64_t end))

}  // namespace shadowkv
