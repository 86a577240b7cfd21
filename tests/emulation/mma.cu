// The tensor-core instructions of intrinsics.cuh, for test_mma_layouts.py: a warp, each argument
// an array of what its lanes hold.
#include "cuda/include/intrinsics.cuh"

namespace shadowkv::cuda {
namespace {

template <typename Lane>
void each_lane(const Lane& lane) {
  emulation::run("mma", {1}, kWarp, 0, [&] { lane(emulation::lane()); });
}

}  // namespace

extern "C" {
void mma_float16(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*c)[4]) {
  each_lane([&](int lane) { mma_16x8x16<Half>(c[lane], a[lane], b[lane]); });
}
void mma_bfloat16(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*c)[4]) {
  each_lane([&](int lane) { mma_16x8x16<BFloat16>(c[lane], a[lane], b[lane]); });
}
void mma_int8(const uint32_t (*a)[2], const uint32_t* b, int (*c)[4]) {
  each_lane([&](int lane) { mma_16x8x16(c[lane], a[lane], b[lane]); });
}
void mma_int8_uint8(const uint32_t (*a)[4], const uint32_t (*b)[2], int (*c)[4]) {
  each_lane([&](int lane) { mma_16x8x32(c[lane], a[lane], b[lane]); });
}
}

}  // namespace shadowkv::cuda
