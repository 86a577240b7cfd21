#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "params/sparse_attention.h"

namespace shadowkv {

// Parts into which a row's slots and exact tokens are cut. They depend on nothing but the row and
// are always merged in their order, so a result depends on neither batch nor threads.
SHADOWKV_DECLARE_KERNEL(int64_t attention_num_splits(const SparseAttentionParams& p, int64_t row))
// Floats that one split's unfinished result takes.
SHADOWKV_DECLARE_KERNEL(int64_t attention_partial_size(const SparseAttentionParams& p))

// Attends to one split of a row and KV head.
SHADOWKV_DECLARE_KERNEL(void attention_split_kernel(const SparseAttentionParams& p, int64_t row,
                                                    int64_t head, int64_t split, float* partial))

// Writes output and lse of a row and KV head from its splits' partial results and its rest.
SHADOWKV_DECLARE_KERNEL(void attention_merge_kernel(const SparseAttentionParams& p, int64_t row,
                                                    int64_t head, const float* partials))

// All of it, with scratch memory of the calling thread.
SHADOWKV_DECLARE_KERNEL(void sparse_attention_kernel(const SparseAttentionParams& p, int64_t row,
                                                     int64_t head))

}  // namespace shadowkv
