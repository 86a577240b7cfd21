// A warp's softmax over steps of 16 tokens, in base 2, whose logits are in the sums' layout of two
// mma tiles (intrinsics.cuh).
#pragma once

#include <cmath>

#include "cuda/include/attention_tokens.cuh"

namespace shadowkv::cuda {

constexpr float kNegativeInfinity = -INFINITY;

// For query rows g and g + 8 of lane (g, t).
struct OnlineSoftmax {
  float largest[2] = {kNegativeInfinity, kNegativeInfinity};
  float total[2] = {};  // this lane's tokens only

  // Turns a step's products into weights, and says by what to scale what was summed before.
  __device__ __forceinline__ void add(float (&s)[2][4], uint32_t tokens, float scale,
                                      float (&decay)[2]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = largest[row];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[i / 2][2 * row + i % 2];
        x = tokens >> (i / 2 * kTileTokens + 2 * t + i % 2) & 1 ? x * scale : kNegativeInfinity;
        top = max_or_nan(top, x);
      }
      top = max_or_nan(top, shuffle_xor(top, 1));
      top = max_or_nan(top, shuffle_xor(top, 2));
      // While no logit is above -inf, 2 ** (-inf - 0) = 0 is wanted and not 2 ** (-inf + inf).
      const float base = top == kNegativeInfinity ? 0.0f : top;
      decay[row] = fast_exp2(largest[row] - base);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[i / 2][2 * row + i % 2];
        x = fast_exp2(x - base);
        sum += x;
      }
      total[row] = total[row] * decay[row] + sum;
      largest[row] = top;
    }
  }
};

}  // namespace shadowkv::cuda
