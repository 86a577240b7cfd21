#pragma once

#include <cstdint>

#include "layout.h"

namespace shadowkv {

// Shapes as in vllm_shadowkv/ops.py; strides in elements (slot_pages: bytes), other dimensions are
// contiguous.
struct PlanSlotsParams {
  PageLayout layout;
  const int32_t* chunk_ids;    // [num_rows, num_kv_heads, columns]
  const int32_t* block_table;  // [num_rows, table_width]
  int64_t table_width;
  int64_t table_stride;
  const int64_t* epochs;      // [num_pages]
  const int64_t* clock;       // [1], this step
  const int32_t* slot_table;  // [num_rows, pages_per_row]
  int64_t pages_per_row;
  int64_t slot_table_stride;
  uint8_t* slot_pages;  // [num_pages, page_bytes]
  int64_t num_pages;
  int64_t page_stride;
  int32_t* slot_ids;    // [num_rows, num_kv_heads, columns]
  int32_t* misses;      // [num_rows, num_kv_heads, columns]
  int32_t* num_misses;  // [num_rows, num_kv_heads]
  int64_t* counts;      // [4], the first two are added to: chunks selected, found in a slot
  int64_t columns;
  int64_t num_rows;
};

}  // namespace shadowkv
