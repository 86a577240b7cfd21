// The arguments of select_chunks, checked: what a kernel gets on any device.
#pragma once

#include <vector>

#include "host_tensor.h"
#include "params/select_chunks.h"

namespace shadowkv {

inline SelectChunksParams read_select_chunks(const Tensor& query, const Tensor& pages,
                                             const Tensor& block_table, const Tensor& exact_start,
                                             const Tensor& seq_lens, double scale,
                                             int64_t budget_chunks,
                                             const std::vector<int64_t>& layout_ints,
                                             const Tensor& chunk_ids, const Tensor& rest_values,
                                             const Tensor& rest_lse, DeviceType device) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(query, "query", device, scalar_type(layout), {kAnySize, kAnySize, layout.head_size},
               Strides::kLastContiguous);
  const int64_t rows = query.size(0), heads = layout.num_kv_heads;
  SHADOWKV_CHECK(query.size(1) > 0 && query.size(1) % heads == 0, "query: expected a multiple of ",
                 heads, " heads, got ", query.size(1));
  check_pages(pages, "pages", device, layout.page_bytes);
  check_tensor(block_table, "block_table", device, ScalarType::Int, {rows, kAnySize},
               Strides::kRows);
  check_tensor(exact_start, "exact_start", device, ScalarType::Int, {rows});
  check_tensor(seq_lens, "seq_lens", device, ScalarType::Int, {rows});
  check_tensor(chunk_ids, "chunk_ids", device, ScalarType::Int, {rows, heads, kAnySize});
  SHADOWKV_CHECK(budget_chunks >= 0, "budget_chunks: expected 0 or more, got ", budget_chunks);
  const int64_t fewest = budget_chunks + kSinkChunks + kLocalChunks;
  SHADOWKV_CHECK(rows == 0 || chunk_ids.size(2) >= fewest, "chunk_ids: expected at least ", fewest,
                 " columns for a budget of ", budget_chunks, " chunks, got ", chunk_ids.size(2));
  check_tensor(rest_values, "rest_values", device, ScalarType::Float,
               {rows, query.size(1), layout.head_size});
  check_tensor(rest_lse, "rest_lse", device, ScalarType::Float, {rows, query.size(1)});

  return {
      .layout = layout,
      .query = query.data_ptr(),
      .query_row_stride = stride_of(query, 0),
      .query_head_stride = stride_of(query, 1),
      .pages = static_cast<const uint8_t*>(pages.data_ptr()),
      .num_pages = pages.size(0),
      .page_stride = stride_of(pages, 0),
      .block_table = static_cast<const int32_t*>(block_table.data_ptr()),
      .table_width = block_table.size(1),
      .table_stride = stride_of(block_table, 0),
      .exact_start = static_cast<const int32_t*>(exact_start.data_ptr()),
      .seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr()),
      .chunk_ids = static_cast<int32_t*>(chunk_ids.data_ptr()),
      .columns = chunk_ids.size(2),
      .rest_values = static_cast<float*>(rest_values.data_ptr()),
      .rest_lse = static_cast<float*>(rest_lse.data_ptr()),
      .num_rows = rows,
      .group = query.size(1) / heads,
      .budget_chunks = budget_chunks,
      .scale = static_cast<float>(scale),
  };
}

}  // namespace shadowkv
