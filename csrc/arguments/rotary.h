// The `cos_sin` argument of the ops that turn keys.
#pragma once

#include "host_tensor.h"
#include "params/rotary_table.h"

namespace shadowkv {

// fp32 [positions, rotary_dim]; rotary_dim 0 (any number of dimensions): keys are not turned. Exact
// keys (rank 0) are turned already.
inline RotaryTable read_rotary(const Tensor& cos_sin, bool is_neox, const PageLayout& layout,
                               DeviceType device) {
  const int64_t dims = cos_sin.dim();
  if (layout.rank == 0 || (dims > 0 && cos_sin.size(dims - 1) == 0))
    return {nullptr, 0, 0, is_neox};
  check_tensor(cos_sin, "cos_sin", device, ScalarType::Float, {kAnySize, kAnySize});
  const int64_t rotary_dim = cos_sin.size(1);
  SHADOWKV_CHECK(rotary_dim % 2 == 0 && rotary_dim <= layout.head_size,
                 "cos_sin: expected an even rotary_dim of at most head_size ", layout.head_size,
                 ", got ", rotary_dim);
  return {static_cast<const float*>(cos_sin.const_data_ptr()), cos_sin.size(0), rotary_dim,
          is_neox};
}

}  // namespace shadowkv
