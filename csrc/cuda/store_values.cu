// Store: a warp copies the values of one token of one KV head, 16 bytes a lane, straight into
// mapped host memory. The link bounds it. Mean: a CTA per block and KV head reads its values once
// more, 16 bytes a thread, and writes their mean to the shadow page. Sums are fp32 and in one
// order.
#include "arguments/store_values.h"

#include "cuda/include/dispatch.cuh"
#include "cuda/include/launch.cuh"
#include "cuda/include/quantise.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Whether a block and its exact pages exist; the same for all lanes of a warp.
__device__ __forceinline__ bool exists(const StoreValuesParams& p, int i) {
  const int64_t block = p.block_ids[i];
  if (block <= 0 || block >= p.num_blocks) return false;
  const int num_exact = static_cast<int>(p.layout.block_size / p.layout.exact_tokens);
  bool valid = true;
  for (int page = threadIdx.x % kWarp; page < num_exact; page += kWarp) {
    const int id = p.exact_ids[i * num_exact + page];
    valid &= id > 0 && id < p.num_exact;
  }
  return !ballot(!valid);
}

// The values of a token of block i.
template <typename T>
__device__ __forceinline__ const T* values_at(const StoreValuesParams& p, int i, int head,
                                              int token) {
  const int exact_tokens = static_cast<int>(p.layout.exact_tokens);
  const int num_exact = static_cast<int>(p.layout.block_size) / exact_tokens;
  const int64_t page = p.exact_ids[i * num_exact + token / exact_tokens];
  return static_cast<const T*>(p.exact_values) + page * p.exact_stride + head * p.head_stride +
         token % exact_tokens * p.token_stride;
}

// grid: tokens / kWarps, KV heads, blocks.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kThreads) store_values_kernel(const StoreValuesParams p) {
  const PageLayout& layout = p.layout;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int token = blockIdx.x * kWarps + warp;
  const int head = blockIdx.y, i = blockIdx.z;
  if (token >= layout.block_size || !exists(p, i)) return;

  const T* from = values_at<T>(p, i, head, token);
  uint8_t* row = p.host_pool + p.block_ids[i] * p.host_pool_stride;
  const int64_t place = head * layout.block_size + token;
  if (layout.value_int8) {
    auto* codes = reinterpret_cast<int8_t*>(row) + place * kHeadSize;
    const float scale = quantise_row<kHeadSize>([&](int d) { return to_float(from[d]); }, codes);
    if (lane == 0) reinterpret_cast<float*>(row + layout.value_scales())[place] = scale;
    return;
  }
  constexpr int kVectors = kHeadSize * sizeof(T) / sizeof(uint4);
  for (int v = lane; v < kVectors; v += kWarp) {
    reinterpret_cast<uint4*>(row)[place * kVectors + v] = reinterpret_cast<const uint4*>(from)[v];
  }
}

// grid: KV heads, blocks.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kThreads, 4) mean_values_kernel(const StoreValuesParams p) {
  constexpr int kValues = sizeof(uint4) / sizeof(T), kVectors = kHeadSize / kValues;
  constexpr int kTokens = kThreads / kVectors;  // at a time
  __shared__ float shared_sums[kTokens][kHeadSize];
  const int vector = threadIdx.x % kVectors, first = threadIdx.x / kVectors;
  const int head = blockIdx.x, i = blockIdx.y;
  if (!exists(p, i)) return;
  const int block_size = static_cast<int>(p.layout.block_size);
  float sums[kValues] = {};
  if (first < kTokens) {
#pragma unroll 4
    for (int token = first; token < block_size; token += kTokens) {
      const uint4 x = reinterpret_cast<const uint4*>(values_at<T>(p, i, head, token))[vector];
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        sums[j] += to_float(T{static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)))});
      }
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) shared_sums[first][vector * kValues + j] = sums[j];
  }
  sync_threads();
  T* mean = reinterpret_cast<T*>(p.pages + p.block_ids[i] * p.page_stride + p.layout.mean_values) +
            head * kHeadSize;
  for (int d = threadIdx.x; d < kHeadSize; d += kThreads) {
    float sum = 0;
    for (int t = 0; t < kTokens; ++t) sum += shared_sums[t][d];
    mean[d] = from_float<T>(sum / static_cast<float>(block_size));
  }
}

}  // namespace

void store_values(const Tensor& block_ids, const Tensor& exact_ids, const Tensor& exact_values,
                  const Tensor& pages, const Tensor& host_pool,
                  const std::vector<int64_t>& layout_ints) {
  const StoreValuesParams p =
      read_store_values(block_ids, exact_ids, exact_values, pages, host_pool, layout_ints, kDevice);
  check_vectors(exact_values, "exact_values");
  check_vector_rows(host_pool, "host_pool");
  const Launcher launch(block_ids);
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    const auto tokens = static_cast<unsigned>(p.layout.block_size + kWarps - 1) / kWarps;
    launch("store_values", store_values_kernel<T, kHeadSize>,
           dim3(tokens, p.layout.num_kv_heads, p.num_stored), kThreads, 0, p);
    launch("store_values: mean", mean_values_kernel<T, kHeadSize>,
           dim3(p.layout.num_kv_heads, p.num_stored), kThreads, 0, p);
  });
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(store_values)
