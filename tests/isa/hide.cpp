// Loaded before everything else (LD_PRELOAD, scripts/on_isa.py): hides instruction sets from torch,
// and from all that asks it what the processor has, as vLLM does when it chooses its kernels.
//
// torch learns what there is by calling cpuinfo_initialize once, and reads cpuinfo_isa afterwards.
// Both are exported by libc10.so; the layout of cpuinfo_isa is that of the header in torch's own
// package.
#include <cpuinfo.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "tests/isa/hide.cpp: %s\n", what);
  std::_Exit(1);
}

template <typename T>
T* symbol_of_torch(const char* name) {
  void* library = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, name) : nullptr;
  if (!symbol) fail("libc10.so no longer exports cpuinfo");
  return reinterpret_cast<T*>(symbol);
}

}  // namespace

extern "C" bool cpuinfo_initialize() {
  if (!symbol_of_torch<bool()>("cpuinfo_initialize")()) return false;
  const char* wanted = std::getenv("SHADOWKV_HIDE_BEYOND");
  if (!wanted) fail("SHADOWKV_HIDE_BEYOND is not set");
  auto& isa = *symbol_of_torch<cpuinfo_x86_isa>("cpuinfo_isa");
  isa.amx_tile = isa.amx_int8 = isa.amx_bf16 = isa.amx_fp16 = false;
  isa.avx512bf16 = isa.avx512fp16 = isa.avxvnni = false;
  if (!std::strcmp(wanted, "avx512")) return true;
  if (std::strcmp(wanted, "avx2")) fail("SHADOWKV_HIDE_BEYOND must be avx2 or avx512");
  isa.avx512f = isa.avx512cd = isa.avx512dq = isa.avx512bw = isa.avx512vl = false;
  isa.avx512vnni = isa.avx512vbmi = isa.avx512vbmi2 = isa.avx512ifma = isa.avx512bitalg = false;
  isa.avx512vpopcntdq = isa.avx512vp2intersect = false;
  return true;
}
