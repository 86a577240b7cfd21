// The last launch of select_chunks: attention of a query head to the rest of its row, the chunks
// that are usable and were not picked. A chunk's landmark is its key, the mean of its block's
// values its value, and it counts as chunk_size tokens.
#pragma once

#include "cuda/include/select_logits.cuh"
#include "cuda/include/softmax.cuh"

namespace shadowkv::cuda {

constexpr int kRestWarps = 8;
constexpr int kRestThreads = kRestWarps * kWarp;

// The key of a chunk of an invalid block; the pick gives it to what it has picked, too.
constexpr uint32_t kUnusable = 0;

// grid: rows, query heads.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kRestThreads, 4) rest_kernel(const SelectPass pass) {
  constexpr int kMost = (kHeadSize + kWarp - 1) / kWarp;  // of the dimensions, per lane
  __shared__ float shared_values[kRestWarps][kHeadSize];
  __shared__ SoftmaxPart shared_parts[kRestWarps];
  const SelectChunksParams& p = pass.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = pass.first_row + blockIdx.x, query_head = blockIdx.y;
  const int64_t query_heads = p.layout.num_kv_heads * pass.group, head = query_head / pass.group;
  const int64_t row_chunks = p.table_width * pass.chunks;
  const float* logits = pass.logits + (blockIdx.x * query_heads + query_head) * row_chunks;
  const uint32_t* keys = pass.keys + (blockIdx.x * p.layout.num_kv_heads + head) * row_chunks;

  float values[kMost] = {};
  SoftmaxPart part = no_softmax();
  const int blocks = num_blocks(p, row);
  for (int column = warp; column < blocks; column += kRestWarps) {
    const int64_t block = block_at(p, row, column);
    if (block == 0) continue;
    const int first = column * pass.chunks;
    const auto logit = [&](int chunk) {
      const float x = logits[first + chunk];
      return keys[first + chunk] != kUnusable && fabsf(x) < infinity() ? x : -infinity();
    };
    float top = -infinity();
    for (int i = lane; i < pass.chunks; i += kWarp) top = fmaxf(top, logit(i));
    top = warp_max(top);
    // A mean that is not finite must not count where no chunk has it.
    if (top == -infinity()) continue;
    const float largest = fmaxf(part.top, top), decay = exp_below(part.top, largest);
    float weight = 0;
    for (int i = lane; i < pass.chunks; i += kWarp) weight += exp_below(logit(i), largest);
    weight = warp_sum(weight);
    part = {largest, part.sum * decay + weight};
    const T* mean = section<T>(p, block, p.layout.mean_values, head * kHeadSize);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int d = i * kWarp + lane;
      if (d < kHeadSize) values[i] = values[i] * decay + weight * to_float(mean[d]);
    }
  }

#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int d = i * kWarp + lane;
    if (d < kHeadSize) shared_values[warp][d] = values[i];
  }
  if (lane == 0) shared_parts[warp] = part;
  sync_threads();
  SoftmaxPart all = no_softmax();
  for (int i = 0; i < kRestWarps; ++i) all = merge(all, shared_parts[i]);
  const float inverse = all.sum > 0 ? 1.0f / all.sum : 0.0f;
  const int64_t result = row * query_heads + query_head;
  for (int d = threadIdx.x; d < kHeadSize; d += kRestThreads) {
    float value = 0;
    for (int i = 0; i < kRestWarps; ++i) {
      value += exp_below(shared_parts[i].top, all.top) * shared_values[i][d];
    }
    p.rest_values[result * kHeadSize + d] = value * inverse;
  }
  if (threadIdx.x == 0) {
    const float tokens = logf(static_cast<float>(p.layout.chunk_size));
    p.rest_lse[result] = log_sum_exp(all) + tokens;
  }
}

}  // namespace shadowkv::cuda
