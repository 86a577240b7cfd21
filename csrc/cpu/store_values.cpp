#include "cpu/kernels/store_values.h"

#include "arguments/store_values.h"
#include "cpu/parallel.h"

namespace shadowkv {
namespace {

void store_values(const Tensor& block_ids, const Tensor& exact_ids, const Tensor& exact_values,
                  const Tensor& pages, const Tensor& host_pool,
                  const std::vector<int64_t>& layout_ints) {
  const StoreValuesParams p = read_store_values(block_ids, exact_ids, exact_values, pages,
                                                host_pool, layout_ints, DeviceType::CPU);
  parallel_items(p.num_stored * p.layout.num_kv_heads,
                 [&](int64_t i) { SHADOWKV_DISPATCH_ISA(store_values_kernel, p, i, i + 1); });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("store_values", TORCH_BOX(&shadowkv::store_values));
}
