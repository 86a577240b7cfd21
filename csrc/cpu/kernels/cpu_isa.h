#pragma once

#include "cpu/isa.h"

namespace shadowkv {

SHADOWKV_DECLARE_KERNEL(const char* cpu_isa_kernel())

}  // namespace shadowkv
