// Memory that is needed soon, brought to the second-level cache a few lines at a time: it arrives
// beside the computation, not before it. The second level takes more at once than the first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels/numeric.h"

namespace shadowkv::SHADOWKV_ISA {

class Ahead {
 public:
  // `rows` rows of `size` bytes, `stride` bytes apart. At most kRanges calls.
  void add(const void* from, int64_t size, int64_t rows = 1, int64_t stride = 0) {
    if (size <= 0 || rows <= 0) return;
    ranges_[count_++] = {static_cast<const uint8_t*>(from), size, stride, rows};
    lines_ += (size + kLine - 1) / kLine * rows;
  }
  // Spreads what is left over so many calls of step(): more at once than the memory delivers would
  // hold up the computation.
  void spread(int64_t steps) { per_step_ = steps > 0 ? (lines_ + steps - 1) / steps : 0; }
  SHADOWKV_INLINE void step() { fetch(per_step_); }
  void finish() { fetch(lines_); }

  static constexpr size_t kRanges = 16;

 private:
  static constexpr int64_t kLine = 64;
  struct Range {
    const uint8_t* row;
    int64_t size, stride, rows;
  };
  SHADOWKV_INLINE void fetch(int64_t lines) {
    for (; lines > 0 && current_ < count_; --lines) {
      Range& range = ranges_[current_];
      __builtin_prefetch(range.row + place_, 0, 2);
      --lines_;
      place_ += kLine;
      if (place_ < range.size) continue;
      place_ = 0;
      range.row += range.stride;
      current_ += --range.rows == 0;
    }
  }

  Range ranges_[kRanges];
  size_t count_ = 0, current_ = 0;
  int64_t place_ = 0;  // in the row
  int64_t lines_ = 0, per_step_ = 0;
};

}  // namespace shadowkv::SHADOWKV_ISA
