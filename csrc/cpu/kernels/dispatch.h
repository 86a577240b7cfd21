// From a layout's dtype and head size to template arguments.
#pragma once

#include "cpu/kernels/numeric.h"
#include "layout.h"

namespace shadowkv::SHADOWKV_ISA {

// Returns function.operator()<T, kHeadSize>() for the layout's types; read_layout (host_tensor.h)
// refuses every other layout.
template <typename Function>
inline auto dispatch_layout(const PageLayout& layout, const Function& function) {
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
    __builtin_unreachable();
  };
  switch (static_cast<DType>(layout.dtype_index)) {
    case DType::kFloat:
      return with_size.template operator()<float>();
    case DType::kHalf:
      return with_size.template operator()<Half>();
    case DType::kBFloat16:
      return with_size.template operator()<BFloat16>();
  }
  __builtin_unreachable();
}

}  // namespace shadowkv::SHADOWKV_ISA
