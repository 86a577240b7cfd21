// The first launch of select_chunks: logits of all sealed chunks, and the softmax over each
// block's.
#pragma once

#include "cuda/include/quantise.cuh"
#include "cuda/include/softmax.cuh"
#include "params/select_chunks.h"

namespace shadowkv::cuda {

constexpr int kLogitWarps = 4;
constexpr int kLogitThreads = kLogitWarps * kWarp;
constexpr int kMaxGroup = 16;  // rows of a tensor core's tile
constexpr int kTile = 8;       // its columns
constexpr int kTiles = 2;      // that a warp has at a time

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

// A landmark's bytes as words of four; a word is a lane's share of a step of 32 dimensions (the
// order within a product is free). The lanes t = lane % 4 take neighbours.
template <int kHeadSize>
struct LandmarkWords {
  static constexpr int kWords = kHeadSize / 8;
  static constexpr int kSteps = (kWords + 3) / 4;
  static constexpr int kWide = kWords % 16 == 0 ? 4 : 2;  // of a load: as its alignment allows

  uint32_t words[kSteps] = {};  // of each step

  // The word of a lane in a step; a last step may have less than a word for each lane.
  __device__ __forceinline__ static constexpr int word(int step, int t) {
    const int first = step / kWide * kWide * 4;
    return first + 4 * kWide <= kWords ? first + t * kWide + step % kWide : 4 * step + t;
  }

  __device__ __forceinline__ void load(const uint8_t* landmark, int t) {
#pragma unroll
    for (int step = 0; step < kSteps; step += kWide) {
      const uint8_t* from = landmark + 4 * word(step, t);
      if (kSteps - step < kWide) {
        if (word(step, t) < kWords) words[step] = *reinterpret_cast<const uint32_t*>(from);
      } else if constexpr (kWide == 4) {
        const uint4 x = load_streaming(reinterpret_cast<const uint4*>(from));
        words[step] = x.x, words[step + 1] = x.y, words[step + 2] = x.z, words[step + 3] = x.w;
      } else {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        words[step] = x.x, words[step + 1] = x.y;
      }
    }
  }

  // The low halves of bytes are dimensions of the head's first half, the others of its second.
  __device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&codes)[kSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      mma_16x8x32(c, codes[step], {words[step] & 0x0f0f0f0fu, words[step] >> 4 & 0x0f0f0f0fu});
    }
  }
};

// Codes of query heads in shared memory, as tensor cores take them: a lane's are of the rows
// g = lane / 4 and g + 8.
template <int kHeadSize>
struct QueryCodes {
  using Words = LandmarkWords<kHeadSize>;

  uint32_t words[Words::kSteps][4];
  int offsets[2];  // what kNibbleOffset in every dimension adds to a row's products

  __device__ __forceinline__ void load(const uint32_t (*codes)[kHeadSize / 4], int group) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int member = g + 8 * half;
#pragma unroll
      for (int step = 0; step < Words::kSteps; ++step) {
        const int word = Words::word(step, t);
        const bool exists = member < group && word < Words::kWords;
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // halves of a head
          words[step][half + 2 * i] = exists ? codes[member][i * Words::kWords + word] : 0;
        }
      }
    }
    constexpr uint32_t kOffsets = kNibbleOffset * 0x01010101u;
    int c[4] = {};  // the same in all columns
#pragma unroll
    for (int step = 0; step < Words::kSteps; ++step) {
      mma_16x8x32(c, words[step], {kOffsets, kOffsets});
    }
    offsets[0] = c[0], offsets[1] = c[2];
  }
};

// The product of a query head and a mean key, to every lane of a warp.
template <typename T, int kHeadSize>
__device__ __forceinline__ float multiply_mean(const T* query, const float* mean) {
  float sum = 0;
#pragma unroll
  for (int first = 0; first < kHeadSize; first += 2 * kWarp) {
    const int d = first + 2 * (threadIdx.x % kWarp);
    if (d >= kHeadSize) break;
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(query + d);
    const float2 key = *reinterpret_cast<const float2*>(mean + d);
    sum += to_float(T{static_cast<uint16_t>(pair)}) * key.x;
    sum += to_float(T{static_cast<uint16_t>(pair >> 16)}) * key.y;
  }
  return warp_sum(sum);
}

// What a lane has of a warp's tiles, from chunk `first` on. Loads leave what was where a block has
// no such chunk.
template <int kHeadSize>
struct LandmarkTiles {
  LandmarkWords<kHeadSize> landmarks[kTiles];
  float scales[kTiles][2] = {};

  __device__ __forceinline__ void load_landmarks(const uint8_t* from, int first, int chunks) {
    const int lane = threadIdx.x % kWarp, chunk = first + lane / 4;
    from += chunk * (kHeadSize / 2);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (chunk + i * kTile < chunks) {
        landmarks[i].load(from + i * kTile * (kHeadSize / 2), lane % 4);
      }
    }
  }

  __device__ __forceinline__ void load_scales(const float* from, int first, int chunks) {
    const int chunk = first + 2 * (threadIdx.x % 4);
    from += chunk;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (chunk + i * kTile + j < chunks) scales[i][j] = from[i * kTile + j];
      }
    }
  }
};

