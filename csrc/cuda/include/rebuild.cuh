// Keys of a sealed block out of its shadow page, and its values out of the host pool: what
// fill_slots and expand_blocks share. csrc/cpu/kernels/rebuild.h is its twin.
//
// A CTA rebuilds a tile of kTokens keys of one KV head: keys^T [head_size x tokens] = basis^T
// [head_size x rank] * coefficients^T [rank x tokens] on tensor cores, int8 with int32 sums; the
// epilogue applies the token's scale. That reads rank * head_size + kTokens * (rank +
// leading_rank) / 2 bytes, which bound it; the basis stays in shared memory for the next tile of
// the block.
#pragma once

#include "cuda/include/int8.cuh"
#include "cuda/include/intrinsics.cuh"
#include "cuda/include/rotary.cuh"
#include "cuda/include/value_tile.cuh"
#include "cuda/include/warp.cuh"
#include "host_tensor.h"
#include "layout.h"

namespace shadowkv::cuda {

constexpr int kRebuildWarps = kRebuildThreads / kWarp;
// CTAs that a multiprocessor's registers are to hold: the most without spills.
constexpr int rebuild_ctas(int head_size, int tokens) {
  return head_size == 256 ? 3 : tokens == 8 ? 5 : 4;
}
constexpr int kMaxSharedBytes = 99 << 10;  // of a CTA, since sm_80

// Shared memory of a tile: a panel of basis rows, their coefficients, the keys. Rows are padded so
// that the lanes of a warp meet no bank twice.
template <int kHeadSize, int kTokens>
struct RebuildShape {
  static constexpr int kPairs = (kHeadSize + 31) / 32;  // of two tiles of 16 dimensions
  static constexpr int kBasisStride = 32 * kPairs + 16;
  static constexpr int kKeyStride = kHeadSize + 4;
  static constexpr int kKeyBytes = kTokens * kKeyStride * static_cast<int>(sizeof(float));
  // Bytes of a token's coefficients: the eight tokens of a tile start in different banks.
  static constexpr int coefficient_stride(int rows) {
    return rows / 16 * 16 + (rows % 32 ? 0 : 16);
  }

  // Basis rows that are in shared memory at once, a multiple of 16.
  static constexpr int panel(int64_t rank) {
    constexpr int kBytes = kMaxSharedBytes - kKeyBytes - 16 * kTokens;
    constexpr int kMost = kBytes / (kBasisStride + kTokens) / 16 * 16;
    return rank < kMost ? static_cast<int>(rank) : kMost;
  }
  static constexpr int shared_bytes(int64_t rank) {
    const int rows = panel(rank);
    return rank == 0 ? 0 : rows * kBasisStride + coefficient_stride(rows) * kTokens + kKeyBytes;
  }
};

// Rebuilds tiles of one layout; every thread of the CTA calls it with the same arguments.
template <typename T, int kHeadSize, int kTokens>
class Rebuilder {
  using Shape = RebuildShape<kHeadSize, kTokens>;
  static constexpr int kTiles = kTokens / 8;
  // Pairs of 16-dimension tiles that a warp takes.
  static constexpr int kMine = (Shape::kPairs + kRebuildWarps - 1) / kRebuildWarps;

 public:
  __device__ __forceinline__ explicit Rebuilder(const PageLayout& layout)
      : layout_(layout),
        rank_(static_cast<int>(layout.rank)),
        panel_(Shape::panel(layout.rank)),
        basis_(dynamic_shared_memory()),
        coefficients_(basis_ + panel_ * Shape::kBasisStride),
        keys_(reinterpret_cast<float*>(coefficients_ + kTokens * coefficient_stride())) {}

  // Writes the keys of tokens [token, token + kTokens) of a block, the first at `position`: T rows
  // `stride` elements apart.
  __device__ __forceinline__ void operator()(const uint8_t* page, int head, int token,
                                             int64_t position, const RotaryTable& rotary, T* out,
                                             int64_t stride) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int8_t* basis = reinterpret_cast<const int8_t*>(page + layout_.basis) +
                          static_cast<int64_t>(head) * rank_ * kHeadSize;
    if (basis != staged_) stage(basis, 0);
    const auto* scales =
        reinterpret_cast<const BFloat16*>(page + layout_.coefficient_scales) + token;
    const auto* mean = reinterpret_cast<const float*>(page + layout_.mean) + head * kHeadSize;
    float scale[kTiles][2];
    float4 centre[kMine];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) scale[n][j] = to_float(scales[8 * n + 2 * (lane % 4) + j]);
    }
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int d = first_dim(warp, m, lane);
      centre[m] = d < kHeadSize ? *reinterpret_cast<const float4*>(mean + d) : float4{};
    }

    int sums[kMine][2][kTiles][4] = {};
    for (int first = 0; first < rank_; first += panel_) {
      if (first > 0) {
        sync_threads();
        stage(basis, first);
      }
      const int rows = rank_ - first < panel_ ? rank_ - first : panel_;
      load_coefficients(page, token, first, rows);
      wait_copies<0>();
      sync_threads();
      multiply(rows, sums);
    }
    staged_ = rank_ == panel_ ? basis : nullptr;

