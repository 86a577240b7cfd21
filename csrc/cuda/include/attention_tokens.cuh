// What a row of sparse_attention attends to, 16 tokens a step, and how a step's keys and values get
// from global memory to tensor-core fragments without a detour through shared memory.
#pragma once

#include "cuda/include/intrinsics.cuh"
#include "params/sparse_attention.h"

namespace shadowkv::cuda {

constexpr int kTileTokens = 8;                // columns of an mma
constexpr int kStepTokens = 2 * kTileTokens;  // k of the mma with the values
constexpr int kMaxQueries = 16;               // rows of an mma

// The tokens of two tiles; a tile's tokens lie a stride (in elements) apart.
template <typename T>
struct Step {
  const T* keys[2];
  const T* values[2];
  int64_t key_stride;
  int64_t value_stride;
  uint32_t tokens;  // bit n: token n, of tile n / 8, is there
};

// The steps of one row and KV head: first its slot columns, then its exact tokens. A step of exact
// tokens starts at a multiple of 16, so it lies in one page.
template <typename T, int kHeadSize>
class RowTokens {
 public:
  __device__ __forceinline__ RowTokens(const SparseAttentionParams& p, int64_t row, int head)
      : p_(p),
        slots_(p.slot_ids + (row * p.layout.num_kv_heads + head) * p.columns),
        slot_pages_(p.slot_table + row * p.slot_table_stride),
        exact_pages_(p.exact_table + row * p.exact_table_stride),
        head_(head) {
    const int chunk = static_cast<int>(p.layout.chunk_size);
    slot_steps_ = (static_cast<int>(p.columns) * chunk + kStepTokens - 1) / kStepTokens;
    const int64_t room = p.exact_width * p.layout.exact_tokens;
    begin_ = p.exact_start[row] > 0 ? p.exact_start[row] : 0;
    end_ = static_cast<int>(p.seq_lens[row] < room ? p.seq_lens[row] : room);
    first_ = begin_ / kStepTokens;
    num_steps_ = slot_steps_;
    if (end_ > begin_) num_steps_ += (end_ - 1) / kStepTokens + 1 - first_;
  }

  __device__ __forceinline__ int num_steps() const { return num_steps_; }

  __device__ __forceinline__ Step<T> at(int index) const {
    return index < slot_steps_ ? slots_at(index) : exact_at(index - slot_steps_);
  }

 private:
  __device__ __forceinline__ Step<T> slots_at(int index) const {
    const PageLayout& layout = p_.layout;
    const int per_page = static_cast<int>(layout.slots_per_page);
    const bool whole = layout.chunk_size == kStepTokens;  // a step is one chunk, else two
    // Both tiles at each turn, so that their loads wait for one another no longer than they must.
    int slots[2], pages[2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int column = whole ? index : 2 * index + tile;
      slots[tile] = column < p_.columns ? load_constant(slots_ + column) : -1;
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const bool there = slots[tile] >= 0 && slots[tile] < p_.pages_per_row * per_page;
      pages[tile] = there ? load_constant(slot_pages_ + slots[tile] / per_page) : 0;
    }
    Step<T> step = {};
    step.key_stride = step.value_stride = kHeadSize;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (pages[tile] <= 0 || pages[tile] >= p_.num_pages) continue;
      const uint8_t* page = p_.slot_pages + pages[tile] * p_.page_stride;
      int64_t token = (static_cast<int64_t>(head_) * per_page + slots[tile] % per_page) *
                      static_cast<int>(layout.chunk_size);
      if (whole) token += tile * kTileTokens;
      step.keys[tile] = reinterpret_cast<const T*>(page + layout.slot_keys) + token * kHeadSize;
      step.values[tile] = reinterpret_cast<const T*>(page + layout.slot_values) + token * kHeadSize;
      step.tokens |= 0xffu << (tile * kTileTokens);
    }
    return step;
  }

  __device__ __forceinline__ Step<T> exact_at(int index) const {
    const int exact_tokens = static_cast<int>(p_.layout.exact_tokens);
    const int token = (first_ + index) * kStepTokens;
    const int page = exact_pages_[token / exact_tokens];
    Step<T> step = {};
    if (page <= 0 || page >= p_.num_exact) return step;
    step.key_stride = p_.key_strides.token;
    step.value_stride = p_.value_strides.token;
    const int place = token % exact_tokens;
    step.keys[0] = static_cast<const T*>(p_.exact_keys) + page * p_.key_strides.page +
                   head_ * p_.key_strides.head + place * step.key_stride;
    step.values[0] = static_cast<const T*>(p_.exact_values) + page * p_.value_strides.page +
                     head_ * p_.value_strides.head + place * step.value_stride;
    step.keys[1] = step.keys[0] + kTileTokens * step.key_stride;
    step.values[1] = step.values[0] + kTileTokens * step.value_stride;
    step.tokens = 0xffffu;
    if (end_ - token < kStepTokens) step.tokens >>= kStepTokens - (end_ - token);
    if (begin_ > token) step.tokens &= 0xffffu << (begin_ - token);
    return step;
  }

