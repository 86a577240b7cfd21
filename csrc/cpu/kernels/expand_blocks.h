#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "params/expand_blocks.h"

namespace shadowkv {

// Writes items [begin, end), an item being one chunk of one KV head: item = (i * num_kv_heads +
// head)
// * chunks + chunk.
SHADOWKV_DECLARE_KERNEL(void expand_blocks_kernel(const ExpandBlocksParams& p, int64_t begin,
                                                  int64_t end))

}  // namespace shadowkv
