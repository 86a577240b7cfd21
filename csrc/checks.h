// Host-side argument checks: one sentence that names the argument, what was expected and what came.
// Order in an op: architecture, dtype, device, layout, shape (docs/kernels.md).
#pragma once

#include <sstream>
#include <stdexcept>

namespace shadowkv {

// Throws what the message parts say, without torch's "Expected ... to be true" prefix.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace shadowkv

// For what a caller can get wrong. The message parts are evaluated only on failure.
#define SHADOWKV_CHECK(condition, ...) \
  do {                                 \
    if (!(condition)) [[unlikely]] {   \
      ::shadowkv::fail(__VA_ARGS__);   \
    }                                  \
  } while (false)
