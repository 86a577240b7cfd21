// Registrations against torch's stable ABI. The Python door is vllm_shadowkv/ops.py.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops.h"
#include "schemas.h"

namespace shadowkv {

// True only when the CUDA sources were compiled into this library.
bool has_cuda() {
#ifdef SHADOWKV_HAS_CUDA
  return true;
#else
  return false;
#endif
}

// What the CUDA kernels were compiled for, as TORCH_CUDA_ARCH_LIST has it.
std::string cuda_architectures() {
#ifdef SHADOWKV_HAS_CUDA
  return SHADOWKV_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

}  // namespace shadowkv

STABLE_TORCH_LIBRARY(shadowkv, m) {
  // Whether this build has CUDA kernels.
  m.def("has_cuda() -> bool");
  // What its CUDA kernels were compiled for; empty without them.
  m.def("cuda_architectures() -> str");
  // The instruction set of the CPU kernels that run here.
  m.def("cpu_isa() -> str");

  shadowkv::define_ops(m);
}

// Ops without a tensor argument have no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(shadowkv, CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&shadowkv::has_cuda));
  m.impl("cuda_architectures", TORCH_BOX(&shadowkv::cuda_architectures));
  m.impl("cpu_isa", TORCH_BOX(&shadowkv::cpu_isa));
}
