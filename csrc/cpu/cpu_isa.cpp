#include "cpu/kernels/cpu_isa.h"

#include "ops.h"

namespace shadowkv {

std::string cpu_isa() { return SHADOWKV_DISPATCH_ISA(cpu_isa_kernel); }

}  // namespace shadowkv
