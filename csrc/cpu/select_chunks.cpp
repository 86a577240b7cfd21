#include "cpu/kernels/select_chunks.h"

#include <algorithm>
#include <vector>

#include "arguments/select_chunks.h"
#include "cpu/parallel.h"

namespace shadowkv {
namespace {

// Blocks in one work item where rows and heads alone would leave threads idle.
constexpr int64_t kItemBlocks = 8;

void select_chunks(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                   const Tensor& exact_start, const Tensor& seq_lens, double scale,
                   int64_t budget_chunks, const std::vector<int64_t>& layout_ints, const Tensor&,
                   const Tensor& chunk_ids, const Tensor& rest_values, const Tensor& rest_lse) {
  const SelectChunksParams p =
      read_select_chunks(query, pages, block_table, exact_start, seq_lens, scale, budget_chunks,
                         layout_ints, chunk_ids, rest_values, rest_lse, DeviceType::CPU);
  const int64_t heads = p.layout.num_kv_heads, tasks = p.num_rows * heads;
  if (tasks >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_items(tasks, [&](int64_t task) {
      SHADOWKV_DISPATCH_ISA(select_chunks_kernel, p, task / heads, task % heads);
    });
    return;
  }
  // Few rows and heads: threads share a context, and its logits.
  int64_t most_blocks = 0, most_logits = 0;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    most_blocks = std::max(most_blocks, SHADOWKV_DISPATCH_ISA(select_num_blocks, p, row));
    most_logits = std::max(most_logits, SHADOWKV_DISPATCH_ISA(select_logits_size, p, row));
  }
  thread_local std::vector<float> logits;
  logits.resize(std::max<size_t>(logits.size(), tasks * most_logits));
  float* const shared = logits.data();
  const int64_t parts = (most_blocks + kItemBlocks - 1) / kItemBlocks;
  parallel_items(tasks * parts, [&](int64_t item) {
    const int64_t task = item / parts, begin = item % parts * kItemBlocks;
    const int64_t row = task / heads;
    const int64_t blocks = SHADOWKV_DISPATCH_ISA(select_num_blocks, p, row);
    SHADOWKV_DISPATCH_ISA(select_logits_kernel, p, row, task % heads, begin,
                          std::min(begin + kItemBlocks, blocks), shared + task * most_logits);
  });
  parallel_items(tasks, [&](int64_t task) {
    SHADOWKV_DISPATCH_ISA(select_pick_kernel, p, task / heads, task % heads,
                          shared + task * most_logits);
  });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("select_chunks", TORCH_BOX(&shadowkv::select_chunks));
}
