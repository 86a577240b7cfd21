// Runs CUDA kernels on the CPU, so that the sources of csrc/cuda are tested where there is no GPU.
//
// A CTA's threads are fibers of one OS thread, switched at barriers and warp-wide operations only;
// CTAs run one after the other. So a kernel computes what it would compute on a GPU, but races
// between threads, alignment, occupancy and speed do not show. Two things are made harder than on
// a GPU: shared memory is full of NaN when a CTA starts, and an asynchronous copy writes nothing
// before it is waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
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
extern Index thread_index, block_index;
extern dim3 block_size, grid_size;
extern uint8_t* shared_memory;

// Runs `thread` once for every thread of every CTA.
void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

// Waits for all threads of the CTA that have not ended. Returns how many of them passed true.
int sync_threads(bool value = false);
// Waits for the other lanes of the warp.
void sync_warp();
// 64 bytes of every lane, for warp-wide operations: write one's own, sync_warp, read, sync_warp.
uint64_t* lane_memory(int lane);
int lane();

// Copies are queued per thread, in groups.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int pending);

}  // namespace emulation

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define blockDim ::emulation::block_size
#define gridDim ::emulation::grid_size
