// The arguments of sparse_attention, checked: what a kernel gets on any device.
#pragma once

#include <vector>

#include "arguments/exact_strides.h"
#include "host_tensor.h"
#include "params/sparse_attention.h"

namespace shadowkv {

inline SparseAttentionParams read_sparse_attention(
    const Tensor& query, const Tensor& slot_ids, const Tensor& slot_table, const Tensor& slot_pages,
    const Tensor& exact_keys, const Tensor& exact_values, const Tensor& exact_table,
    const Tensor& exact_start, const Tensor& seq_lens, const Tensor& rest_values,
    const Tensor& rest_lse, double scale, const std::vector<int64_t>& layout_ints,
    const Tensor& output, const Tensor& lse, DeviceType device) {
  const PageLayout layout = read_layout(layout_ints);
  const ScalarType dtype = scalar_type(layout);
  const int64_t heads = layout.num_kv_heads, size = layout.head_size;
  check_tensor(query, "query", device, dtype, {kAnySize, kAnySize, size}, Strides::kLastContiguous);
  const int64_t rows = query.size(0), query_heads = query.size(1);
  SHADOWKV_CHECK(query_heads > 0 && query_heads % heads == 0, "query: expected a multiple of ",
                 heads, " heads, got ", query_heads);
  check_tensor(slot_ids, "slot_ids", device, ScalarType::Int, {rows, heads, kAnySize});
  check_tensor(slot_table, "slot_table", device, ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_pages(slot_pages, "slot_pages", device, layout.page_bytes);
  check_tensor(exact_keys, "exact_keys", device, dtype,
               {kAnySize, heads, layout.exact_tokens, size}, Strides::kAny);
  check_tensor(exact_values, "exact_values", device, dtype,
               {exact_keys.size(0), heads, layout.exact_tokens, size}, Strides::kAny);
  check_tensor(exact_table, "exact_table", device, ScalarType::Int, {rows, kAnySize},
               Strides::kRows);
  check_tensor(exact_start, "exact_start", device, ScalarType::Int, {rows});
  check_tensor(seq_lens, "seq_lens", device, ScalarType::Int, {rows});
  check_tensor(rest_values, "rest_values", device, ScalarType::Float, {rows, query_heads, size});
  check_tensor(rest_lse, "rest_lse", device, ScalarType::Float, {rows, query_heads});
  check_tensor(output, "output", device, dtype, {rows, query_heads, size},
               Strides::kLastContiguous);
  check_tensor(lse, "lse", device, ScalarType::Float, {rows, query_heads});

  return {
      .layout = layout,
      .query = query.data_ptr(),
      .query_row_stride = stride_of(query, 0),
      .query_head_stride = stride_of(query, 1),
      .slot_ids = static_cast<const int32_t*>(slot_ids.data_ptr()),
      .columns = slot_ids.size(2),
      .slot_table = static_cast<const int32_t*>(slot_table.data_ptr()),
      .pages_per_row = slot_table.size(1),
      .slot_table_stride = stride_of(slot_table, 0),
      .slot_pages = static_cast<const uint8_t*>(slot_pages.data_ptr()),
      .num_pages = slot_pages.size(0),
      .page_stride = stride_of(slot_pages, 0),
      .exact_keys = exact_keys.data_ptr(),
      .exact_values = exact_values.data_ptr(),
      .key_strides = exact_strides(exact_keys),
      .value_strides = exact_strides(exact_values),
      .num_exact = exact_keys.size(0),
      .exact_table = static_cast<const int32_t*>(exact_table.data_ptr()),
      .exact_width = exact_table.size(1),
      .exact_table_stride = stride_of(exact_table, 0),
      .exact_start = static_cast<const int32_t*>(exact_start.data_ptr()),
      .seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr()),
      .rest_values = static_cast<const float*>(rest_values.data_ptr()),
      .rest_lse = static_cast<const float*>(rest_lse.data_ptr()),
      .output = output.data_ptr(),
      .output_row_stride = stride_of(output, 0),
      .output_head_stride = stride_of(output, 1),
      .lse = static_cast<float*>(lse.data_ptr()),
      .num_rows = rows,
      .group = query_heads / heads,
      .scale = static_cast<float>(scale),
  };
}

}  // namespace shadowkv
