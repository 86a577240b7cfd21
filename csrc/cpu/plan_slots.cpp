#include "cpu/kernels/plan_slots.h"

#include <vector>

#include "arguments/plan_slots.h"
#include "cpu/parallel.h"

namespace shadowkv {
namespace {

void plan_slots(const Tensor& chunk_ids, const Tensor& block_table, const Tensor& epochs,
                const Tensor& clock, const Tensor& slot_table, const Tensor& slot_pages,
                const std::vector<int64_t>& layout_ints, const Tensor& slot_ids,
                const Tensor& misses, const Tensor& num_misses, const Tensor& counts) {
  const PlanSlotsParams p =
      read_plan_slots(chunk_ids, block_table, epochs, clock, slot_table, slot_pages, layout_ints,
                      slot_ids, misses, num_misses, counts, DeviceType::CPU);
  parallel_items(p.num_rows,
                 [&](int64_t row) { SHADOWKV_DISPATCH_ISA(plan_slots_prepare_kernel, p, row); });
  const int64_t heads = p.layout.num_kv_heads;
  parallel_items(p.num_rows * heads, [&](int64_t item) {
    SHADOWKV_DISPATCH_ISA(plan_slots_kernel, p, item / heads, item % heads);
  });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("plan_slots", TORCH_BOX(&shadowkv::plan_slots));
}
