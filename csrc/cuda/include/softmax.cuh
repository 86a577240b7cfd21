// log(sum(exp(x))) of a set of numbers, in parts that can be merged in any order.
#pragma once

#include "cuda/include/warp.cuh"

namespace shadowkv::cuda {

__device__ __forceinline__ float infinity() { return bits_float(0x7f800000u); }

// NaN if either is; fmaxf would ignore it.
__device__ __forceinline__ float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

struct SoftmaxPart {
  float top;  // the largest x; -infinity for none, NaN where one is
  float sum;  // of exp(x - top); 0 where top is infinite
};

__device__ __forceinline__ SoftmaxPart no_softmax() { return {-infinity(), 0.0f}; }

__device__ __forceinline__ SoftmaxPart merge(SoftmaxPart a, SoftmaxPart b) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float top = max_or_nan(a.top, b.top);
  if (fabsf(top) == infinity()) return {top, 0.0f};
  return {top,
          a.sum * fast_exp2((a.top - top) * kLog2E) + b.sum * fast_exp2((b.top - top) * kLog2E)};
}

__device__ __forceinline__ SoftmaxPart add(SoftmaxPart part, float x) {
  return merge(part, {x, 1});
}

// Of lanes whose indices differ in the bits below `lanes`, a power of two; all of them get it.
__device__ __forceinline__ SoftmaxPart merge_lanes(SoftmaxPart part, int lanes) {
#pragma unroll
  for (int mask = 1; mask < lanes; mask *= 2) {
    part = merge(part, {shuffle_xor(part.top, mask), shuffle_xor(part.sum, mask)});
  }
  return part;
}

__device__ __forceinline__ float log_sum_exp(SoftmaxPart part) {
  return fabsf(part.top) == infinity() ? part.top : part.top + logf(part.sum);
}

}  // namespace shadowkv::cuda
