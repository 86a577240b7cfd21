#include "cpu/kernels/fill_slots.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "arguments/fill_slots.h"
#include "cpu/parallel.h"

namespace shadowkv {
namespace {

// Misses that a thread takes at a time: neighbours share a basis, but threads should end together.
int64_t misses_at_once(int64_t total) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(total / (4 * threads), 1, 16);
}

// Misses before each (row, head), and at the end the number of all of them.
std::vector<int64_t> count_misses(const FillSlotsParams& p) {
  const int64_t heads = p.layout.num_kv_heads;
  std::vector<int64_t> first(p.rows * heads + 1);
  for (int64_t i = 0; i < p.rows * heads; ++i) {
    SHADOWKV_CHECK(p.num_misses[i] >= 0 && p.num_misses[i] <= p.places,
                   "num_misses: expected 0 to ", p.places, " (the places of misses), got ",
                   p.num_misses[i], " at row ", i / heads, ", KV head ", i % heads);
    first[i + 1] = first[i] + p.num_misses[i];
  }
  return first;
}

void fill_slots(const Tensor& chunk_ids, const Tensor& slot_ids, const Tensor& misses,
                const Tensor& num_misses, const Tensor& pages, const Tensor& block_table,
                const Tensor& host_pool, const Tensor& cos_sin, bool is_neox, const Tensor& sources,
                const Tensor& epochs, const Tensor& exact_keys, const Tensor& exact_values,
                const Tensor& slot_table, const Tensor& slot_pages,
                const std::vector<int64_t>& layout_ints, const Tensor& counts) {
  const FillSlotsParams p =
      read_fill_slots(chunk_ids, slot_ids, misses, num_misses, pages, block_table, host_pool,
                      cos_sin, is_neox, sources, epochs, exact_keys, exact_values, slot_table,
                      slot_pages, layout_ints, counts, DeviceType::CPU);
  const std::vector<int64_t> first_miss = count_misses(p);
  std::atomic<int64_t> beyond = -1;
  const int64_t total = first_miss.back();
  const int64_t share = misses_at_once(total);
  parallel_items((total + share - 1) / share, [&](int64_t i) {
    const int64_t position = SHADOWKV_DISPATCH_ISA(fill_slots_kernel, p, first_miss.data(),
                                                   i * share, std::min(total, (i + 1) * share));
    int64_t highest = beyond.load();
    while (position > highest && !beyond.compare_exchange_weak(highest, position)) {
    }
  });
  SHADOWKV_CHECK(beyond.load() < 0, "cos_sin: expected a row for every position up to ",
                 beyond.load(), ", got ", p.rotary.positions, " rows");
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("fill_slots", TORCH_BOX(&shadowkv::fill_slots));
}
