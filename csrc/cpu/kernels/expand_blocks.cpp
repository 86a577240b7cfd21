// An item is one chunk of one KV head; chunks of a head follow each other, so that its basis stays
// in the cache: rank * head_size bytes, read once per head, and block_size * (rank + leading_rank)
// / 2 bytes of coefficients, read once per head too. Writes the block's keys and values, and reads
// its values from the host pool.
#include "cpu/kernels/expand_blocks.h"

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/rebuild.h"

namespace shadowkv::SHADOWKV_ISA {
namespace {

template <typename T, int kHeadSize>
void expand_blocks(const ExpandBlocksParams& p, int64_t begin, int64_t end) {
  const PageLayout& layout = p.layout;
  const int64_t stride = layout.width();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item % layout.chunks();
    const int64_t head = item / layout.chunks() % layout.num_kv_heads;
    const int64_t i = item / layout.chunks() / layout.num_kv_heads;
    const int64_t block = p.block_ids[i];
    const int64_t token = chunk * layout.chunk_size;
    const int64_t offset = (i * layout.block_size + token) * stride + head * kHeadSize;
    T* keys = static_cast<T*>(p.keys) + offset;
    T* values = static_cast<T*>(p.values) + offset;
    if (block <= 0 || block >= p.num_blocks) {
      for (int64_t t = 0; t < layout.chunk_size; ++t) {
        std::fill_n(keys + t * stride, kHeadSize, T{});
        std::fill_n(values + t * stride, kHeadSize, T{});
      }
      continue;
    }
    Ahead nothing;  // the hardware foresees what comes next
    rebuild_chunk<T, kHeadSize>(layout, p.pages + block * p.page_stride, head, chunk,
                                p.first_positions[i] + token, p.rotary, nothing, keys, stride);
    fetch_chunk<T, kHeadSize>(layout, p.host_pool + block * p.host_pool_stride, head, chunk, values,
                              stride);
  }
}

}  // namespace

void expand_blocks_kernel(const ExpandBlocksParams& p, int64_t begin, int64_t end) {
  dispatch_layout(p.layout,
                  [&]<typename T, int kHeadSize>() { expand_blocks<T, kHeadSize>(p, begin, end); });
}

}  // namespace shadowkv::SHADOWKV_ISA
