// A miss is one chunk of one KV head: its keys are rebuilt from the shadow page (rebuild.h), its
// values copied from the host pool. Misses of a row and head are in token order, so neighbours that
// lie in one block find its basis in the cache. What the next miss needs is fetched meanwhile.
//
// A chunk whose tokens still lie in the exact pages that its block was sealed from is copied.
//
// Another miss reads head_size * rank bytes of basis and chunk_size * (rank + leading_rank) / 2 of
// coefficients, or chunk_size * head_size exact keys, and one record of values. It writes
// chunk_size * head_size keys and as many values.
#include "cpu/kernels/fill_slots.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/rebuild.h"

namespace shadowkv::SHADOWKV_ISA {
namespace {

// One miss, found in the tables.
template <typename T>
struct Miss {
  bool usable = false;  // else it names no chunk, block or slot, or has no position
  int64_t head;
  int64_t chunk;  // in its block
  int64_t position;
  const uint8_t* page;
  const uint8_t* values;  // the block's row of the host pool
  uint8_t* slot_page;
  int64_t slot;                   // in its page
  const T* exact_keys = nullptr;  // of its first token, in a resident page; null: there is none
  const T* exact_values = nullptr;
};

// Walks the misses in order.
template <typename T>
class Misses {
 public:
  Misses(const FillSlotsParams& params, const int64_t* first_miss, int64_t begin)
      : p_(params),
        first_miss_(first_miss),
        group_(
            std::upper_bound(first_miss, first_miss + p_.rows * p_.layout.num_kv_heads + 1, begin) -
            first_miss - 1) {}

  // `index` is not below that of the call before.
  Miss<T> at(int64_t index) {
    const PageLayout& layout = p_.layout;
    while (index >= first_miss_[group_ + 1]) ++group_;
    const int64_t row = group_ / layout.num_kv_heads;
    const int64_t head = group_ % layout.num_kv_heads;
    const int64_t place = p_.misses[group_ * p_.places + index - first_miss_[group_]];
    if (place < 0 || place >= p_.places) return {};
    const int64_t chunk = p_.chunk_ids[group_ * p_.places + place];
    const int64_t slot = p_.slot_ids[group_ * p_.places + place];
    if (chunk < 0 || slot < 0) return {};

    const int64_t column = chunk / layout.chunks();
    const int64_t slot_column = slot / layout.slots_per_page;
    if (column >= p_.max_blocks || slot_column >= p_.slot_columns) return {};
    const int64_t block = p_.block_table[row * p_.block_table_stride + column];
    const int64_t slot_page = p_.slot_table[row * p_.slot_table_stride + slot_column];
    if (block <= 0 || block >= p_.num_blocks) return {};
    if (slot_page < 0 || slot_page >= p_.num_slot_pages) return {};

    const int64_t position = chunk * layout.chunk_size;
    if (!p_.rotary.covers(position, layout.chunk_size)) {
      beyond_ = std::max(beyond_, position + layout.chunk_size - 1);
      return {};
    }
    const int64_t inside = chunk % layout.chunks();
    Miss<T> miss = {
        .usable = true,
        .head = head,
        .chunk = inside,
        .position = position,
        .page = p_.pages + block * p_.page_stride,
        .values = p_.host_pool + block * p_.host_pool_stride,
        .slot_page = p_.slot_pages + slot_page * p_.slot_page_stride,
        .slot = slot % layout.slots_per_page,
    };
    if (const int64_t from = p_.resident_page(block, static_cast<int>(inside))) {
      const int64_t token = inside * layout.chunk_size % layout.exact_tokens;
      const auto at = [&](const void* pages, const ExactStrides& strides) {
        return static_cast<const T*>(pages) + from * strides.page + head * strides.head +
               token * strides.token;
      };
      miss.exact_keys = at(p_.exact_keys, p_.key_strides);
      miss.exact_values = at(p_.exact_values, p_.value_strides);
    }
    return miss;
  }

  // The highest position seen that the rotary table lacks, or -1.
  int64_t beyond() const { return beyond_; }

