#include "cpu/kernels/pack_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"
#include "host_tensor.h"

namespace shadowkv {
namespace {

void pack_block(const Tensor& block_ids, const Tensor& keys, const Tensor& mean,
                const Tensor& coefficients, const Tensor& basis, const Tensor& pages,
                const std::vector<int64_t>& layout_ints) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(block_ids, "block_ids", ScalarType::Int, {kAnySize});
  const int64_t n = block_ids.size(0);
  check_tensor(keys, "keys", scalar_type(layout),
               {n, layout.block_size, layout.num_kv_heads, layout.head_size});
  if (layout.rank != 0) {
    check_tensor(mean, "mean", ScalarType::Float, {n, layout.width()});
    check_tensor(coefficients, "coefficients", ScalarType::Float,
                 {n, layout.block_size, layout.rank});
    check_tensor(basis, "basis", ScalarType::Float, {n, layout.rank, layout.width()});
  }
  check_pages(pages, "pages", layout.page_bytes);

  const auto factor = [&](const Tensor& tensor) {
    return layout.rank == 0 ? nullptr : static_cast<const float*>(tensor.const_data_ptr());
  };
  const PackBlockParams params = {
      .layout = layout,
      .block_ids = static_cast<const int32_t*>(block_ids.const_data_ptr()),
      .keys = keys.const_data_ptr(),
      .mean = factor(mean),
      .coefficients = factor(coefficients),
      .basis = factor(basis),
      .pages = static_cast<uint8_t*>(pages.mutable_data_ptr()),
      .num_blocks = pages.size(0),
      .page_stride = stride_of(pages, 0),
  };
  parallel_items(n * layout.num_kv_heads,
                 [&](int64_t i) { SHADOWKV_DISPATCH_ISA(pack_block_kernel, params, i, i + 1); });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("pack_block", TORCH_BOX(&shadowkv::pack_block));
}
