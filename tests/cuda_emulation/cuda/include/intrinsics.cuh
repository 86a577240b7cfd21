// csrc/cuda/include/intrinsics.cuh in C++, for emulation.h; that file documents the functions.
#pragma once

#include <math.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "emulation.h"

namespace shadowkv::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }

__forceinline__ float to_float(Half x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}
__forceinline__ float to_float(BFloat16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

template <typename T>
__forceinline__ T from_float(float x);
template <>
__forceinline__ Half from_float<Half>(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  Half result;
  std::memcpy(&result, &half, sizeof half);
  return result;
}
template <>
__forceinline__ BFloat16 from_float<BFloat16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = float_bits(x);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>((both >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  }
  return result;
}

inline float round_even(float x) { return std::nearbyint(x); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

constexpr int kWarp = 32;

template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float mine[12];
  for (int i = 0; i < 6; ++i) {
    const uint32_t two = i < 4 ? a[i] : b[i - 4];
    mine[2 * i] = to_float(T{static_cast<uint16_t>(two)});
    mine[2 * i + 1] = to_float(T{static_cast<uint16_t>(two >> 16)});
  }
  std::memcpy(emulation::lane_memory(emulation::lane()), mine, sizeof mine);
  emulation::meet_warp();
  const auto value = [](int lane, int reg, int half) {
    float result;
    const auto* memory = reinterpret_cast<const char*>(emulation::lane_memory(lane));
    std::memcpy(&result, memory + 4 * (2 * reg + half), sizeof result);
    return result;
  };
  const int group = emulation::lane() / 4, pair = emulation::lane() % 4;
  float sum[4] = {};
  for (int k = 0; k < 16; ++k) {
    const int from = (k % 8) / 2;
    const float rows[2] = {value(4 * group + from, 2 * (k / 8), k % 2),
                           value(4 * group + from, 2 * (k / 8) + 1, k % 2)};
    const float columns[2] = {value(8 * pair + from, 4 + k / 8, k % 2),
                              value(8 * pair + 4 + from, 4 + k / 8, k % 2)};
    for (int i = 0; i < 4; ++i) sum[i] += rows[i / 2] * columns[i % 2];
  }
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
  emulation::meet_warp();
}

inline void mma_16x8x16(int (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  const uint32_t mine[3] = {a[0], a[1], b};
  std::memcpy(emulation::lane_memory(emulation::lane()), mine, sizeof mine);
  emulation::meet_warp();
  const auto value = [](int lane, int reg, int byte) {
    int8_t result;
    std::memcpy(&result,
                reinterpret_cast<const char*>(emulation::lane_memory(lane)) + 4 * reg + byte, 1);
    return static_cast<int>(result);
  };
  const int group = emulation::lane() / 4, pair = emulation::lane() % 4;
  for (int k = 0; k < 16; ++k) {
    const int rows[2] = {value(4 * group + k / 4, 0, k % 4), value(4 * group + k / 4, 1, k % 4)};
    const int columns[2] = {value(8 * pair + k / 4, 2, k % 4),
                            value(8 * pair + 4 + k / 4, 2, k % 4)};
    for (int i = 0; i < 4; ++i) c[i] += rows[i / 2] * columns[i % 2];
  }
  emulation::meet_warp();
}

inline void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::memcpy(emulation::lane_memory(emulation::lane()), mine, sizeof mine);
  emulation::meet_warp();
  const auto byte = [](int lane, int reg, int i) {
    return reinterpret_cast<const uint8_t*>(emulation::lane_memory(lane))[4 * reg + i];
  };
  const int group = emulation::lane() / 4, pair = emulation::lane() % 4;
  for (int k = 0; k < 32; ++k) {
    const int half = k / 16, from = k % 16 / 4;
    const int rows[2] = {static_cast<int8_t>(byte(4 * group + from, 2 * half, k % 4)),
                         static_cast<int8_t>(byte(4 * group + from, 2 * half + 1, k % 4))};
    const int columns[2] = {byte(8 * pair + from, 4 + half, k % 4),
                            byte(8 * pair + 4 + from, 4 + half, k % 4)};
    for (int i = 0; i < 4; ++i) c[i] += rows[i / 2] * columns[i % 2];
  }
  emulation::meet_warp();
}

template <typename T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(emulation::lane_memory(emulation::lane()), &value, sizeof value);
  emulation::meet_warp();
  T result;
  std::memcpy(&result, emulation::lane_memory(lane % kWarp), sizeof result);
  emulation::meet_warp();
  return result;
}
template <typename T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, emulation::lane() ^ mask);
}
template <typename T>
T shuffle_up(T value, int delta) {
  const int from = emulation::lane() - delta;
  return shuffle(value, from < 0 ? emulation::lane() : from);
}
inline uint32_t ballot(bool value) {
  *emulation::lane_memory(emulation::lane()) = value;
  emulation::meet_warp();
  uint32_t result = 0;
  for (int i = 0; i < kWarp; ++i) result |= (*emulation::lane_memory(i) & 1) << i;
  emulation::meet_warp();
  return result;
}
inline int count_bits(uint32_t x) { return std::popcount(x); }
using At = std::source_location;
inline void sync_warp(At at = At::current()) { emulation::sync_warp(at); }
inline void sync_threads(At at = At::current()) { emulation::sync_threads(false, at); }
inline int sync_threads_count(bool value, At at = At::current()) {
  return emulation::sync_threads(value, at);
}

template <typename T>
__forceinline__ T load_constant(const T* from) {
  return *from;
}
__forceinline__ uint4 load_streaming(const uint4* from) { return *from; }
inline void copy_async(void* shared, const void* global) {
  emulation::copy_async(shared, global, 16);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

// By std::atomic_ref, so that a race detector knows them.
inline int atomic_add(int* to, int value) {
  return std::atomic_ref(*to).fetch_add(value, std::memory_order_relaxed);
}
inline void atomic_add(int64_t* to, int64_t value) {
  std::atomic_ref(*to).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomic_cas(T* at, T expected, std::type_identity_t<T> value) {
  std::atomic_ref(*at).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;  // what was there, exchanged or not
}
inline int atomic_min(int* to, int value) {
  const std::atomic_ref at(*to);
  int old = at.load(std::memory_order_relaxed);
  while (value < old && !at.compare_exchange_strong(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

inline uint8_t* dynamic_shared_memory() { return emulation::context.shared_memory; }

}  // namespace shadowkv::cuda
