#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "params/store_values.h"

namespace shadowkv {

// Writes items [begin, end): item i * num_kv_heads + head is the values of one head of block i.
SHADOWKV_DECLARE_KERNEL(void store_values_kernel(const StoreValuesParams& p, int64_t begin,
                                                 int64_t end))

}  // namespace shadowkv
