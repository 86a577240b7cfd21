#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "params/select_chunks.h"

namespace shadowkv {

// Blocks of a row whose landmarks are scored, and the floats that the logits of one KV head take.
SHADOWKV_DECLARE_KERNEL(int64_t select_num_blocks(const SelectChunksParams& p, int64_t row))
SHADOWKV_DECLARE_KERNEL(int64_t select_logits_size(const SelectChunksParams& p, int64_t row))

// Writes the logits of the chunks in blocks [begin, end) of one row and KV head.
SHADOWKV_DECLARE_KERNEL(void select_logits_kernel(const SelectChunksParams& p, int64_t row,
                                                  int64_t head, int64_t begin, int64_t end,
                                                  float* logits))

// Picks the chunks of one row and KV head from its logits, and attends to the rest.
SHADOWKV_DECLARE_KERNEL(void select_pick_kernel(const SelectChunksParams& p, int64_t row,
                                                int64_t head, float* logits))

// Both, with scratch memory of the calling thread.
SHADOWKV_DECLARE_KERNEL(void select_chunks_kernel(const SelectChunksParams& p, int64_t row,
                                                  int64_t head))

}  // namespace shadowkv
