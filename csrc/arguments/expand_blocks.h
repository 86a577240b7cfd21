// The arguments of expand_blocks, checked: what a kernel gets on any device.
#pragma once

#include <vector>

#include "arguments/rotary.h"
#include "host_tensor.h"
#include "params/expand_blocks.h"

namespace shadowkv {

inline ExpandBlocksParams read_expand_blocks(const Tensor& block_ids, const Tensor& first_positions,
                                             const Tensor& pages, const Tensor& host_pool,
                                             const Tensor& cos_sin, bool is_neox,
                                             const std::vector<int64_t>& layout_ints,
                                             const Tensor& keys, const Tensor& values,
                                             DeviceType device) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(block_ids, "block_ids", device, ScalarType::Int, {kAnySize});
  const int64_t n = block_ids.size(0);
  check_tensor(first_positions, "first_positions", device, ScalarType::Int, {n});
  check_pages(pages, "pages", device, layout.page_bytes);
  check_pages(host_pool, "host_pool", DeviceType::CPU, layout.value_row_bytes());
  SHADOWKV_CHECK(host_pool.size(0) == pages.size(0), "host_pool: expected as many rows as pages, ",
                 pages.size(0), ", got ", host_pool.size(0));
  const RotaryTable rotary = read_rotary(cos_sin, is_neox, layout, device);
  check_tensor(keys, "keys", device, scalar_type(layout),
               {n, layout.block_size, layout.num_kv_heads, layout.head_size});
  check_tensor(values, "values", device, scalar_type(layout),
               {n, layout.block_size, layout.num_kv_heads, layout.head_size});

  return {
      .layout = layout,
      .num_expanded = n,
      .block_ids = static_cast<const int32_t*>(block_ids.const_data_ptr()),
      .first_positions = static_cast<const int32_t*>(first_positions.const_data_ptr()),
      .pages = static_cast<const uint8_t*>(pages.const_data_ptr()),
      .num_blocks = pages.size(0),
      .page_stride = stride_of(pages, 0),
      .host_pool = static_cast<const uint8_t*>(host_pool.const_data_ptr()),
      .host_pool_stride = stride_of(host_pool, 0),
      .rotary = rotary,
      .keys = keys.mutable_data_ptr(),
      .values = values.mutable_data_ptr(),
  };
}

}  // namespace shadowkv
