// Scores the landmarks of every row and KV head, picks its chunks, and attends to the rest as a
// whole, in three launches.
//
// Logits: a warp multiplies 16 landmarks at a time with the query heads of the group, which it
// rounds to int8, on tensor cores, and each block's mean key with the heads as they are. Reads
// chunks * (head_size / 2 + 4) + head_size * 4 bytes of landmarks, scales and mean key per block
// and KV head; writes group fp32 logits per chunk, and the softmax over each block's chunks.
// Pick: a CTA per row and KV head turns logits into scores (shares of the softmax), finds the
// threshold of the best by a radix select, and emits ids in ascending order. Reads the logits once
// and the scores about five times (they lie in the L2 cache); 8 bytes per outlier.
// Rest: a CTA per row and query head reads logits and keys again, and each block's mean value; its
// warps take blocks in turn and are merged in their order. See select_rest.cuh.
#include "arguments/select_chunks.h"

#include <algorithm>

#include "cuda/include/dispatch.cuh"
#include "cuda/include/launch.cuh"
#include "cuda/include/radix_select.cuh"
#include "cuda/include/select_logits.cuh"
#include "cuda/include/select_rest.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int64_t kLogitCtas = 8192;  // more of them take several blocks each
constexpr int64_t kMostRows = 65535;  // grid.z
constexpr int64_t kOutlierCacheBytes = 64 << 10;

// A chunk's key: a larger one is picked first.
constexpr uint32_t kForced = 0xffffffffu;

// The chunks of a row that are always picked, outliers apart.
struct ForcedChunks {
  int newest;

  __device__ __forceinline__ ForcedChunks(const SelectChunksParams& p, int64_t row) {
    const int64_t tokens = p.seq_lens[row] - kLocalChunks * p.layout.chunk_size;
    newest = tokens > 0 ? static_cast<int>(tokens / p.layout.chunk_size) : 0;
  }
  __device__ __forceinline__ bool contains(int chunk) const {
    return chunk < kSinkChunks || chunk >= newest;
  }
};

// Outlier i of a row, of all its blocks: the largest key has the lowest cosine, then the lower id;
// 0 where there is nothing to force.
__device__ __forceinline__ uint64_t outlier_key(const SelectPass& pass, int64_t row, int head,
                                                const ForcedChunks& forced, int i) {
  const SelectChunksParams& p = pass.p;
  const int per_block = static_cast<int>(p.layout.num_outliers), column = i / per_block;
  const int64_t block = block_at(p, row, column);
  if (block == 0) return 0;
  const int64_t index = head * static_cast<int64_t>(per_block) + i % per_block;
  const int id = *section<int32_t>(p, block, p.layout.outlier_ids, index);
  const float cosine = *section<float>(p, block, p.layout.outlier_cosines, index);
  if (id < 0 || id >= pass.chunks) return 0;
  const int chunk = column * pass.chunks + id;
  if (forced.contains(chunk)) return 0;
  return ~(static_cast<uint64_t>(ordered(cosine)) << 32 | static_cast<uint32_t>(chunk));
}

// Turns the group's logits into keys, a warp a block's: a chunk's score is the sum of its shares of
// the group's softmaxes.
__device__ __forceinline__ void score(const SelectPass& pass, int64_t row, const float* sums,
                                      const ForcedChunks& forced, const float* logits,
                                      uint32_t* keys, int blocks) {
  constexpr int kUnroll = 4;
  const int64_t stride = pass.p.table_width * pass.chunks;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int column = threadIdx.x / kWarp; column < blocks; column += warps) {
    const bool usable = block_at(pass.p, row, column) != 0;
    const int first = column * pass.chunks, end = first + pass.chunks;
    for (int i = first + lane; i < end; i += kUnroll * kWarp) {
      float share[kUnroll] = {};
      for (int g = 0; g < pass.group; ++g) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int chunk = i + u * kWarp;
          if (chunk < end) share[u] += exp_below(logits[g * stride + chunk], sums[g]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int chunk = i + u * kWarp;
        if (chunk >= end) continue;
        const uint32_t key = forced.contains(chunk) ? kForced : ordered(share[u]);
        keys[chunk] = usable ? key : kUnusable;
      }
    }
  }
}

