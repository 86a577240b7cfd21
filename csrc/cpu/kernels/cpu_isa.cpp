// The smallest kernel: says which copy of it runs, and that the copy has its ISA's instructions.
#include "cpu/kernels/cpu_isa.h"

#include <string_view>

#define SHADOWKV_STRINGIZE_(x) #x
#define SHADOWKV_STRINGIZE(x) SHADOWKV_STRINGIZE_(x)

namespace shadowkv::SHADOWKV_ISA {
namespace {

constexpr std::string_view kName = SHADOWKV_STRINGIZE(SHADOWKV_ISA);

#if defined(__AVX512VL__)
static_assert(kName == "avx512");
#elif defined(__AVX2__)
static_assert(kName == "avx2");
#else
static_assert(kName == "baseline");
#endif

}  // namespace

const char* cpu_isa_kernel() { return kName.data(); }

}  // namespace shadowkv::SHADOWKV_ISA
