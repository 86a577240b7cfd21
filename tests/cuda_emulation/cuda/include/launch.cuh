// csrc/cuda/include/launch.cuh for emulation.h: kernels are registered for CPU tensors, in a
// library of their own, and run here.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cuda/include/intrinsics.cuh"
#include "host_tensor.h"

#define SHADOWKV_CUDA_KERNEL(op)                         \
  STABLE_TORCH_LIBRARY_IMPL(shadowkv_emulated, CPU, m) { \
    m.impl(#op, TORCH_BOX(&::shadowkv::cuda::op));       \
  }

namespace shadowkv::cuda {

constexpr DeviceType kDevice = DeviceType::CPU;

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <typename Argument>
  void operator()(const char* name, void (*kernel)(Argument), dim3 grid, unsigned threads,
                  size_t shared_bytes, const Argument& argument) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    // What every architecture since sm_80 has; more fails at the launch.
    SHADOWKV_CHECK(shared_bytes <= 99 << 10, name, ": ", shared_bytes, " bytes of shared memory");
    SHADOWKV_CHECK(threads > 0 && threads <= 1024 && grid.y <= 65535 && grid.z <= 65535, name,
                   ": launched with ", threads, " threads, grid ", grid.x, " ", grid.y, " ",
                   grid.z);
    emulation::run(name, grid, threads, shared_bytes, [&] { kernel(argument); });
  }
};

}  // namespace shadowkv::cuda