#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int d = first_dim(warp, m, lane);
      if (d >= kHeadSize) continue;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int n = i / 2, j = i % 2;
        *reinterpret_cast<float4*>(keys_ + (8 * n + 2 * (lane % 4) + j) * Shape::kKeyStride + d) = {
            fmaf(static_cast<float>(sums[m][0][n][j]), scale[n][j], centre[m].x),
            fmaf(static_cast<float>(sums[m][0][n][2 + j]), scale[n][j], centre[m].y),
            fmaf(static_cast<float>(sums[m][1][n][j]), scale[n][j], centre[m].z),
            fmaf(static_cast<float>(sums[m][1][n][2 + j]), scale[n][j], centre[m].w)};
      }
    }
    sync_threads();
    constexpr int kVectors = kHeadSize / 8;
#pragma unroll 1
    for (int v = threadIdx.x; v < kTokens * kVectors; v += kRebuildThreads) {
      const int t = v / kVectors, d = v % kVectors * 8;
      *reinterpret_cast<uint4*>(out + t * stride + d) =
          turn<T>(rotary, position + t, keys_ + t * Shape::kKeyStride, d);
    }
  }

 private:
  __device__ __forceinline__ int coefficient_stride() const {
    return Shape::coefficient_stride(panel_);
  }

  // A lane holds four neighbouring dimensions of a pair of tiles, in both the basis and the sums:
  // which dimension a row of a tile is, is free. The last pair of head size 80 is half empty.
  static __device__ __forceinline__ int first_dim(int warp, int m, int lane) {
    return 32 * (warp + m * kRebuildWarps) + 4 * (lane / 4);
  }

  // Starts to copy a panel of the basis.
  __device__ __forceinline__ void stage(const int8_t* basis, int first) {
    constexpr int kVectors = kHeadSize / 16;
    const int rows = rank_ - first < panel_ ? rank_ - first : panel_;
    const int8_t* from = basis + first * kHeadSize;
    for (int v = threadIdx.x; v < rows * kVectors; v += kRebuildThreads) {
      copy_async(basis_ + v / kVectors * Shape::kBasisStride + v % kVectors * 16, from + v * 16);
    }
    commit_copies();
  }

  // Copies the coefficients of a panel's rows. Of every 16 of a token, word i has k = 2i, 2i + 1,
  // 2i + 8 and 2i + 9: then the lanes of a warp read basis rows without meeting a bank twice.
  __device__ __forceinline__ void load_coefficients(const uint8_t* page, int token, int first,
                                                    int rows) {
    const int leading = static_cast<int>(layout_.leading_rank), tail = (rank_ - leading) / 2;
    const uint8_t* codes = page + layout_.coefficients + static_cast<int64_t>(token) * leading;
    const uint8_t* tails = page + layout_.tail_coefficients + static_cast<int64_t>(token) * tail;
    const uint8_t* steps = page + layout_.tail_steps + token;
#pragma unroll 1
    for (int i = threadIdx.x; i < kTokens * rows / 16; i += kRebuildThreads) {
      const int t = i % kTokens, r = i / kTokens * 16, at = first + r;
      // Of the 16 of a token, the lower eight and the upper eight.
      uint2 low, high;
      if (at < leading) {
        const uint4 both = *reinterpret_cast<const uint4*>(codes + t * leading + at);
        low = {both.x, both.y}, high = {both.z, both.w};
      } else {
        const uint2 both = *reinterpret_cast<const uint2*>(tails + t * tail + (at - leading) / 2);
        const uint32_t step = steps[t];
        low = {tail_codes(both.x, step), tail_codes(both.y, step)};
        high = {tail_codes(both.x >> 4, step), tail_codes(both.y >> 4, step)};
      }
      *reinterpret_cast<uint4*>(coefficients_ + t * coefficient_stride() + r) = {
          pick_bytes(low.x, high.x, 0x5410), pick_bytes(low.x, high.x, 0x7632),
          pick_bytes(low.y, high.y, 0x5410), pick_bytes(low.y, high.y, 0x7632)};
    }
  }

  // Four int8 out of the lower halves of four bytes: (half - kNibbleOffset) * step. A product of at
  // most 15 * kTailStep stays in its byte.
  static __device__ __forceinline__ uint32_t tail_codes(uint32_t halves, uint32_t step) {
    static_assert(15 * kTailStep < 256);
    return subtract_bytes((halves & 0x0f0f0f0fu) * step, kNibbleOffset * 0x01010101u * step);
  }

  // sums[m][tile of a pair][n] += a panel's product.
  __device__ __forceinline__ void multiply(int rows, int (&sums)[kMine][2][kTiles][4]) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int group = lane / 4, k = 2 * (lane % 4);