  const SparseAttentionParams& p_;
  const int32_t* slots_;
  const int32_t* slot_pages_;
  const int32_t* exact_pages_;
  int head_, slot_steps_, num_steps_;
  int begin_, end_;  // exact tokens
  int first_;        // the first exact step's token / kStepTokens
};

// Loads 4 * kWords bytes at once; zeros for what is not there, as 0 * NaN is no 0.
template <int kWords>
__device__ __forceinline__ void load_words(const void* from, bool there, uint32_t* words) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    const uint4 v = there ? load_constant(static_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = there ? load_constant(static_cast<const uint2*>(from)) : uint2{0, 0};
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = there ? load_constant(static_cast<const uint32_t*>(from)) : 0;
  }
}

// A row's part in fragments over its dimensions: words[2k] and words[2k + 1] are the two registers
// of lane (g, t) for dimensions [16k, 16k + 16). Which of these 16 a register holds does not matter
// as long as queries and keys agree, so a lane loads 16 bytes for two k at once.
template <int kDims, typename T>
__device__ __forceinline__ void load_row(const T* row, bool there, uint32_t (&words)[kDims / 8]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int d = 0; d + 32 <= kDims; d += 32) load_words<4>(row + d + 8 * t, there, words + d / 8);
  if constexpr (kDims % 32 != 0) {
    load_words<2>(row + kDims - 16 + 4 * t, there, words + kDims / 8 - 2);
  }
}

// Both tiles' keys, dimensions [first, first + kDims).
template <int kDims, typename T>
__device__ __forceinline__ void load_keys(const Step<T>& step, int first,
                                          uint32_t (&words)[2][kDims / 8]) {
  const int g = threadIdx.x % kWarp / 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    load_row<kDims>(step.keys[tile] + first + g * step.key_stride,
                    step.tokens >> (tile * kTileTokens + g) & 1, words[tile]);
  }
}

// Values and outputs go through in pieces of 64 dimensions, then the rest.
constexpr int kPiece = 64;

// Calls function.operator()<kFirst, kDims>() for the pieces [kFirst, kFirst + kDims).
template <int kHeadSize, int kFirst = 0, typename Function>
__device__ __forceinline__ void for_pieces(const Function& function) {
  constexpr int kDims = kHeadSize - kFirst < kPiece ? kHeadSize - kFirst : kPiece;
  function.template operator()<kFirst, kDims>();
  if constexpr (kFirst + kDims < kHeadSize) for_pieces<kHeadSize, kFirst + kDims>(function);
}

// Of the piece at dimension `first`, with kDims of them: lane (g, t) gets dimensions
// [g * kDims / 8, (g + 1) * kDims / 8) of the tokens 2t, 2t + 1, 2t + 8 and 2t + 9.
template <int kDims, typename T>
__device__ __forceinline__ void load_values(const Step<T>& step, int first,
                                            uint32_t (&words)[4][4]) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int tile = i / 2, token = 2 * t + i % 2;
    load_words<kDims / 16>(step.values[tile] + first + g * (kDims / 8) + token * step.value_stride,
                           step.tokens >> (tile * kTileTokens + token) & 1, words[i]);
  }
}

// Adds weights * values to kDims / 8 tiles of sums. Column c of tile i is dimension
// c * kDims / 8 + i of the piece.
template <int kDims, typename T>
__device__ __forceinline__ void add_values(const uint32_t (&weights)[4],
                                           const uint32_t (&words)[4][4], float (*sums)[4]) {
#pragma unroll
  for (int i = 0; i < kDims / 8; ++i) {
    const uint32_t half = i % 2 == 0 ? 0x5410 : 0x7632;
    const uint32_t b[2] = {pick_bytes(words[0][i / 2], words[1][i / 2], half),
                           pick_bytes(words[2][i / 2], words[3][i / 2], half)};
    mma_16x8x16<T>(sums[i], weights, b);
  }
}

}  // namespace shadowkv::cuda
