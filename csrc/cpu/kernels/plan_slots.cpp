// Matches the selected chunks of one row and KV head with the tags of the row's slots.
//
// Reads the chunk ids, the tag and the stamp of every slot of the head (16 bytes each) and two
// numbers per chunk (block id, epoch); writes slot_ids, misses, a stamp per chunk and a tag per
// miss; counts. The slots' tags go into a hash table, so the cost grows with chunks + slots. Slots
// that no chunk hit are taken for the misses in the order of their stamps, the lower slot first.
#include "cpu/kernels/plan_slots.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "cpu/kernels/numeric.h"

namespace shadowkv::SHADOWKV_ISA {
namespace {

bool is_page(const PlanSlotsParams& p, int64_t id) { return id > 0 && id < p.num_pages; }

int64_t* section(const PlanSlotsParams& p, int64_t page, int64_t offset, int64_t index) {
  return reinterpret_cast<int64_t*>(p.slot_pages + page * p.page_stride + offset) + index;
}

bool has_slots(const PlanSlotsParams& p, int64_t row) {
  const int32_t* pages = p.slot_table + row * p.slot_table_stride;
  return std::all_of(pages, pages + p.pages_per_row, [&](int32_t id) { return is_page(p, id); });
}

// Names a chunk's content for ever: a block's epoch changes whenever it is written or sealed anew.
// 0, which no chunk has, for a chunk of an invalid block.
int64_t tag_of(const PlanSlotsParams& p, int64_t row, int64_t chunk) {
  const int64_t chunks = p.layout.chunks();
  if (chunk < 0 || chunk / chunks >= p.table_width) return 0;
  const int64_t block = p.block_table[row * p.table_stride + chunk / chunks];
  return is_page(p, block) ? p.epochs[block] * chunks + chunk % chunks : 0;
}

// Other rows and heads count at the same time.
void add(int64_t& count, int64_t value) {
  std::atomic_ref(count).fetch_add(value, std::memory_order_relaxed);
}

// From tag to the lowest slot that holds it: open addressing, at most half full.
class TagTable {
 public:
  void reset(int64_t size) {
    bits_ = 1;
    while ((int64_t{1} << bits_) < 2 * size) ++bits_;
    entries_.assign(size_t{1} << bits_, {0, -1});
  }

  // The entry of a tag other than 0, or the empty one where it belongs: {0, -1}.
  std::pair<int64_t, int32_t>& find(int64_t tag) {
    const uint64_t mask = entries_.size() - 1;
    // Tags of one block are consecutive; the golden ratio spreads them.
    uint64_t i = static_cast<uint64_t>(tag) * 0x9e3779b97f4a7c15 >> (64 - bits_);
    while (entries_[i].first != tag && entries_[i].first != 0) i = (i + 1) & mask;
    return entries_[i];
  }

 private:
  std::vector<std::pair<int64_t, int32_t>> entries_;
  int bits_ = 1;
};

}  // namespace

void plan_slots_prepare_kernel(const PlanSlotsParams& p, int64_t row) {
  const int64_t columns = p.layout.num_kv_heads * p.columns;
  const int32_t* chunks = p.chunk_ids + row * columns;
  if (!has_slots(p, row)) return;
  if (std::all_of(chunks, chunks + columns, [](int32_t id) { return id < 0; })) return;
  const int64_t slots = p.layout.num_kv_heads * p.layout.slots_per_page;
  for (int64_t i = 0; i < p.pages_per_row; ++i) {
    const int64_t page = p.slot_table[row * p.slot_table_stride + i];
    int64_t* epoch = section(p, page, p.layout.slot_epoch, 0);
    if (*epoch == p.epochs[page]) continue;
    std::fill_n(section(p, page, p.layout.slot_tags, 0), slots, 0);
    std::fill_n(section(p, page, p.layout.slot_used, 0), slots, 0);
    *epoch = p.epochs[page];
  }
}

void plan_slots_kernel(const PlanSlotsParams& p, int64_t row, int64_t head) {
  const int64_t item = row * p.layout.num_kv_heads + head;
  const int32_t* chunk_ids = p.chunk_ids + item * p.columns;
  int32_t* slot_ids = p.slot_ids + item * p.columns;
  int32_t* misses = p.misses + item * p.columns;
  std::fill_n(slot_ids, p.columns, -1);
  std::fill_n(misses, p.columns, -1);
  p.num_misses[item] = 0;
  if (!has_slots(p, row)) return;
  if (std::all_of(chunk_ids, chunk_ids + p.columns, [](int32_t id) { return id < 0; })) return;

  const int64_t per_page = p.layout.slots_per_page, slots = p.pages_per_row * per_page;
  const auto word = [&](int64_t offset, int64_t slot) {
    const int64_t page = p.slot_table[row * p.slot_table_stride + slot / per_page];
    return section(p, page, offset, head * per_page + slot % per_page);
  };
  thread_local TagTable table;
  table.reset(slots);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t tag = *word(p.layout.slot_tags, slot);
    if (tag == 0) continue;
    auto& entry = table.find(tag);
    if (entry.first == 0) entry = {tag, static_cast<int32_t>(slot)};
  }
  int64_t hit = 0, missed = 0;
  for (int64_t i = 0; i < p.columns; ++i) {
    const int64_t tag = tag_of(p, row, chunk_ids[i]);
    if (tag == 0) continue;
    const int32_t slot = table.find(tag).second;
    if (slot < 0) {
      misses[missed++] = static_cast<int32_t>(i);
      continue;
    }
    slot_ids[i] = slot;
    *word(p.layout.slot_used, slot) = *p.clock;
    ++hit;
  }
  add(p.counts[0], hit + missed);
  add(p.counts[1], hit);
  if (missed == 0) return;

  // What this step uses is no victim.
  thread_local std::vector<std::pair<int64_t, int64_t>> victims;  // stamp, slot
  victims.clear();
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t used = *word(p.layout.slot_used, slot);
    if (used != *p.clock) victims.emplace_back(used, slot);
  }
  const int64_t taken = std::min<int64_t>(missed, victims.size());
  std::partial_sort(victims.begin(), victims.begin() + taken, victims.end());
  for (int64_t i = 0; i < taken; ++i) {
    const int64_t slot = victims[i].second;
    slot_ids[misses[i]] = static_cast<int32_t>(slot);
    *word(p.layout.slot_tags, slot) = tag_of(p, row, chunk_ids[misses[i]]);
    *word(p.layout.slot_used, slot) = *p.clock;
  }
  std::fill(misses + taken, misses + missed, -1);
  p.num_misses[item] = static_cast<int32_t>(taken);
}

}  // namespace shadowkv::SHADOWKV_ISA