#pragma unroll 2
    for (int first = 0; first < rows; first += 16) {
      uint32_t b[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        b[n] = *reinterpret_cast<const uint32_t*>(
            coefficients_ + (8 * n + group) * coefficient_stride() + first + 2 * k);
      }
#pragma unroll
      for (int m = 0; m < kMine; ++m) {
        if (warp + m * kRebuildWarps >= Shape::kPairs) continue;
        const uint8_t* at = basis_ + (first + k) * Shape::kBasisStride + first_dim(warp, m, lane);
        const auto row = [&](int r) {
          return *reinterpret_cast<const uint32_t*>(at + r * Shape::kBasisStride);
        };
        // From a word per row, four dimensions each, to a word per dimension.
        const uint32_t words[4] = {row(0), row(1), row(8), row(9)};
        const uint32_t low[2] = {pick_bytes(words[0], words[1], 0x5140),
                                 pick_bytes(words[2], words[3], 0x5140)};
        const uint32_t high[2] = {pick_bytes(words[0], words[1], 0x7362),
                                  pick_bytes(words[2], words[3], 0x7362)};
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const auto& halves = tile == 0 ? low : high;
          const uint32_t a[2] = {pick_bytes(halves[0], halves[1], 0x5410),
                                 pick_bytes(halves[0], halves[1], 0x7632)};
#pragma unroll
          for (int n = 0; n < kTiles; ++n) mma_16x8x16(sums[m][tile][n], a, b[n]);
        }
      }
    }
  }

  const PageLayout& layout_;
  const int rank_, panel_;
  uint8_t* const basis_;
  uint8_t* const coefficients_;     // [kTokens, panel], see load_coefficients
  float* const keys_;               // [kTokens, kHeadSize]
  const int8_t* staged_ = nullptr;  // the basis that is in shared memory as a whole
};

// Sections of pages that kernels read or write 16 bytes at a time.
inline void check_rebuilt_sections(const PageLayout& layout) {
  const auto check = [](const char* name, int64_t offset) {
    SHADOWKV_CHECK(offset % 16 == 0, "layout: ", name, " must be aligned to 16 bytes, got offset ",
                   offset);
  };
  check("coefficients", layout.coefficients);
  check("tail_coefficients", layout.tail_coefficients);
  check("basis", layout.basis);
  check("mean", layout.mean);
  check("exact_keys", layout.exact_keys);
  check("outlier_keys", layout.outlier_keys);
  check("slot_keys", layout.slot_keys);
  check("slot_values", layout.slot_values);
}

// A page's own keys of a chunk, where it holds them: `index` counts chunks (rank 0) or outliers.
template <typename T>
__device__ __forceinline__ const T* exact_keys(const PageLayout& layout, const uint8_t* page,
                                               int head, int64_t index) {
  const int64_t section = layout.rank == 0 ? layout.exact_keys : layout.outlier_keys;
  const int64_t count = layout.rank == 0 ? layout.chunks() : layout.num_outliers;
  return reinterpret_cast<const T*>(page + section) +
         (head * count + index) * layout.chunk_size * layout.head_size;
}

__device__ __forceinline__ const int32_t* outlier_ids(const PageLayout& layout, const uint8_t* page,
                                                      int head) {
  return reinterpret_cast<const int32_t*>(page + layout.outlier_ids) + head * layout.num_outliers;
}

}  // namespace shadowkv::cuda
