// An item is one head of one block: block_size * head_size values read from its exact pages and
// written to one run of the host pool, as they are, or as int8 with a scale per token in another;
// their mean, summed in fp32 in the order of the tokens, goes to the shadow page.
#include "cpu/kernels/store_values.h"

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/numeric.h"
#include "cpu/kernels/quantise.h"

namespace shadowkv::SHADOWKV_ISA {
namespace {

template <typename T, int kHeadSize>
void store_page(const StoreValuesParams& p, const T* values, uint8_t* records, float* scales) {
  const PageLayout& layout = p.layout;
  if (!layout.value_int8) {
    T* out = reinterpret_cast<T*>(records);
    if (p.token_stride == kHeadSize) {
      std::copy_n(values, layout.exact_tokens * kHeadSize, out);
      return;
    }
    for (int64_t t = 0; t < layout.exact_tokens; ++t) {
      std::copy_n(values + t * p.token_stride, kHeadSize, out + t * kHeadSize);
    }
    return;
  }
  for (int64_t t = 0; t < layout.exact_tokens; ++t) {
    alignas(64) float row[kHeadSize];
    widen(values + t * p.token_stride, 1, kHeadSize, row);
    scales[t] = quantisation_scale(row, kHeadSize);
    quantise_row(row, kHeadSize, scales[t], reinterpret_cast<int8_t*>(records) + t * kHeadSize);
  }
}

// Adds a page's values to their sums, token by token.
template <typename T, int kHeadSize>
void add_page(const StoreValuesParams& p, const T* values, float* sums) {
  for (int64_t t = 0; t < p.layout.exact_tokens; ++t) {
    const T* row = values + t * p.token_stride;
    for (int d = 0; d < kHeadSize; d += kLanes) store(sums + d, load(sums + d) + load(row + d));
  }
}

template <typename T, int kHeadSize>
void store_values(const StoreValuesParams& p, int64_t begin, int64_t end) {
  const PageLayout& layout = p.layout;
  const int64_t pages = layout.block_size / layout.exact_tokens;
  const int64_t page_records = layout.exact_tokens / layout.chunk_size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i = item / layout.num_kv_heads;
    const int64_t head = item % layout.num_kv_heads;
    const int64_t block = p.block_ids[i];
    const int32_t* exact_ids = p.exact_ids + i * pages;
    const bool usable =
        block > 0 && block < p.num_blocks &&
        std::all_of(
            exact_ids, exact_ids + pages, [&](int64_t id) { return id > 0 && id < p.num_exact; });
    if (!usable) continue;
    uint8_t* row = p.host_pool + block * p.host_pool_stride;
    uint8_t* records = row + head * layout.chunks() * layout.value_record_bytes;
    float* scales =
        reinterpret_cast<float*>(row + layout.value_scales()) + head * layout.block_size;
    alignas(64) float sums[kHeadSize] = {};
    for (int64_t page = 0; page < pages; ++page) {
      const T* values = static_cast<const T*>(p.exact_values) + exact_ids[page] * p.exact_stride +
                        head * p.head_stride;
      store_page<T, kHeadSize>(p, values, records + page * page_records * layout.value_record_bytes,
                               scales + page * layout.exact_tokens);
      add_page<T, kHeadSize>(p, values, sums);
    }
    T* mean = reinterpret_cast<T*>(p.pages + block * p.page_stride + layout.mean_values) +
              head * kHeadSize;
    const float share = 1.0f / static_cast<float>(layout.block_size);
    for (int d = 0; d < kHeadSize; d += kLanes) store(mean + d, load(sums + d) * share);
  }
}

}  // namespace

void store_values_kernel(const StoreValuesParams& p, int64_t begin, int64_t end) {
  dispatch_layout(p.layout,
                  [&]<typename T, int kHeadSize>() { store_values<T, kHeadSize>(p, begin, end); });
}

}  // namespace shadowkv::SHADOWKV_ISA
