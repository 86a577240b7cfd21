// The arguments of fill_slots, checked: what a kernel gets on any device.
#pragma once

#include <vector>

#include "arguments/exact_strides.h"
#include "arguments/rotary.h"
#include "host_tensor.h"
#include "params/fill_slots.h"

namespace shadowkv {

inline FillSlotsParams read_fill_slots(
    const Tensor& chunk_ids, const Tensor& slot_ids, const Tensor& misses, const Tensor& num_misses,
    const Tensor& pages, const Tensor& block_table, const Tensor& host_pool, const Tensor& cos_sin,
    bool is_neox, const Tensor& sources, const Tensor& epochs, const Tensor& exact_keys,
    const Tensor& exact_values, const Tensor& slot_table, const Tensor& slot_pages,
    const std::vector<int64_t>& layout_ints, const Tensor& counts, DeviceType device) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(chunk_ids, "chunk_ids", device, ScalarType::Int,
               {kAnySize, layout.num_kv_heads, kAnySize});
  const int64_t rows = chunk_ids.size(0);
  const int64_t places = chunk_ids.size(2);
  check_tensor(slot_ids, "slot_ids", device, ScalarType::Int, {rows, layout.num_kv_heads, places});
  check_tensor(misses, "misses", device, ScalarType::Int, {rows, layout.num_kv_heads, places});
  check_tensor(num_misses, "num_misses", device, ScalarType::Int, {rows, layout.num_kv_heads});
  check_pages(pages, "pages", device, layout.page_bytes);
  check_tensor(block_table, "block_table", device, ScalarType::Int, {rows, kAnySize},
               Strides::kRows);
  check_pages(host_pool, "host_pool", DeviceType::CPU, layout.value_row_bytes());
  SHADOWKV_CHECK(host_pool.size(0) == pages.size(0), "host_pool: expected as many rows as pages, ",
                 pages.size(0), ", got ", host_pool.size(0));
  const RotaryTable rotary = read_rotary(cos_sin, is_neox, layout, device);
  check_tensor(sources, "sources", device, ScalarType::Int,
               {pages.size(0), layout.block_size / layout.exact_tokens});
  check_tensor(epochs, "epochs", device, ScalarType::Long, {pages.size(0)});
  // Keys lie in any order: on a CPU those of a page are transposed.
  check_tensor(exact_keys, "exact_keys", device, scalar_type(layout),
               {pages.size(0), layout.num_kv_heads, layout.exact_tokens, layout.head_size},
               Strides::kAny);
  check_tensor(exact_values, "exact_values", device, scalar_type(layout),
               {pages.size(0), layout.num_kv_heads, layout.exact_tokens, layout.head_size},
               Strides::kLastContiguous);
  check_tensor(counts, "counts", device, ScalarType::Long, {4});
  check_tensor(slot_table, "slot_table", device, ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_pages(slot_pages, "slot_pages", device, layout.page_bytes);

  return {
      .layout = layout,
      .rows = rows,
      .places = places,
      .chunk_ids = static_cast<const int32_t*>(chunk_ids.const_data_ptr()),
      .slot_ids = static_cast<const int32_t*>(slot_ids.const_data_ptr()),
      .misses = static_cast<const int32_t*>(misses.const_data_ptr()),
      .num_misses = static_cast<const int32_t*>(num_misses.const_data_ptr()),
      .pages = static_cast<const uint8_t*>(pages.const_data_ptr()),
      .num_blocks = pages.size(0),
      .page_stride = stride_of(pages, 0),
      .host_pool = static_cast<const uint8_t*>(host_pool.const_data_ptr()),
      .host_pool_stride = stride_of(host_pool, 0),
      .block_table = static_cast<const int32_t*>(block_table.const_data_ptr()),
      .max_blocks = block_table.size(1),
      .block_table_stride = stride_of(block_table, 0),
      .slot_table = static_cast<const int32_t*>(slot_table.const_data_ptr()),
      .slot_columns = slot_table.size(1),
      .slot_table_stride = stride_of(slot_table, 0),
      .slot_pages = static_cast<uint8_t*>(slot_pages.mutable_data_ptr()),
      .num_slot_pages = slot_pages.size(0),
      .slot_page_stride = stride_of(slot_pages, 0),
      .rotary = rotary,
      .sources = static_cast<const int32_t*>(sources.const_data_ptr()),
      .epochs = static_cast<const int64_t*>(epochs.const_data_ptr()),
      .exact_keys = exact_keys.const_data_ptr(),
      .exact_values = exact_values.const_data_ptr(),
      .key_strides = exact_strides(exact_keys),
      .value_strides = exact_strides(exact_values),
      .counts = static_cast<int64_t*>(counts.mutable_data_ptr()),
  };
}

}  // namespace shadowkv
