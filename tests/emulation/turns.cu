// For test_orders.py: in which order the threads of two CTAs of three warps take their turns, twice
// each, with a barrier of the warp between.
#include "cuda/include/intrinsics.cuh"

extern "C" void take_turns(int* turns) {
  int count = 0;
  emulation::run("take_turns", {2}, 96, 0, [&] {
    const int thread = static_cast<int>(blockIdx.x * 96 + threadIdx.x);
    turns[count++] = thread;
    shadowkv::cuda::sync_warp();
    turns[count++] = thread;
  });
}
