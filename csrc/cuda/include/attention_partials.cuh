// The workspace of sparse_attention: what the splits of a row hand to the kernel that merges them.
#pragma once

#include "cuda/include/intrinsics.cuh"
#include "params/sparse_attention.h"

namespace shadowkv::cuda {

constexpr int kSplits = 8;      // vllm_shadowkv/ops.py: ATTENTION_SPLITS
constexpr float kNoToken = -1;  // as a sum of weights

// Some rows at a time, as many as the workspace has room for.
struct Pass {
  SparseAttentionParams p;
  int64_t first_row;
  int64_t num_rows;
  float* workspace;
};

// The partial result of one split of a query head.
struct Partial {
  float* values;  // [head_size], sum of 2 ** (logit - largest) * value; unset where no token is
  float* stats;   // largest logit, sum of 2 ** (logit - largest)
};

__device__ __forceinline__ Partial partial_at(const Pass& pass, int64_t row, int64_t query_head,
                                              int split) {
  const PageLayout& layout = pass.p.layout;
  const int64_t per_row = layout.num_kv_heads * pass.p.group * kSplits;
  const int64_t i = row * per_row + query_head * kSplits + split;
  return {pass.workspace + i * layout.head_size,
          pass.workspace + pass.num_rows * per_row * layout.head_size + 2 * i};
}

}  // namespace shadowkv::cuda
