// The rows that keys are turned with, as host functions hand them to kernels.
#pragma once

#include <cstdint>

namespace shadowkv {

struct RotaryTable {
  const float* cos_sin;  // [positions, rotary_dim], cosines then sines
  int64_t positions;
  int64_t rotary_dim;  // 0: keys are not turned
  bool is_neox;        // true: halves are pairs; false: neighbours are

  // Whether `count` tokens from position `first` on have their rows.
  constexpr bool covers(int64_t first, int64_t count) const {
    return rotary_dim == 0 || (first >= 0 && first + count <= positions);
  }
};

}  // namespace shadowkv
