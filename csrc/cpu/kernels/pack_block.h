#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "params/pack_block.h"

namespace shadowkv {

// Writes parts [begin, end); part i * num_kv_heads + head is block i's keys of this head, and the
// head's share of the block's coefficient and basis rows.
SHADOWKV_DECLARE_KERNEL(void pack_block_kernel(const PackBlockParams& p, int64_t begin,
                                               int64_t end))

}  // namespace shadowkv
