#pragma once

#include <cstdint>

#include "layout.h"

namespace shadowkv {

// Shapes as in vllm_shadowkv/ops.py; strides in elements (pages: bytes), the last dimension's is 1.
struct SelectChunksParams {
  PageLayout layout;
  const void* query;  // [num_rows, num_kv_heads * group, head_size]
  int64_t query_row_stride;
  int64_t query_head_stride;
  const uint8_t* pages;  // [num_pages, page_bytes]
  int64_t num_pages;
  int64_t page_stride;
  const int32_t* block_table;  // [num_rows, table_width]
  int64_t table_width;
  int64_t table_stride;
  const int32_t* exact_start;  // [num_rows]
  const int32_t* seq_lens;     // [num_rows]
  int32_t* chunk_ids;          // [num_rows, num_kv_heads, columns], contiguous
  int64_t columns;             // at least budget_chunks + kSinkChunks + kLocalChunks
  float* rest_values;          // [num_rows, num_kv_heads * group, head_size], contiguous
  float* rest_lse;             // [num_rows, num_kv_heads * group], contiguous
  int64_t num_rows;
  int64_t group;
  int64_t budget_chunks;
  float scale;
};

}  // namespace shadowkv
