// Work sharing between torch's CPU threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace shadowkv {

// Calls function(i) once for every i in [0, count), a thread taking the next i when it is free:
// items differ in cost as rows differ in length, which parallel_for's equal ranges would not level
// out.
template <typename Function>
void parallel_items(int64_t count, const Function& function) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, count < threads ? count : threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) function(i);
  });
}

}  // namespace shadowkv
