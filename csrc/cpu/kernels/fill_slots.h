#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kernels/rotary_table.h"
#include "layout.h"

namespace shadowkv {

// Arrays are contiguous unless a stride is named; shapes as in vllm_shadowkv/ops.py.
struct FillSlotsParams {
  PageLayout layout;
  int64_t rows;
  int64_t places;            // K
  const int32_t* chunk_ids;  // [rows, num_kv_heads, places]
  const int32_t* slot_ids;   // [rows, num_kv_heads, places]
  const int32_t* misses;     // [rows, num_kv_heads, places]
  // [rows * num_kv_heads + 1]: misses before each (row, head), and at the end all of them
  const int64_t* first_miss;
  const uint8_t* pages;  // [num_blocks, page_bytes], page_stride bytes apart
  int64_t num_blocks;
  int64_t page_stride;
  const uint8_t* host_pool;  // [num_blocks, value_row_bytes], host_pool_stride bytes apart
  int64_t host_pool_stride;
  const int32_t* block_table;  // [rows, max_blocks], rows block_table_stride apart
  int64_t max_blocks;
  int64_t block_table_stride;
  const int32_t* slot_table;  // [rows, slot_columns], rows slot_table_stride apart
  int64_t slot_columns;
  int64_t slot_table_stride;
  uint8_t* slot_pages;  // [num_slot_pages, page_bytes], slot_page_stride bytes apart
  int64_t num_slot_pages;
  int64_t slot_page_stride;
  RotaryTable rotary;
};

// Fills the slots of misses [begin, end), counted over all rows and heads. Returns the highest
// position that has no row in the rotary table (its miss is left undone), or -1.
SHADOWKV_DECLARE_KERNEL(int64_t fill_slots_kernel(const FillSlotsParams& p, int64_t begin,
                                                  int64_t end))

}  // namespace shadowkv
