#include "cpu/kernels/pack_block.h"

#include "arguments/pack_block.h"
#include "cpu/parallel.h"

namespace shadowkv {
namespace {

void pack_block(const Tensor& block_ids, const Tensor& keys, const Tensor& query_scales,
                const Tensor& mean, const Tensor& coefficients, const Tensor& basis,
                const Tensor& pages, const std::vector<int64_t>& layout_ints) {
  const PackBlockParams p = read_pack_block(block_ids, keys, query_scales, mean, coefficients,
                                            basis, pages, layout_ints, DeviceType::CPU);
  parallel_items(p.num_packed * p.layout.num_kv_heads,
                 [&](int64_t i) { SHADOWKV_DISPATCH_ISA(pack_block_kernel, p, i, i + 1); });
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("pack_block", TORCH_BOX(&shadowkv::pack_block));
}
