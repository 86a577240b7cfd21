// Host side of the CUDA kernels: where they are registered, and how they are launched.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/include/intrinsics.cuh"
#include "host_tensor.h"

// A CPU torch lacks these symbols, and the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

// Registers the CUDA kernel of an op: SHADOWKV_CUDA_KERNEL(foo) for shadowkv::cuda::foo.
#define SHADOWKV_CUDA_KERNEL(op) \
  STABLE_TORCH_LIBRARY_IMPL(shadowkv, CUDA, m) { m.impl(#op, TORCH_BOX(&::shadowkv::cuda::op)); }

namespace shadowkv::cuda {

// Where the tensors of a CUDA op lie.
constexpr DeviceType kDevice = DeviceType::CUDA;

inline void check_cuda(cudaError_t status, const char* what) {
  SHADOWKV_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// The device of an op's launches; while it lives, that device is the current one.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    SHADOWKV_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                   "torch has no current CUDA stream on device ", tensor.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // kernel<<<grid, threads, shared_bytes, current stream>>>(argument), checked; nothing for an
  // empty grid.
  template <typename Argument>
  void operator()(const char* name, void (*kernel)(Argument), dim3 grid, unsigned threads,
                  size_t shared_bytes, const Argument& argument) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    // 48 KB with the kernel's static shared memory.
    constexpr size_t kWithoutAsking = 32 << 10;
    if (shared_bytes > kWithoutAsking) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 name);
    }
    kernel<<<grid, threads, shared_bytes, stream_>>>(argument);
    check_cuda(cudaGetLastError(), name);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace shadowkv::cuda
