// What CUDA offers and C++ does not: the only device file with intrinsics and PTX. Kernels include
// no other CUDA header, so that tests/cuda_emulation can put C++ in this file's place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace shadowkv::cuda {

// The model's dtypes, as bits: a kernel converts them to fp32 or hands them to tensor cores.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// ------------------------------------------------------------------------------------------------
// Conversions; to 16 bits: round to nearest even.

__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// Two values side by side, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Picks four of the eight bytes of (low, high), as `prmt` does without its sign mode.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }
// Round to nearest even.
__device__ __forceinline__ float round_even(float x) { return rintf(x); }
__device__ __forceinline__ float fast_exp2(float x) { return exp2f(x); }
// The larger, NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// ------------------------------------------------------------------------------------------------
// Tensor cores: c[16 x 8] += a[16 x 16] * b[16 x 8], fp32 sums.
//
// With g = lane / 4 and t = lane % 4, a lane holds, each register two values of neighbouring k:
//   a[0]: row g,     k 2t, 2t+1        b[0]: k 2t, 2t+1, column g
//   a[1]: row g + 8, k 2t, 2t+1        b[1]: k 2t+8, 2t+9, column g
//   a[2]: row g,     k 2t+8, 2t+9      c[0], c[1]: row g,     columns 2t, 2t+1
//   a[3]: row g + 8, k 2t+8, 2t+9      c[2], c[3]: row g + 8, columns 2t, 2t+1

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<Half>(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of int8, with int32 sums. A register holds four values of neighbouring k:
//   a[0]: row g,     k 4t to 4t+3      b: k 4t to 4t+3, column g
//   a[1]: row g + 8, k 4t to 4t+3      c: as above
__device__ __forceinline__ void mma_16x8x16(int (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// The same of int8 by uint8, twice as long: c[16 x 8] += a[16 x 32] * b[32 x 8].
//   a[0]: row g,     k 4t to 4t+3         b[0]: k 4t to 4t+3, column g
//   a[1]: row g + 8, k 4t to 4t+3         b[1]: k 4t+16 to 4t+19, column g
//   a[2]: row g,     k 4t+16 to 4t+19     c: as above
//   a[3]: row g + 8, k 4t+16 to 4t+19
__device__ __forceinline__ void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ------------------------------------------------------------------------------------------------
// Warps. Every lane takes part.

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
// `value` of the lane `delta` below; a lane without one gets its own.
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
__device__ __forceinline__ uint32_t ballot(bool value) { return __ballot_sync(kAllLanes, value); }
__device__ __forceinline__ int count_bits(uint32_t x) { return __popc(x); }
// Also makes shared memory written by a lane visible to the others.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_threads() { __syncthreads(); }
// The sum of all threads' `value` != 0, for all threads.
__device__ __forceinline__ int sync_threads_count(bool value) { return __syncthreads_count(value); }

// ------------------------------------------------------------------------------------------------
// Memory

// From global memory that nobody writes while the kernel runs: for pointers of which the compiler
// does not see where they point.
template <typename T>
__device__ __forceinline__ T load_constant(const T* from) {
  return __ldg(from);
}
// 16 bytes that are read once: past the L1 cache. `from` may be mapped host memory.
__device__ __forceinline__ uint4 load_streaming(const uint4* from) { return __ldcs(from); }
// 16 bytes from global to shared memory without registers; wait_copies() makes this thread's
// copies, and a barrier those of the others, visible.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's commits are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ int atomic_add(int* to, int value) { return atomicAdd(to, value); }
__device__ __forceinline__ void atomic_add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ uint64_t atomic_cas(uint64_t* at, uint64_t expected, uint64_t value) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(at),
                   static_cast<unsigned long long>(expected),
                   static_cast<unsigned long long>(value));
}
__device__ __forceinline__ int atomic_cas(int* at, int expected, int value) {
  return atomicCAS(at, expected, value);
}
__device__ __forceinline__ int atomic_min(int* to, int value) { return atomicMin(to, value); }

// A CTA's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(16) uint8_t shadowkv_shared_memory[];
  return shadowkv_shared_memory;
}

}  // namespace shadowkv::cuda
