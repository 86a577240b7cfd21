// What a CTA of kRebuildThreads threads copies, 16 bytes at a time: rows of keys, and values out of
// the host pool.
#pragma once

#include "cuda/include/intrinsics.cuh"
#include "layout.h"

namespace shadowkv::cuda {

constexpr int kRebuildThreads = 128;

// The i-th int8 of a word.
__device__ __forceinline__ float code_at(uint32_t word, int i) {
  return static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
}

// Copies `tokens` contiguous rows to rows `stride` elements apart.
template <int kHeadSize, typename T>
__device__ __forceinline__ void copy_rows(const T* from, int tokens, T* out, int64_t stride) {
  constexpr int kVectors = kHeadSize / 8;
#pragma unroll 2
  for (int v = threadIdx.x; v < tokens * kVectors; v += kRebuildThreads) {
    *reinterpret_cast<uint4*>(out + v / kVectors * stride + v % kVectors * 8) =
        reinterpret_cast<const uint4*>(from)[v];
  }
}

template <int kHeadSize, typename T>
__device__ __forceinline__ void clear_rows(int tokens, T* out, int64_t stride) {
  constexpr int kVectors = kHeadSize / 8;
  for (int v = threadIdx.x; v < tokens * kVectors; v += kRebuildThreads) {
    *reinterpret_cast<uint4*>(out + v / kVectors * stride + v % kVectors * 8) = uint4{};
  }
}

// The scales of a head's int8 values in its block's row of the host pool.
__device__ __forceinline__ const float* head_scales(const PageLayout& layout, const uint8_t* row,
                                                    int head) {
  return reinterpret_cast<const float*>(row + layout.value_scales()) + head * layout.block_size;
}

// The values of kTokens tokens of one head on their way from the host pool: between load() and
// store() there is time to rebuild their keys.
template <typename T, int kHeadSize, int kTokens>
class ValueTile {
  static constexpr int kRowVectors = kHeadSize / 8;    // of 16 bytes, as T
  static constexpr int kCodeVectors = kHeadSize / 16;  // as int8
  static constexpr int kMost = (kTokens * kRowVectors + kRebuildThreads - 1) / kRebuildThreads;
  static constexpr int kMostCodes =
      (kTokens * kCodeVectors + kRebuildThreads - 1) / kRebuildThreads;

 public:
  // `records` are those of the head in its block's row of the host pool, `scales` theirs; the tile
  // starts with a chunk.
  __device__ __forceinline__ void load(const PageLayout& layout, const uint8_t* records,
                                       const float* scales, int token) {
    const int size = static_cast<int>(layout.chunk_size);
    const uint8_t* first = records + token / size * layout.value_record_bytes;
    if (!layout.value_int8) {
      each<kMost>(kTokens * kRowVectors, [&](int i, int v) {
        vectors_[i] = load_streaming(reinterpret_cast<const uint4*>(first) + v);
      });
      return;
    }
    each<kMostCodes>(kTokens * kCodeVectors, [&](int i, int v) {
      scales_[i] = scales[token + v / kCodeVectors];
      vectors_[i] = load_streaming(reinterpret_cast<const uint4*>(first) + v);
    });
  }

  __device__ __forceinline__ void store(const PageLayout& layout, T* out, int64_t stride) const {
    if (!layout.value_int8) {
      each<kMost>(kTokens * kRowVectors, [&](int i, int v) {
        *reinterpret_cast<uint4*>(out + v / kRowVectors * stride + v % kRowVectors * 8) =
            vectors_[i];
      });
      return;
    }
    each<kMostCodes>(kTokens * kCodeVectors, [&](int i, int v) {
      auto* to = reinterpret_cast<uint4*>(out + v / kCodeVectors * stride + v % kCodeVectors * 16);
      const float s = scales_[i];
      const auto two = [&](uint32_t word, int at) {
        return pack<T>(code_at(word, at) * s, code_at(word, at + 1) * s);
      };
      const uint4 codes = vectors_[i];
      to[0] = {two(codes.x, 0), two(codes.x, 2), two(codes.y, 0), two(codes.y, 2)};
      to[1] = {two(codes.z, 0), two(codes.z, 2), two(codes.w, 0), two(codes.w, 2)};
    });
  }

 private:
  // function(i, v) for this thread's vectors v, its i-th each.
  template <int kCount, typename Function>
  static __device__ __forceinline__ void each(int vectors, const Function& function) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int v = threadIdx.x + i * kRebuildThreads;
      if (v < vectors) function(i, v);
    }
  }

  uint4 vectors_[kMost];
  float scales_[kMostCodes];
};

}  // namespace shadowkv::cuda
