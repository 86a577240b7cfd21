// Matches the selected chunks of every row and KV head with the tags of the row's slots, in two
// launches: one empties the slot pages that have been something else in between, then a CTA per row
// and KV head puts the slots' tags into a hash table in shared memory and looks its chunks up.
//
// Reads the chunk ids, tags and stamps of a head's slots (16 bytes each) and two numbers per chunk
// (block id, epoch); writes slot_ids, misses, a stamp per chunk and a tag per miss; adds three
// counts per CTA. It is bound by latency. Slots that no chunk hit are sorted by stamp, then slot,
// and taken for the misses.
#include "arguments/plan_slots.h"

#include <algorithm>

#include "cuda/include/block.cuh"
#include "cuda/include/launch.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int kPrepareThreads = 128;
constexpr int kSlotBits = 13;
constexpr uint64_t kNoVictim = ~uint64_t{0};
// Of the hash table: its entries are at most half full, three quarters above kMaxTable / 2 slots.
constexpr int kMaxTable = 8192;
// Per row, so that tags and hash table fit the shared memory of every architecture since sm_80.
constexpr int kMaxSlots = 6144;
static_assert(kMaxSlots < 1 << kSlotBits);
static_assert(8 * kMaxSlots + 4 * kMaxTable <= 96 << 10);

struct SlotPlan {
  PlanSlotsParams p;
  int slots;       // of a row
  int table_bits;  // the hash table has 1 << table_bits entries
  int sort_size;   // the power of two from `slots` on
};

__device__ __forceinline__ bool is_page(const PlanSlotsParams& p, int64_t id) {
  return id > 0 && id < p.num_pages;
}

__device__ __forceinline__ int64_t* section(const PlanSlotsParams& p, int64_t page, int64_t offset,
                                            int64_t index) {
  return reinterpret_cast<int64_t*>(p.slot_pages + page * p.page_stride + offset) + index;
}

// Whether all slot pages of a row are valid; a barrier.
__device__ __forceinline__ bool has_slots(const PlanSlotsParams& p, int64_t row) {
  bool valid = true;
  for (int64_t i = threadIdx.x; i < p.pages_per_row; i += blockDim.x) {
    valid &= is_page(p, p.slot_table[row * p.slot_table_stride + i]);
  }
  return all_threads(valid);
}

// Whether one of `count` chunk ids is not -1; a barrier.
__device__ __forceinline__ bool has_chunks(const int32_t* ids, int64_t count) {
  bool empty = true;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) empty &= ids[i] < 0;
  return !all_threads(empty);
}

// Names a chunk's content for ever: a block's epoch changes whenever it is written or sealed anew.
// 0, which no chunk has, for a chunk of an invalid block.
__device__ __forceinline__ int64_t tag_of(const PlanSlotsParams& p, int64_t row, int chunk) {
  const int chunks = static_cast<int>(p.layout.block_size / p.layout.chunk_size);
  if (chunk < 0 || chunk / chunks >= p.table_width) return 0;
  const int64_t block = p.block_table[row * p.table_stride + chunk / chunks];
  return is_page(p, block) ? p.epochs[block] * chunks + chunk % chunks : 0;
}

// From tag to the lowest slot that holds it: open addressing.
struct TagTable {
  static constexpr int kEmpty = 0x7fffffff;
  const int64_t* tags;  // of the slots
  int* entries;         // slots
  int bits;

  // Tags of one block are consecutive; the golden ratio spreads them.
  __device__ __forceinline__ int first(int64_t tag) const {
    return static_cast<int>(static_cast<uint64_t>(tag) * 0x9e3779b97f4a7c15u >> (64 - bits));
  }
  __device__ __forceinline__ int next(int entry) const { return (entry + 1) & ((1 << bits) - 1); }

