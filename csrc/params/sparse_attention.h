#pragma once

#include <cstdint>

#include "layout.h"
#include "params/exact_strides.h"

namespace shadowkv {

// Shapes as in vllm_shadowkv/ops.py; strides in elements (slot_pages: bytes), the last dimension's
// is 1 where there is no field for it.
struct SparseAttentionParams {
  PageLayout layout;
  const void* query;  // [num_rows, num_kv_heads * group, head_size]
  int64_t query_row_stride;
  int64_t query_head_stride;
  const int32_t* slot_ids;  // [num_rows, num_kv_heads, columns], contiguous
  int64_t columns;
  const int32_t* slot_table;  // [num_rows, pages_per_row]
  int64_t pages_per_row;
  int64_t slot_table_stride;
  const uint8_t* slot_pages;  // [num_pages, page_bytes]
  int64_t num_pages;
  int64_t page_stride;
  const void* exact_keys;
  const void* exact_values;
  ExactStrides key_strides;
  ExactStrides value_strides;
  int64_t num_exact;
  const int32_t* exact_table;  // [num_rows, exact_width]
  int64_t exact_width;
  int64_t exact_table_stride;
  const int32_t* exact_start;  // [num_rows]
  const int32_t* seq_lens;     // [num_rows]
  const float* rest_values;    // [num_rows, num_kv_heads * group, head_size], contiguous
  const float* rest_lse;       // [num_rows, num_kv_heads * group], contiguous
  void* output;                // [num_rows, num_kv_heads * group, head_size]
  int64_t output_row_stride;
  int64_t output_head_stride;
  float* lse;  // [num_rows, num_kv_heads * group], contiguous
  int64_t num_rows;
  int64_t group;
  float scale;
};

}  // namespace shadowkv
