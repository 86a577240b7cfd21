// Strides of a view of exact pages.
#pragma once

#include "host_tensor.h"
#include "params/exact_strides.h"

namespace shadowkv {

inline ExactStrides exact_strides(const Tensor& tensor) {
  return {stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2), tensor.stride(3)};
}

}  // namespace shadowkv
