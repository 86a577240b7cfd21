#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "params/fill_slots.h"

namespace shadowkv {

// Fills the slots of misses [begin, end), counted over all rows and heads; first_miss [rows *
// num_kv_heads + 1] counts those before each (row, head), and all of them. Returns the highest
// position that has no row in the rotary table (its miss is left undone), or -1.
SHADOWKV_DECLARE_KERNEL(int64_t fill_slots_kernel(const FillSlotsParams& p,
                                                  const int64_t* first_miss, int64_t begin,
                                                  int64_t end))

}  // namespace shadowkv
