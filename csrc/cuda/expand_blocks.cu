// A CTA rebuilds a share of one block's keys of one KV head (rebuild.cuh), kTokens at a time, with
// the head's basis in shared memory; the values of the same tokens are on their way from mapped
// host memory meanwhile. Outliers are copied over what was rebuilt in their place.
//
// The link bounds it: chunks value records per block and head. The output is twice to four times
// as many bytes of device memory.
#include "arguments/expand_blocks.h"

#include "cuda/include/dispatch.cuh"
#include "cuda/include/launch.cuh"
#include "cuda/include/rebuild.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int kTokens = 16;  // divides every block, as exact_tokens is a multiple of it
// So many share a basis: more would read it less often, fewer fill the GPU with fewer blocks.
constexpr int kTokensPerCta = 128;

// grid: shares of a block, KV heads, blocks.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kRebuildThreads, rebuild_ctas(kHeadSize, kTokens))
    expand_blocks_kernel(const ExpandBlocksParams p) {
  const PageLayout& layout = p.layout;
  const int head = blockIdx.y, i = blockIdx.z;
  const int size = static_cast<int>(layout.chunk_size);
  const int block_size = static_cast<int>(layout.block_size);
  const int begin = blockIdx.x * kTokensPerCta;
  const int end = begin + kTokensPerCta < block_size ? begin + kTokensPerCta : block_size;
  const int64_t stride = layout.width();
  const int64_t offset = i * layout.block_size * stride + head * kHeadSize;
  T* keys = static_cast<T*>(p.keys) + offset;
  T* values = static_cast<T*>(p.values) + offset;
  const auto clear = [&](T* out) {
    clear_rows<kHeadSize>(end - begin, out + begin * stride, stride);
  };

  const int64_t block = p.block_ids[i];
  if (block <= 0 || block >= p.num_blocks) {
    clear(keys);
    clear(values);
    return;
  }
  const uint8_t* page = p.pages + block * p.page_stride;
  const uint8_t* row_of_block = p.host_pool + block * p.host_pool_stride;
  const uint8_t* records = row_of_block + head * layout.chunks() * layout.value_record_bytes;
  const float* scales = head_scales(layout, row_of_block, head);
  const int64_t position = p.first_positions[i];
  const bool covered = p.rotary.covers(position, layout.block_size);
  const bool low_rank = layout.rank != 0 && covered;
  if (layout.rank == 0) {
    copy_rows<kHeadSize>(exact_keys<T>(layout, page, head, begin / size), end - begin,
                         keys + begin * stride, stride);
  } else if (!covered) {
    clear(keys);
  }

  Rebuilder<T, kHeadSize, kTokens> rebuild(layout);
  for (int token = begin; token < end; token += kTokens) {
    ValueTile<T, kHeadSize, kTokens> tile;
    tile.load(layout, records, scales, token);
    if (low_rank) {
      rebuild(page, head, token, position + token, p.rotary, keys + token * stride, stride);
    }
    tile.store(layout, values + token * stride, stride);
  }

  if (!low_rank) return;
  sync_threads();  // orders the writes
  const int32_t* ids = outlier_ids(layout, page, head);
  for (int64_t o = layout.num_outliers - 1; o >= 0; --o) {  // of equal ids the first one stays
    const int chunk = ids[o];
    if (chunk < begin / size || chunk >= end / size) continue;
    copy_rows<kHeadSize>(exact_keys<T>(layout, page, head, o), size, keys + chunk * size * stride,
                         stride);
  }
}

}  // namespace

void expand_blocks(const Tensor& block_ids, const Tensor& first_positions, const Tensor& pages,
                   const Tensor& host_pool, const Tensor& cos_sin, bool is_neox,
                   const std::vector<int64_t>& layout_ints, const Tensor& keys,
                   const Tensor& values) {
  const ExpandBlocksParams p =
      read_expand_blocks(block_ids, first_positions, pages, host_pool, cos_sin, is_neox,
                         layout_ints, keys, values, kDevice);
  check_rebuilt_sections(p.layout);
  check_vector_rows(pages, "pages");
  check_vector_rows(host_pool, "host_pool");
  check_vectors(keys, "keys");
  check_vectors(values, "values");
  const Launcher launch(pages);
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    const auto shares = (p.layout.block_size + kTokensPerCta - 1) / kTokensPerCta;
    launch("expand_blocks", expand_blocks_kernel<T, kHeadSize>,
           dim3(shares, p.layout.num_kv_heads, p.num_expanded), kRebuildThreads,
           RebuildShape<kHeadSize, kTokens>::shared_bytes(p.layout.rank), p);
  });
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(expand_blocks)
