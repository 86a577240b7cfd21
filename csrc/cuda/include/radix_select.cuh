// The largest keys of a set, found by a CTA: a histogram of the keys' first digit tells the digit
// of the last key taken, then the next digit of the keys that share it, until a bin is taken whole.
// fp32 scores take three passes over the keys; ties in the upper half of a key take more.
#pragma once

#include "cuda/include/block.cuh"

namespace shadowkv::cuda {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kKeyBits = 64;

// Shared memory of a select.
struct SelectMemory {
  int bins[kDigits];
  int warps[kMaxWarps];
  int digit, larger, inside;  // the bin of the last key taken: keys above and in it
};

// Maps floats to integers of the same order, NaN above every number; never 0.
constexpr uint32_t kNanKey = 0xfffffffeu;
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return kNanKey;
  const uint32_t bits = float_bits(x + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A threshold: of the keys `key(i)`, i in [0, size), the `count` largest reach it, or all if there
// are fewer; a key of 0 does not take part. Every thread gets it. The keys taken are those with
// key != 0 and key >= threshold. `blockDim.x` divides kDigits.
template <typename Key>
__device__ __forceinline__ uint64_t radix_select(int size, int64_t count, SelectMemory& memory,
                                                 const Key& key) {
  constexpr int kUnroll = 4;
  if (count <= 0) return ~uint64_t{0};
  if (count >= size) return 0;
  const int threads = blockDim.x, run = kDigits / threads;
  int needed = static_cast<int>(count);
  uint64_t prefix = 0;  // of the last key taken: its bits from `shift` on
  int shift = kKeyBits;
  while (shift > 0) {
    const int above = shift;
    shift = shift > kDigitBits ? shift - kDigitBits : 0;
    for (int i = threadIdx.x; i < kDigits; i += threads) memory.bins[i] = 0;
    sync_threads();
    for (int i = threadIdx.x; i < size; i += kUnroll * threads) {
      uint64_t keys[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        keys[u] = i + u * threads < size ? key(i + u * threads) : 0;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (keys[u] == 0 || (above < kKeyBits && keys[u] >> above != prefix)) continue;
        atomic_add(&memory.bins[(keys[u] >> shift) & ((uint64_t{1} << (above - shift)) - 1)], 1);
      }
    }
    sync_threads();
    // A thread looks at `run` bins, the first one at the largest digits.
    const int first = kDigits - 1 - static_cast<int>(threadIdx.x) * run;
    int mine = 0;
    for (int i = 0; i < run; ++i) mine += memory.bins[first - i];
    const PrefixSum sum = prefix_sum(mine, memory.warps);
    if (above == kKeyBits && sum.total <= needed) return 0;
    if (sum.before < needed && sum.before + mine >= needed) {
      int larger = sum.before, digit = first;
      while (larger + memory.bins[digit] < needed) larger += memory.bins[digit--];
      memory.digit = digit;
      memory.larger = larger;
      memory.inside = memory.bins[digit];
    }
    sync_threads();
    prefix = prefix << (above - shift) | static_cast<uint64_t>(memory.digit);
    needed -= memory.larger;
    if (memory.inside == needed) break;
  }
  return prefix << shift;
}

}  // namespace shadowkv::cuda
