// Small kernels for test_race_detector.py: those with lines marked `race` have one, between the
// marked lines, the others have none. 64 threads a CTA; own() is a thread's own word of memory.
#include <vector>

#include "cuda/include/intrinsics.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int kThreads = 64;

template <typename Kernel>
void launch(const char* name, unsigned ctas, const Kernel& kernel) {
  std::vector<int> global(4 * kThreads * ctas);
  const size_t bytes = 4 * kThreads * sizeof(int);
  emulation::run(name, {ctas}, kThreads, bytes, [&] { kernel(global.data()); });
}

int& own(int* global) { return global[kThreads + blockIdx.x * kThreads + threadIdx.x]; }

#define CASE(name, ctas)                                                \
  [[gnu::noinline]] void name##_kernel(int* global, unsigned t);        \
  extern "C" void name() {                                              \
    launch(#name, ctas, [](int* g) { name##_kernel(g, threadIdx.x); }); \
  }                                                                     \
  void name##_kernel([[maybe_unused]] int* global, [[maybe_unused]] unsigned t)

CASE(barrier, 2) {
  __shared__ int memory[kThreads];
  memory[t] = 1;
  sync_threads();
  own(global) = memory[kThreads - 1 - t];
}

CASE(no_barrier, 1) {
  __shared__ int memory[kThreads];
  memory[t] = 1;                           // race
  own(global) = memory[kThreads - 1 - t];  // race
}

CASE(no_barrier_before_the_next_write, 1) {
  __shared__ int memory[kThreads];
  memory[t] = 1;
  sync_threads();
  own(global) = memory[kThreads - 1 - t];  // race
  memory[t] = 2;                           // race
}

CASE(no_barrier_in_dynamic_memory, 1) {
  auto* memory = reinterpret_cast<int*>(dynamic_shared_memory());
  memory[t] = 1;                           // race
  own(global) = memory[kThreads - 1 - t];  // race
}

// What functions give and take as a whole.
CASE(a_struct_that_a_function_returns, 1) {
  __shared__ Half memory[kThreads];
  memory[t] = from_float<Half>(static_cast<float>(t));  // race
  own(global) = memory[kThreads - 1 - t].bits;          // race
}

// In one line, as GCC says that an argument is copied in the line before.
CASE(a_struct_that_a_function_is_given, 1) {
  __shared__ Half memory[kThreads];
  memory[t].bits = 1, own(global) = to_float(memory[t ^ 1]) > 0;  // race
}

CASE(sixteen_bytes, 1) {
  __shared__ uint4 memory[kThreads];
  memory[t] = load_streaming(reinterpret_cast<const uint4*>(global));  // race
  own(global) = static_cast<int>(memory[t ^ 1].w);                     // race
}

CASE(counting_barrier, 1) {
  __shared__ int memory[kThreads];
  memory[t] = 1;
  const int count = sync_threads_count(true);
  own(global) = count + memory[kThreads - 1 - t];
}

CASE(warp_barrier_in_a_warp, 1) {
  __shared__ int memory[kThreads];
  memory[t] = 1;
  sync_warp();
  own(global) = memory[t ^ 31];
}

CASE(warp_barrier_between_warps, 1) {
  __shared__ int memory[kThreads];
  memory[t] = 1;  // race
  sync_warp();
  own(global) = memory[t ^ 32];  // race
}

// Lanes of a warp read, then one of them writes: in order for them, not for the other warp.
CASE(warp_barrier_and_readers_elsewhere, 1) {
  __shared__ int memory;
  own(global) = memory;  // race
  sync_warp();
  if (t == kThreads - 1) memory = 1;  // race
}

CASE(shuffle_orders_nothing, 1) {
  __shared__ int memory[kThreads];
  memory[t] = 1;                                    // race
  own(global) = shuffle_xor(0, 1) + memory[t ^ 1];  // race
}

CASE(ballot_orders_nothing, 1) {
  __shared__ int memory[kThreads];
  memory[t] = 1;  // race
  const bool any = ballot(true) != 0;
  own(global) = any + memory[t ^ 1];  // race
}

CASE(atomics, 2) {
  atomic_add(&global[0], 1);
  atomic_min(&global[1], static_cast<int>(t));
  atomic_cas(&global[2], 0, static_cast<int>(t));
}

CASE(atomic_and_read, 1) {
  atomic_add(&global[0], 1);  // race
  own(global) = global[0];    // race
}

// The thread's own atomic access comes after its write, and hides it from nobody.
CASE(atomic_after_write, 1) {
  __shared__ int memory;
  if (t == 0) {
    memory = 0;  // race
    atomic_add(&memory, 1);
  } else {
    atomic_add(&memory, 1);  // race
  }
}

CASE(atomics_after_a_barrier, 1) {
  __shared__ int memory;
  if (t == 0) memory = 0;
  sync_threads();
  atomic_add(&memory, 1);
  sync_threads();
  own(global) = memory;
}

CASE(two_ctas_write, 2) {
  if (t == 0) global[0] = 1;  // race
}

CASE(two_ctas_read_what_one_writes, 2) {
  own(global) = global[0];                       // race
  if (t == 0 && blockIdx.x == 1) global[0] = 1;  // race
}

CASE(barriers_do_not_order_ctas, 2) {
  sync_threads();
  if (t == blockIdx.x) global[0] = 1;  // race
  sync_threads();
}

CASE(two_ctas_read, 2) { own(global) = global[0]; }

CASE(every_cta_has_its_own_shared_memory, 3) {
  __shared__ int memory;
  auto* dynamic = reinterpret_cast<int*>(dynamic_shared_memory());
  if (t == 0) memory = *dynamic = 1;
  sync_threads();
  own(global) = memory + *dynamic;
}

CASE(neighbouring_bytes, 1) { reinterpret_cast<int8_t*>(global)[t] = 1; }

CASE(a_word_over_a_byte, 1) {
  if (t == 0) reinterpret_cast<int8_t*>(global)[3] = 1;  // race
  if (t == 1) global[0] = 1;                             // race
}

CASE(a_thread_and_itself, 1) {
  own(global) = 1;
  own(global) += 1;
}

CASE(copy_waited_for_and_barrier, 1) {
  auto* memory = reinterpret_cast<int*>(dynamic_shared_memory());
  copy_async(memory + 4 * t, global);
  commit_copies();
  wait_copies<0>();
  sync_threads();
  own(global) = memory[(4 * t + 4) % (4 * kThreads)];
}

CASE(copy_waited_for, 1) {
  auto* memory = reinterpret_cast<int*>(dynamic_shared_memory());
  copy_async(memory + 4 * t, global);  // race
  commit_copies();
  wait_copies<0>();
  own(global) = memory[(4 * t + 4) % (4 * kThreads)];  // race
}

// It may be written before it is waited for.
CASE(copy_over_what_others_read, 1) {
  auto* memory = reinterpret_cast<int*>(dynamic_shared_memory());
  own(global) = memory[(4 * t + 4) % (4 * kThreads)];  // race
  copy_async(memory + 4 * t, global);                  // race
  commit_copies();
  sync_threads();
  wait_copies<0>();
}

}  // namespace
}  // namespace shadowkv::cuda
