// The arguments of store_values, checked: what a kernel gets on any device.
#pragma once

#include <algorithm>
#include <vector>

#include "host_tensor.h"
#include "params/store_values.h"

namespace shadowkv {

inline StoreValuesParams read_store_values(const Tensor& block_ids, const Tensor& exact_ids,
                                           const Tensor& exact_values, const Tensor& pages,
                                           const Tensor& host_pool,
                                           const std::vector<int64_t>& layout_ints,
                                           DeviceType device) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(block_ids, "block_ids", device, ScalarType::Int, {kAnySize});
  const int64_t n = block_ids.size(0);
  check_tensor(exact_ids, "exact_ids", device, ScalarType::Int,
               {n, layout.block_size / layout.exact_tokens});
  check_tensor(exact_values, "exact_values", device, scalar_type(layout),
               {kAnySize, layout.num_kv_heads, layout.exact_tokens, layout.head_size},
               Strides::kLastContiguous);
  check_pages(pages, "pages", device, layout.page_bytes);
  check_pages(host_pool, "host_pool", DeviceType::CPU, layout.value_row_bytes());

  return {
      .layout = layout,
      .num_stored = n,
      .block_ids = static_cast<const int32_t*>(block_ids.const_data_ptr()),
      .exact_ids = static_cast<const int32_t*>(exact_ids.const_data_ptr()),
      .exact_values = exact_values.const_data_ptr(),
      .num_exact = exact_values.size(0),
      .exact_stride = stride_of(exact_values, 0),
      .head_stride = stride_of(exact_values, 1),
      .token_stride = stride_of(exact_values, 2),
      .pages = static_cast<uint8_t*>(pages.mutable_data_ptr()),
      .host_pool = static_cast<uint8_t*>(host_pool.mutable_data_ptr()),
      .num_blocks = std::min(pages.size(0), host_pool.size(0)),
      .page_stride = stride_of(pages, 0),
      .host_pool_stride = stride_of(host_pool, 0),
  };
}

}  // namespace shadowkv