  // An entry's slot may fall, its tag never changes.
  __device__ __forceinline__ void insert(int slot) const {
    for (int i = first(tags[slot]);; i = next(i)) {
      const int other = atomic_cas(&entries[i], kEmpty, slot);
      if (other == kEmpty) return;
      if (tags[other] == tags[slot]) {
        atomic_min(&entries[i], slot);
        return;
      }
    }
  }

  // -1: no slot holds it.
  __device__ __forceinline__ int find(int64_t tag) const {
    for (int i = first(tag);; i = next(i)) {
      const int slot = entries[i];
      if (slot == kEmpty) return -1;
      if (tags[slot] == tag) return slot;
    }
  }
};

// grid: rows, slot pages of a row.
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const SlotPlan plan) {
  const PlanSlotsParams& p = plan.p;
  const int64_t row = blockIdx.x, heads = p.layout.num_kv_heads;
  const int64_t page = p.slot_table[row * p.slot_table_stride + blockIdx.y];
  if (!is_page(p, page)) return;
  int64_t* epoch = section(p, page, p.layout.slot_epoch, 0);
  const int64_t current = p.epochs[page];
  if (*epoch == current) return;
  if (!has_slots(p, row)) return;
  // Its barrier is also between all reads of the epoch and the write.
  if (!has_chunks(p.chunk_ids + row * heads * p.columns, heads * p.columns)) return;
  int64_t* tags = section(p, page, p.layout.slot_tags, 0);
  int64_t* used = section(p, page, p.layout.slot_used, 0);
  for (int64_t i = threadIdx.x; i < heads * p.layout.slots_per_page; i += kPrepareThreads) {
    tags[i] = 0;
    used[i] = 0;
  }
  if (threadIdx.x == 0) *epoch = current;
}

// grid: rows, KV heads.
__global__ void __launch_bounds__(kMaxThreads, 1) plan_kernel(const SlotPlan plan) {
  __shared__ int warps[kMaxWarps];
  const PlanSlotsParams& p = plan.p;
  const int head = blockIdx.y, threads = blockDim.x, slots = plan.slots;
  const int64_t row = blockIdx.x, item = row * p.layout.num_kv_heads + head;
  const int columns = static_cast<int>(p.columns);
  const int32_t* chunk_ids = p.chunk_ids + item * p.columns;
  int32_t* slot_ids = p.slot_ids + item * p.columns;
  int32_t* misses = p.misses + item * p.columns;

  if (!has_slots(p, row) || !has_chunks(chunk_ids, columns)) {
    for (int i = threadIdx.x; i < columns; i += threads) slot_ids[i] = misses[i] = -1;
    if (threadIdx.x == 0) p.num_misses[item] = 0;
    return;
  }

  const int per_page = static_cast<int>(p.layout.slots_per_page);
  const auto word = [&](int64_t offset, int slot) {
    const int64_t page = p.slot_table[row * p.slot_table_stride + slot / per_page];
    return section(p, page, offset, head * static_cast<int64_t>(per_page) + slot % per_page);
  };
  auto* tags = reinterpret_cast<int64_t*>(dynamic_shared_memory());
  const TagTable table = {tags, reinterpret_cast<int*>(tags + slots), plan.table_bits};
  for (int i = threadIdx.x; i < 1 << plan.table_bits; i += threads) {
    table.entries[i] = TagTable::kEmpty;
  }
  for (int slot = threadIdx.x; slot < slots; slot += threads) {
    tags[slot] = *word(p.layout.slot_tags, slot);
  }
  sync_threads();
  for (int slot = threadIdx.x; slot < slots; slot += threads) {
    if (tags[slot] != 0) table.insert(slot);
  }
  sync_threads();

  const int64_t clock = *p.clock;
  int hits = 0, missed = 0;
  for (int first = 0; first < columns; first += threads) {
    const int i = first + threadIdx.x;
    const int64_t tag = i < columns ? tag_of(p, row, chunk_ids[i]) : 0;
    const int slot = tag != 0 ? table.find(tag) : -1;
    const bool miss = tag != 0 && slot < 0;
    // Two sums in one: neither exceeds kMaxThreads.
    const PrefixSum places = prefix_sum(miss | (slot >= 0) << 16, warps);
    if (miss) misses[missed + (places.before & 0xffff)] = i;
    if (i < columns) slot_ids[i] = slot;
    if (slot >= 0) *word(p.layout.slot_used, slot) = clock;
    missed += places.total & 0xffff;
    hits += places.total >> 16;
  }

  int taken = 0;
  if (missed > 0) {
    sync_threads();  // stamps and misses are written, the tags read
    // What this step uses is no victim.
    auto* keys = reinterpret_cast<uint64_t*>(tags);
    int mine = 0;
    for (int slot = threadIdx.x; slot < plan.sort_size; slot += threads) {
      const int64_t used = slot < slots ? *word(p.layout.slot_used, slot) : clock;
      keys[slot] = used != clock ? static_cast<uint64_t>(used) << kSlotBits | slot : kNoVictim;
      mine += used != clock;
    }
    const int victims = prefix_sum(mine, warps).total;
    bitonic_sort(keys, plan.sort_size);
    taken = missed < victims ? missed : victims;
    for (int i = threadIdx.x; i < taken; i += threads) {
      const int slot = static_cast<int>(keys[i] & ((1 << kSlotBits) - 1)), place = misses[i];
      slot_ids[place] = slot;
      *word(p.layout.slot_tags, slot) = tag_of(p, row, chunk_ids[place]);
      *word(p.layout.slot_used, slot) = clock;
    }
  }
  for (int i = taken + threadIdx.x; i < columns; i += threads) misses[i] = -1;
  if (threadIdx.x == 0) {
    p.num_misses[item] = taken;
    atomic_add(&p.counts[0], hits + missed);
    atomic_add(&p.counts[1], hits);
  }
}

}  // namespace

