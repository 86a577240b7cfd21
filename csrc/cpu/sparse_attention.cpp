#include "cpu/kernels/sparse_attention.h"

#include <algorithm>
#include <vector>

#include "arguments/sparse_attention.h"
#include "cpu/parallel.h"

namespace shadowkv {
namespace {

void sparse_attention(const Tensor& query, const Tensor& slot_ids, const Tensor& slot_table,
                      const Tensor& slot_pages, const Tensor& exact_keys,
                      const Tensor& exact_values, const Tensor& exact_table,
                      const Tensor& exact_start, const Tensor& seq_lens, const Tensor& rest_values,
                      const Tensor& rest_lse, double scale, const std::vector<int64_t>& layout_ints,
                      const Tensor&, const Tensor& output, const Tensor& lse) {
  const SparseAttentionParams p = read_sparse_attention(
      query, slot_ids, slot_table, slot_pages, exact_keys, exact_values, exact_table, exact_start,
      seq_lens, rest_values, rest_lse, scale, layout_ints, output, lse, DeviceType::CPU);
  const int64_t heads = p.layout.num_kv_heads, tasks = p.num_rows * heads;
  if (tasks >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_items(tasks, [&](int64_t task) {
      SHADOWKV_DISPATCH_ISA(sparse_attention_kernel, p, task / heads, task % heads);
    });
    return;
  }
  // Few rows and heads: threads share a row's splits.
  int64_t most_splits = 0;
  for (int64_t row = 0; row < p.num_rows; ++row) {
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
