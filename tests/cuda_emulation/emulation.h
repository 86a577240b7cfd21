// Runs CUDA kernels on the CPU, so that the sources of csrc/cuda are tested where there is no GPU.
//
// A CTA's threads are fibers of one OS thread, switched at barriers and warp-wide operations only;
// CTAs run one after the other. So a kernel computes what it would compute on a GPU, but occupancy
// and speed do not show, and races only by other means: other orders (order.h), a detector (race/).
// Two things are made harder than on a GPU: shared memory is full of NaN when a CTA starts, and an
// asynchronous copy writes nothing before it is waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
// Truly so: GCC tells a race detector nothing of a struct that a call stores or is given.
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the thread that runs.
struct Context {
  Index thread_index, block_index;
  dim3 block_size, grid_size;
  uint8_t* shared_memory;
};
extern Context context;

// Runs `thread` once for every thread of every CTA; `kernel` is its name in messages.
void run(const char* kernel, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& thread);

// Waits for all threads of the CTA that have not ended. Returns how many of them passed true. `at`
// is where a kernel calls it.
int sync_threads(bool value, const std::source_location& at);
// Waits for the other lanes of the warp and orders their memory: __syncwarp.
void sync_warp(const std::source_location& at);
// Waits for them only, as a warp-wide operation does: CUDA lets it order no memory.
void meet_warp();
// 64 bytes of every lane, for warp-wide operations: write one's own, meet_warp, read, meet_warp.
uint64_t* lane_memory(int lane);
int lane();

// Copies are queued per thread, in groups.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int pending);

}  // namespace emulation

#define threadIdx ::emulation::context.thread_index
#define blockIdx ::emulation::context.block_index
#define blockDim ::emulation::context.block_size
#define gridDim ::emulation::context.grid_size
