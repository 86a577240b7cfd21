// What a race detector has to know of an emulated launch. The ordinary build has no watcher.
#pragma once

#include <cstddef>
#include <source_location>

namespace emulation {

class Watcher {
 public:
  // `shared` is the dynamic shared memory; every CTA begins with a new one.
  virtual void start_launch(const char* kernel, const void* shared, size_t bytes) = 0;
  virtual void start_cta() = 0;
  virtual void end_launch() = 0;
  // The thread that runs has passed one: a barrier of its CTA, __syncwarp of its warp.
  virtual void cta_barrier(const std::source_location& at) = 0;
  virtual void warp_barrier(const std::source_location& at) = 0;
  // The thread that runs reads or writes; `code` is the address of the instruction after.
  virtual void access(const void* at, size_t bytes, bool write, const void* code) = 0;

 protected:
  ~Watcher() = default;
};

extern Watcher* watcher;

// The index in its CTA of the thread that runs.
unsigned running_thread();
// Whether no other thread sees `at`: it lies on the stack of the thread that runs, or belongs to
// the emulation.
bool is_private(const void* at);

}  // namespace emulation
