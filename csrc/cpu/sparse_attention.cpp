#include "cpu/kernels/sparse_attention.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "host_tensor.h"

namespace shadowkv {
namespace {

ExactStrides exact_strides(const Tensor& tensor) {
  return {stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2), tensor.stride(3)};
}

void sparse_attention(const Tensor& query, const Tensor& slot_ids, const Tensor& slot_table,
                      const Tensor& slot_pages, const Tensor& exact_keys,
                      const Tensor& exact_values, const Tensor& exact_table,
                      const Tensor& exact_start, const Tensor& seq_lens, double scale,
                      std::vector<int64_t> layout_ints, const Tensor& output, const Tensor& lse) {
  const PageLayout layout = read_layout(layout_ints);
  const ScalarType dtype = scalar_type(layout);
  const int64_t heads = layout.num_kv_heads, size = layout.head_size;
  check_tensor(query, "query", dtype, {kAnySize, kAnySize, size}, Strides::kLastContiguous);
  const int64_t rows = query.size(0), query_heads = query.size(1);
  SHADOWKV_CHECK(query_heads > 0 && query_heads % heads == 0, "query: expected a multiple of ",
                 heads, " heads, got ", query_heads);
  check_tensor(slot_ids, "slot_ids", ScalarType::Int, {rows, heads, kAnySize});
  check_tensor(slot_table, "slot_table", ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_pages(slot_pages, "slot_pages", layout.page_bytes);
  check_tensor(exact_keys, "exact_keys", dtype, {kAnySize, heads, layout.exact_tokens, size},
               Strides::kAny);
  check_tensor(exact_values, "exact_values", dtype,
               {exact_keys.size(0), heads, layout.exact_tokens, size}, Strides::kAny);
  check_tensor(exact_table, "exact_table", ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_tensor(exact_start, "exact_start", ScalarType::Int, {rows});
  check_tensor(seq_lens, "seq_lens", ScalarType::Int, {rows});
  check_tensor(output, "output", dtype, {rows, query_heads, size}, Strides::kLastContiguous);
  check_tensor(lse, "lse", ScalarType::Float, {rows, query_heads});
  if (rows == 0) return;

  const SparseAttentionParams p{
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
      .output = output.data_ptr(),
      .output_row_stride = stride_of(output, 0),
      .output_head_stride = stride_of(output, 1),
      .lse = static_cast<float*>(lse.data_ptr()),
      .num_rows = rows,
      .group = query_heads / heads,
      .scale = static_cast<float>(scale),
  };
  const int64_t tasks = rows * heads;
  if (tasks >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_items(tasks, [&](int64_t task) {
      SHADOWKV_DISPATCH_ISA(sparse_attention_kernel, p, task / heads, task % heads);
    });
    return;
  }
  // Few rows and heads: threads share a row's splits.
  int64_t most_splits = 0;
  for (int64_t row = 0; row < rows; ++row) {
    most_splits = std::max(most_splits, SHADOWKV_DISPATCH_ISA(attention_num_splits, p, row));
  }
  const int64_t step = SHADOWKV_DISPATCH_ISA(attention_partial_size, p);
  thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), tasks * most_splits * step));
  float* const partials = memory.data();
  parallel_items(tasks * most_splits, [&](int64_t item) {
    const int64_t task = item / most_splits, split = item % most_splits, row = task / heads;
    if (split >= SHADOWKV_DISPATCH_ISA(attention_num_splits, p, row)) return;
    SHADOWKV_DISPATCH_ISA(attention_split_kernel, p, row, task % heads, split,
                          partials + item * step);
  });
  parallel_items(tasks, [&](int64_t task) {
    SHADOWKV_DISPATCH_ISA(attention_merge_kernel, p, task / heads, task % heads,
                          partials + task * most_splits * step);
  });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&shadowkv::sparse_attention));
}
