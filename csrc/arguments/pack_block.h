// The arguments of pack_block, checked: what a kernel gets on any device.
#pragma once

#include <vector>

#include "host_tensor.h"
#include "params/pack_block.h"

namespace shadowkv {

inline PackBlockParams read_pack_block(const Tensor& block_ids, const Tensor& keys,
                                       const Tensor& query_scales, const Tensor& mean,
                                       const Tensor& coefficients, const Tensor& basis,
                                       const Tensor& pages, const std::vector<int64_t>& layout_ints,
                                       DeviceType device) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(block_ids, "block_ids", device, ScalarType::Int, {kAnySize});
  const int64_t n = block_ids.size(0);
  check_tensor(keys, "keys", device, scalar_type(layout),
               {n, layout.block_size, layout.num_kv_heads, layout.head_size});
  check_tensor(query_scales, "query_scales", device, ScalarType::Float, {layout.width()});
  if (layout.rank != 0) {
    check_tensor(mean, "mean", device, ScalarType::Float, {n, layout.width()});
    check_tensor(coefficients, "coefficients", device, ScalarType::Float,
                 {n, layout.block_size, layout.rank});
    check_tensor(basis, "basis", device, ScalarType::Float, {n, layout.rank, layout.width()});
  }
  check_pages(pages, "pages", device, layout.page_bytes);

  const auto factor = [&](const Tensor& tensor) {
    return layout.rank == 0 ? nullptr : static_cast<const float*>(tensor.const_data_ptr());
  };
  return {
      .layout = layout,
      .num_packed = n,
      .block_ids = static_cast<const int32_t*>(block_ids.const_data_ptr()),
      .keys = keys.const_data_ptr(),
      .query_scales = static_cast<const float*>(query_scales.const_data_ptr()),
      .mean = factor(mean),
      .coefficients = factor(coefficients),
      .basis = factor(basis),
      .pages = static_cast<uint8_t*>(pages.mutable_data_ptr()),
      .num_blocks = pages.size(0),
      .page_stride = stride_of(pages, 0),
  };
}

}  // namespace shadowkv