 private:
  const FillSlotsParams& p_;
  const int64_t* first_miss_;
  int64_t group_;  // row * num_kv_heads + head of the last miss
  int64_t beyond_ = -1;
};

// What a miss reads and writes; its basis only if it is not that of the miss before.
template <typename T>
Ahead memory_of(const FillSlotsParams& p, const Miss<T>& miss, const Miss<T>& before) {
  constexpr int64_t kBytes = sizeof(T);
  const PageLayout& layout = p.layout;
  Ahead memory;
  if (!miss.usable) return memory;
  const int64_t chunk_bytes = kBytes * layout.chunk_size * layout.head_size;
  const int64_t offset = (miss.head * layout.slots_per_page + miss.slot) * chunk_bytes;
  memory.add(miss.slot_page + layout.slot_keys + offset, chunk_bytes);
  memory.add(miss.slot_page + layout.slot_values + offset, chunk_bytes);
  if (miss.exact_keys != nullptr) {
    const ExactStrides &ks = p.key_strides, &vs = p.value_strides;
    if (ks.dim == 1) {
      memory.add(miss.exact_keys, kBytes * layout.head_size, layout.chunk_size, kBytes * ks.token);
    } else {
      memory.add(miss.exact_keys, kBytes * layout.chunk_size, layout.head_size, kBytes * ks.dim);
    }
    memory.add(miss.exact_values, kBytes * layout.head_size, layout.chunk_size, kBytes * vs.token);
    return memory;
  }
  if (layout.rank != 0) {
    const int64_t angles = p.rotary.rotary_dim;  // a long table, seldom in any cache
    memory.add(p.rotary.cos_sin + miss.position * angles,
               layout.chunk_size * angles * static_cast<int64_t>(sizeof(float)));
    const int64_t codes = layout.chunk_size * layout.leading_rank;
    const int64_t tail = layout.chunk_size * layout.tail_bytes();
    memory.add(miss.page + layout.coefficients + miss.chunk * codes, codes);
    memory.add(miss.page + layout.tail_coefficients + miss.chunk * tail, tail);
    if (miss.page != before.page || miss.head != before.head) {
      memory.add(head_basis(layout, miss.page, miss.head), layout.rank * layout.head_size);
    }
  }
  memory.add(value_record(layout, miss.values, miss.head, miss.chunk), layout.value_record_bytes);
  if (layout.value_int8) {
    memory.add(value_scales(layout, miss.values, miss.head, miss.chunk),
               layout.chunk_size * static_cast<int64_t>(sizeof(float)));
  }
  return memory;
}

// Copies a chunk's keys or values out of an exact page.
template <typename T, int kHeadSize>
void copy_exact(const T* from, const ExactStrides& strides, int64_t tokens, T* to) {
  if (strides.dim == 1) {
    for (int64_t t = 0; t < tokens; ++t) {
      copy_row<kHeadSize>(from + t * strides.token, to + t * kHeadSize);
    }
    return;
  }
  for (int64_t d = 0; d < kHeadSize; ++d) {
    for (int64_t t = 0; t < tokens; ++t) {
      to[t * kHeadSize + d] = from[t * strides.token + d * strides.dim];
    }
  }
}

template <typename T, int kHeadSize>
int64_t fill_slots(const FillSlotsParams& p, const int64_t* first_miss, int64_t begin,
                   int64_t end) {
  const PageLayout& layout = p.layout;
  const int64_t chunk_elements = layout.chunk_size * kHeadSize;
  if (begin == end) return -1;
  Misses<T> misses(p, first_miss, begin);
  Miss<T> miss = misses.at(begin);
  int64_t resident = 0, fetched = 0;
  for (int64_t index = begin; index < end; ++index) {
    const Miss<T> next = index + 1 < end ? misses.at(index + 1) : Miss<T>{};
    Ahead ahead = memory_of(p, next, miss);
    if (miss.usable) {
      const int64_t offset = (miss.head * layout.slots_per_page + miss.slot) * chunk_elements;
      T* keys = reinterpret_cast<T*>(miss.slot_page + layout.slot_keys) + offset;
      T* values = reinterpret_cast<T*>(miss.slot_page + layout.slot_values) + offset;
      if (miss.exact_keys != nullptr) {
        ++resident;
        ahead.finish();  // there are no products to spread it over
        copy_exact<T, kHeadSize>(miss.exact_keys, p.key_strides, layout.chunk_size, keys);
        copy_exact<T, kHeadSize>(miss.exact_values, p.value_strides, layout.chunk_size, values);
      } else {
        ++fetched;
        rebuild_chunk<T, kHeadSize>(layout, miss.page, miss.head, miss.chunk, miss.position,
                                    p.rotary, ahead, keys, kHeadSize);
        fetch_chunk<T, kHeadSize>(layout, miss.values, miss.head, miss.chunk, values, kHeadSize);
      }
    }
    ahead.finish();
    miss = next;
  }
  // Other threads count at the same time.
  std::atomic_ref(p.counts[2]).fetch_add(resident, std::memory_order_relaxed);
  std::atomic_ref(p.counts[3]).fetch_add(fetched, std::memory_order_relaxed);
  return misses.beyond();
}

}  // namespace

int64_t fill_slots_kernel(const FillSlotsParams& p, const int64_t* first_miss, int64_t begin,
                          int64_t end) {
  return dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    return fill_slots<T, kHeadSize>(p, first_miss, begin, end);
  });
}

}  // namespace shadowkv::SHADOWKV_ISA
