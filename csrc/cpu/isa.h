// CPU kernels for several instruction sets in one library, picked at run time.
//
// setup.py compiles every csrc/cpu/kernels/*.cpp once per instruction set (ISA), with SHADOWKV_ISA
// defined as baseline (x86-64-v2), avx2 (v3) or avx512 (v4 and VNNI, which all but the first CPUs
// with AVX-512 have); off x86-64 as baseline only. All other .cpp files are compiled once, for the
// compiler's default. An op `foo` is three files in csrc/cpu:
//
//   kernels/foo.h    namespace shadowkv { struct FooParams {...};
//                    SHADOWKV_DECLARE_KERNEL(void foo_kernel(const FooParams& p)) }
//   kernels/foo.cpp  namespace shadowkv::SHADOWKV_ISA { void foo_kernel(const FooParams& p) {...} }
//   foo.cpp          checks tensors, fills FooParams, SHADOWKV_DISPATCH_ISA(foo_kernel, params);
//
// A kernel file cannot include torch headers. It keeps its helpers, those in shared headers too,
// in namespace SHADOWKV_ISA: elsewhere an inline function is one symbol with three bodies, and the
// linker keeps the baseline's. `#pragma omp` and `#if defined(__AVX2__)` work as usual. The best
// set that the CPU has is taken; SHADOWKV_CPU_ISA=baseline|avx2|avx512 forces one (for tests).
#pragma once

#if defined(__x86_64__)
#define SHADOWKV_HAVE_X86_ISAS 1
#else
#define SHADOWKV_HAVE_X86_ISAS 0
#endif

namespace shadowkv {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Chosen on the first call and kept. Throws when SHADOWKV_CPU_ISA is unknown or not in this CPU.
Isa selected_isa();

}  // namespace shadowkv

#if SHADOWKV_HAVE_X86_ISAS

// Declares one kernel in the namespace of each ISA. Used inside namespace shadowkv.
#define SHADOWKV_DECLARE_KERNEL(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__;                       \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__;                       \
  }

// Calls shadowkv::<selected ISA>::kernel(...); an expression with the kernel's return value.
#define SHADOWKV_DISPATCH_ISA(kernel, ...)                \
  [&]() -> decltype(auto) {                               \
    switch (::shadowkv::selected_isa()) {                 \
      case ::shadowkv::Isa::kAvx512:                      \
        return ::shadowkv::avx512::kernel(__VA_ARGS__);   \
      case ::shadowkv::Isa::kAvx2:                        \
        return ::shadowkv::avx2::kernel(__VA_ARGS__);     \
      default:                                            \
        return ::shadowkv::baseline::kernel(__VA_ARGS__); \
    }                                                     \
  }()

#else

#define SHADOWKV_DECLARE_KERNEL(...) \
  namespace baseline {               \
  __VA_ARGS__;                       \
  }

#define SHADOWKV_DISPATCH_ISA(kernel, ...)            \
  [&]() -> decltype(auto) {                           \
    ::shadowkv::selected_isa();                       \
    return ::shadowkv::baseline::kernel(__VA_ARGS__); \
  }()

#endif
