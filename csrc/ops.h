// The host functions behind the ops: they check tensors, fill a parameter struct and call a kernel.
#pragma once

#include <string>

namespace shadowkv {

bool has_cuda();
std::string cpu_isa();

}  // namespace shadowkv