void plan_slots(const Tensor& chunk_ids, const Tensor& block_table, const Tensor& epochs,
                const Tensor& clock, const Tensor& slot_table, const Tensor& slot_pages,
                const std::vector<int64_t>& layout_ints, const Tensor& slot_ids,
                const Tensor& misses, const Tensor& num_misses, const Tensor& counts) {
  const PlanSlotsParams p =
      read_plan_slots(chunk_ids, block_table, epochs, clock, slot_table, slot_pages, layout_ints,
                      slot_ids, misses, num_misses, counts, kDevice);
  const int64_t slots = p.pages_per_row * p.layout.slots_per_page;
  SHADOWKV_CHECK(slots <= kMaxSlots, "slot_table: expected pages of at most ", kMaxSlots,
                 " slots per row, got ", p.pages_per_row, " pages of ", p.layout.slots_per_page);
  SHADOWKV_CHECK(p.columns <= 1 << 24, "chunk_ids: expected at most ", 1 << 24, " columns, got ",
                 p.columns);
  SlotPlan plan = {.p = p, .slots = static_cast<int>(slots), .table_bits = 1, .sort_size = 1};
  while (1 << plan.table_bits < std::min<int64_t>(2 * slots, kMaxTable)) ++plan.table_bits;
  while (plan.sort_size < slots) plan.sort_size *= 2;
  const size_t table_bytes = slots * sizeof(int64_t) + (sizeof(int) << plan.table_bits);
  const size_t sort_bytes = plan.sort_size * sizeof(uint64_t);
  const auto rows = static_cast<unsigned>(p.num_rows);
  const Launcher launch(chunk_ids);
  launch("plan_slots: prepare", prepare_kernel, dim3(rows, static_cast<unsigned>(p.pages_per_row)),
         kPrepareThreads, 0, plan);
  launch("plan_slots", plan_kernel, dim3(rows, static_cast<unsigned>(p.layout.num_kv_heads)),
         std::clamp(plan.sort_size / 2, 128, kMaxThreads), std::max(table_bytes, sort_bytes), plan);
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(plan_slots)