// grid: blocks (or fewer), KV heads, rows.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kLogitThreads, kHeadSize > 128 ? 4 : 6)
    logits_kernel(const SelectPass pass) {
  constexpr int kWarpTiles = kTiles * kTile;
  const SelectChunksParams& p = pass.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, chunks = pass.chunks, group = pass.group;
  const int64_t row = pass.first_row + blockIdx.z;
  const int blocks = num_blocks(p, row);
  const int first_column = blockIdx.x, step = gridDim.x;
  if (first_column >= blocks) return;

  const T* queries = static_cast<const T*>(p.query) + row * p.query_row_stride +
                     head * group * p.query_head_stride;
  // A query head that is not finite has codes 0 (quantise.cuh), and 0 times its unit is NaN.
  // Two copies of what changes with the block, so that one barrier per block is enough: it stands
  // before a block's logits, and the softmax over the block before is merged behind it.
  __shared__ uint32_t codes[kMaxGroup][kHeadSize / 4];  // int8 of the query heads
  __shared__ float units[kMaxGroup];  // of their codes; NaN or infinity where one is not finite
  __shared__ float of_means[2][kMaxGroup];  // what the block's mean key adds to a head's logits
  __shared__ SoftmaxPart parts[2][kLogitWarps][kMaxGroup];
  const int64_t heads = p.layout.num_kv_heads * group;
  const int64_t first_head = blockIdx.z * heads + head * group;
  const int64_t row_chunks = p.table_width * chunks;
  const auto merge_parts = [&](int column, int copy) {
    const int member = threadIdx.x;
    if (member >= group) return;
    SoftmaxPart all = parts[copy][0][member];
    for (int i = 1; i < kLogitWarps; ++i) all = merge(all, parts[copy][i][member]);
    pass.tops[(first_head + member) * p.table_width + column] = all.top;
    pass.sums[(first_head + member) * p.table_width + column] = all.sum;
  };
  int copy = 0, column = first_column;
  while (true) {
    const int64_t block = block_at(p, row, column);
    const int64_t index = head * int64_t{chunks};
    const auto* landmarks = section<uint8_t>(p, block, p.layout.landmarks, index * kHeadSize / 2);
    const auto* scales = section<float>(p, block, p.layout.landmark_scales, index);
    LandmarkTiles<kHeadSize> tiles;
    int tile = warp * kWarpTiles;
    float* logits =
        pass.logits + (first_head + g) * row_chunks + column * int64_t{chunks} + tile + 2 * t;
    if (block != 0) {  // asked for before all that the barrier waits for
      tiles.load_landmarks(landmarks, tile, chunks);
      tiles.load_scales(scales, tile, chunks);
    }
    const auto* mean = section<float>(p, block, p.layout.landmark_mean, head * kHeadSize);
    for (int member = warp; member < group; member += kLogitWarps) {
      const T* query = queries + member * p.query_head_stride;
      if (column == first_column) {
        const float scale = quantise_row<kHeadSize>([&](int d) { return to_float(query[d]); },
                                                    reinterpret_cast<int8_t*>(codes[member]));
        if (lane == 0) units[member] = scale * p.scale;
      }
      if (block != 0) {
        const float product = multiply_mean<T, kHeadSize>(query, mean);
        if (lane == 0) of_means[copy][member] = product * p.scale;
      }
    }
    sync_threads();
    QueryCodes<kHeadSize> query;
    query.load(codes, group);
    if (column != first_column) merge_parts(column - step, copy ^ 1);
    float unit[2] = {}, of_mean[2] = {-infinity(), -infinity()};  // of an invalid block
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (block == 0 || g + 8 * half >= group) continue;
      unit[half] = units[g + 8 * half];
      of_mean[half] = of_means[copy][g + 8 * half];
    }
    SoftmaxPart part[2] = {no_softmax(), no_softmax()};
    for (; tile < chunks; tile += kLogitWarps * kWarpTiles) {
      sync_warp();  // tensor cores want all lanes together
      int c[kTiles][4] = {};
      const int next = tile + kLogitWarps * kWarpTiles;
      if (block != 0) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) c[i][j] = -query.offsets[j / 2];
          tiles.landmarks[i].multiply(c[i], query.words);
        }
        tiles.load_landmarks(landmarks, next, chunks);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (8 * half >= group) break;
        float* to = logits + 8 * half * row_chunks;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          float logit[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float product = static_cast<float>(c[i][2 * half + j]);
            logit[j] = product * (tiles.scales[i][j] * unit[half]) + of_mean[half];
            // Not a branch around all of it: addresses would be computed in each.
            const bool exists = g + 8 * half < group && tile + i * kTile + 2 * t + j < chunks;
            if (exists) to[i * kTile + j] = logit[j];
            logit[j] = exists ? logit[j] : -infinity();
          }
          part[half] = add(part[half], logit[0], logit[1]);
        }
      }
      if (block != 0) tiles.load_scales(scales, next, chunks);
      logits += kLogitWarps * kWarpTiles;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= group) break;
      part[half] = merge_lanes(part[half], 4);
      if (t == 0) parts[copy][warp][g + 8 * half] = part[half];
    }
    if (column + step >= blocks) break;
    column += step, copy ^= 1;
  }
  sync_threads();
  merge_parts(column, copy);
}

}  // namespace shadowkv::cuda
