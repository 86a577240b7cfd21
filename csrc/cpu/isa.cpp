#include "cpu/isa.h"

#include <cstdlib>
#include <string_view>
#include <utility>

#include "checks.h"

namespace shadowkv {
namespace {

bool cpu_has(Isa isa) {
#if SHADOWKV_HAVE_X86_ISAS
  // The builtin also asks whether the operating system saves the wide registers.
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx2:
      return __builtin_cpu_supports("x86-64-v3");
    case Isa::kBaseline:
      return __builtin_cpu_supports("x86-64-v2");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa forced_isa(std::string_view name) {
  for (const auto& [isa, isa_name] : {std::pair{Isa::kBaseline, std::string_view("baseline")},
                                      std::pair{Isa::kAvx2, std::string_view("avx2")},
                                      std::pair{Isa::kAvx512, std::string_view("avx512")}}) {
    if (name == isa_name) {
      SHADOWKV_CHECK(cpu_has(isa), "SHADOWKV_CPU_ISA=", name, ", but this CPU lacks it");
      return isa;
    }
  }
  fail("SHADOWKV_CPU_ISA must be baseline, avx2 or avx512, got '", name, "'");
}

Isa choose_isa() {
  if (const char* forced = std::getenv("SHADOWKV_CPU_ISA")) return forced_isa(forced);
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline}) {
    if (cpu_has(isa)) return isa;
  }
  fail("the CPU kernels need at least x86-64-v2 (SSE4.2, POPCNT)");
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace shadowkv
