#include "cpu/kernels/select_chunks.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "host_tensor.h"

namespace shadowkv {
namespace {

// Blocks in one work item where rows and heads alone would leave threads idle.
constexpr int64_t kItemBlocks = 8;

void select_chunks(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                   const Tensor& exact_start, const Tensor& seq_lens, double scale,
                   int64_t budget_chunks, std::vector<int64_t> layout_ints,
                   const Tensor& chunk_ids) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(query, "query", scalar_type(layout), {kAnySize, kAnySize, layout.head_size},
               Strides::kLastContiguous);
  const int64_t rows = query.size(0), heads = layout.num_kv_heads;
  SHADOWKV_CHECK(query.size(1) > 0 && query.size(1) % heads == 0, "query: expected a multiple of ",
                 heads, " heads, got ", query.size(1));
  check_pages(pages, "pages", layout.page_bytes);
  check_tensor(block_table, "block_table", ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_tensor(exact_start, "exact_start", ScalarType::Int, {rows});
  check_tensor(seq_lens, "seq_lens", ScalarType::Int, {rows});
  check_tensor(chunk_ids, "chunk_ids", ScalarType::Int, {rows, heads, kAnySize});
  SHADOWKV_CHECK(budget_chunks >= 0, "budget_chunks: expected 0 or more, got ", budget_chunks);
  if (rows == 0) return;
  const int64_t fewest = budget_chunks + kSinkChunks + kLocalChunks;
  SHADOWKV_CHECK(chunk_ids.size(2) >= fewest, "chunk_ids: expected at least ", fewest,
                 " columns for a budget of ", budget_chunks, " chunks, got ", chunk_ids.size(2));

  const SelectChunksParams p{
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
      .num_rows = rows,
      .group = query.size(1) / heads,
      .budget_chunks = budget_chunks,
      .scale = static_cast<float>(scale),
  };
  const int64_t tasks = rows * heads;
  if (tasks >= 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_items(tasks, [&](int64_t task) {
      SHADOWKV_DISPATCH_ISA(select_chunks_kernel, p, task / heads, task % heads);
    });
    return;
  }
  // Few rows and heads: threads share a context, and its logits.
  int64_t most_blocks = 0, most_logits = 0;
  for (int64_t row = 0; row < rows; ++row) {
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
