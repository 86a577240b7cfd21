#pragma once

#include <cstdint>

#include "layout.h"
#include "params/rotary_table.h"

namespace shadowkv {

// Arrays are contiguous unless a stride is named; shapes as in vllm_shadowkv/ops.py.
struct FillSlotsParams {
  PageLayout layout;
  int64_t rows;
  int64_t places;             // K
  const int32_t* chunk_ids;   // [rows, num_kv_heads, places]
  const int32_t* slot_ids;    // [rows, num_kv_heads, places]
  const int32_t* misses;      // [rows, num_kv_heads, places]
  const int32_t* num_misses;  // [rows, num_kv_heads]
  const uint8_t* pages;       // [num_blocks, page_bytes], page_stride bytes apart
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

}  // namespace shadowkv
