// The first launch of select_chunks: logits of all sealed chunks, and the softmax over each
// block's.
#pragma once

#include "cuda/include/int8.cuh"
#include "cuda/include/softmax.cuh"
#include "params/select_chunks.h"

namespace shadowkv::cuda {

constexpr int kLogitWarps = 4;
constexpr int kLogitThreads = kLogitWarps * kWarp;
constexpr int kMaxGroup = 16;  // rows of a tensor core's tile
constexpr int kTile = 8;       // its columns

// Rows [first_row, first_row + rows) and their share of the workspace.
struct SelectPass {
  SelectChunksParams p;
  int64_t first_row;
  float* logits;   // [rows, query heads, table_width * chunks]
  float* tops;     // [rows, query heads, table_width]: SoftmaxPart
  float* sums;     // the same
  uint32_t* keys;  // [rows, KV heads, table_width * chunks]
  int chunks;
  int group;
  bool cache_outliers;  // in shared memory
};

__device__ __forceinline__ int num_blocks(const SelectChunksParams& p, int64_t row) {
  if (p.seq_lens[row] <= 0 || p.exact_start[row] <= 0) return 0;
  const int64_t blocks = p.exact_start[row] / p.layout.block_size;
  return static_cast<int>(blocks < p.table_width ? blocks : p.table_width);
}

// The physical id in a column of a row's block table, 0 where it is invalid.
__device__ __forceinline__ int64_t block_at(const SelectChunksParams& p, int64_t row, int column) {
  const int64_t block = p.block_table[row * p.table_stride + column];
  return block > 0 && block < p.num_pages ? block : 0;
}

template <typename T>
__device__ __forceinline__ const T* section(const SelectChunksParams& p, int64_t block,
                                            int64_t offset, int64_t index) {
  return reinterpret_cast<const T*>(p.pages + block * p.page_stride + offset) + index;
}

// A step of 16 dimensions multiplies four of each of the lanes t = lane % 4 (the order within a
// product is free): those which make a lane's landmark bytes of four steps neighbours.
template <int kHeadSize>
__device__ __forceinline__ constexpr int step_dim(int step, int t) {
  const int slab = step / 4 * 64, left = kHeadSize - slab;
  return slab + t * (left < 64 ? left / 4 : 16) + step % 4 * 4;
}

template <int kHeadSize>
struct LandmarkBytes {
  uint32_t words[(kHeadSize + 63) / 64 * 4];  // of each step

  __device__ __forceinline__ void load(const int8_t* landmark, int t) {
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; step += 4) {
      const int8_t* from = landmark + step_dim<kHeadSize>(step, t);
      const int left = kHeadSize / 16 - step;
      if (left >= 4) {
        const uint4 x = load_streaming(reinterpret_cast<const uint4*>(from));
        words[step] = x.x, words[step + 1] = x.y, words[step + 2] = x.z, words[step + 3] = x.w;
      } else if (left == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        words[step] = x.x, words[step + 1] = x.y;
      } else {
        words[step] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
  }
};

// grid: blocks (or fewer), KV heads, rows.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kLogitThreads, kHeadSize > 128 ? 4 : 6)
    logits_kernel(const SelectPass pass) {
  constexpr int kSteps = kHeadSize / 16;
  const SelectChunksParams& p = pass.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, chunks = pass.chunks, group = pass.group;
  const int64_t row = pass.first_row + blockIdx.z;
  const int blocks = num_blocks(p, row);
  if (static_cast<int>(blockIdx.x) >= blocks) return;

  uint32_t a[kSteps][4];
  const T* query = static_cast<const T*>(p.query) + row * p.query_row_stride;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool exists = g + 8 * half < group;
    const T* from = query + (head * group + (exists ? g + 8 * half : 0)) * p.query_head_stride;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint2 x = *reinterpret_cast<const uint2*>(from + step_dim<kHeadSize>(step, t));
      a[step][half] = exists ? x.x : 0;
      a[step][half + 2] = exists ? x.y : 0;
    }
  }
  // A query head that is not finite has NaN logits: times zero, it is NaN.
  float zeros[4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) mma_16x8x16<T>(zeros, a[step], {0, 0});

  // Two copies, so that one barrier per block is enough.
  __shared__ SoftmaxPart parts[2][kLogitWarps][kMaxGroup];
  const int64_t heads = p.layout.num_kv_heads * group;
  const int64_t first_head = blockIdx.z * heads + head * group;
  float* logits[2];  // of the query heads that this lane writes
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    logits[half] = pass.logits + (first_head + g + 8 * half) * p.table_width * chunks;
  }
  int copy = 0;
  for (int column = blockIdx.x; column < blocks; column += gridDim.x, copy ^= 1) {
    const int64_t block = block_at(p, row, column);
    const int64_t index = head * static_cast<int64_t>(chunks);
    const int64_t start = column * static_cast<int64_t>(chunks);
    const auto* landmarks = section<int8_t>(p, block, p.layout.landmarks, index * kHeadSize);
    const auto* scales = section<float>(p, block, p.layout.landmark_scales, index);
    SoftmaxPart part[2] = {no_softmax(), no_softmax()};
    for (int tile = warp * kTile; tile < chunks; tile += kLogitWarps * kTile) {
      sync_warp();  // tensor cores want all lanes together
      const int chunk = tile + 2 * t;
      float c[4] = {zeros[0], zeros[1], zeros[2], zeros[3]};
      float scale[2] = {};
      if (block != 0) {
        LandmarkBytes<kHeadSize> bytes;
        bytes.load(landmarks + (tile + g < chunks ? tile + g : chunks - 1) * kHeadSize, t);
        // Asked for beside the landmarks, not after their products.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (chunk + i < chunks) scale[i] = scales[chunk + i] * p.scale;
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint2 b = widen_int8<T>(bytes.words[step]);
          mma_16x8x16<T>(c, a[step], {b.x, b.y});
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int member = g + 8 * half;
        if (8 * half >= group) break;
        float logit[2] = {-infinity(), -infinity()};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (chunk + i >= chunks || member >= group) continue;
          if (block != 0) logit[i] = c[2 * half + i] * scale[i];
          logits[half][start + chunk + i] = logit[i];
        }
        part[half] = add(part[half], logit[0], logit[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= group) break;
      part[half] = merge_lanes(part[half], 4);
      if (t == 0) parts[copy][warp][g + 8 * half] = part[half];
    }
    sync_threads();
    const int member = threadIdx.x;
    if (member < group) {
      SoftmaxPart all = parts[copy][0][member];
      for (int i = 1; i < kLogitWarps; ++i) all = merge(all, parts[copy][i][member]);
      pass.tops[(first_head + member) * p.table_width + column] = all.top;
      pass.sums[(first_head + member) * p.table_width + column] = all.sum;
    }
  }
}

}  // namespace shadowkv::cuda
