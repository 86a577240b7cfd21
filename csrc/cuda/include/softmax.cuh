// log(sum(exp(x))) of a set of numbers, in parts that can be merged in any order.
#pragma once

#include "cuda/include/warp.cuh"

namespace shadowkv::cuda {

__device__ __forceinline__ float infinity() { return bits_float(0x7f800000u); }

struct SoftmaxPart {
  float top;  // the largest x; -infinity for none, NaN where one is
  float sum;  // of exp(x - top); says nothing where top is infinite
};

__device__ __forceinline__ SoftmaxPart no_softmax() { return {-infinity(), 0.0f}; }

// exp(x - top); exp(x) where top is infinite, so that no infinities are subtracted.
__device__ __forceinline__ float exp_below(float x, float top) {
  constexpr float kLog2E = 1.4426950408889634f;
  return fast_exp2((x - (fabsf(top) == infinity() ? 0.0f : top)) * kLog2E);
}

__device__ __forceinline__ SoftmaxPart merge(SoftmaxPart a, SoftmaxPart b) {
  const float top = max_or_nan(a.top, b.top);
  return {top, a.sum * exp_below(a.top, top) + b.sum * exp_below(b.top, top)};
}

// Adds two numbers.
__device__ __forceinline__ SoftmaxPart add(SoftmaxPart part, float x, float y) {
  const float top = max_or_nan(part.top, max_or_nan(x, y));
  return {top, part.sum * exp_below(part.top, top) + exp_below(x, top) + exp_below(y, top)};
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
