#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "params/plan_slots.h"

namespace shadowkv {

// Empties a row's slot pages whose epoch is not their block's. Before plan_slots_kernel of any head
// of the row, which reads the same tags.
SHADOWKV_DECLARE_KERNEL(void plan_slots_prepare_kernel(const PlanSlotsParams& p, int64_t row))

// Plans one row and KV head.
SHADOWKV_DECLARE_KERNEL(void plan_slots_kernel(const PlanSlotsParams& p, int64_t row, int64_t head))

}  // namespace shadowkv
