// From a layout's dtype and head size to template arguments.
#pragma once

#include "checks.h"
#include "cuda/include/intrinsics.cuh"
#include "layout.h"

namespace shadowkv::cuda {

// Returns function.operator()<T, kHeadSize>() for the layout's types.
template <typename Function>
void dispatch_layout(const PageLayout& layout, const Function& function) {
  const auto with_size = [&]<typename T>() {
    switch (layout.head_size) {
      case 64:
        return function.template operator()<T, 64>();
      case 80:
        return function.template operator()<T, 80>();
      case 96:
        return function.template operator()<T, 96>();
      case 128:
        return function.template operator()<T, 128>();
      case 256:
        return function.template operator()<T, 256>();
    }
    fail("layout: head_size must be 64, 80, 96, 128 or 256, got ", layout.head_size);
  };
  switch (static_cast<DType>(layout.dtype_index)) {
    case DType::kHalf:
      return with_size.template operator()<Half>();
    case DType::kBFloat16:
      return with_size.template operator()<BFloat16>();
    case DType::kFloat:
      break;
  }
  fail("layout: the CUDA kernels take float16 and bfloat16, got float32");
}

}  // namespace shadowkv::cuda