// grid: rows, KV heads.
__global__ void __launch_bounds__(kMaxThreads, 1) pick_kernel(const SelectPass pass) {
  __shared__ SelectMemory memory;
  __shared__ SoftmaxPart parts[kMaxGroup][kMaxWarps];
  __shared__ float sums[kMaxGroup];  // log-sum-exp of each query head
  const SelectChunksParams& p = pass.p;
  const int threads = blockDim.x, warps = threads / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, head = blockIdx.y;
  const int64_t row = pass.first_row + blockIdx.x;
  const int blocks = num_blocks(p, row), size = blocks * pass.chunks;
  int32_t* ids = p.chunk_ids + (row * p.layout.num_kv_heads + head) * p.columns;

  const int64_t first_head = (blockIdx.x * p.layout.num_kv_heads + head) * pass.group;
  for (int g = 0; g < pass.group; ++g) {
    SoftmaxPart part = no_softmax();
    const int64_t first = (first_head + g) * p.table_width;
    for (int i = threadIdx.x; i < blocks; i += threads) {
      part = merge(part, {pass.tops[first + i], pass.sums[first + i]});
    }
    part = merge_lanes(part, kWarp);
    if (lane == 0) parts[g][warp] = part;
  }
  sync_threads();
  if (static_cast<int>(threadIdx.x) < pass.group) {
    SoftmaxPart part = no_softmax();
    for (int i = 0; i < warps; ++i) part = merge(part, parts[threadIdx.x][i]);
    const float sum = log_sum_exp(part);
    sums[threadIdx.x] = fabsf(sum) < infinity() ? sum : sum - sum;  // else no share is a number
  }
  sync_threads();

  const int64_t row_chunks = p.table_width * pass.chunks;
  uint32_t* keys = pass.keys + (blockIdx.x * p.layout.num_kv_heads + head) * row_chunks;
  const ForcedChunks forced(p, row);
  score(pass, row, sums, forced, pass.logits + first_head * row_chunks, keys, blocks);

  const int64_t room = p.columns - p.budget_chunks - kSinkChunks - kLocalChunks;
  const int outliers = room > 0 ? blocks * static_cast<int>(p.layout.num_outliers) : 0;
  auto* cache = reinterpret_cast<uint64_t*>(dynamic_shared_memory());
  const auto new_outlier = [&](int i) { return outlier_key(pass, row, head, forced, i); };
  const auto outlier = [&](int i) { return pass.cache_outliers ? cache[i] : new_outlier(i); };
  if (pass.cache_outliers) {
    for (int i = threadIdx.x; i < outliers; i += threads) cache[i] = new_outlier(i);
  }
  sync_threads();
  const uint64_t worst = radix_select(outliers, room, memory, outlier);
  for (int i = threadIdx.x; i < outliers; i += threads) {
    const uint64_t key = outlier(i);
    if (key != 0 && key >= worst) keys[static_cast<uint32_t>(~key)] = kForced;
  }
  sync_threads();

  // Of equal scores the lower id has the larger key.
  const auto ranked = [](uint32_t key, int chunk) -> uint64_t {
    if (key == kUnusable || key == kForced) return 0;
    return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(chunk);
  };
  const uint64_t threshold =
      radix_select(size, p.budget_chunks, memory, [&](int i) { return ranked(keys[i], i); });
  const auto picked = [&](uint32_t key, int chunk) {
    return key == kForced || (key != kUnusable && ranked(key, chunk) >= threshold);
  };

  // A warp emits a part of its own, once it knows where that begins.
  const int share = ((size + warps - 1) / warps + kWarp - 1) / kWarp * kWarp;
  const int begin = warp * share, end = begin + share < size ? begin + share : size;
  int mine = 0;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += kWarp) mine += picked(keys[i], i);
  const PrefixSum counts = prefix_sum(mine, memory.warps);
  int64_t place = shuffle(counts.before, 0);
  constexpr int kUnroll = 4;
  for (int first = begin; first < end; first += kUnroll * kWarp) {
    uint32_t key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * kWarp + lane;
      key[u] = i < end ? keys[i] : kUnusable;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = first + u * kWarp + lane;
      const bool take = picked(key[u], i);
      const uint32_t all = ballot(take);
      const int64_t at = place + count_bits(all & ((1u << lane) - 1));
      if (take && at < p.columns) {
        ids[at] = i;
        keys[i] = kUnusable;  // what is left is the rest
      }
      place += count_bits(all);
    }
  }
  for (int64_t i = counts.total + static_cast<int>(threadIdx.x); i < p.columns; i += threads) {
    ids[i] = -1;
  }
}

