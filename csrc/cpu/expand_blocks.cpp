#include "cpu/kernels/expand_blocks.h"

#include <algorithm>

#include "arguments/expand_blocks.h"
#include "cpu/parallel.h"

namespace shadowkv {
namespace {

// Chunks that a thread takes at a time: most of them share a head's basis.
constexpr int64_t kChunksAtOnce = 32;

void expand_blocks(const Tensor& block_ids, const Tensor& first_positions, const Tensor& pages,
                   const Tensor& host_pool, const Tensor& cos_sin, bool is_neox,
                   const std::vector<int64_t>& layout_ints, const Tensor& keys,
                   const Tensor& values) {
  const ExpandBlocksParams p =
      read_expand_blocks(block_ids, first_positions, pages, host_pool, cos_sin, is_neox,
                         layout_ints, keys, values, DeviceType::CPU);
  for (int64_t i = 0; i < p.num_expanded; ++i) {
    if (p.block_ids[i] <= 0 || p.block_ids[i] >= p.num_blocks) continue;
    SHADOWKV_CHECK(p.rotary.covers(p.first_positions[i], p.layout.block_size),
                   "first_positions: expected a block of ", p.layout.block_size,
                   " tokens within the ", p.rotary.positions, " rows of cos_sin, got ",
                   p.first_positions[i], " at ", i);
  }
  const int64_t total = p.num_expanded * p.layout.num_kv_heads * p.layout.chunks();
  parallel_items((total + kChunksAtOnce - 1) / kChunksAtOnce, [&](int64_t i) {
    SHADOWKV_DISPATCH_ISA(expand_blocks_kernel, p, i * kChunksAtOnce,
                          std::min(total, (i + 1) * kChunksAtOnce));
  });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("expand_blocks", TORCH_BOX(&shadowkv::expand_blocks));
}
