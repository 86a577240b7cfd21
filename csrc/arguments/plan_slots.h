// The arguments of plan_slots, checked: what a kernel gets on any device.
#pragma once

#include <vector>

#include "host_tensor.h"
#include "params/plan_slots.h"

namespace shadowkv {

inline PlanSlotsParams read_plan_slots(const Tensor& chunk_ids, const Tensor& block_table,
                                       const Tensor& epochs, const Tensor& clock,
                                       const Tensor& slot_table, const Tensor& slot_pages,
                                       const std::vector<int64_t>& layout_ints,
                                       const Tensor& slot_ids, const Tensor& misses,
                                       const Tensor& num_misses, const Tensor& counts,
                                       DeviceType device) {
  const PageLayout layout = read_layout(layout_ints);
  const int64_t heads = layout.num_kv_heads;
  check_tensor(chunk_ids, "chunk_ids", device, ScalarType::Int, {kAnySize, heads, kAnySize});
  const int64_t rows = chunk_ids.size(0), columns = chunk_ids.size(2);
  check_tensor(block_table, "block_table", device, ScalarType::Int, {rows, kAnySize},
               Strides::kRows);
  check_pages(slot_pages, "slot_pages", device, layout.page_bytes);
  check_tensor(epochs, "epochs", device, ScalarType::Long, {slot_pages.size(0)});
  check_tensor(clock, "clock", device, ScalarType::Long, {1});
  check_tensor(slot_table, "slot_table", device, ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_tensor(slot_ids, "slot_ids", device, ScalarType::Int, {rows, heads, columns});
  check_tensor(misses, "misses", device, ScalarType::Int, {rows, heads, columns});
  check_tensor(num_misses, "num_misses", device, ScalarType::Int, {rows, heads});
  check_tensor(counts, "counts", device, ScalarType::Long, {4});

  return {
      .layout = layout,
      .chunk_ids = static_cast<const int32_t*>(chunk_ids.data_ptr()),
      .block_table = static_cast<const int32_t*>(block_table.data_ptr()),
      .table_width = block_table.size(1),
      .table_stride = stride_of(block_table, 0),
      .epochs = static_cast<const int64_t*>(epochs.data_ptr()),
      .clock = static_cast<const int64_t*>(clock.data_ptr()),
      .slot_table = static_cast<const int32_t*>(slot_table.data_ptr()),
      .pages_per_row = slot_table.size(1),
      .slot_table_stride = stride_of(slot_table, 0),
      .slot_pages = static_cast<uint8_t*>(slot_pages.data_ptr()),
      .num_pages = slot_pages.size(0),
      .page_stride = stride_of(slot_pages, 0),
      .slot_ids = static_cast<int32_t*>(slot_ids.data_ptr()),
      .misses = static_cast<int32_t*>(misses.data_ptr()),
      .num_misses = static_cast<int32_t*>(num_misses.data_ptr()),
      .counts = static_cast<int64_t*>(counts.data_ptr()),
      .columns = columns,
      .num_rows = rows,
  };
}

}  // namespace shadowkv
