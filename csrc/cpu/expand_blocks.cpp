#include "cpu/kernels/expand_blocks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/rotary_argument.h"
#include "host_tensor.h"

namespace shadowkv {
namespace {

// Chunks that a thread takes at a time: most of them share a head's basis.
constexpr int64_t kChunksAtOnce = 32;

void expand_blocks(const Tensor& block_ids, const Tensor& first_positions, const Tensor& pages,
                   const Tensor& host_pool, const Tensor& cos_sin, bool is_neox,
                   const std::vector<int64_t>& layout_ints, const Tensor& keys,
                   const Tensor& values) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(block_ids, "block_ids", ScalarType::Int, {kAnySize});
  const int64_t n = block_ids.size(0);
  check_tensor(first_positions, "first_positions", ScalarType::Int, {n});
  check_pages(pages, "pages", layout.page_bytes);
  check_pages(host_pool, "host_pool", layout.value_row_bytes());
  SHADOWKV_CHECK(host_pool.size(0) == pages.size(0), "host_pool: expected as many rows as pages, ",
                 pages.size(0), ", got ", host_pool.size(0));
  const RotaryTable rotary = read_rotary(cos_sin, is_neox, layout);
  check_tensor(keys, "keys", scalar_type(layout),
               {n, layout.block_size, layout.num_kv_heads, layout.head_size});
  check_tensor(values, "values", scalar_type(layout),
               {n, layout.block_size, layout.num_kv_heads, layout.head_size});

  const auto* blocks = static_cast<const int32_t*>(block_ids.const_data_ptr());
  const auto* first = static_cast<const int32_t*>(first_positions.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    if (blocks[i] <= 0 || blocks[i] >= pages.size(0)) continue;
    SHADOWKV_CHECK(rotary.covers(first[i], layout.block_size),
                   "first_positions: expected a block of ", layout.block_size,
                   " tokens within the ", rotary.positions, " rows of cos_sin, got ", first[i],
                   " at ", i);
  }

  const ExpandBlocksParams params = {
      .layout = layout,
      .block_ids = blocks,
      .first_positions = first,
      .pages = static_cast<const uint8_t*>(pages.const_data_ptr()),
      .num_blocks = pages.size(0),
      .page_stride = stride_of(pages, 0),
      .host_pool = static_cast<const uint8_t*>(host_pool.const_data_ptr()),
      .host_pool_stride = stride_of(host_pool, 0),
      .rotary = rotary,
      .keys = keys.mutable_data_ptr(),
      .values = values.mutable_data_ptr(),
  };
  const int64_t total = n * layout.num_kv_heads * layout.chunks();
  parallel_items((total + kChunksAtOnce - 1) / kChunksAtOnce, [&](int64_t i) {
    SHADOWKV_DISPATCH_ISA(expand_blocks_kernel, params, i * kChunksAtOnce,
                          std::min(total, (i + 1) * kChunksAtOnce));
  });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("expand_blocks", TORCH_BOX(&shadowkv::expand_blocks));
}
