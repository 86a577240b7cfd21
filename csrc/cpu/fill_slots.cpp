#include "cpu/kernels/fill_slots.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rotary_argument.h"
#include "host_tensor.h"

namespace shadowkv {
namespace {

// Misses that a thread takes at a time: neighbours share a basis, but threads should end together.
int64_t misses_at_once(int64_t total) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(total / (4 * threads), 1, 16);
}

// Misses before each (row, head), and the number of all of them.
std::vector<int64_t> count_misses(const Tensor& num_misses, int64_t places) {
  const auto* counts = static_cast<const int32_t*>(num_misses.const_data_ptr());
  std::vector<int64_t> first(num_misses.numel() + 1);
  for (int64_t i = 0; i < num_misses.numel(); ++i) {
    SHADOWKV_CHECK(counts[i] >= 0 && counts[i] <= places, "num_misses: expected 0 to ", places,
                   " (the places of misses), got ", counts[i], " at row ", i / num_misses.size(1),
                   ", KV head ", i % num_misses.size(1));
    first[i + 1] = first[i] + counts[i];
  }
  return first;
}

void fill_slots(const Tensor& chunk_ids, const Tensor& slot_ids, const Tensor& misses,
                const Tensor& num_misses, const Tensor& pages, const Tensor& block_table,
                const Tensor& host_pool, const Tensor& cos_sin, bool is_neox,
                const Tensor& slot_table, const Tensor& slot_pages,
                const std::vector<int64_t>& layout_ints) {
  const PageLayout layout = read_layout(layout_ints);
  check_tensor(chunk_ids, "chunk_ids", ScalarType::Int, {kAnySize, layout.num_kv_heads, kAnySize});
  const int64_t rows = chunk_ids.size(0);
  const int64_t places = chunk_ids.size(2);
  check_tensor(slot_ids, "slot_ids", ScalarType::Int, {rows, layout.num_kv_heads, places});
  check_tensor(misses, "misses", ScalarType::Int, {rows, layout.num_kv_heads, places});
  check_tensor(num_misses, "num_misses", ScalarType::Int, {rows, layout.num_kv_heads});
  check_pages(pages, "pages", layout.page_bytes);
  check_tensor(block_table, "block_table", ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_pages(host_pool, "host_pool", layout.value_row_bytes());
  SHADOWKV_CHECK(host_pool.size(0) == pages.size(0), "host_pool: expected as many rows as pages, ",
                 pages.size(0), ", got ", host_pool.size(0));
  const RotaryTable rotary = read_rotary(cos_sin, is_neox, layout);
  check_tensor(slot_table, "slot_table", ScalarType::Int, {rows, kAnySize}, Strides::kRows);
  check_pages(slot_pages, "slot_pages", layout.page_bytes);

  const std::vector<int64_t> first_miss = count_misses(num_misses, places);
  const FillSlotsParams params = {
      .layout = layout,
      .rows = rows,
      .places = places,
      .chunk_ids = static_cast<const int32_t*>(chunk_ids.const_data_ptr()),
      .slot_ids = static_cast<const int32_t*>(slot_ids.const_data_ptr()),
      .misses = static_cast<const int32_t*>(misses.const_data_ptr()),
      .first_miss = first_miss.data(),
      .pages = static_cast<const uint8_t*>(pages.const_data_ptr()),
      .num_blocks = pages.size(0),
      .page_stride = stride_of(pages, 0),
      .host_pool = static_cast<const uint8_t*>(host_pool.const_data_ptr()),
      .host_pool_stride = stride_of(host_pool, 0),
      .block_table = static_cast<const int32_t*>(block_table.const_data_ptr()),
      .max_blocks = block_table.size(1),
      .block_table_stride = stride_of(block_table, 0),
      .slot_table = static_cast<const int32_t*>(slot_table.const_data_ptr()),
      .slot_columns = slot_table.size(1),
      .slot_table_stride = stride_of(slot_table, 0),
      .slot_pages = static_cast<uint8_t*>(slot_pages.mutable_data_ptr()),
      .num_slot_pages = slot_pages.size(0),
      .slot_page_stride = stride_of(slot_pages, 0),
      .rotary = rotary,
  };
  std::atomic<int64_t> beyond = -1;
  const int64_t total = first_miss.back();
  const int64_t share = misses_at_once(total);
  parallel_items((total + share - 1) / share, [&](int64_t i) {
    const int64_t position = SHADOWKV_DISPATCH_ISA(fill_slots_kernel, params, i * share,
                                                   std::min(total, (i + 1) * share));
    int64_t highest = beyond.load();
    while (position > highest && !beyond.compare_exchange_weak(highest, position)) {
    }
  });
  SHADOWKV_CHECK(beyond.load() < 0, "cos_sin: expected a row for every position up to ",
                 beyond.load(), ", got ", rotary.positions, " rows");
}

}  // namespace
}  // namespace shadowkv

STABLE_TORCH_LIBRARY_IMPL(shadowkv, CPU, m) {
  m.impl("fill_slots", TORCH_BOX(&shadowkv::fill_slots));
}
