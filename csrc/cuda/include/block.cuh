// What the threads of a CTA compute together. All of them call it; their number is a multiple of
// kWarp.
#pragma once

#include "cuda/include/intrinsics.cuh"

namespace shadowkv::cuda {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;

struct PrefixSum {
  int before;  // of the threads with a lower index
  int total;   // of all
};

// `memory`, in shared memory, is free again afterwards. A barrier for the caller's memory, too.
__device__ __forceinline__ PrefixSum prefix_sum(int value, int (&memory)[kMaxWarps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  int sum = value;
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int other = shuffle_up(sum, delta);
    if (lane >= delta) sum += other;
  }
  if (lane == kWarp - 1) memory[warp] = sum;
  sync_threads();
  PrefixSum result = {sum - value, 0};
  for (int i = 0; i < warps; ++i) {
    result.before += i < warp ? memory[i] : 0;
    result.total += memory[i];
  }
  sync_threads();
  return result;
}

// Whether `value` holds for every thread. A barrier, too.
__device__ __forceinline__ bool all_threads(bool value) { return sync_threads_count(!value) == 0; }

// Sorts keys in shared memory, ascending; `size` is a power of two. Barriers on both sides.
__device__ __forceinline__ void bitonic_sort(uint64_t* keys, int size) {
  sync_threads();
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      sync_threads();
    }
  }
}

}  // namespace shadowkv::cuda
