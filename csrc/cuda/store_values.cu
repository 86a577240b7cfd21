// A warp copies the values of one token of one KV head: 16 bytes a lane, straight into mapped host
// memory. Nothing waits for it; the caller launches it on a side stream. The link bounds it.
#include "arguments/store_values.h"

#include "cuda/include/dispatch.cuh"
#include "cuda/include/launch.cuh"
#include "cuda/include/quantise.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// grid: tokens / kWarps, KV heads, blocks.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kThreads) store_values_kernel(const StoreValuesParams p) {
  const PageLayout& layout = p.layout;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int token = blockIdx.x * kWarps + warp;
  const int head = blockIdx.y, i = blockIdx.z;
  const int64_t block = p.block_ids[i];
  if (token >= layout.block_size || block <= 0 || block >= p.num_blocks) return;
  const int num_exact = static_cast<int>(layout.block_size / layout.exact_tokens);
  bool valid = true;
  for (int page = lane; page < num_exact; page += kWarp) {
    const int id = p.exact_ids[i * num_exact + page];
    valid &= id > 0 && id < p.num_exact;
  }
  if (ballot(!valid)) return;

  const int size = static_cast<int>(layout.chunk_size);
  const int exact_tokens = static_cast<int>(layout.exact_tokens);
  const int64_t page = p.exact_ids[i * num_exact + token / exact_tokens];
  const T* from = static_cast<const T*>(p.exact_values) + page * p.exact_stride +
                  head * p.head_stride + token % exact_tokens * p.token_stride;
  uint8_t* record = p.host_pool + block * p.host_pool_stride +
                    (head * layout.chunks() + token / size) * layout.value_record_bytes;
  const int row = token % size;
  if (layout.value_int8) {
    auto* codes = reinterpret_cast<int8_t*>(record + 4 * size) + row * kHeadSize;
    const float scale = quantise_row<kHeadSize>([&](int d) { return to_float(from[d]); }, codes);
    if (lane == 0) reinterpret_cast<float*>(record)[row] = scale;
    return;
  }
  constexpr int kVectors = kHeadSize * sizeof(T) / sizeof(uint4);
  for (int v = lane; v < kVectors; v += kWarp) {
    reinterpret_cast<uint4*>(record)[row * kVectors + v] = reinterpret_cast<const uint4*>(from)[v];
  }
}

}  // namespace

void store_values(const Tensor& block_ids, const Tensor& exact_ids, const Tensor& exact_values,
                  const Tensor& host_pool, const std::vector<int64_t>& layout_ints) {
  const StoreValuesParams p =
      read_store_values(block_ids, exact_ids, exact_values, host_pool, layout_ints, kDevice);
  check_vectors(exact_values, "exact_values");
  check_vector_rows(host_pool, "host_pool");
  const Launcher launch(block_ids);
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    const auto tokens = static_cast<unsigned>(p.layout.block_size + kWarps - 1) / kWarps;
    launch("store_values", store_values_kernel<T, kHeadSize>,
           dim3(tokens, p.layout.num_kv_heads, p.num_stored), kThreads, 0, p);
  });
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(store_values)