// Threads of a pick: enough to keep loads in flight, few where there is little to do.
unsigned pick_threads(int64_t chunks) {
  unsigned threads = 128;
  while (threads < kMaxThreads && threads * 4 < chunks) threads *= 2;
  return threads;
}

}  // namespace

void select_chunks(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                   const Tensor& exact_start, const Tensor& seq_lens, double scale,
                   int64_t budget_chunks, const std::vector<int64_t>& layout_ints,
                   const Tensor& workspace, const Tensor& chunk_ids, const Tensor& rest_values,
                   const Tensor& rest_lse) {
  const SelectChunksParams p =
      read_select_chunks(query, pages, block_table, exact_start, seq_lens, scale, budget_chunks,
                         layout_ints, chunk_ids, rest_values, rest_lse, kDevice);
  check_tensor(workspace, "workspace", kDevice, ScalarType::Float, {kAnySize});
  check_vectors(query, "query");
  check_vector_rows(pages, "pages");
  SHADOWKV_CHECK(p.layout.landmarks % 16 == 0,
                 "layout: landmarks must be aligned to 16 bytes, got offset ", p.layout.landmarks);
  SHADOWKV_CHECK(p.layout.landmark_mean % 8 == 0,
                 "layout: landmark_mean must be aligned to 8 bytes, got offset ",
                 p.layout.landmark_mean);
  SHADOWKV_CHECK(p.group <= kMaxGroup, "query: expected at most ", kMaxGroup,
                 " query heads per KV head, got ", p.group);
  const int64_t heads = p.layout.num_kv_heads, chunks = p.layout.chunks();
  // As select_chunks_workspace of ops.py.
  const int64_t row_blocks = heads * p.group * p.table_width,
                row_keys = heads * p.table_width * chunks,
                row_floats = row_blocks * (chunks + 2) + row_keys;
  int64_t most_rows = row_floats > 0 ? workspace.size(0) / row_floats : p.num_rows;
  SHADOWKV_CHECK(p.num_rows == 0 || most_rows > 0, "workspace: expected at least ", row_floats,
                 " values, those of one row, got ", workspace.size(0));
  most_rows = std::min(most_rows, kMostRows);

  const int64_t outlier_bytes = p.table_width * p.layout.num_outliers * sizeof(uint64_t);
  const bool cache_outliers = outlier_bytes <= kOutlierCacheBytes;
  const Launcher launch(query);
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    for (int64_t first = 0; first < p.num_rows; first += most_rows) {
      const int64_t rows = std::min(most_rows, p.num_rows - first);
      auto* logits = static_cast<float*>(workspace.data_ptr());
      float* tops = logits + rows * row_blocks * chunks;
      float* sums = tops + rows * row_blocks;
      const SelectPass pass = {
          .p = p,
          .first_row = first,
          .logits = logits,
          .tops = tops,
          .sums = sums,
          .keys = reinterpret_cast<uint32_t*>(sums + rows * row_blocks),
          .chunks = static_cast<int>(chunks),
          .group = static_cast<int>(p.group),
          .cache_outliers = cache_outliers,
      };
      const int64_t most_ctas = std::max<int64_t>(kLogitCtas / (rows * heads), 1);
      launch("select_chunks: logits", logits_kernel<T, kHeadSize>,
             dim3(std::min(p.table_width, most_ctas), heads, rows), kLogitThreads, 0, pass);
      launch("select_chunks: pick", pick_kernel, dim3(rows, heads),
             pick_threads(p.table_width * chunks), cache_outliers ? outlier_bytes : 0, pass);
      launch("select_chunks: rest", rest_kernel<T, kHeadSize>, dim3(rows, heads * p.group),
             kRestThreads, 0, pass);
    }
  });
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(select_chunks)
